"""Identities of LoRSum (names as in its specification), in float64 without jitter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab.core.low_rank_sum import (
    Metric,
    Pair,
    damped_power,
    kfac_statistics,
    low_rank_sum,
    preconditioned,
    product_norm_squared,
    shampoo_statistics,
)
from tests.reference import lorsum as reference

N, M, R, ROWS = 12, 8, 3, 6


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape)


def pair(k=R, seed=0):
    return Pair(draw(N, k, seed=seed), draw(k, M, seed=seed))


def whole(p):
    return np.asarray(p.left) @ np.asarray(p.right)


def close(got, wanted, tolerance=1e-12):
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


def solve(pairs, coefficients, **options):
    pairs = [Pair(*map(jnp.asarray, p)) for p in pairs]
    return low_rank_sum(pairs, coefficients, **{"jitter": 0.0, **options})


def projector(x):
    q, _ = np.linalg.qr(x)
    return q @ q.T


@pytest.mark.parametrize("start", ["left", "right"])
@pytest.mark.parametrize("sweeps", [0, 1, 3])
@pytest.mark.parametrize("form", [None, "diagonal", "dense"])
def test_it_solves_the_dense_problem(form, sweeps, start):
    p, g, m = pair(), pair(ROWS, 1), pair(2, 2)
    rows = columns = None
    if form == "diagonal":
        rows, columns = (np.abs(draw(k)) + 0.1 for k in (N, M))
    elif form == "dense":
        rows, columns = (draw(k, k) @ draw(k, k).T + np.eye(k) for k in (N, M))
    metric = None if rows is None else Metric(jnp.asarray(rows), jnp.asarray(columns))
    step = -0.3 * whole(g) - 0.2 * whole(m)
    if form == "diagonal":
        step = step / rows[:, None] / columns
    elif form == "dense":
        step = np.linalg.solve(rows, step) @ np.linalg.inv(columns)
    wanted = reference.sweep(
        0.9 * whole(p) + step,
        *p,
        0.05,
        sweeps=sweeps,
        rows=rows,
        columns=columns,
        start="a" if start == "left" else "b",
    )
    keywords = {"sweeps": sweeps, "proximal": 0.05, "metric": metric, "start": start}
    got = solve([p, g, m], [0.9, -0.3, -0.2], **keywords)
    for x, y in zip(got, wanted, strict=True):
        close(x, y, 1e-9)


def test_p1_block_power():
    p, g = pair(), pair(ROWS, 1)
    target = whole(p) - 0.3 * whole(g)
    for sweeps in (1, 3):
        got = solve([p, g], [1.0, -0.3], sweeps=sweeps)
        basis = p.right.T
        for _ in range(sweeps):
            image = target @ basis  # the columns of A
            basis = np.linalg.qr(target.T @ np.linalg.qr(image)[0])[0]
        close(projector(np.asarray(got.left)), projector(image), 1e-9)
        close(projector(np.asarray(got.right).T), projector(basis), 1e-9)
        close(whole(got), projector(image) @ target, 1e-9)


def test_p2_rate():
    u, _ = np.linalg.qr(draw(N, M))
    v, _ = np.linalg.qr(draw(M, M))
    sigma = np.array([4.0, 3.0, 2.0, 0.84, 0.5, 0.3, 0.2, 0.1])
    target, best = (u * sigma) @ v.T, (u[:, :R] * sigma[:R]) @ v[:, :R].T
    errors = []
    for sweeps in (4, 8):
        got = solve([pair(), Pair(target, np.eye(M))], [0.0, 1.0], sweeps=sweeps)
        errors.append(np.linalg.norm(whole(got) - best))
    # Four sweeps more; the constant of the bound depends on the start.
    assert 0.5 < errors[1] / errors[0] / (sigma[R] / sigma[R - 1]) ** 8 < 2


def test_p3_full_rank_is_exact():
    p, g = pair(M), pair(ROWS, 1)
    close(whole(solve([p, g], [1.0, -0.3])), whole(p) - 0.3 * whole(g), 1e-9)


def test_p4_jacobi_is_scaled_gradient_descent():
    p, g, rate, lam = pair(), pair(ROWS, 1), 0.3, 0.07
    got = solve([p, g], [1.0, -rate], sweeps=0, proximal=lam)
    gradient = Pair(jnp.asarray(whole(g) @ p.right.T), jnp.asarray(p.left.T @ whole(g)))
    direction = preconditioned(Pair(*map(jnp.asarray, p)), gradient, lam)
    for new, old, d in zip(got, p, direction, strict=True):
        close(new, old - rate * d, 1e-9)
    sequential = solve([p, g], [1.0, -rate], sweeps=1, proximal=lam)
    close(sequential.left, got.left)


def test_p5_far_pull_is_descent_on_the_factors():
    p, g, lam = pair(), pair(ROWS, 1), 1e7
    got = solve([p, g], [1.0, -1.0], proximal=lam)
    np.testing.assert_allclose((p.left - got.left) * lam, whole(g) @ p.right.T, rtol=1e-3)
    np.testing.assert_allclose((p.right - got.right) * lam, p.left.T @ whole(g), rtol=1e-3)


def test_p6_gauge():
    p, g, mixing = pair(), pair(ROWS, 1), draw(R, R) + 3 * np.eye(R)
    turn, _ = np.linalg.qr(draw(R, R))
    for lam, r, same in ((0.0, mixing, True), (0.1, turn, True), (0.1, mixing, False)):
        other = Pair(p.left @ r, np.linalg.solve(r, p.right))
        one, two = (solve([x, g], [1.0, -0.3], proximal=lam) for x in (p, other))
        assert np.allclose(whole(one), whole(two), atol=1e-9) == same


@pytest.mark.parametrize("lam", [0.0, 0.2])
def test_p7_whitening(lam):
    p, g = pair(), pair(ROWS, 1)
    rows, columns = (np.abs(draw(k)) + 0.1 for k in (N, M))
    metric = Metric(jnp.asarray(rows), jnp.asarray(columns))
    got = solve([p, g], [1.0, -0.3], sweeps=2, proximal=lam, metric=metric)
    r, c = np.sqrt(rows)[:, None], np.sqrt(columns)
    white = [Pair(r * p.left, p.right * c), Pair(g.left / r, g.right / c)]
    back = solve(white, [1.0, -0.3], sweeps=2, proximal=lam)
    close(got.left, back.left / r, 1e-9)
    close(got.right, back.right / c, 1e-9)


def test_p8_unit_metrics_and_power_zero():
    p, g = pair(), pair(ROWS, 1)
    unit = damped_power(Metric(jnp.full(N, 3.0), jnp.full(M, 0.2)), 1e-5, 0.0)
    one = solve([p, g], [1.0, -0.3], proximal=0.1)
    two = solve([p, g], [1.0, -0.3], proximal=0.1, metric=unit)
    for x, y in zip(one, two, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("statistics", [kfac_statistics, shampoo_statistics])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("rows", [3, 40])  # Gram matrices, and the product itself
def test_p8_statistics(statistics, dense, rows):
    x, s = draw(rows, N), draw(rows, M)
    total = statistics(Pair(jnp.asarray(x.T), jnp.asarray(s)), 1 / rows, dense=dense)
    mean = statistics(Pair(jnp.asarray(x.T), jnp.asarray(s / rows)), rows, dense=dense)
    g = x.T @ s
    wanted = {
        kfac_statistics: (x.T @ x / rows, s.T @ s / rows),
        shampoo_statistics: (g @ g.T / rows, g.T @ g / rows),
    }[statistics]
    for a, b, c in zip(total, mean, wanted, strict=True):
        close(a, c if dense else np.diagonal(c), 1e-10)
        close(b, a, 1e-10)
    close(product_norm_squared(Pair(jnp.asarray(x.T), jnp.asarray(s))), np.sum(g**2), 1e-10)


def test_p9_zero_start():
    p, g, rate, lam = Pair(draw(N, R), np.zeros((R, M))), pair(ROWS, 1), 0.3, 0.1
    got = solve([p, g], [1.0, -rate], proximal=lam)
    close(got.left, p.left)
    inner = np.linalg.inv(p.left.T @ p.left + lam * np.eye(R))
    close(got.right, -rate * inner @ p.left.T @ whole(g), 1e-10)
    jittered = solve([p, g], [1.0, -rate], proximal=5e-4, jitter=1e-6)
    close(jittered.left, p.left * 5e-4 / (5e-4 + 1e-6))


@pytest.mark.parametrize("sweeps", [0, 1, 3])
def test_p10_fixed_point(sweeps):
    p = pair()
    metric = Metric(jnp.abs(jnp.asarray(draw(N))) + 0.1, jnp.abs(jnp.asarray(draw(M))) + 0.1)
    got = solve([p], [1.0], sweeps=sweeps, proximal=0.3, metric=metric)
    close(got.left, p.left, 1e-10)
    close(got.right, p.right, 1e-10)


def test_p11_the_objective_falls():
    p, g, lam = pair(), pair(ROWS, 1), 0.1
    rows, columns = (np.abs(draw(k)) + 0.1 for k in (N, M))
    target = whole(p) - 2.0 * whole(g) / rows[:, None] / columns
    metric = Metric(jnp.asarray(rows), jnp.asarray(columns))
    values, last = [], p
    for sweeps in range(1, 5):
        new = solve([p, g], [1.0, -2.0], sweeps=sweeps, proximal=lam, metric=metric)
        for a, b in (last, (new.left, last.right), new):
            values.append(reference.objective(target, a, b, *p, lam, rows, columns))
        last = new
    assert all(y <= x * (1 + 1e-12) for x, y in zip(values, values[1:], strict=False))
    assert values[-1] < 0.9 * values[0]


def test_p12_jacobi_needs_factor_gradients_alone():
    p, g, rate, lam = pair(), pair(ROWS, 1), 0.3, 0.1
    rows, columns = (np.abs(draw(k)) + 0.1 for k in (N, M))
    metric = Metric(jnp.asarray(rows), jnp.asarray(columns))
    got = solve([p, g], [1.0, -rate], sweeps=0, proximal=lam, metric=metric)
    g_a, g_b = whole(g) @ p.right.T, p.left.T @ whole(g)
    gram = (p.right * columns) @ p.right.T + lam * np.eye(R)
    close(got.left, p.left - rate * g_a / rows[:, None] @ np.linalg.inv(gram), 1e-10)
    gram = (p.left.T * rows) @ p.left + lam * np.eye(R)
    close(got.right, p.right - rate * np.linalg.solve(gram, g_b / columns), 1e-10)


def test_dense_powers():
    d = draw(M, M) @ draw(M, M).T / M + np.eye(M)
    for power, tolerance in ((1.0, 1e-12), (0.5, 2e-2), (0.25, 1e-10), (0.0, 1e-10)):
        got = damped_power(Metric(jnp.asarray(d), jnp.asarray(d)), 0.1, power).rows
        values, vectors = np.linalg.eigh(d + 0.1 * np.eye(M))
        wanted = (vectors * values**power) @ vectors.T
        assert np.linalg.norm(got - wanted) <= tolerance * np.linalg.norm(wanted), power


def test_half_precision_is_computed_in_float32():
    p = Pair(*(jnp.asarray(x, jnp.bfloat16) for x in pair()))
    got = low_rank_sum([p], [1.0], proximal=0.1)
    assert got.left.dtype == got.right.dtype == jnp.float32


def test_bad_calls_are_named():
    with pytest.raises(ValueError, match="1 coefficients for 2 pairs"):
        low_rank_sum([pair(), pair()], [1.0])
    with pytest.raises(ValueError, match="sweeps: got -1"):
        low_rank_sum([pair()], [1.0], sweeps=-1)
