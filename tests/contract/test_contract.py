"""What every first-order optimizer of the library promises, beyond Optax's own suite."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_lab as jol
from tests.contract.optimizers import OPTIMIZERS
from tests.contract.trees import TREES, plain

TWO_STEPS = jol.NewtonSchulz(steps=2)
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def options(name):
    entry = OPTIMIZERS[name]
    # Two iterations compile in half the time and obey the same contract.
    takes_newton_schulz = "newton_schulz" in inspect.signature(entry.factory).parameters
    return entry.kwargs | ({"newton_schulz": TWO_STEPS} if takes_newton_schulz else {})


@functools.cache
def make(name):
    return OPTIMIZERS[name].factory(**options(name))


@functools.cache
def compiled_step(name):
    """One jitted step an optimizer, shared by the tests that do not look at compilation."""
    return jax.jit(step(make(name)))


def gradients(params, seed=1):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), max(len(leaves), 1))
    drawn = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=False)]
    return treedef.unflatten(drawn)


def step(tx):
    def run(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return run


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def finite(tree):
    return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(tree))


@every_optimizer
def test_init_accepts_abstract_parameters(name):
    params, tx = plain(), make(name)
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    assert types(jax.eval_shape(tx.init, abstract)) == types(tx.init(params))
    assert types(tx.init(abstract)) == types(tx.init(params))


@every_optimizer
def test_state_is_arrays_of_stable_type(name):
    params, tx = plain(), make(name)
    state = tx.init(params)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    _, new = jax.eval_shape(step(tx), params, state, params)
    assert types(new) == types(state)


@every_optimizer
def test_trees_of_every_library(name):
    # In one tree: matrices of one shape are compiled once.
    params, tx = {library: tree() for library, tree in TREES.items()}, make(name)
    # Twice: some methods only look at the first gradient.
    new, state = compiled_step(name)(params, tx.init(params), gradients(params))
    new, _ = compiled_step(name)(new, state, gradients(params, seed=2))
    chex.assert_trees_all_equal_structs(new, params)
    assert finite(new)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), new, params)
    assert all(jax.tree.leaves(moved))


@every_optimizer
def test_scan_equals_loop_without_retracing(name):
    params, tx = plain(), make(name)
    stream = jax.tree.map(lambda p: jax.random.normal(jax.random.key(2), (4, *p.shape)), params)
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(step(tx), n=1)
    # Donation: the buffers of the previous step are given away.
    one = jax.jit(traced, donate_argnums=(0, 1))
    p, s = jax.tree.map(jnp.copy, (params, tx.init(params)))
    for i in range(4):
        p, s = one(p, s, jax.tree.map(lambda g, i=i: g[i], stream))

    def body(carry, g):
        return step(tx)(*carry, g), None

    (q, r), _ = jax.jit(lambda c, g: jax.lax.scan(body, c, g))((params, tx.init(params)), stream)
    chex.assert_trees_all_close((p, s), (q, r), rtol=1e-5, atol=1e-6)


@every_optimizer
def test_vmap_over_members_with_shared_counters(name):
    params, tx = plain(), make(name)
    members = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    # Each its own: in the eigenbases of one gradient, the same one again is rounding outside of
    # the diagonal, which a normalised direction brings to full size.
    three = jax.tree.map(lambda p: jax.ShapeDtypeStruct((2, 3, *p.shape), p.dtype), params)
    stream = gradients(three)

    def run(p, stream):  # init inside, so that no counter is batched
        scanned = jax.lax.scan(lambda c, g: (step(tx)(*c, g), None), (p, tx.init(p)), stream)
        return scanned[0][0]

    together = jax.jit(jax.vmap(run))(members, stream)
    for i in range(2):
        one = jax.jit(run)(*jax.tree.map(lambda x, i=i: x[i], (members, stream)))
        # bfloat16 products of a batch and of one matrix may be summed in another order.
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=i: x[i], together), one, rtol=1e-3, atol=1e-3
        )


@every_optimizer
def test_zero_gradient_leaves_parameters_alone(name):
    params, tx = plain(), make(name)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state, p = tx.init(params), params
    for _ in range(3):
        p, state = compiled_step(name)(p, state, zeros)
    chex.assert_trees_all_equal(p, params)


@every_optimizer
def test_empty_trees_and_odd_leaves(name):
    tx = make(name)
    for params in ({}, {"none": jnp.zeros((0, 4)), "vector": jnp.ones(3), "row": jnp.ones((1, 5))}):
        new, _ = compiled_step(name)(params, tx.init(params), params)
        assert types(new) == types(params) and finite(new)


@every_optimizer
def test_masked_leaves_are_untouched(name):
    params = plain()
    mask = jax.tree_util.tree_map_with_path(lambda p, _: "scale" not in str(p), params)
    tx = optax.masked(make(name), mask)
    grads = gradients(params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert updates["scale"] == grads["scale"]
    bare, _ = compiled_step(name)(params, make(name).init(params), grads)
    for key in ("embedding", "layers"):
        moved = jax.tree.map(jnp.add, params[key], updates[key])
        chex.assert_trees_all_close(moved, bare[key], rtol=1e-5, atol=1e-6)


@every_optimizer
def test_chain_and_schedule(name):
    params, numbers = plain(), options(name)
    rate = optax.constant_schedule(numbers.pop("learning_rate"))
    scheduled = OPTIMIZERS[name].factory(rate, **numbers)
    tx = optax.chain(optax.clip_by_global_norm(0.5), scheduled, optax.identity())
    grads = gradients(params)
    a, _ = jax.jit(step(tx))(params, tx.init(params), grads)
    norm = optax.tree.norm(grads)
    clipped = jax.tree.map(lambda g: g * 0.5 / norm, grads)
    b, _ = compiled_step(name)(params, make(name).init(params), clipped)
    chex.assert_trees_all_close(a, b, rtol=1e-3, atol=1e-5)  # bfloat16 sees the rounded clip


@every_optimizer
def test_every_state_leaf_has_the_sharding_of_its_parameter(name):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    params, tx = {"kernel": jnp.ones((16, 8)), "bias": jnp.zeros(8)}, make(name)
    specs = {"kernel": P("fsdp"), "bias": P()}
    shardings = {k: NamedSharding(mesh, s) for k, s in specs.items()}
    placed = jol.state_shardings(tx, params, shardings)
    state = tx.init(params)
    chex.assert_trees_all_equal_structs(
        jax.tree.map(lambda _: 0, placed), jax.tree.map(lambda _: 0, state)
    )
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True)
    for leaf, sharding in pairs:
        if leaf.ndim > 1 and leaf.shape[-1] == leaf.shape[-2]:  # a factor, or what comes of one
            assert "fsdp" in sharding.spec[-2:], leaf.shape
        else:
            assert sharding.spec == (specs["kernel"] if leaf.shape == (16, 8) else P())
    made = jax.jit(tx.init, out_shardings=placed)(jax.device_put(params, shardings))
    assert all(len(x.devices()) == 8 for x in jax.tree.leaves(made))


def test_describe_names_every_leaf_and_counts_every_byte():
    params = plain()
    for name in OPTIMIZERS:
        table = jol.describe(make(name), params)
        state = make(name).init(params)
        assert table.total_bytes == sum(x.nbytes for x in jax.tree.leaves(state))
        assert len(table.rows) == len(jax.tree.leaves(params))
        assert sum(r.state_bytes for r in table.rows) == table.total_bytes - table.shared_bytes
        assert np.all([r.rule for r in table.rows])
