"""What every zero-order method promises: types, compilation, trees, meshes, replays."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_lab as jol
from jaxopt_lab import zeroth_order as zo
from tests.contract.trees import TREES
from tests.zeroth_order.problems import KEY, entries, probe_state, quadratic, rough

TWO = jol.NewtonSchulz(steps=2, dtype="float32")


def ldsd_over_jaguar(learning_rate, *, key):
    base = optax.chain(
        zo.scale_by_coordinate_momentum(b1=0.5),
        optax.scale_by_sign(),
        optax.scale_by_learning_rate(learning_rate),
    )
    probes = zo.Probes(zo.sparse(params_ratio=0.5))
    return zo.ldsd(base, candidates=2, start="random", key=key, probes=probes)


# (factory, options); the rates are such that a quadratic shrinks.
METHODS = {
    "mezo": (zo.mezo, {"momentum": 0.5, "weight_decay": 0.1}),
    "low_rank": (zo.mezo, {"probes": zo.Probes(zo.low_rank(), num_directions=2)}),
    "zo_signsgd": (zo.zo_signsgd, {"b1": 0.5}),
    "zo_adamm": (zo.zo_adamm, {}),
    "zo_muon": (zo.zo_muon, {"newton_schulz": TWO}),
    "sampling_muon": (zo.sampling_muon, {}),
    "subspace_muon": (zo.subspace_muon, {"subspace": zo.Subspace(rank=1, newton_schulz=TWO)}),
    "conservative": (zo.conservative, {}),
    "forward_gradient": (zo.forward_gradient, {}),
    "jaguar_signsgd": (zo.jaguar_signsgd, {}),
    "jaguar_muon": (zo.jaguar_muon, {"newton_schulz": TWO}),
    "ldsd": (ldsd_over_jaguar, {}),
}
every_method = pytest.mark.parametrize("name", METHODS)
# Programs of few leaves compile quickly.
SMALL = {"w": 0.3 * jnp.ones((4, 3)), "b": jnp.zeros(3)}


def make(name, learning_rate=1e-2):
    factory, options = METHODS[name]
    return factory(learning_rate, key=KEY, **options)


def stepper(tx, loss=rough):
    def step(params, state):
        updates, state = tx.update(None, state, params, value_fn=loss)
        return optax.apply_updates(params, updates), state

    return step


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@every_method
def test_types_scan_donation_and_replay(name, tmp_path):
    params, tx = SMALL, make(name)
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    state = tx.init(params)
    assert types(jax.eval_shape(tx.init, abstract)) == types(state)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    assert probe_state(state).key.dtype == jnp.uint32
    chex.clear_trace_counter()
    one = jax.jit(chex.assert_max_traces(stepper(tx), n=1), donate_argnums=(0, 1))
    (p, s), losses = jax.tree.map(jnp.copy, (params, state)), []
    for _ in range(3):
        p, s = one(p, s)
        losses.append(jnp.copy(zo.recorded(s)))
    assert types(p) == types(params) and types(s) == types(state)
    assert all(np.isfinite(np.asarray(x, np.float64)).all() for x in jax.tree.leaves((p, s)))
    assert (entries(p) != entries(params)).any() and probe_state(s).count == 3
    scanned = jax.jit(lambda c: jax.lax.scan(lambda c, _: (stepper(tx)(*c), None), c, length=3)[0])
    q, r = scanned((params, state))
    # Matching losses to rounding moves D by 1e-3 or so; nothing flips.
    np.testing.assert_allclose(probe_state(r).losses, probe_state(s).losses, rtol=1e-4)
    np.testing.assert_allclose(entries(q), entries(p), atol=3e-3)
    assert not KEY.is_deleted()
    # A run is its key and its losses.
    run = {"method": name, "settings": {"learning_rate": 1e-2}}
    file = tmp_path / "run.npz"
    zo.save_replay(file, **run, key=KEY, params=params, losses=jnp.stack(losses))
    np.testing.assert_array_equal(entries(zo.apply_replay(file, tx, params, **run)), entries(p))
    assert file.stat().st_size < 5_000


@pytest.mark.parametrize("name", ["mezo", "conservative", "subspace_muon", "jaguar_muon", "ldsd"])
def test_injected_rates_lanes_and_schedules(name):
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    factory, options = METHODS[name]

    # Lanes with one key share their draws: the same losses, other rates.
    def lane(rate):
        tx = make(name, rate)
        return stepper(tx)(params, tx.init(params))

    moved, states = jax.jit(jax.vmap(lane))(jnp.array([1e-2, 2e-2]))
    losses = np.asarray(probe_state(states).losses)[:, :2]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    wanted, other = (entries(jax.tree.map(lambda x, i=i: x[i], moved)) for i in (0, 1))
    assert np.abs(other - wanted).max() > 3e-3
    for tx in (
        optax.inject_hyperparams(factory)(1e-2, key=KEY, **options),
        make(name, optax.constant_schedule(1e-2)),
    ):
        new = jax.jit(lambda p, tx=tx: stepper(tx)(p, tx.init(p))[0])(params)
        np.testing.assert_allclose(entries(new), wanted, atol=1e-3)


def test_trees_of_every_library():
    params = {library: tree() for library, tree in TREES.items()}
    for name in ("mezo", "jaguar_muon", "ldsd"):
        tx = make(name)
        new, _ = jax.eval_shape(stepper(tx), params, jax.eval_shape(tx.init, params))
        chex.assert_trees_all_equal_structs(new, params)
    tx = make("mezo")
    some = {library: params[library] for library in ("nnx", "equinox")}
    new, _ = jax.jit(stepper(tx))(some, tx.init(some))
    assert np.isfinite(entries(new)).all()
    empty, _ = tx.update(None, tx.init({}), {}, value_fn=lambda p: jnp.zeros(()))
    assert empty == {}


@every_method
def test_describe_and_shardings(name):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    params, tx = {"kernel": jnp.ones((16, 8)), "bias": jnp.zeros(8)}, make(name)
    table = jol.describe(tx, params)
    state = jax.eval_shape(tx.init, params)
    assert table.total_bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    shardings = {"kernel": NamedSharding(mesh, P("fsdp")), "bias": NamedSharding(mesh, P())}
    placed = jol.state_shardings(tx, params, shardings)
    chex.assert_trees_all_equal_structs(
        jax.tree.map(lambda _: 0, placed), jax.tree.map(lambda _: 0, state)
    )
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        assert sharding.spec == (P("fsdp") if leaf.shape == (16, 8) else P())


def for_eight_devices():
    keys = jax.random.split(jax.random.key(1), 2)
    shapes = {"kernel": (16, 8), "bias": (8,)}
    return {
        n: jax.random.normal(k, shapes[n], "float64") for n, k in zip(shapes, keys, strict=True)
    }


@functools.cache
def step_of_one_device(name):
    params, tx = for_eight_devices(), make(name)
    return entries(jax.jit(lambda p: stepper(tx, quadratic)(p, tx.init(p))[0])(params))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", ["mezo", "low_rank", "jaguar_muon", "ldsd"])
def test_eight_devices_take_the_step_of_one(name, kind):
    with jax.enable_x64(True):
        params = for_eight_devices()
        mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(kind,))
        shardings = {"kernel": NamedSharding(mesh, P("fsdp")), "bias": NamedSharding(mesh, P())}
        tx = make(name)
        placed = jol.state_shardings(tx, params, shardings)
        state = jax.device_put(jax.jit(tx.init)(params), placed)
        spread = jax.jit(stepper(tx, quadratic), out_shardings=(shardings, placed))
        compiled = spread.lower(jax.device_put(params, shardings), state).compile()
        eight, _ = compiled(jax.device_put(params, shardings), state)
        found = entries(jax.device_get(eight))
        np.testing.assert_allclose(found, step_of_one_device(name), rtol=1e-6)
        if name != "jaguar_muon":  # whole matrices move there
            text = compiled.as_text()
            assert not any(word in text for word in ("all-gather", "all-to-all", "f64[16,8]"))


def test_replays_of_something_else(tmp_path):
    params, tx, file = {"w": jnp.ones((2, 3))}, zo.mezo(1e-2, key=KEY), tmp_path / "run.npz"
    run = {"method": "mezo", "settings": {"rate": 1e-2}}
    zo.save_replay(file, **run, key=KEY, params=params, losses=jnp.zeros((4, 2)))
    other = zo.mezo(1e-2, key=jax.random.key(1))
    five = zo.conservative(1e-2, key=KEY)
    for message, changed in {
        "method of the run was 'mezo', got 'ldsd'": {"method": "ldsd"},
        "settings of the run was {'rate': 0.01}, got": {"settings": {"rate": 1e-3}},
        r"the leaf \[\"\['w'\]\", \[2, 3\], 'float32'\], the parameters have": {
            "params": {"v": jnp.ones((2, 3))}
        },
        "the run had 1 leaves, the parameters 2": {"params": {**params, "b": jnp.ones(1)}},
        "the key of the run was": {"tx": other},
        r"losses have shape \(4, 2\), tx takes \('steps', 5\)": {"tx": five},
        "the state holds 0 zero-order methods": {"tx": optax.sgd(0.1)},
    }.items():
        with pytest.raises(ValueError, match=message):
            zo.apply_replay(file, **({"tx": tx, "params": params, **run} | changed))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="is no replay"):
        zo.apply_replay(file, tx, params, **run)


def test_leaves_without_entries_and_python_numbers():
    params = {"none": jnp.ones((3, 0)), "w": 0.3 * jnp.ones((4, 3)), "number": 1.0}
    wanted = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params))
    for name in ("mezo", "jaguar_muon", "subspace_muon"):
        tx = make(name)
        new, _ = jax.eval_shape(stepper(tx), params, jax.eval_shape(tx.init, params))
        assert types(new) == types(wanted)


@pytest.mark.parametrize("name", ["mezo", "forward_gradient", "subspace_muon"])
def test_decay_leaves_what_is_not_trainable(name):
    factory, options = METHODS[name]
    probes = zo.Probes(trainable={"w": False, "v": np.bool_(True)})
    tx = factory(0.1, key=KEY, **options | {"weight_decay": 0.5, "probes": probes})
    params = {"w": SMALL["w"], "v": SMALL["w"]}
    updates, _ = tx.update(None, tx.init(params), params, value_fn=lambda p: 0.0 * jnp.sum(p["v"]))
    np.testing.assert_allclose(updates["v"], -0.1 * 0.5 * params["v"], rtol=1e-6)
    assert not updates["w"].any()


@pytest.mark.parametrize("trainable", [False, {"w": False, "b": "no"}, {"w": True}])
def test_what_is_trainable_is_said_in_bools(trainable):
    tx = zo.mezo(0.1, weight_decay=0.5, key=KEY, probes=zo.Probes(trainable=trainable))
    if trainable is False:
        updates, _ = tx.update(None, tx.init(SMALL), SMALL, value_fn=rough)
        assert not entries(updates).any()
        return
    with pytest.raises(ValueError, match=r"trainable .*leaf \['b'\]"):
        tx.init(SMALL)
