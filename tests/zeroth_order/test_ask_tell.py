"""Asking and telling: the numbers of the traced step, resuming, refusals, values that are lost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import zeroth_order as zo

KEY = jax.random.key(7)
TARGET = {"a": np.array([0.3, -0.2]), "b": np.array([[0.1, 0.4]])}
D = 4
# name -> (optimizer, iterations)
CONFIGURATIONS = {
    "frank-wolfe": lambda: zo.jaguar_frank_wolfe(zo.l2_ball(), key=KEY),
    "from zeros": lambda: zo.jaguar_frank_wolfe(zo.l1_ball(), key=KEY, h0="zeros"),
    "two of four": lambda: zo.jaguar_gd(0.05, key=KEY, num_coordinates=2),
    "refilled": lambda: zo.jaguar_gd(0.05, key=KEY, refill=0.4),
    "two-point": lambda: zo.jaguar_frank_wolfe(zo.l2_ball(), key=KEY, feedback="two_point"),
    "one-point": lambda: zo.jaguar_frank_wolfe(
        zo.box(-1, 1), key=KEY, feedback="one_point", num_coordinates=2, eps=0.1
    ),
    "single": lambda: zo.jaguar_frank_wolfe(zo.l2_ball(), key=KEY, feedback="single", eps=0.1),
    "sphere": lambda: zo.gradient_descent(
        lambda k: 0.1 / (k + 1), zo.random_directions(num_directions=3, feedback="single"), key=KEY
    ),
    "corrected momentum": lambda: zo.frank_wolfe(
        zo.averaged(zo.random_coordinates(num_coordinates=2), 0.3, corrected=True),
        zo.linf_ball(),
        key=KEY,
    ),
    "corrected momentum of samples": lambda: zo.frank_wolfe(
        zo.averaged(zo.random_directions(feedback="two_point"), 0.3, corrected=True),
        zo.linf_ball(),
        key=KEY,
    ),
}


def loss(x, key=None):
    """A quadratic with noise of the sample."""
    gaps = jax.tree.map(lambda a, b: a - b, x, TARGET)
    noise = 0 if key is None else 0.01 * jax.random.normal(key)
    return (
        sum(jnp.vdot(gap, gap) for gap in gaps.values()) + jnp.sum(x["a"]) * jnp.sum(x["b"]) + noise
    )


def start():
    return jax.tree.map(jnp.zeros_like, jax.tree.map(jnp.asarray, TARGET))


def assert_same(a, b, atol):
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=atol, rtol=0), a, b)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_asking_one_value_at_a_time_is_the_traced_iteration(name):
    with jax.enable_x64(True):
        opt = CONFIGURATIONS[name]()
        f = loss if opt.feedback != "deterministic" else lambda x: loss(x)

        @jax.jit
        def run(state):
            step = lambda s, _: (opt.step(s, f), s.calls)  # noqa: E731
            return jax.lax.scan(step, state, length=6)[0]

        traced = run(opt.init(start()))
        assert int(traced.count) == 6 and not np.allclose(traced.x["a"], 0)
        asked, values = opt.minimize(lambda *a: float(f(*a)), start(), num_calls=int(traced.calls))
        assert len(values) == traced.calls
        # Values of iterations that are over are left as they are.
        assert int(asked.position) == 0
        assert_same(asked._replace(values=traced.values), traced, 1e-12)


def test_a_refill_costs_values_and_happens_as_often_as_asked():
    opt = CONFIGURATIONS["refilled"]()
    state = opt.init(start())
    step = jax.jit(lambda s: opt.step(s, lambda x: loss(x)))
    for _ in range(100):
        state = step(state)
    refills = (int(state.calls) - 2 * 100) / (2 * D) - 1
    assert 25 < refills < 55


def test_the_first_asks_fill_the_memory_and_leave_the_point():
    opt = CONFIGURATIONS["frank-wolfe"]()
    state, asked = opt.init(start()), []
    for _ in range(2 * D):
        state, x = opt.ask(state)
        asked.append(jax.flatten_util.ravel_pytree(x)[0])
        state = opt.tell(state, loss(x))
    both = np.stack([1e-3 * np.eye(D), -1e-3 * np.eye(D)], 1).reshape(-1, D)
    np.testing.assert_allclose(asked, both, atol=1e-9)
    gradient = jax.flatten_util.ravel_pytree(jax.grad(loss)(start()))[0]
    np.testing.assert_allclose(state.memory.h, gradient, atol=1e-3)
    assert state.count == 0 and not any(map(np.any, jax.tree.leaves(state.x)))


def test_asking_again_asks_the_same_and_a_stored_state_goes_on():
    opt = CONFIGURATIONS["one-point"]()
    state = opt.init(start())
    for _ in range(13):
        state, x = opt.ask(state)
        again, same = opt.ask(state)
        assert_same((again, same), (state, x), 0)
        state = opt.tell(state, loss(x, opt.sample_key(state)))
    # The key of the caller is not needed any more; NumPy arrays are what files give back.
    other = zo.jaguar_frank_wolfe(
        zo.box(-1, 1), key=jax.random.key(1), feedback="one_point", num_coordinates=2, eps=0.1
    )
    restored = jax.tree.map(np.asarray, state)
    for _ in range(9):
        (state, x), (restored, y) = opt.ask(state), other.ask(restored)
        assert_same(x, y, 0)
        state, restored = opt.tell(state, loss(x)), other.tell(restored, loss(y))
    assert_same(state, restored, 0)


def test_a_step_after_an_ask_starts_the_iteration_again():
    opt = zo.jaguar_gd(0.1, key=KEY, h0="zeros")
    state = opt.init(start())
    step = jax.jit(lambda s: opt.step(s, lambda x: loss(x)))
    asked, _ = opt.ask(state)
    asked, _ = opt.ask(opt.tell(asked, 5.0))
    expected = step(state)
    assert_same(step(asked), expected._replace(calls=expected.calls + 1), 0)


def test_samples_are_shared_within_a_pair_and_in_the_first_memory():
    for feedback, pairs in (("two_point", True), ("one_point", False)):
        opt = zo.jaguar_gd(0.1, key=KEY, feedback=feedback)
        state, keys = opt.init(start()), []
        for _ in range(2 * D + 6):
            state, x = opt.ask(state)
            keys.append(tuple(jax.random.key_data(opt.sample_key(state)).tolist()))
            state = opt.tell(state, 1.0)
        assert len(set(keys[: 2 * D])) == 1
        rest = keys[2 * D :]
        assert len(set(rest)) == (3 if pairs else 6)
        assert (rest[0] == rest[1]) is pairs and keys[0] not in rest


@pytest.mark.parametrize(("feedback", "different"), [("two_point", 1), ("one_point", 2)])
def test_a_correction_looks_at_both_points_with_the_same_samples(feedback, different):
    estimator = zo.averaged(zo.random_directions(feedback=feedback), 0.5, corrected=True)
    opt = zo.gradient_descent(0.1, estimator, key=KEY)
    state, keys, points = opt.init(np.zeros(3)), [], []
    for value in (1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0):
        state, x = opt.ask(state)
        keys.append(tuple(jax.random.key_data(opt.sample_key(state)).tolist()))
        points.append(np.asarray(x))
        state = opt.tell(state, value)
    assert keys[4:6] == keys[6:8] and len(set(keys[4:])) == different
    # The middle of the second pair is the point before the move.
    np.testing.assert_allclose(points[6] + points[7], 0, atol=1e-6)
    assert np.abs(points[4] + points[5]).max() > 0.1


def test_values_in_float64_keep_their_digits():
    # The difference is below what float32 resolves beside 1e4.
    def f(x):
        return 1e4 + float(np.sum((np.asarray(x, np.float64) - 0.3) ** 2))

    opt = zo.jaguar_gd(0.1, key=KEY)
    state, _ = opt.minimize(f, np.zeros(3), num_calls=6)
    assert state.memory.h.dtype == jnp.float32
    np.testing.assert_allclose(state.memory.h, np.full(3, -0.6), rtol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_changes_nothing_and_is_counted(bad):
    opt = zo.jaguar_frank_wolfe(zo.l2_ball(), key=KEY, averaging=0.5)
    state, _ = opt.minimize(lambda x: float(loss(x)), start(), num_calls=2 * D + 4)
    lost = state
    for value in (1.0, bad):
        lost, _ = opt.ask(lost)
        lost = opt.tell(lost, value)
    assert lost.notfinite_count == 1 and lost.count == state.count + 1
    assert_same((lost.x, lost.memory), (state.x, state.memory), 0)
    for _ in range(6):
        lost, x = opt.ask(lost)
        lost = opt.tell(lost, loss(x))
    assert not np.allclose(lost.x["a"], state.x["a"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(lost))


def test_of_several_differences_the_finite_ones_count():
    opt = zo.jaguar_gd(0.1, key=KEY, num_coordinates=2)
    state, _ = opt.minimize(lambda x: float(loss(x)), start(), num_calls=2 * D)
    before = np.asarray(state.memory.h)
    index = opt_probes(state, 2)
    for value in (np.nan, 1.0, 2.0, 0.0):
        state, _ = opt.ask(state)
        state = opt.tell(state, value)
    after = np.asarray(state.memory.h)
    assert np.isclose(after[index[1]], 2.0 / 2e-3) and after[index[0]] == before[index[0]]
    assert state.notfinite_count == 1 and not np.allclose(state.x["a"], 0)


def opt_probes(state, number):
    """Which coordinates the next iteration looks at."""
    opt = zo.jaguar_gd(1e-9, key=KEY, num_coordinates=number)
    flat = lambda x: np.asarray(jax.flatten_util.ravel_pytree(x)[0])  # noqa: E731
    at, found = flat(state.x), []
    for _ in range(number):
        state, x = opt.ask(state)
        found.append(int(np.argmax(np.abs(flat(x) - at))))
        state = opt.tell(state, 0.0)
        state, _ = opt.ask(state)
        state = opt.tell(state, 0.0)
    return found


def test_a_start_of_zeros_with_a_lost_first_iteration_still_averages_from_the_memory():
    opt = zo.jaguar_frank_wolfe(zo.l2_ball(), key=KEY, averaging=0.5)
    state, _ = opt.minimize(lambda x: float(loss(x)), start(), num_calls=2 * D)
    memory = np.asarray(state.memory.inner.h)
    for value in (np.nan, 0.0, 0.0, 0.0):
        state, _ = opt.ask(state)
        state = opt.tell(state, value)
    # One coordinate became 0, the average is half of that and half of the first memory.
    expected = (memory + np.asarray(state.memory.inner.h)) / 2
    np.testing.assert_allclose(state.memory.average, expected, rtol=1e-6)


def test_a_step_is_one_program_over_seeds_and_its_state_can_be_donated():
    def run(seed):
        opt = zo.jaguar_frank_wolfe(zo.l2_ball(), key=jax.random.key(seed))
        step = lambda s, _: (opt.step(s, lambda x: loss(x)), None)  # noqa: E731
        return jax.lax.scan(step, opt.init(start()), length=3)[0].x

    program = jax.make_jaxpr(jax.vmap(run))(jnp.arange(2))
    # The memory is filled in a branch, not computed and thrown away at every step.
    assert "cond[" in str(program)
    opt = zo.jaguar_frank_wolfe(zo.l2_ball(), key=KEY)
    step = jax.jit(lambda s: opt.step(s, lambda x: loss(x)), donate_argnums=0)
    x0 = start()
    state = step(step(opt.init(x0)))
    assert state.count == 2 and not np.any(x0["a"])


class TestBadInput:
    opt = zo.jaguar_frank_wolfe(zo.simplex(), key=KEY)
    ready = np.full(3, 1 / 3)

    def test_tell_before_ask(self):
        state = self.opt.init(self.ready)
        with pytest.raises(ValueError, match="ask first:\n  state, x = opt.ask"):
            self.opt.tell(state, 1.0)
        state, _ = self.opt.ask(state)
        state = self.opt.tell(state, 1.0)
        with pytest.raises(ValueError, match="ask first"):
            self.opt.tell(state, 1.0)

    @pytest.mark.parametrize(
        ("value", "came"),
        [
            (np.ones(1), r"an array of shape \(1,\)"),
            (jnp.ones((2, 2)), r"an array of shape \(2, 2\)"),
            (None, "None"),
            ("3", "'3'"),
            (1j, "1j"),
        ],
    )
    def test_a_value_that_is_no_number(self, value, came):
        state, _ = self.opt.ask(self.opt.init(self.ready))
        with pytest.raises(ValueError, match=f"tell: the value is {came}; wanted one real number"):
            self.opt.tell(state, value)

    def test_a_traced_function_of_another_shape(self):
        with pytest.raises(ValueError, match=r"f: the value is an array of shape \(3,\)"):
            jax.jit(lambda s: self.opt.step(s, lambda x: x))(self.opt.init(self.ready))

    @pytest.mark.parametrize(
        ("x0", "message"),
        [
            (np.zeros(3), "x0: outside of simplex of radius 1, 0.577 from its nearest point"),
            (np.array([0.5, np.nan]), "x0: not all entries are finite"),
            ({"w": np.array([1, 0])}, r"x0\['w'\]: dtype is int32; wanted real floats"),
            ({}, "x0: the tree has no leaves"),
        ],
    )
    def test_a_start(self, x0, message):
        with pytest.raises(ValueError, match=message):
            self.opt.init(x0)

    def test_a_start_on_the_boundary_up_to_rounding_is_taken(self):
        for seed in range(20):
            x = np.random.default_rng(seed).dirichlet(np.ones(1000)).astype(np.float32)
            self.opt.init(x)
        zo.jaguar_gd(0.1, key=KEY, constraint=zo.l2_ball(3.0)).init(np.array([0.0, 3.0]))

    def test_a_set_of_matrices_wants_a_matrix(self):
        opt = zo.jaguar_frank_wolfe(zo.nuclear_ball(), key=KEY)
        with pytest.raises(ValueError, match="nuclear_ball of radius 1 is a set of matrices"):
            opt.init(np.zeros(3))

    def test_an_eps_that_is_lost(self):
        opt = zo.jaguar_gd(0.1, key=KEY, eps=1e-6)
        with pytest.raises(ValueError, match=r"float32 keeps 0.0 digits of it; wanted at least"):
            opt.init(np.array([20.0]))

    def test_sets(self):
        capped = zo.ConstraintSet("capped", project=lambda x: jnp.clip(x, 0, 1))
        with pytest.raises(ValueError, match="'capped' has no linear minimisation oracle"):
            zo.jaguar_frank_wolfe(capped, key=KEY)
        with pytest.raises(ValueError, match="has no projection, which gradient descent needs"):
            zo.jaguar_gd(0.1, key=KEY, constraint=zo.ConstraintSet("x", lmo=lambda g, x: x))
        with pytest.raises(ValueError, match="wanted a ConstraintSet, as simplex"):
            zo.jaguar_frank_wolfe(zo.simplex, key=KEY)
        for make in (lambda: zo.l2_ball(0.0), lambda: zo.lp_ball(1.0), lambda: zo.box(1.0, 0.0)):
            with pytest.raises(ValueError, match="wanted"):
                make()

    @pytest.mark.parametrize("name", ["rbg", "unsafe_rbg"])
    def test_keys_of_another_generator(self, name):
        with pytest.raises(ValueError, match="wanted 'threefry2x32'"):
            zo.jaguar_gd(0.1, key=jax.random.key(0, impl=name))

    @pytest.mark.parametrize(
        "options",
        [
            {"feedback": "three_point"},
            {"eps": 0.0},
            {"h0": "ones"},
            {"refill": 2.0},
            {"refill": 0.5, "h0": "zeros"},
            {"averaging": 1.5},
            {"step_size": 2.0},
            {"step_size": "1"},
            {"averaging": "1"},
            {"refill": "1"},
        ],
    )
    def test_options(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            zo.jaguar_frank_wolfe(zo.simplex(), key=KEY, **options)

    def test_numbers_that_are_none(self):
        for rate in (0.0, np.nan, None, "1"):
            with pytest.raises(ValueError, match="learning_rate: got"):
                zo.jaguar_gd(rate, key=KEY)
        for make in (lambda: zo.simplex("1"), lambda: zo.l2_ball(None)):
            with pytest.raises(ValueError, match="radius is .* wanted a positive number"):
                make()
        with pytest.raises(ValueError, match="num_coordinates is 1.5"):
            zo.jaguar_gd(0.1, key=KEY, num_coordinates=1.5).init(np.zeros(3))
        with pytest.raises(ValueError, match="x0: there are no entries"):
            zo.jaguar_gd(0.1, key=KEY).init(np.zeros((0, 2)))

    def test_more_coordinates_than_there_are(self):
        opt = zo.jaguar_gd(0.1, key=KEY, num_coordinates=4)
        with pytest.raises(ValueError, match="num_coordinates is 4; the point has 3"):
            opt.init(np.zeros(3))
