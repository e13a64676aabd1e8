"""What is known of JAGUAR: exactness, contraction, bounds, rates, noise, limits, feasibility."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_lab import zeroth_order as zo
from jaxopt_lab.zeroth_order.differences import Found
from tests.zeroth_order.test_ask_tell import assert_same

D, MU, SMOOTHNESS = 10, 0.1, 5.0
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def quadratic(d=D, mu=MU, smoothness=SMOOTHNESS, seed=0):
    """(A, t) of (x - t) A (x - t) / 2 with both ends of the spectrum attained."""
    rng = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(rng.normal(size=(d, d)))
    values = np.concatenate([[mu, smoothness], rng.uniform(mu, smoothness, d - 2)])
    return basis * values @ basis.T, rng.normal(size=d)


def value_of(matrix, target):
    return lambda x: 0.5 * (x - target) @ matrix @ (x - target)


def run(opt, f, x0, steps, record=lambda state: state.x):
    """What is recorded before each step, and the last state."""

    def step(state, _):
        return opt.step(state, f), record(state)

    return jax.jit(lambda s: jax.lax.scan(step, s, length=steps))(opt.init(x0))


def estimates(estimator, h, differences, index, average=None):
    """Directions and memories of all single coordinates, given their exact differences."""

    def one(i):
        found = Found(differences[i][None], (), jnp.ones(1, bool), jnp.zeros((), jnp.int32), h)
        probes = zo.Coordinates(i[None], jnp.ones(1))
        return estimator.estimate(zo.CoordinateMemory(h), probes, found)

    return jax.vmap(one)(index)


@given(seed=seeds)
def test_the_memory_contracts_by_one_part_in_d_at_a_fixed_point(seed):
    rng = np.random.default_rng(seed)
    h, gradient = jnp.asarray(rng.normal(size=(2, D)))
    _, memory = estimates(zo.coordinate_memory(), h, gradient, jnp.arange(D))
    error = np.mean(np.sum((np.asarray(memory.h) - gradient) ** 2, axis=1))
    np.testing.assert_allclose(error, (1 - 1 / D) * np.sum((h - gradient) ** 2), rtol=1e-12)


@given(seed=seeds)
def test_the_correction_of_sega_is_unbiased(seed):
    rng = np.random.default_rng(seed)
    h, gradient = jnp.asarray(rng.normal(size=(2, D)))
    direction, _ = estimates(zo.sega(), h, gradient, jnp.arange(D))
    np.testing.assert_allclose(np.mean(direction, axis=0), gradient, atol=1e-12)


@given(seed=seeds, length=st.floats(0, 3))
def test_the_error_drifts_no_faster_than_the_point(seed, length):
    rng = np.random.default_rng(seed)
    matrix, target = quadratic(seed=seed)
    before, move, h = rng.normal(size=(3, D))
    after = before + length * move
    old, new = matrix @ (before - target), matrix @ (after - target)
    _, memory = estimates(zo.coordinate_memory(), jnp.asarray(h), jnp.asarray(new), jnp.arange(D))
    error = np.mean(np.sum((np.asarray(memory.h) - new) ** 2, axis=1))
    drift = 2 * D * SMOOTHNESS**2 * np.sum((after - before) ** 2)
    assert error <= (1 - 1 / (2 * D)) * np.sum((h - old) ** 2) + drift + 1e-9


def test_after_a_visit_of_every_coordinate_the_memory_is_the_gradient():
    matrix, target = quadratic()
    opt = zo.jaguar_gd(1e-300, key=jax.random.key(0), h0="zeros")
    state, _ = run(opt, value_of(matrix, target), np.zeros(D), 150)
    np.testing.assert_allclose(state.memory.h, -matrix @ target, atol=1e-10)


def test_trajectories_on_quadratics_do_not_depend_on_eps():
    matrix, target = quadratic()
    f = value_of(matrix, target)
    paths = [
        run(zo.jaguar_frank_wolfe(zo.l1_ball(), key=jax.random.key(1), eps=eps), f, np.zeros(D), 50)
        for eps in (1e-3, 1.0)
    ]
    assert_same(paths[0][1], paths[1][1], 1e-9)


def test_frank_wolfe_keeps_its_rate():
    """Mean excess at most d max(22 L D^2, 8 F0) / (k + 8 d); in fact far below."""
    matrix, target = quadratic()
    f = value_of(matrix, target)
    steps = 4000

    def one(seed):
        opt = zo.jaguar_frank_wolfe(zo.simplex(), key=jax.random.key(seed))
        step = lambda s, _: (opt.step(s, f), f(s.x))  # noqa: E731
        return jax.lax.scan(step, opt.init(np.full(D, 1 / D)), length=steps)[1]

    values = np.asarray(jax.jit(jax.vmap(one))(jnp.arange(6))).mean(0)
    best = values.min()
    diameter = 2**0.5
    k = np.arange(steps)
    top = D * max(22 * SMOOTHNESS * diameter**2, 8 * (values[0] - best)) / (k + 8 * D)
    assert (values - best <= top).all()
    # O(1/k), not just bounded: ten times the steps leave a tenth.
    assert values[-1] - best < (values[400] - best) / 10


def test_descent_keeps_its_rate_and_converges_linearly():
    matrix, target = quadratic()
    f = value_of(matrix, target)
    rate = 1 / (4 * D * SMOOTHNESS)
    steps, x0 = 6000, np.zeros(D)

    def one(seed):
        opt = zo.jaguar_gd(rate, key=jax.random.key(seed), h0="zeros")
        step = lambda s, _: (opt.step(s, f), s.x)  # noqa: E731
        return jax.lax.scan(step, opt.init(x0), length=steps)[1]

    x = np.asarray(jax.jit(jax.vmap(one))(jnp.arange(4)))
    gradients = np.sum(((x - target) @ matrix) ** 2, axis=-1).mean(0)
    potential = float(f(x0)) + rate * D * np.sum((matrix @ target) ** 2)
    assert gradients.mean() <= 2 * potential / (rate * steps)
    values = jax.vmap(jax.vmap(f))(x).mean(0)
    assert values[-1] <= potential * (1 - rate * MU / 2) ** (steps - 1)


@pytest.mark.parametrize("eps", [0.03, 0.3])
def test_independent_samples_add_their_variance_and_shared_ones_do_not(eps):
    noise = 0.2
    f = lambda x, key: jnp.sum(x**2) + noise * jax.random.normal(key)  # noqa: E731

    def memory(feedback, seed):
        opt = zo.jaguar_gd(
            1e-9, key=jax.random.key(seed), eps=eps, feedback=feedback, h0="zeros",
            num_coordinates=4,
        )  # fmt: skip
        return opt.step(opt.init(jnp.ones(4)), f).memory.h

    h = jax.jit(jax.vmap(functools.partial(memory, "one_point")))(jnp.arange(1000))
    np.testing.assert_allclose(np.var(h), noise**2 / (2 * eps**2), rtol=0.1)
    h = jax.jit(jax.vmap(functools.partial(memory, "two_point")))(jnp.arange(10))
    np.testing.assert_allclose(h, 2.0, atol=1e-10)


def test_differences_of_noisy_values_err_within_the_bound_and_too_small_an_eps_is_worse():
    level = 1e-4
    target = jnp.linspace(-1, 1, 6)
    # Curvature at most 1, not a quadratic.
    smooth = lambda x: jnp.sum(jnp.log(jnp.cosh(x - target)))  # noqa: E731

    def error(eps, seed):
        f = lambda x, key: smooth(x) + level * jax.random.uniform(key, minval=-1, maxval=1)  # noqa: E731
        opt = zo.jaguar_gd(
            1e-300, key=jax.random.key(seed), eps=eps, feedback="one_point", num_coordinates=6,
            h0="zeros",
        )  # fmt: skip
        state = opt.step(opt.init(jnp.zeros(6)), f)
        return jnp.abs(state.memory.h - jax.grad(smooth)(jnp.zeros(6)))

    best = (2 * level) ** 0.5
    grid = best * np.array([0.01, 0.1, 1.0])
    errors = jax.jit(jax.vmap(jax.vmap(error, (None, 0)), (0, None)))(grid, jnp.arange(50))
    for eps, found in zip(grid, np.asarray(errors), strict=True):
        assert found.max() <= eps / 2 + level / eps
    mean = np.asarray(errors).mean((1, 2))
    assert mean[0] > 5 * mean[1] > 25 * mean[2]


CONSTRAINTS = {
    "simplex": zo.simplex(2.0),
    "l1": zo.l1_ball(),
    "l2": zo.l2_ball(),
    "lp": zo.lp_ball(3.0),
    "box": zo.box(-0.1, np.linspace(0.1, 1, 6)),
    "moved": zo.l2_ball(0.5).centered_at(np.full(6, 2.0)),
    "nuclear": zo.nuclear_ball(),
    "spectral": zo.spectral_ball(),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_iterates_stay_in_the_set(name):
    constraint = CONSTRAINTS[name]
    shape = (2, 3) if constraint.matrix else (6,)
    target = np.random.default_rng(0).normal(size=shape)
    x0 = constraint.project(jnp.zeros(shape))
    f = lambda x: jnp.sum((x - target) ** 2 * np.arange(1, 7).reshape(shape))  # noqa: E731
    methods = (
        zo.jaguar_frank_wolfe(constraint, key=jax.random.key(0), step_size=0.3),
        zo.jaguar_gd(0.1, key=jax.random.key(0), constraint=constraint),
    )
    for opt in methods:
        _, path = run(opt, f, x0, 60)
        assert not np.allclose(path[-1], x0)
        np.testing.assert_allclose(jax.vmap(constraint.project)(path), path, atol=1e-9)


class TestLimits:
    def test_one_coordinate_is_ordinary_frank_wolfe(self):
        opt = zo.jaguar_frank_wolfe(zo.l2_ball(2.0), key=jax.random.key(0))
        _, path = run(opt, lambda x: jnp.sum((x - 0.3) ** 2), np.array([-1.0]), 30)
        x = -1.0
        for k in range(30):
            np.testing.assert_allclose(path[k], [x], atol=1e-9)
            x += 4 / (k + 8) * (-2.0 * np.sign(2 * (x - 0.3)) - x)

    def test_all_coordinates_are_the_full_method(self):
        matrix, target = quadratic()
        f, key = value_of(matrix, target), jax.random.key(0)
        a = zo.jaguar_gd(0.1, key=key, num_coordinates=D, h0="zeros")
        b = zo.gradient_descent(0.1, zo.full_coordinates(), key=key)
        paths = [run(opt, f, np.zeros(D), 20)[1] for opt in (a, b)]
        np.testing.assert_array_equal(*paths)
        x = np.zeros(D)
        for step in paths[0]:
            np.testing.assert_allclose(step, x, atol=1e-9)
            x = x - 0.1 * matrix @ (x - target)

    def test_weight_one_without_correction_is_the_deterministic_algorithm(self):
        matrix, target = quadratic()
        f, key = value_of(matrix, target), jax.random.key(0)
        steps = dict(step_size=lambda k: 4 / (k + 8 * D), key=key)
        a = zo.jaguar_frank_wolfe(zo.l1_ball(), **steps)
        b = zo.jaguar_frank_wolfe(
            zo.l1_ball(), feedback="two_point", averaging=1.0, sega=False, **steps
        )
        _, x = run(a, f, np.zeros(D), 30)
        _, y = run(b, lambda x, key: f(x), np.zeros(D), 30)
        np.testing.assert_allclose(x, y, atol=1e-12)

    def test_a_set_that_is_never_left_is_no_set(self):
        matrix, target = quadratic()
        a, b = (
            zo.jaguar_gd(0.02, key=jax.random.key(0), constraint=constraint)
            for constraint in (None, zo.l2_ball(1e6))
        )
        paths = [run(opt, value_of(matrix, target), np.zeros(D), 20)[1] for opt in (a, b)]
        np.testing.assert_array_equal(*paths)


@pytest.mark.parametrize("feedback", ["two_point", "single"])
def test_directions_on_the_sphere_average_to_the_gradient_of_a_linear_function(feedback):
    slope = np.array([1.0, -2.0, 0.5])
    directions = 20_000
    opt = zo.gradient_descent(
        1.0, zo.random_directions(num_directions=directions, feedback=feedback, eps=0.1),
        key=jax.random.key(0),
    )  # fmt: skip
    state = jax.jit(lambda s: opt.step(s, lambda x, key: slope @ x))(opt.init(np.zeros(3)))
    # Standard deviation of an entry: at most sqrt(d) |slope| of one direction.
    np.testing.assert_allclose(-state.x, slope, atol=4 * (3 * 5.25 / directions) ** 0.5)


def test_single_values_overwrite_the_memory_whatever_the_sign():
    opt = zo.jaguar_gd(1e-300, key=jax.random.key(0), feedback="single", eps=0.5, h0="zeros")
    state, found = opt.init(jnp.zeros(2)), []
    for value in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0):
        state, x = opt.ask(state)
        side = np.asarray(x) / 0.5
        state = opt.tell(state, value)
        np.testing.assert_allclose(state.memory.h @ side, value / 0.5)
        found.append(side.sum())
    assert {-1.0, 1.0} == set(found)


def test_the_correction_follows_a_gradient_that_moves():
    # With exact estimates the average is the newest one, wherever the point goes.
    matrix, target = quadratic()
    estimator = zo.averaged(zo.full_coordinates(), 0.1, corrected=True)
    opt = zo.gradient_descent(0.05, estimator, key=jax.random.key(0))
    state, path = run(opt, value_of(matrix, target), np.zeros(D), 20)
    last = matrix @ (np.asarray(path[-1]) - target)
    np.testing.assert_allclose(state.memory.average, last, atol=1e-9)
    assert state.calls == 20 * 4 * D


def test_the_correction_of_random_estimates_has_less_noise_than_these():
    # At a point that hardly moves the average tends to the gradient, and the estimates do not.
    slope = np.arange(1.0, 5.0)
    f = lambda x: slope @ x  # noqa: E731
    errors = []
    for estimator in (
        zo.random_coordinates(),
        zo.averaged(zo.random_coordinates(), lambda k: 1 / (k + 1), corrected=True),
    ):
        opt = zo.gradient_descent(1e-9, estimator, key=jax.random.key(3))
        state, path = run(opt, f, np.zeros(4), 400)
        direction = (path[-1] - state.x) / 1e-9
        errors.append(np.linalg.norm(direction - slope))
    assert errors[1] < 0.2 * errors[0]
