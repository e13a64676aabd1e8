"""The contract of the optimizers of adapters, on trees of pairs, weights and other leaves."""

import functools

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_lab as jol
from jaxopt_lab import lora
from jaxopt_lab.lora import Tap

N, M, R, ROWS = 16, 8, 2, 24

FACTORIES = {
    "weight_lora": (lora.weight_lora, {"learning_rate": 1e-2, "keep": 3}),
    "weight_lora_plus": (lora.weight_lora_plus, {"learning_rate": 1e-2}),
    "lorsum": (lora.lorsum, {"learning_rate": 1e-2, "momentum": 0.9, "clip": 1.0}),
    "scaled_lorsum": (lora.scaled_lorsum, {"learning_rate": 0.2}),
    "projected_lorsum": (lora.projected_lorsum, {"learning_rate": 1e-2}),
    "extrapolated_lorsum": (lora.extrapolated_lorsum, {"learning_rate": 1e-2}),
    "preconditioned": (lora.preconditioned, {"learning_rate": 1e-2}),
    "lora_plus": (lora.lora_plus, {"learning_rate": 1e-2}),
    "lora_fa": (lora.lora_fa, {"learning_rate": 1e-2}),
}
# Integers that decide how many rounds there are.
STATIC = {"weight_lora_plus": ("every", "halvings")}
every = pytest.mark.parametrize("name", FACTORIES)
# One of each way to move: compiled in several programs.
some = pytest.mark.parametrize(
    "name", ["weight_lora", "scaled_lorsum", "projected_lorsum", "preconditioned"]
)


def test_every_optimizer_is_here():
    others = {"difference", "effective", "fold", "grow", "init", "joined_taps", "load", "merge"}
    others |= {"prune", "resolve", "save", "select_and_grow", "selection", "side", "unmerge"}
    others |= {"shardings", "pairwise", "with_rest"}
    others |= {"spec_from_json", "spec_to_json", "value_grad_and_taps"}
    others |= {"loss_beside", "with_taps"}
    # A direction, for trees of pairs alone.
    others |= {"scale_by_preconditioned"}
    names = {n for n in lora.__all__ if callable(getattr(lora, n)) and n.islower()}
    assert names - others == set(FACTORIES)


def draw(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), dtype)


def adapters(dtype="float32"):
    """Two layers of two projections that share inputs, a single kernel, and a head."""
    tree = {
        "stack": {"a": draw(4, N, R), "b": draw(4, R, M), "weight": jnp.ones(4)},
        "one": {"a": draw(N, R), "b": draw(R, M), "weight": jnp.ones(())},
        "head": draw(5),
    }
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def gradients(params, seed=1):
    return jax.tree.map(lambda p: draw(*p.shape, seed=seed, dtype=p.dtype), params)


def taps(seed=1, dtype="float32"):
    drawn = functools.partial(draw, seed=seed, dtype=dtype)
    return {
        "stack": Tap(drawn(2, ROWS, N), drawn(4, ROWS, M) / ROWS, 1.5),
        "one": Tap(drawn(ROWS, N), drawn(ROWS, M) / ROWS, 2.0),
    }


@functools.cache
def make(name):
    factory, kwargs = FACTORIES[name]
    return factory(**kwargs)


def step_of(tx):
    def step(grads, taps, state, params):
        updates, state = tx.update(grads, state, params, taps=taps, value=1.0, unknown=2)
        return updates, optax.apply_updates(params, updates), state

    return step


@functools.cache
def compiled(name):
    return jax.jit(step_of(make(name)))


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@every
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_three_steps(name, dtype):
    params, tx = adapters(dtype), make(name)
    state, start = tx.init(params), params
    before, moved = types(state), []
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    assert all(x.dtype != jnp.bfloat16 for x in jax.tree.leaves(state) if dtype == "float32")
    for t in range(3):
        grads = gradients(params, seed=t)
        updates, params, state = compiled(name)(grads, taps(t, dtype), state, params)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, params, state)))
        assert types(state) == before and types(updates) == types(params) == types(start)
        moved.append([bool(u.any()) for u in jax.tree.leaves(updates)])
    still = [not any(column) for column in zip(*moved, strict=True)]
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    frozen = {p for p, s in zip(paths, still, strict=True) if s}
    assert frozen == ({"['one']['a']", "['stack']['a']"} if name == "lora_fa" else set())


@every
def test_what_is_not_finite_is_refused(name):
    params = adapters()
    state, tx = make(name).init(params), compiled(name)
    _, params, state = tx(gradients(params), taps(), state, params)
    bad_taps, bad = taps(2), gradients(params, 2)
    one = bad_taps["one"]
    bad_taps["one"] = Tap(one.x.at[3, 2].set(jnp.inf), one.s, one.scale)
    bad["one"]["b"] = bad["one"]["b"].at[0, 0].set(jnp.nan)
    bad["head"] = bad["head"].at[1].set(jnp.nan)
    updates, after, new = tx(bad, bad_taps, state, params)
    for tree in (updates, after, new):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(tree))
    assert updates["one"]["b"][0, 0] == 0 and updates["head"][1] == 0
    assert updates["stack"]["b"].any() and updates["head"][0] != 0
    updates, _, _ = tx(gradients(params, 3), taps(3), new, after)
    assert updates["one"]["b"].any() and updates["head"][1] != 0


