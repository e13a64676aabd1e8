"""Estimates: exact cases, moments, engines, what is not finite, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_lab as jol
from jaxopt_lab import zeroth_order as zo
from tests.zeroth_order.problems import (
    AXES,
    FEW_AXES,
    KEY,
    entries,
    few,
    linear,
    probe_state,
    quadratic,
    rough,
    run,
    tree,
)


def estimated(loss, params, sampler=None, steps=1, draws=None, **options):
    """The estimate of the last step, and the state after it."""
    tx = zo.estimate(sampler, key=KEY, **{"matrix_axes": AXES, **options})
    _, state, g = run(tx, params, loss, steps, draws=draws)
    return g, state


@pytest.mark.parametrize("two_sided", [True, False])
def test_exact_on_quadratics(two_sided):
    with jax.enable_x64(True):
        params, draws, eps = tree(dtype="float64"), tree(3, "float64"), 0.3
        x, z = entries(params), entries(draws)
        g, state = estimated(
            quadratic,
            params,
            draws=jax.tree.map(lambda z: z[None], draws),
            eps=eps,
            two_sided=two_sided,
        )
        # Forward differences see half of eps z H z more.
        slope = x @ z + (0 if two_sided else eps * z @ z / 2)
        np.testing.assert_allclose(entries(g), slope * z, rtol=1e-11)
        assert state.losses.shape == (2,) and state.losses.dtype == np.float64


@pytest.mark.parametrize("name", ["gaussian", "signs", "sphere"])
def test_unbiased_with_the_second_moment_of_its_sampler(name):
    # <s, z> z for many z at once, from a linear loss: the mean is s.
    params = {"w": jnp.array([[1.0, -2.0, 0.5], [0.0, 1.0, 3.0]])}
    sampler = {"gaussian": zo.gaussian(), "signs": zo.signs(), "sphere": zo.sphere()}[name]

    def one(count):
        tx = zo.estimate(sampler, eps=1.0, key=KEY)
        state = tx.init(params)._replace(count=count)
        return tx.update(None, state, params, value_fn=linear(params))[0]["w"].reshape(-1)

    g = np.asarray(jax.jit(jax.vmap(one))(jnp.arange(20_000)))
    slope = entries(params)
    np.testing.assert_allclose(g.mean(0), slope, atol=0.15)
    times = {"gaussian": 6 + 2, "signs": 6, "sphere": 6}[name]
    np.testing.assert_allclose((g**2).sum(1).mean() / (slope @ slope), times, rtol=0.05)


@pytest.mark.parametrize("two_sided", [True, False])
def test_engines_give_equal_numbers(two_sided):
    with jax.enable_x64(True):
        params = few(dtype="float64")
        options = {"num_directions": 4, "two_sided": two_sided, "matrix_axes": FEW_AXES}
        g, state = estimated(rough, params, steps=2, **options)
        for engine in (zo.vmapped(), zo.chunked(2)):
            other, theirs = estimated(rough, params, steps=2, engine=engine, **options)
            np.testing.assert_allclose(entries(other), entries(g), rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(theirs.losses, state.losses, rtol=1e-14)


def test_the_average_of_directions_is_that_of_single_ones():
    params = tree()
    draws = [tree(seed) for seed in (3, 4)]
    both = jax.tree.map(lambda *z: jnp.stack(z), *draws)
    g, _ = estimated(rough, params, num_directions=2, draws=both)
    single = [estimated(rough, params, draws=jax.tree.map(lambda z: z[None], z))[0] for z in draws]
    mean = (entries(single[0]) + entries(single[1])) / 2
    np.testing.assert_allclose(entries(g), mean, rtol=1e-5, atol=1e-4)


def test_evaluation_and_update_draw_the_same():
    # <s, z> is in the losses, z in the update: they must belong together.
    with jax.enable_x64(True):
        params = tree(dtype="float64")
        g, state = estimated(linear(params), params, eps=0.5)
        difference = state.losses[0] - state.losses[1]
        z = entries(g) / difference
        np.testing.assert_allclose(entries(params) @ z, difference, rtol=1e-10)


def test_draws_of_the_update_may_be_others():
    params, first, second = tree(), tree(3), tree(4)
    draws = zo.Draws(*(jax.tree.map(lambda z: z[None], z) for z in (first, second)))
    g, _ = estimated(linear(params), params, draws=draws, eps=0.5)
    slope = entries(params) @ entries(first)
    np.testing.assert_allclose(entries(g), slope * entries(second), rtol=1e-3)


def test_steps_draw_anew_and_a_state_continues_its_run():
    params = tree()
    tx = zo.mezo(1e-3, key=KEY)
    ahead, state, _ = run(tx, params, rough, 2)
    whole, _, last = run(tx, params, rough, 3)
    restored = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state)  # as from a file
    again, _, updates = run(tx, ahead, rough, 1, state=restored)
    np.testing.assert_array_equal(entries(updates), entries(last))
    np.testing.assert_array_equal(entries(again), entries(whole))
    assert (entries(run(tx, params, rough, 1)[2]) != entries(last)).all()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_loss_that_is_not_finite_counts_as_zero_and_is_counted(bad):
    params = {"w": jnp.zeros(3)}
    draws = {"w": jnp.array([[1.0, 0, 0], [0, 1.0, 0]])}

    def loss(p):
        return jnp.sum(2 * p["w"]) + jnp.where(p["w"][1] > 0, bad, 0.0)

    tx = optax.chain(zo.estimate(num_directions=2, eps=0.5, key=KEY), optax.adam(0.1))
    params, state, _ = run(tx, params, loss, 3, draws=draws)
    assert probe_state(state).notfinite_count == 3
    moved = entries(params)
    assert np.isfinite(moved).all() and moved[0] < -0.2 and not moved[1:].any()
    np.testing.assert_allclose(state[1][0].mu["w"], [2 / 2 * (1 - 0.9**3), 0, 0], rtol=1e-5)


def test_only_trainable_leaves_move():
    params, mask = tree(), {name: name == "kernel" for name in AXES}
    g, _ = estimated(rough, params, trainable=mask)
    assert all(bool(g[name].any()) == mask[name] for name in g)
    # As if the others did not exist.
    rest = {name: x for name, x in params.items() if name != "kernel"}
    tx = zo.estimate(key=KEY, matrix_axes={"kernel": AXES["kernel"]})
    inner = {"kernel": params["kernel"]}
    _, _, alone = run(tx, inner, lambda p: rough({**rest, **p}), 1)
    np.testing.assert_allclose(alone["kernel"], g["kernel"], rtol=1e-3)


def test_in_front_of_a_partition_and_behind_one():
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    labels = {"a": "moves", "b": "stays"}
    rules = {"moves": optax.sgd(0.1), "stays": optax.set_to_zero()}
    mask = {"a": True, "b": False}
    front = optax.chain(zo.estimate(key=KEY, trainable=mask), optax.partition(rules, labels))
    wanted, _, _ = run(front, params, quadratic)
    assert (wanted["b"] == 1).all() and (wanted["a"] != 1).all()
    behind = optax.partition({**rules, "moves": zo.mezo(0.1, key=KEY)}, labels)

    def step(params, state, value_fn):
        updates, state = behind.update(params, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    state, found = behind.init(params), params
    for _ in range(3):
        found, state = step(found, state, zo.fill_masked(quadratic, found))
    np.testing.assert_allclose(entries(found), entries(wanted), rtol=1e-3)
    with pytest.raises(ValueError, match=r"chain\(zeroth_order.estimate\(..., trainable=mask\)"):
        step(params, behind.init(params), quadratic)
    masked = optax.masked(zo.mezo(0.1, key=KEY), mask)
    with pytest.raises(ValueError, match=r"fill_masked\(value_fn, params\)"):
        masked.update(params, masked.init(params), params, value_fn=quadratic)


def test_one_perturbed_copy_and_nothing_else_of_the_size_of_the_parameters():
    n = 512
    params = {"w": jnp.ones((n, n))}
    tx = zo.mezo(1e-6, key=KEY, probes=zo.Probes(zo.signs()))

    def loss(params):  # a product needs its operand whole
        return jnp.mean(jnp.tanh(jnp.ones((4, n)) @ params["w"]))

    def step(params, state):
        updates, state = tx.update(None, state, params, value_fn=loss)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params))
    memory = lowered.compile().memory_analysis()
    # Without the barrier the draw leaves the loop over +eps and -eps: twice as much.
    assert memory.temp_size_in_bytes < 1.2 * params["w"].nbytes
    assert memory.alias_size_in_bytes >= params["w"].nbytes


BAD = {
    "no loss": (dict(value_fn=None), r"value_fn=value_fn\)"),
    "a vector": (dict(value_fn=lambda p: p["w"]), "value_fn: got .*wanted one floating-point"),
    "an integer": (dict(value_fn=lambda p: jnp.sum(p["w"] > 0)), "wanted one floating-point"),
    "values": (dict(value_fn=lambda p: float(p["w"][0])), "value_fn cannot be traced by jax"),
    "half": (dict(value_fn=lambda p: p["w"].sum().astype("bfloat16")), "the loss is bfloat16"),
    "draws": (
        dict(value_fn=quadratic, draws={"w": jnp.zeros(3)}),
        r"draws.evaluation of leaf \['w'\]: got \(3,\), wanted \(1, 3\)",
    ),
    "losses": (dict(losses=jnp.zeros(3)), r"losses: got shape \(3,\), wanted \(2,\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_updates(case):
    given, message = BAD[case]
    params, tx = {"w": jnp.ones(3)}, zo.mezo(0.1, key=KEY)
    with pytest.raises(ValueError, match=message):
        tx.update(None, tx.init(params), params, **given)


def test_parameters_are_needed():
    tx = zo.estimate(key=KEY)
    with pytest.raises(ValueError, match="the parameters is missing|params"):
        tx.update(None, tx.init({"w": jnp.ones(3)}), value_fn=quadratic)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_of_other_generators_are_refused(impl):
    tx = zo.estimate(key=jax.random.key(0, impl=impl))
    with pytest.raises(ValueError, match="wanted 'threefry2x32'"):
        tx.init({"w": jnp.ones(3)})


def test_an_epsilon_that_the_parameters_cannot_hold():
    tx = zo.estimate(key=KEY)
    with pytest.raises(ValueError, match=r"leaf \['w'\] is bfloat16, .* -0.9 decimal digits"):
        tx.init({"w": jnp.ones(3, "bfloat16")})
    zo.estimate(eps=1e-1, key=KEY).init({"w": jnp.ones(3, "bfloat16")})
    for eps in (0.0, -1.0, np.inf, np.nan, "x", None):
        with pytest.raises(ValueError, match="eps: got"):
            zo.estimate(eps=eps, key=KEY).init({"w": jnp.ones(3)})


def test_two_leaves_that_would_draw_the_same():
    from jax.tree_util import register_pytree_with_keys_class

    @register_pytree_with_keys_class
    class Twins:
        def __init__(self, *leaves):
            self.leaves = leaves

        def tree_flatten_with_keys(self):
            return [(jax.tree_util.GetAttrKey("x"), leaf) for leaf in self.leaves], None

        @classmethod
        def tree_unflatten(cls, _, leaves):
            return cls(*leaves)

    with pytest.raises(ValueError, match="would draw the same noise"):
        zo.estimate(key=KEY).init(Twins(jnp.ones(2), jnp.ones(2)))


def test_numbers_that_decide_shapes():
    for number in (0, 1.5, True, None):
        with pytest.raises(ValueError, match="num_directions is"):
            zo.estimate(num_directions=number, key=KEY)
    with pytest.raises(ValueError, match=r'static_args=\("num_directions",\)'):
        optax.inject_hyperparams(zo.estimate)(num_directions=2, key=KEY).init({"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"3 directions do not divide into chunked\(2\)"):
        zo.estimate(num_directions=3, engine=zo.chunked(2), key=KEY)
    with pytest.raises(ValueError, match="chunked: got size 0"):
        zo.chunked(0)


def test_importing_the_library_finds_it():
    assert jol.zeroth_order.mezo is zo.mezo


def test_arguments_of_another_kind():
    params = {"w": jnp.ones(3)}
    for key in (0, None, "0", jnp.zeros(2)):
        with pytest.raises(ValueError, match="key: got .* wanted a key"):
            zo.estimate(key=key).init(params)
    for options in ({"sampler": zo.gaussian}, {"engine": "vmapped"}, {"two_sided": "no"}):
        with pytest.raises(ValueError, match=f"Probes.{next(iter(options))}: got"):
            zo.Probes(**options)
    tx = zo.estimate(num_directions=2, key=KEY)
    with pytest.raises(ValueError, match=r"draws.evaluation of leaf \['w'\]: got \(1, 3\)"):
        tx.update(None, tx.init(params), params, value_fn=quadratic, draws={"w": jnp.ones((1, 3))})
    with pytest.raises(ValueError, match="value_fn: got 3.0, wanted a function"):
        tx.update(None, tx.init(params), params, value_fn=3.0)
    with pytest.raises(ValueError, match="value_fn cannot be traced by jax"):
        tx.update(None, tx.init(params), params, value_fn=lambda p: np.sum(np.asarray(p["w"])))
    listed, _ = tx.update(None, tx.init(params), params, losses=[1.0, 0.0, 1.0, 0.0])
    assert listed["w"].any()
    for options in ({"policy_std": 0.0}, {"policy_std": np.nan}, {"start_sign": "x"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: got"):
            zo.ldsd(optax.sgd(0.1), key=KEY, **options)
    with pytest.raises(ValueError, match="learning_rate: got None"):
        zo.subspace_muon(None, key=KEY)
