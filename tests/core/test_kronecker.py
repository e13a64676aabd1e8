"""The integrators against brute force on the m^2 x n^2 matrices, and their properties."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from jaxopt_lab.core import kronecker
from jaxopt_lab.core.precision import congruence
from tests.examples import examples
from tests.reference import kronecker as reference

SHAPES = [(3, 4), (4, 2)]  # few: every shape is compiled once
NAMES = sorted(kronecker.INTEGRATORS)
STEPS = {name: jax.jit(step) for name, step in kronecker.INTEGRATORS.items()}
START = jax.jit(kronecker.nearest_kronecker, static_argnums=1)

seeds = st.integers(0, 2**32 - 1)
decays = st.one_of(st.sampled_from([0.0, 0.5, 0.95, 1.0]), st.floats(0, 1))


def step(name, left, right, grad, decay, weight):
    """One float64 step, NumPy in and out."""
    with jax.enable_x64(True):
        scalars = {"decay": jnp.asarray(decay), "weight": jnp.asarray(weight)}
        out = STEPS[name](jnp.asarray(left), jnp.asarray(right), jnp.asarray(grad), **scalars)
    return tuple(np.asarray(x) for x in out)


def semidefinite(rng, size, rank):
    x = rng.standard_normal((size, rank))
    return x @ x.T


def orthogonal(rng, size):
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


def with_values(rng, m, n, values):
    u, v = orthogonal(rng, m), orthogonal(rng, n)
    return u[:, : len(values)] * values @ v[:, : len(values)].T


@st.composite
def states(draw, shapes=SHAPES):
    """Unbalanced factors of any rank, a gradient, the decay and the weight that goes with it."""
    m, n = draw(st.sampled_from(shapes))
    rng = np.random.default_rng(draw(seeds))
    left = semidefinite(rng, m, draw(st.integers(1, m)))
    right = 10 ** draw(st.floats(-2, 2)) * semidefinite(rng, n, draw(st.integers(1, n)))
    decay = draw(decays)
    weight = draw(st.sampled_from([1 - decay, 1.0]))
    return left, right, rng.standard_normal((m, n)), decay, weight


def amplification(case):
    """How much the K-step enlarges rounding: the old right factor may hardly see the target."""
    matrix, right = reference.target(*case), case[1].ravel()
    seen = np.linalg.norm(matrix @ right) / np.linalg.norm(right)
    return np.linalg.norm(matrix) / seen


def error(case, pair):
    return np.linalg.norm(reference.target(*case) - np.outer(*pair))


@given(seeds)
def test_rearrangement(seed):
    rng = np.random.default_rng(seed)
    m, n = 3, 4
    left, right = rng.standard_normal((m, m)), rng.standard_normal((n, n))
    grad = rng.standard_normal((m, n))
    fisher = reference.second_moment(grad)
    with jax.enable_x64(True):
        ours = np.asarray(kronecker.rearrange(jnp.asarray(fisher), m, n))
        product = kronecker.rearrange(jnp.kron(left, right), m, n)
        rows = congruence(jnp.asarray(grad), jnp.asarray(right))
        columns = congruence(jnp.asarray(grad), jnp.asarray(left), transpose=True)
    np.testing.assert_array_equal(ours, reference.rearranged(fisher, m, n))
    np.testing.assert_allclose(np.linalg.norm(ours), np.linalg.norm(fisher), rtol=1e-14)
    np.testing.assert_allclose(product, np.outer(left, right), rtol=1e-15)
    np.testing.assert_allclose(rows.ravel(), ours @ right.ravel(), atol=1e-13)
    np.testing.assert_allclose(columns.ravel(), ours.T @ left.ravel(), atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
@examples(50)
@given(states())
def test_equals_the_generic_step_on_the_full_matrices(name, case):
    left, right = step(name, *case)
    wanted_left, wanted_right = reference.step(name, *case)
    tolerance = 1e-14 * amplification(case)
    for got, wanted in ((left, wanted_left), (right, wanted_right)):
        np.testing.assert_allclose(got, wanted, atol=tolerance * np.linalg.norm(wanted))


@examples(50)
@given(states())
def test_ksl_lies_between_the_best_and_the_parallel_step(case):
    matrix, v = reference.target(*case), case[1].ravel() / np.linalg.norm(case[1])
    slack = 1e-12 * np.linalg.norm(matrix)
    best = error(case, reference.best(matrix, *case[2].shape))
    ksl, parallel = (error(case, step(name, *case)) for name in ("ksl", "parallel"))
    assert best <= ksl + slack and ksl <= parallel + slack
    assert ksl <= np.linalg.norm(matrix - np.outer(matrix @ v, v)) + slack


@given(states())
def test_ksl_is_an_orthogonal_projection(case):
    left, right = step("ksl", *case)
    whole = np.linalg.norm(reference.target(*case)) ** 2
    parts = error(case, (left, right)) ** 2 + np.vdot(left, left) * np.vdot(right, right)
    np.testing.assert_allclose(parts, whole, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@given(states())
def test_factors_are_semidefinite_and_balanced(name, case):
    left, right = step(name, *case)
    size = np.linalg.norm(left)
    np.testing.assert_allclose(np.linalg.norm(right), size, rtol=1e-13)
    for x in (left, right):
        np.testing.assert_allclose(x, x.T, atol=1e-15 * size)
        assert np.linalg.eigvalsh(x).min() >= -1e-14 * amplification(case) * size
    # The middle number of the splitting, which both roots need, is not negative.
    assert np.vdot(np.outer(left, right), reference.target(*case)) >= 0


@pytest.mark.parametrize("name", NAMES)
@given(states(), st.floats(-3, 3))
def test_gauge_and_scale(name, case, exponent):
    left, right, grad, decay, weight = case
    c = 10.0**exponent
    wanted = step(name, *case)
    tolerance = 1e-13 * amplification(case) * np.linalg.norm(wanted[0])
    for got, x in zip(step(name, c * left, right / c, grad, decay, weight), wanted, strict=True):
        np.testing.assert_allclose(got, x, atol=tolerance)
    scaled = step(name, c * left, c * right, c * grad, decay, weight)
    for got, x in zip(scaled, wanted, strict=True):
        np.testing.assert_allclose(got, c * x, atol=c * tolerance)


@pytest.mark.parametrize("name", NAMES)
@given(states(), seeds)
def test_orthogonal_equivariance(name, case, seed):
    left, right, grad, decay, weight = case
    rng = np.random.default_rng(seed)
    p, q = orthogonal(rng, grad.shape[0]), orthogonal(rng, grad.shape[1])
    wanted_left, wanted_right = step(name, *case)
    turned = step(name, p @ left @ p.T, q.T @ right @ q, p @ grad @ q, decay, weight)
    tolerance = 1e-13 * amplification(case) * np.linalg.norm(wanted_left)
    np.testing.assert_allclose(turned[0], p @ wanted_left @ p.T, atol=tolerance)
    np.testing.assert_allclose(turned[1], q.T @ wanted_right @ q, atol=tolerance)


@given(states(shapes=[(3, 4)]))
def test_parallel_commutes_with_transposition(case):
    left, right, grad, decay, weight = case
    wanted = step("parallel", *case)
    turned = step("parallel", right, left, grad.T, decay, weight)
    tolerance = 1e-13 * amplification(case) * np.linalg.norm(wanted[0])
    for got, x in zip(turned[::-1], wanted, strict=True):
        np.testing.assert_allclose(got, x, atol=tolerance)


def test_ksl_does_not():
    rng = np.random.default_rng(0)
    case = semidefinite(rng, 3, 3), semidefinite(rng, 4, 4), rng.standard_normal((3, 4))
    wanted = step("ksl", *case, 0.5, 0.5)
    turned = step("ksl", case[1], case[0], case[2].T, 0.5, 0.5)
    assert np.abs(turned[1] - wanted[0]).max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
@given(seeds, st.floats(0, 1))
def test_exact_where_the_fisher_is_a_kronecker_product(name, seed, decay):
    rng = np.random.default_rng(seed)
    u, v = rng.standard_normal(3), rng.standard_normal(4)
    with jax.enable_x64(True):
        start = START(jnp.asarray(np.outer(u, v)), "sigma")
    left, right = (np.asarray(x) for x in start)
    fisher = reference.second_moment(np.outer(u, v))
    for factor in rng.standard_normal(4):
        grad = factor * np.outer(u, v)
        left, right = step(name, left, right, grad, decay, 1 - decay)
        fisher = decay * fisher + (1 - decay) * reference.second_moment(grad)
        np.testing.assert_allclose(
            np.kron(left, right), fisher, atol=1e-13 * max(np.abs(fisher).max(), 1e-3)
        )


@given(states())
def test_without_decay_only_the_directions_of_the_old_factors_matter(case):
    left, right, grad, _, _ = case
    for name in NAMES:
        wanted = step(name, left, right, grad, 0.0, 1.0)
        tolerance = 1e-13 * amplification((left, right, grad, 0.0, 1.0))
        for got, x in zip(step(name, 7 * left, right / 5, grad, 0.0, 1.0), wanted, strict=True):
            np.testing.assert_allclose(got, x, atol=tolerance * np.linalg.norm(x))


@pytest.mark.parametrize(
    ("name", "start", "power"),
    [("ksl", "any", 2), ("parallel", "any", 1), ("ksl", "eye", 4), ("parallel", "eye", 2)],
)
def test_repeated_steps_without_decay_converge_to_the_start(name, start, power):
    rng = np.random.default_rng(1)
    ratio = 0.7
    grad = with_values(rng, 3, 4, [2.0, 2.0 * ratio, 0.1])
    left, right = np.eye(3), np.eye(4)
    if start == "any":
        left, right = semidefinite(rng, 3, 3), semidefinite(rng, 4, 4)
    with jax.enable_x64(True):
        limit = np.outer(*START(jnp.asarray(grad), "sigma"))
    distances = []
    for _ in range(24 // power):
        left, right = step(name, left, right, grad, 0.0, 1.0)
        distances.append(np.linalg.norm(np.outer(left, right) - limit))
    assert distances[-1] < 1e-2 * distances[0]
    np.testing.assert_allclose(distances[-1] / distances[-2], ratio**power, rtol=0.03)


@pytest.mark.parametrize("name", NAMES)
@given(states())
def test_a_zero_gradient_shrinks_both_factors(name, case):
    left, right, grad, decay, weight = case
    balance = np.sqrt(np.linalg.norm(left) / np.linalg.norm(right))
    left, right = left / balance, right * balance
    got = step(name, left, right, np.zeros_like(grad), decay, weight)
    for x, old in zip(got, (left, right), strict=True):
        np.testing.assert_allclose(x, np.sqrt(decay) * old, atol=1e-13 * np.linalg.norm(old))


@given(seeds, st.floats(0, 1))
def test_gram_factors_are_half_a_power_step_from_the_identity(seed, decay):
    m, n = 3, 4
    rng = np.random.default_rng(seed)
    fisher, left, right = np.zeros((m * n, m * n)), np.zeros((m, m)), np.zeros((n, n))
    with jax.enable_x64(True):
        for grad in rng.standard_normal((4, m, n)):
            fisher = decay * fisher + (1 - decay) * reference.second_moment(grad)
            rows = congruence(jnp.asarray(grad), jnp.eye(n))
            columns = congruence(jnp.asarray(grad), jnp.eye(m), transpose=True)
            left = decay * left + (1 - decay) * rows
            right = decay * right + (1 - decay) * columns
    matrix = reference.rearranged(fisher, m, n)
    np.testing.assert_allclose(left.ravel(), matrix @ np.eye(n).ravel(), atol=1e-13)
    np.testing.assert_allclose(right.ravel(), matrix.T @ np.eye(m).ravel(), atol=1e-13)


@pytest.mark.parametrize("shape", [(3, 4), (4, 2)])
@given(seeds)
def test_start_is_the_best_approximation_of_one_gradient(shape, seed):
    grad = np.random.default_rng(seed).standard_normal(shape)
    sigma = np.linalg.svd(grad, compute_uv=False)
    # Closer values are told apart only in part, by documented design.
    tolerance = max(1e-12, 10 * (sigma[1] / sigma[0]) ** 1024)
    with jax.enable_x64(True):
        exact, root = START(jnp.asarray(grad), "sigma"), START(jnp.asarray(grad), "sqrt_sigma")
    matrix = reference.rearranged(reference.second_moment(grad), *shape)
    wanted = reference.best(matrix, *shape)
    for got, other, x in zip(exact, root, wanted, strict=True):
        np.testing.assert_allclose(got, x, atol=tolerance * sigma[0])
        scaled = np.sqrt(sigma[0]) * np.asarray(other)
        np.testing.assert_allclose(scaled, got, atol=tolerance * sigma[0])


@given(seeds, st.floats(0, 1))
def test_rank_one_step_is_the_parallel_step_on_the_squares(seed, decay):
    rng = np.random.default_rng(seed)
    row, column = rng.uniform(0.1, 1, 3), rng.uniform(0.1, 1, 4)
    squares = rng.standard_normal((3, 4)) ** 2
    with jax.enable_x64(True):
        got = _rank_one(jnp.asarray(row), jnp.asarray(column), jnp.asarray(squares), decay)
    start = decay * np.outer(row, column)
    u, size, v = reference.parallel(
        start,
        start + (1 - decay) * squares,
        row / np.linalg.norm(row),
        column / np.linalg.norm(column),
    )
    for x, wanted in zip(got, (np.sqrt(size) * u, np.sqrt(size) * v), strict=True):
        np.testing.assert_allclose(x, wanted, rtol=1e-13)
        assert (np.asarray(x) > 0).all()


@jax.jit
def _rank_one(row, column, squares, decay):
    return kronecker.rank_one_step(row, column, squares, decay=decay)


def test_stacks_are_stepped_one_by_one():
    rng = np.random.default_rng(0)
    lefts = np.stack([semidefinite(rng, 3, k) for k in (1, 3)])
    rights = np.stack([semidefinite(rng, 4, k) for k in (4, 2)])
    grads = rng.standard_normal((2, 3, 4))
    for name in NAMES:
        together = step(name, lefts, rights, grads, 0.9, 0.1)
        for i in range(2):
            alone = step(name, lefts[i], rights[i], grads[i], 0.9, 0.1)
            for x, y in zip(together, alone, strict=True):
                np.testing.assert_allclose(x[i], y, rtol=1e-12)


# float32: what training may bring.

KINDS = ["full", "one_rank", "zero_rows", "zero_columns", "one_entry", "zero"]


def hard_gradient(rng, shape, kind):
    grad = rng.standard_normal(shape)
    if kind == "one_rank":
        grad = np.outer(grad[:, 0], grad[0])
    elif kind == "zero_rows":
        grad[1:] = 0
    elif kind == "zero_columns":
        grad[:, :-1] = 0
    elif kind == "one_entry":
        grad = np.where(np.arange(grad.size).reshape(shape) == 1, grad, 0)
    elif kind == "zero":
        grad = np.zeros(shape)
    return grad


def conditioned(rng, size, decades):
    q = orthogonal(rng, size)
    x = q * np.geomspace(1, 10.0**-decades, size) @ q.T
    return (x + x.T) / 2


@st.composite
def hard_states(draw):
    m, n = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(seeds))
    scale = 10.0 ** draw(st.integers(-18, 18))
    old = 10.0 ** draw(st.integers(-18, 18)) if draw(st.booleans()) else scale
    left, right = (old * conditioned(rng, k, draw(st.integers(0, 12))) for k in (m, n))
    grad = scale * hard_gradient(rng, (m, n), draw(st.sampled_from(KINDS)))
    decay = draw(st.sampled_from([0.0, 0.9, 0.999, 1.0]))
    # What the step receives is float32: the reference starts from the same numbers.
    left, right, grad = (np.asarray(x, np.float32) for x in (left, right, grad))
    return left, right, grad, decay, 1 - decay if decay < 1 else 1.0


@pytest.mark.parametrize("name", NAMES)
@examples(300)
@given(hard_states())
def test_float32_stays_finite_semidefinite_and_near_float64(name, case):
    left, right, grad, decay, weight = case
    got = STEPS[name](left, right, grad, decay=decay, weight=weight)
    got = tuple(np.asarray(x, np.float64) for x in got)
    wide = tuple(np.asarray(x, np.float64) for x in (left, right, grad))
    wanted = step(name, *wide, decay, weight)
    size = np.linalg.norm(wanted[0])
    seen = 1.0
    if size > 0:
        # The parallel step also looks from the other side.
        turned = wide[1], wide[0], wide[2].T
        seen = max(amplification((*x, decay, weight)) for x in (wide, turned))
    # Squares of entries near 1e-19 leave the range of float32, and some of a norm with them.
    tiny = min(np.linalg.norm(x) for x in wide[:2]) < 1e-15
    tolerance = 0.05 * size if tiny else 1e-5 * seen * size
    np.testing.assert_allclose([np.linalg.norm(x) for x in got], size, atol=tolerance)
    for x, exact in zip(got, wanted, strict=True):
        assert np.isfinite(x).all()
        np.testing.assert_allclose(x, x.T, atol=1e-6 * seen * size)
        assert np.linalg.eigvalsh(x).min() >= -1e-6 * seen * size
        np.testing.assert_allclose(x, exact, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
@examples(50)
@given(st.data())
def test_float32_streams_stay_sound(name, data):
    """Twenty steps from the start of a hard first gradient."""
    rng = np.random.default_rng(data.draw(seeds))
    scale = 10.0 ** data.draw(st.integers(-18, 18))
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=4, max_size=4))
    grads = [np.float32(scale * hard_gradient(rng, (3, 4), kind)) for kind in kinds]
    left, right = START(grads[0], "sigma")
    largest = max(np.linalg.norm(np.float64(g)) for g in grads)
    for t in range(20):
        left, right = STEPS[name](left, right, grads[t % 4], decay=0.9, weight=0.1)
    for x in (np.float64(left), np.float64(right)):
        size = np.linalg.norm(x)
        assert np.isfinite(x).all() and size <= largest * (1 + 1e-5)
        np.testing.assert_allclose(x, x.T, atol=2e-6 * size)
        assert np.linalg.eigvalsh(x).min() >= -1e-5 * size
    sizes = [np.linalg.norm(np.float64(x)) for x in (left, right)]
    np.testing.assert_allclose(*sizes, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("decay", [0.0, 0.1, 0.99])
def test_thousands_of_float32_steps_stay_sound(name, decay):
    """Factors are not made symmetric: what rounding adds must die out, and roots must exist."""

    def advance(pair, grad):
        return STEPS[name](*pair, grad, decay=decay, weight=1 - decay), None

    grads = jax.random.normal(jax.random.key(0), (6000, 3, 4))
    start = START(grads[0], "sigma")
    left, right = jax.jit(lambda pair: jax.lax.scan(advance, pair, grads)[0])(start)
    for x in (np.float64(left), np.float64(right)):
        assert np.isfinite(x).all() and np.linalg.norm(x) > 1e-4
        if decay > 0:
            np.testing.assert_allclose(x, x.T, atol=1e-5 * np.linalg.norm(x))


def test_a_matrix_that_saw_nothing_keeps_zero_factors():
    zeros = jnp.zeros((3, 3)), jnp.zeros((4, 4)), jnp.zeros((3, 4))
    for name in NAMES:
        for x in STEPS[name](*zeros, decay=0.9, weight=0.1):
            np.testing.assert_array_equal(x, np.zeros_like(x))
    for x in kronecker.nearest_kronecker(zeros[2]):
        np.testing.assert_array_equal(x, np.zeros_like(x))
