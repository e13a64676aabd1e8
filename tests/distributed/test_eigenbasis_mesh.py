"""SOAP and DyKAF on eight devices: same values, stable layouts, and a budget of collectives."""

import functools
import re

import chex
import jax
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

import jaxopt_lab as jol
from jaxopt_lab.optim import EigenbasisAdamState
from jaxopt_lab.report.hlo import collectives
from jaxopt_lab.report.traffic import traffic
from tests.golden.trajectory import find_states

AXES = {
    "stack": MuonDimensionNumbers(1, 2),  # (layers, m, n)
    "heads": MuonDimensionNumbers(0, (1, 2)),  # (d, heads, head_dim)
    "bias": None,
}
SHAPES = {"stack": (3, 16, 24), "heads": (16, 8, 2), "bias": (16,)}
LAYOUTS = {
    "rows": ({"fsdp": 8}, {"stack": P(None, "fsdp"), "heads": P("fsdp"), "bias": P("fsdp")}),
    "both": (
        {"fsdp": 2, "tensor": 4},
        {"stack": P(None, "fsdp", "tensor"), "heads": P("fsdp", "tensor"), "bias": P()},
    ),
}
METHODS = {"soap": jol.soap, "dykaf": jol.dykaf}
CASES = [
    ("soap", "rows", AxisType.Explicit),
    ("soap", "both", AxisType.Auto),
    ("dykaf", "rows", AxisType.Auto),
    ("dykaf", "both", AxisType.Explicit),
]
FREQUENCY = 2


def random_tree(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {k: jax.random.normal(key, s) for key, (k, s) in zip(keys, SHAPES.items(), strict=True)}


def make(method, shardings):
    return METHODS[method](
        1e-2,
        precondition_frequency=FREQUENCY,
        weight_decay=0.1,
        matrix_axes=AXES,
        eigenbasis=jol.Eigenbasis(rotation_precision="highest"),
        mesh=jol.MeshWork(shardings),
    )


def step(tx):
    def run(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return run


@functools.cache
def single_device(method):
    tx = make(method, None)
    return tx, jax.jit(step(tx))


@functools.cache
def history(method):
    """States of one device before and after each gradient, the factors of full rank at the end."""
    tx, alone = single_device(method)
    params = random_tree(0)
    states = [(params, tx.init(params))]
    for t in range(1, 6):
        states.append(alone(*states[-1], random_tree(t)))
    return jax.device_get(states)


@pytest.mark.parametrize(("method", "layout", "kind"), CASES, ids=str)
def test_equals_one_device_within_its_budget(method, layout, kind):
    sizes, specs = LAYOUTS[layout]
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))
    shardings = {k: NamedSharding(mesh, s) for k, s in specs.items()}
    tx = make(method, shardings)
    with jax.set_mesh(mesh):
        params = jax.device_put(random_tree(0), shardings)
        placed = jol.state_shardings(tx, params, shardings)
        state = jax.jit(tx.init, out_shardings=placed)(params)
        compiled = jax.jit(step(tx), out_shardings=(shardings, placed))
        compiled = compiled.lower(params, state, params).compile()

    # The start, a step with a refresh and one without, each from the state of one device.
    for t in (0, 2, 3, 4):
        before, after = history(method)[t], history(method)[t + 1]
        on_mesh = jax.device_put(before, (shardings, placed))
        got = compiled(*on_mesh, jax.device_put(random_tree(t + 1), shardings))
        chex.assert_trees_all_close(jax.device_get(got[0]), after[0], atol=2e-5)
        states = [find_states(state, EigenbasisAdamState) for state in (got[1], after[1])]
        for mine, wanted in zip(*states, strict=True):
            for name in ("age", "notfinite_count", "row_factor", "column_factor"):
                a, b = (jax.device_get(getattr(x, name)) for x in (mine, wanted))
                chex.assert_trees_all_close(a, b, rtol=1e-4, atol=1e-5)
        assert jax.tree.map(lambda x: x.sharding, got[1]) == placed

    (found,) = find_states(placed, EigenbasisAdamState)
    sharded = P(None, *LAYOUTS[layout][0])
    for field in (found.row_factor, found.column_factor, found.row_basis, found.column_basis):
        assert field["stack"].spec == sharded
    text = compiled.as_text()
    assert "while(" in text
    counts = {name: entry[0] for name, entry in collectives(text).items()}
    # Nothing is gathered. Exchanged are, a leaf and mesh axis: gradient, moments, factors, bases,
    # direction, moments and factors back; at a start the gradient, factors and bases, and these
    # back; and at a refresh both factors and bases, these and the orders back, moments, old and new
    # bases and orders, and the moments back.
    layouts, axes = 2, len(LAYOUTS[layout][0])
    assert set(counts) <= {"all-to-all", "all-reduce"}, counts
    assert counts["all-to-all"] <= axes * layouts * ((5 + 8) + 9 + 10 + 10)
    usual = traffic(text, rounds=0)["all-to-all"].count
    assert 0 < usual <= axes * layouts * (5 + 8), "what most steps exchange"
    # What is reduced is the largest entry: one number a matrix.
    reduced = re.findall(r"= \(?((?:f32|pred|s32)\[[\d,]*\])[^=]* all-reduce\(", text)
    assert all(re.fullmatch(r"\w+\[[\d,]{0,6}\]", x) for x in reduced), reduced


@pytest.mark.parametrize("stagger", [False, True])
def test_traced_numbers_on_an_explicit_mesh(stagger):
    names = ("stack", "bias")  # one matrix shape: the layouts are compared above
    sizes, specs = LAYOUTS["rows"]
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Explicit,))
    shardings = {k: NamedSharding(mesh, specs[k]) for k in names}
    factory = optax.inject_hyperparams(
        jol.dykaf, static_args=("matrix_axes", "precondition_frequency")
    )
    tx = factory(
        1e-2,
        precondition_frequency=FREQUENCY,
        matrix_axes={k: AXES[k] for k in names},
        eigenbasis=jol.Eigenbasis(stagger=stagger, rotation_precision="highest"),
    )
    update = jax.jit(step(tx))

    def draw(seed):
        tree = random_tree(seed)
        return {k: tree[k] for k in names}

    def run(placed):
        params = jax.device_put(draw(0), placed)
        state = jax.jit(tx.init)(params)
        for t in (1, 2, 3):
            params, state = update(params, state, jax.device_put(draw(t), placed))
        return jax.device_get(params)

    with jax.set_mesh(mesh):
        on_mesh = run(shardings)
    chex.assert_tree_all_finite(on_mesh)
    if not stagger:  # which matrix has its turn when depends on how they are distributed
        chex.assert_trees_all_close(on_mesh, run(None), atol=1e-4)
