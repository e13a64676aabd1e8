"""Shampoo on eight devices: same values, stable layouts, and a budget of collectives."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

import jaxopt_lab as jol
from jaxopt_lab.optim import ShampooState
from jaxopt_lab.report.hlo import collectives
from tests.golden.trajectory import find_states
from tests.quick_compile import NEW_EMITTERS

AXES = {
    "stack": MuonDimensionNumbers(1, 2),  # (layers, m, n)
    "heads": MuonDimensionNumbers(0, (1, 2)),  # (d, heads, head_dim)
    "bias": None,
}
SHAPES = {"stack": (3, 16, 24), "heads": (16, 8, 2), "bias": (16,)}
# Blocks of 8: two by three of them in a layer of the stack.
BLOCKS = jol.InverseRoot(max_precond_dim=8)
OPTIONS = {"weight_decay": 0.1, "inverse_root": BLOCKS, "eps": 1e-6}

LAYOUTS = {
    "rows": ({"fsdp": 8}, {"stack": P(None, "fsdp"), "heads": P("fsdp"), "bias": P("fsdp")}),
    "both": (
        {"fsdp": 2, "tensor": 4},
        {"stack": P(None, "fsdp", "tensor"), "heads": P("fsdp", "tensor"), "bias": P()},
    ),
}
CASES = [("rows", AxisType.Auto), ("both", AxisType.Explicit)]


def setup(layout, kind):
    sizes, specs = LAYOUTS[layout]
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))
    return mesh, {k: NamedSharding(mesh, s) for k, s in specs.items()}


def random_tree(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {k: jax.random.normal(key, s) for key, (k, s) in zip(keys, SHAPES.items(), strict=True)}


def make(shardings, **options):
    mesh = jol.MeshWork(shardings)
    return jol.shampoo(1e-2, matrix_axes=AXES, mesh=mesh, **OPTIONS, **options)


def step(tx):
    def run(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return run


@functools.cache
def single_device(frequency):
    tx = make(None, precondition_frequency=frequency)
    return tx, jax.jit(step(tx))


@functools.cache
def compile_on(layout, kind):
    mesh, shardings = setup(layout, kind)
    tx = make(shardings, precondition_frequency=2)
    with jax.set_mesh(mesh):
        params = jax.device_put(random_tree(0), shardings)
        placed = jol.state_shardings(tx, params, shardings)
        state = jax.jit(tx.init, out_shardings=placed)(params)
        compiled = jax.jit(step(tx), out_shardings=(shardings, placed))
        compiled = compiled.lower(params, state, params).compile()
    return compiled, params, state, shardings, placed


@pytest.mark.parametrize(("layout", "kind"), CASES, ids=str)
def test_equals_one_device_within_its_budget(layout, kind):
    compiled, params, state, shardings, placed = compile_on(layout, kind)
    tx, alone = single_device(2)
    expected, expected_state = random_tree(0), tx.init(random_tree(0))
    for t in range(3):  # the graft alone, the first roots, kept roots
        grads = random_tree(1 + t)
        expected, expected_state = alone(expected, expected_state, grads)
        params, state = compiled(params, state, jax.device_put(grads, shardings))
    chex.assert_trees_all_close(*map(jax.device_get, (params, expected)), atol=1e-5)
    chex.assert_trees_all_close(*map(jax.device_get, (state, expected_state)), rtol=2e-3, atol=1e-4)
    (found,) = find_states(placed, ShampooState)
    sharded = P(None, None, *LAYOUTS[layout][0])
    assert found.factors[0]["stack"].spec == found.roots[1]["stack"].spec == sharded
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x, placed)

    text = compiled.as_text()
    assert "while(" in text
    counts = {name: entry[0] for name, entry in collectives(text).items()}
    # A leaf is exchanged as gradient, average, graft and direction, either factor as a Gram matrix
    # and a root; a refresh exchanges the factors of all leaves of one layout, old roots and new.
    layouts, axes = 2, len(LAYOUTS[layout][0])
    assert set(counts) <= {"all-to-all", "all-reduce"}, counts
    assert counts["all-to-all"] <= axes * (8 * layouts + 3)
    # What is reduced are the sums of squares: one number a matrix.
    reduced = re.findall(r"= \(?(f32\[[\d,]*\])[^=]* all-reduce\(", text)
    assert reduced and all(x in ("f32[1,1,1]", "f32[3,1,1]", "f32[3]", "f32[]") for x in reduced)


def test_replicated_roots_are_repeated_or_shared():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shardings = {"stack": NamedSharding(mesh, P())}
    params, grads = ({"stack": random_tree(seed)["stack"]} for seed in (0, 1))
    results = {}
    for choice in ("repeat", "share"):
        tx = jol.scale_by_shampoo(
            precondition_frequency=1,
            inverse_root=BLOCKS,
            matrix_axes=MuonDimensionNumbers(1, 2),
            mesh=jol.MeshWork(shardings, choice),
        )
        with jax.set_mesh(mesh):
            params = jax.device_put(params, shardings)
            state = tx.init(params)
            lowered = jax.jit(step(tx)).lower(params, state, params)
            compiled = lowered.compile(compiler_options=NEW_EMITTERS)
            results[choice] = jax.device_get(
                compiled(params, state, jax.device_put(grads, shardings))[0]
            )
        gathers = collectives(compiled.as_text()).get("all-gather", (0,))[0]
        assert gathers == (1 if choice == "share" else 0)
    chex.assert_trees_all_close(results["repeat"], results["share"], atol=1e-6)


def test_one_bad_layer_stays_alone_on_a_mesh():
    compiled, params, state, shardings, _ = compile_on("both", AxisType.Explicit)
    grads = random_tree(1)
    grads["stack"] = grads["stack"].at[1, 3, 5].set(jnp.nan)
    new, state = compiled(params, state, jax.device_put(grads, shardings))
    (found,) = find_states(state, ShampooState)
    assert found.notfinite_count["stack"].tolist() == [0, 1, 0]
    same = np.asarray(new["stack"] == random_tree(0)["stack"]).all(axis=(1, 2))
    assert same.tolist() == [False, True, False]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state)))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_stack_split_between_matrices_needs_no_collective(kind):
    mesh = jax.make_mesh((4,), ("f",), axis_types=(kind,), devices=jax.devices()[:4])
    shardings = {"w": NamedSharding(mesh, P("f"))}
    tx = jol.shampoo(
        1e-2,
        matrix_axes=MuonDimensionNumbers((1,), (2,)),
        precondition_frequency=2,
        mesh=jol.MeshWork(shardings),
    )
    alone = jol.shampoo(
        1e-2, matrix_axes=MuonDimensionNumbers((1,), (2,)), precondition_frequency=2
    )
    grads = jax.random.normal(jax.random.key(0), (3, 4, 8, 8))
    grads *= jnp.array([1, 1e-3, 1, 1e3])[:, None, None]  # each stops its iteration by itself
    params = {"w": grads[0]}
    expected, expected_state = params, alone.init(params)
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings)
        placed = jol.state_shardings(tx, params, shardings)
        state = jax.jit(tx.init, out_shardings=placed)(params)
        compiled = jax.jit(step(tx), out_shardings=(shardings, placed))
        compiled = compiled.lower(params, state, params).compile()
        for g in grads:
            params, state = compiled(params, state, jax.device_put({"w": g}, shardings))
    for g in grads:
        expected, expected_state = jax.jit(step(alone))(expected, expected_state, {"w": g})
    assert "while(" in compiled.as_text()
    assert not collectives(compiled.as_text())
    chex.assert_trees_all_close(*map(jax.device_get, (params, expected)), atol=1e-5)
    (found,) = find_states(state, ShampooState)
    assert found.roots[0]["w"].sharding.spec[0] == "f"