@some
def test_scan_equals_loop_and_traces_once(name):
    params, tx = adapters(), make(name)
    stream = [(gradients(params, t), taps(t)) for t in range(3)]
    chex.clear_trace_counter()
    one = jax.jit(chex.assert_max_traces(step_of(tx), n=1), donate_argnums=(2, 3))
    state = jax.tree.map(jnp.copy, tx.init(params))
    p = jax.tree.map(jnp.copy, params)
    for grads, tap in stream:
        _, p, state = one(grads, tap, state, p)

    def body(carry, given):
        _, q, s = step_of(tx)(*given, carry[1], carry[0])
        return (q, s), None

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *stream)
    (q, s), _ = jax.jit(lambda c, x: jax.lax.scan(body, c, x))((params, tx.init(params)), stacked)
    chex.assert_trees_all_close((p, state), (q, s), rtol=1e-4, atol=1e-5)


@some
def test_vmap_over_members(name):
    params, tx = adapters(), make(name)
    members = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    stream = jax.tree.map(
        lambda *x: jnp.stack(x), *((gradients(params, t), taps(t)) for t in range(2))
    )

    def body(carry, given):
        _, p, state = step_of(tx)(*given, *carry)
        return (state, p), None

    def run(p):
        return jax.lax.scan(body, (tx.init(p), p), stream)[0][1]

    together = jax.jit(jax.vmap(run))(members)
    for i in range(2):
        one = jax.jit(run)(jax.tree.map(lambda x, i=i: x[i], members))
        got = jax.tree.map(lambda x, i=i: x[i], together)
        chex.assert_trees_all_close(got, one, rtol=1e-3, atol=1e-4)


@every
def test_abstract_init_injection_and_rank_promotion(name):
    params, tx = adapters(), make(name)
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    assert types(jax.eval_shape(tx.init, abstract)) == types(tx.init(params))
    factory, kwargs = FACTORIES[name]
    injected = optax.inject_hyperparams(factory, static_args=STATIC.get(name, ()))(**kwargs)
    state = jax.eval_shape(injected.init, params)
    with jax.numpy_rank_promotion("raise"):
        updates, _, after = jax.eval_shape(step_of(injected), params, taps(), state, params)
    assert types(updates) == types(params) and types(after) == types(state)
    scheduled = factory(
        **kwargs | {"learning_rate": optax.constant_schedule(kwargs["learning_rate"])}
    )
    grads = gradients(params)
    _, one, _ = jax.jit(step_of(scheduled))(grads, taps(), scheduled.init(params), params)
    _, two, _ = compiled(name)(grads, taps(), tx.init(params), params)
    chex.assert_trees_all_close(one, two, rtol=1e-5, atol=1e-6)


@every
def test_a_gradient_of_another_shape_is_named(name):
    params, tx = adapters(), make(name)
    for entry in ("head", "one", "stack"):
        bad = gradients(params)
        bad[entry] = jax.tree.map(lambda g: g[None], bad[entry])  # would be broadcast
        with pytest.raises(ValueError, match=rf"gradient of leaf \['{entry}'\].*: got shape \(1, "):
            jax.eval_shape(lambda g: tx.update(g, tx.init(params), params, taps=taps()), bad)


@every
def test_state_can_be_written_and_described(name):
    params, tx = adapters(), make(name)
    state = tx.init(params)
    read = flax.serialization.from_bytes(
        jax.tree.map(jnp.zeros_like, state), flax.serialization.to_bytes(state)
    )
    jax.tree.map(np.testing.assert_array_equal, read, state)
    table = jol.describe(tx, params)
    assert len(table.rows) == len(jax.tree.leaves(params)) and all(r.rule for r in table.rows)
    assert table.total_bytes == sum(x.nbytes for x in jax.tree.leaves(state))
    rules = {row.path: row.rule for row in table.rows}
    if name != "lora_fa":
        assert rules["['stack']['a']"] == "pairs" or name == "preconditioned", rules
    assert rules["['head']"] == "adamw"


SPECS = {
    "stack": {"a": P(None, "fsdp"), "b": P(None, None, "tensor"), "weight": P()},
    "one": {"a": P("fsdp"), "b": P(None, "tensor"), "weight": P()},
    "head": P(),
}


@some
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_eight_devices_equal_one(name, kind):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(getattr(AxisType, kind),) * 2)
    params, tx = adapters(), make(name)
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), SPECS)
    placed = jol.state_shardings(tx, params, shardings)
    state = tx.init(params)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        if leaf.ndim >= 2 and leaf.shape[-2:] == (N, R):
            assert "fsdp" in sharding.spec, sharding
        if leaf.ndim >= 2 and leaf.shape[-2:] == (R, M):
            assert "tensor" in sharding.spec, sharding
    rows = [NamedSharding(mesh, spec) for spec in (P(None, "fsdp"), P("fsdp"))]

    def on_mesh(tree):
        def place(x):
            return jax.device_put(x, rows[int(x.ndim == 2)]) if jnp.ndim(x) else x

        return jax.tree.map(place, tree)

    with jax.set_mesh(mesh):
        p, s = jax.device_put(params, shardings), jax.device_put(state, placed)
        step = jax.jit(step_of(tx), out_shardings=(shardings, shardings, placed))
        for t in range(2):
            grads = jax.device_put(gradients(params, t), shardings)
            _, p, s = step(grads, on_mesh(taps(t)), s, p)
    q, r = params, state
    for t in range(2):
        _, q, r = compiled(name)(gradients(params, t), taps(t), r, q)
    host = jax.tree.map(np.asarray, (p, s))
    chex.assert_trees_all_close(host, jax.tree.map(np.asarray, (q, r)), rtol=2e-4, atol=2e-5)
