"""LionMuon on eight devices: same values, stable layouts, and a budget of collectives."""

import functools
import math

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
from jaxopt_lab.report.hlo import collectives

AXES = {
    "stack": MuonDimensionNumbers(1, 2),  # (layers, m, n)
    "qkv": MuonDimensionNumbers(1, 3),  # (layers, d, 3, d)
    "heads": MuonDimensionNumbers(0, (1, 2)),  # (d, heads, head_dim)
    "bias": None,
}
SHAPES = {"stack": (12, 16, 32), "qkv": (4, 16, 3, 16), "heads": (16, 4, 8), "bias": (16,)}

# name: mesh, specs, (sharded leaf, mesh axis) pairs: the budget is two all-to-alls for each.
LAYOUTS = {
    "fsdp on rows": (
        {"fsdp": 8},
        {"stack": P(None, "fsdp"), "qkv": P(None, "fsdp"), "heads": P("fsdp"), "bias": P("fsdp")},
        3,
    ),
    "fsdp on columns": (
        {"fsdp": 8},
        {
            "stack": P(None, None, "fsdp"),
            "qkv": P(None, None, None, "fsdp"),
            "heads": P("fsdp"),
            "bias": P(),
        },
        3,
    ),
    "fsdp x tensor": (
        {"fsdp": 2, "tensor": 4},
        {
            "stack": P(None, "fsdp", "tensor"),
            "qkv": P(None, "fsdp", None, "tensor"),
            "heads": P("fsdp", "tensor"),
            "bias": P("tensor"),
        },
        6,
    ),
    "both axes on one side": (
        {"fsdp": 2, "tensor": 4},
        {"stack": P(None, ("fsdp", "tensor")), "qkv": P(), "heads": P(), "bias": P()},
        1,
    ),
    "data x fsdp": (
        {"data": 2, "fsdp": 4},
        {"stack": P(None, "fsdp"), "qkv": P(None, "fsdp"), "heads": P("fsdp"), "bias": P()},
        3,
    ),
}
both_meshes = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def setup(layout, kind):
    sizes, specs, pairs = LAYOUTS[layout]
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))
    return mesh, {k: NamedSharding(mesh, s) for k, s in specs.items()}, pairs


def random_tree(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {k: jax.random.normal(key, s) for key, (k, s) in zip(keys, SHAPES.items(), strict=True)}


def make(shardings, replicated_work="repeat", **options):
    given = None if shardings is None else dict(shardings)
    return jol.lion_muon(
        1e-2,
        weight_decay=0.1,
        matrix_axes=AXES,
        newton_schulz=jol.NewtonSchulz(dtype="float32"),
        mesh=jol.MeshWork(given, replicated_work),
        **options,
    )


@functools.cache
def single_device_updates(**options):
    """The first updates on one device, which do not depend on the layout."""
    params, single = random_tree(0), make(None, **options)
    return jax.jit(single.update)(random_tree(1), single.init(params), params)[0]


def compile_step(tx, params, shardings):
    placed = jol.state_shardings(tx, params, shardings)
    state = jax.jit(tx.init, out_shardings=placed)(params)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, out_shardings=(shardings, placed)).lower(params, state, params)
    return compiled.compile(), state


def counts(compiled):
    return {kind: entry[0] for kind, entry in collectives(compiled.as_text()).items()}


@both_meshes
@every_layout
def test_spectral_step_equals_one_device_within_its_budget(layout, kind):
    mesh, shardings, pairs = setup(layout, kind)
    params, grads = random_tree(0), random_tree(1)
    with jax.set_mesh(mesh):
        on_mesh = jax.device_put(params, shardings)
        compiled, state = compile_step(make(shardings, period=1), on_mesh, shardings)
        new, new_state = compiled(on_mesh, state, jax.device_put(grads, shardings))
    expected = optax.apply_updates(params, single_device_updates(period=1))
    chex.assert_trees_all_close(*jax.device_get((new, expected)), atol=1e-6)
    before, after = (jax.tree.map(lambda x: x.sharding, s) for s in (state, new_state))
    chex.assert_trees_all_equal(before, after)
    found = counts(compiled)
    assert set(found) <= {"all-to-all"}, found
    assert found["all-to-all"] <= 2 * pairs


@both_meshes
def test_a_refused_matrix_is_known_wherever_its_parts_lie(kind):
    mesh, shardings, pairs = setup("fsdp x tensor", kind)
    params, grads = random_tree(0), random_tree(1)
    grads["stack"] = grads["stack"].at[3, 15, 31].set(jnp.nan)
    grads["heads"] = grads["heads"].at[0, 0, 0].set(1e25)
    with jax.set_mesh(mesh):
        on_mesh = jax.device_put(params, shardings)
        compiled, state = compile_step(make(shardings, period=1), on_mesh, shardings)
        new, new_state = compiled(on_mesh, state, jax.device_put(grads, shardings))
    assert counts(compiled) == {"all-to-all": 2 * pairs}
    family = jax.device_get(new_state.inner_states["lion_muon"].inner_state[0])
    assert family.notfinite_count["stack"].tolist() == [0] * 3 + [1] + [0] * 8
    assert family.notfinite_count["heads"] == 1 and not family.notfinite_count["qkv"].any()
    refused = np.zeros(12, bool)
    refused[3] = True
    assert (family.mu["stack"] == 0).all(axis=(1, 2)).tolist() == refused.tolist()
    still = np.asarray(new["stack"]) == np.asarray(params["stack"])
    assert still.all(axis=(1, 2)).tolist() == refused.tolist()
    np.testing.assert_array_equal(new["heads"], params["heads"])
    assert not family.mu["heads"].any()


@both_meshes
@every_layout
def test_sign_step_has_no_collective(layout, kind):
    mesh, shardings, _ = setup(layout, kind)
    params = random_tree(0)
    with jax.set_mesh(mesh):
        on_mesh = jax.device_put(params, shardings)
        compiled, _ = compile_step(make(shardings, period=math.inf), on_mesh, shardings)
    assert counts(compiled) == {}


def test_alternating_step_holds_both_branches_and_no_more():
    mesh, shardings, pairs = setup("fsdp x tensor", AxisType.Auto)
    with jax.set_mesh(mesh):
        on_mesh = jax.device_put(random_tree(0), shardings)
        compiled, _ = compile_step(make(shardings, period=2), on_mesh, shardings)
    assert counts(compiled) == {"all-to-all": 2 * pairs}
    assert "conditional(" in compiled.as_text()


def test_leaves_of_one_layout_share_their_exchange():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    params = {name: jnp.ones((16, 32)) for name in ("a", "b", "c")}
    shardings = dict.fromkeys(params, NamedSharding(mesh, P("fsdp")))
    tx = jol.lion_muon(1e-2, period=1, mesh=jol.MeshWork(shardings))
    compiled, _ = compile_step(tx, jax.device_put(params, shardings), shardings)
    assert counts(compiled) == {"all-to-all": 2}


@both_meshes
def test_replicated_work_is_repeated_or_shared_by_choice(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    shardings = {k: NamedSharding(mesh, P()) for k in SHAPES}
    params, grads = random_tree(0), random_tree(1)
    results, found, flops = {}, {}, {}
    for choice in ("repeat", "share"):
        tx = make(shardings, choice, period=1)
        with jax.set_mesh(mesh):
            on_mesh = jax.device_put(params, shardings)
            compiled, state = compile_step(tx, on_mesh, shardings)
            new, _ = compiled(on_mesh, state, jax.device_put(grads, shardings))
        results[choice], found[choice] = jax.device_get(new), counts(compiled)
        flops[choice] = compiled.cost_analysis()["flops"]
    assert found["repeat"] == {}
    assert found["share"] == {"all-gather": 2}  # one a matrix shape: 16 x 32 and 16 x 16
    assert flops["share"] < 0.5 * flops["repeat"]
    chex.assert_trees_all_close(results["repeat"], results["share"], atol=1e-6)


@both_meshes
def test_stable_rank_trigger_on_whole_matrices(kind):
    mesh, shardings, _ = setup("fsdp x tensor", kind)
    params, grads = random_tree(0), random_tree(1)
    low_rank = jnp.linspace(1, 2, 16)[:, None] * jnp.ones((16, 32))
    grads["stack"] = grads["stack"].at[::2].set(low_rank)
    options = {"stable_rank_threshold": 0.15}
    single = make(None, **options)
    expected, _ = jax.jit(single.update)(grads, single.init(params), params)
    with jax.set_mesh(mesh):
        on_mesh = jax.device_put(params, shardings)
        compiled, state = compile_step(make(shardings, **options), on_mesh, shardings)
        new, _ = compiled(on_mesh, state, jax.device_put(grads, shardings))
    updates = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), new, params)
    chex.assert_trees_all_close(updates, jax.device_get(expected), atol=1e-6)
    # Even layers have rank one and take spectral steps; odd ones take sign steps of the sign rate.
    moved = updates["stack"] + 5e-4 * 0.1 * np.asarray(params["stack"])
    by_sign = np.isclose(np.abs(moved), 5e-4, rtol=1e-2).all(axis=(1, 2))
    assert by_sign.tolist() == [False, True] * 6


def test_unknown_layout_is_an_error():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    params = {"w": jnp.ones((2, 8, 4, 4))}
    tx = jol.scale_by_lion_muon(
        period=1,
        matrix_axes=MuonDimensionNumbers(2, 3),
        mesh=jol.MeshWork({"w": NamedSharding(mesh, P(None, "fsdp"))}),
    )
    with pytest.raises(ValueError, match="first batch axis"):
        tx.update(params, tx.init(params))
