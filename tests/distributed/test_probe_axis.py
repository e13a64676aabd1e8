"""A probe axis beside data and fsdp on eight devices: what travels, what is drawn where, values."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_lab import zeroth_order as zo
from tests.zeroth_order.problems import KEY, entries, mlp

SIZES = {"probe": 2, "data": 2, "fsdp": 2}
SPECS = {"w1": P("fsdp"), "w2": P(None, "fsdp"), "b": P()}
SHAPES = {"w1": (24, 40), "w2": (40, 16), "b": (40,)}
BATCH = P(None, ("data", "fsdp"))
KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
COLLECTIVE = re.compile(
    r"= (\S+) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    r".*?replica_groups=(\{\{.*?\}\}|\[[^ ]*|mesh\[.*? \{.*?\})"
)


def problem(dtype="float32"):
    keys = jax.random.split(jax.random.key(3), len(SHAPES) + 1)
    draw = {
        n: jax.random.normal(k, s, dtype) for k, (n, s) in zip(keys, SHAPES.items(), strict=False)
    }
    return jax.tree.map(lambda x: 0.3 * x, draw), jax.random.normal(keys[-1], (2, 8, 24), dtype)


def mean_of_microbatches(xs, mesh=None):
    """The loss over two microbatches; on an Explicit mesh, layouts of products are said."""
    rows = {} if mesh is None else {"out_sharding": NamedSharding(mesh, P(("data", "fsdp")))}

    def loss(params, x):
        hidden = jnp.tanh(jnp.einsum("bi,io->bo", x, params["w1"], **rows) + params["b"])
        y = jnp.einsum("bi,io->bo", hidden, params["w2"], **rows)
        return jnp.mean(jnp.square(y))

    return lambda params: jnp.mean(jax.lax.map(lambda x: loss(params, x), xs))


def spread(kind, tx, params, xs):
    """The compiled update on eight devices, its result, and the estimate of one device."""
    mesh = jax.make_mesh(tuple(SIZES.values()), tuple(SIZES), axis_types=(kind,) * 3)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    tx_of, explicit = tx, kind == AxisType.Explicit
    state = tx_of(zo.sequential()).init(params)

    def update(engine, where):
        def run(params, state, xs):
            loss = mean_of_microbatches(xs, where)
            return tx_of(engine).update(None, state, params, value_fn=loss)

        return run

    one = jax.jit(update(zo.sequential(), None))(params, state, xs)
    inputs = (
        jax.device_put(params, shardings),
        state,
        jax.device_put(xs, NamedSharding(mesh, BATCH)),
    )
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        program = update(zo.sharded(mesh), mesh if explicit else None)
        compiled = (
            jax.jit(program, out_shardings=(shardings, NamedSharding(mesh, P())))
            .lower(*inputs)
            .compile()
        )
        eight = compiled(*inputs)
    return compiled.as_text(), jax.device_get(eight), one


def devices_together(groups):
    """The groups of devices that an instruction joins, as rows, from any of its notations."""
    if groups.startswith("{{"):
        return [list(map(int, row.split(","))) for row in groups[2:-2].split("},{")]
    if groups.startswith("mesh"):  # axes of a mesh of devices; those named are joined
        sizes = [int(n) for n in re.findall(r"'=(\d+)", groups)]
        joined = [int(n) for n in re.findall(r"axis_(\d+)'", groups.rpartition("{")[2])]
        order = re.search(r"device_ids=\((.*?)\)? \{", groups)
        grid = (turned(order[1]) if order else np.arange(8)).reshape(sizes)
        rest = [a for a in range(grid.ndim) if a not in joined]
        count = int(np.prod([sizes[a] for a in joined]))
        return grid.transpose(rest + joined).reshape(-1, count).tolist()
    shape, _, order = groups.partition("<=")
    sizes = [int(n) for n in re.findall(r"\d+", shape)]
    return turned(order).reshape(sizes).tolist()


def turned(order):
    """Devices in an order such as [4,2]T(1,0)."""
    dims = [int(n) for n in re.findall(r"\d+", order.partition("T")[0])]
    turn = [int(n) for n in re.findall(r"\d+", order.partition("T")[2])] or range(len(dims))
    return np.arange(8).reshape(dims).transpose(turn)


@KINDS
def test_probes_exchange_their_losses_and_nothing_else(kind):
    params, xs = problem()
    q, eps = 4, 1e-2

    def tx(engine):
        return zo.estimate(zo.gaussian(), eps=eps, num_directions=q, key=KEY, engine=engine)

    text, (g, state), (wanted, theirs) = spread(kind, tx, params, xs)
    found = COLLECTIVE.findall(text)
    assert len(found) >= 3  # the losses, a mean over the batch, a gathered weight
    # Devices 0 to 3 are the first group of probes.
    across = [
        (shape, what)
        for shape, what, groups in found
        if any(len({device // 4 for device in row}) > 1 for row in devices_together(groups))
    ]
    assert [what for _, what in across] == ["all-gather"]
    numbers = re.match(r"\(?f32\[([\d,]+)\]", across[0][0]).group(1)
    assert np.prod([int(n) for n in numbers.split(",")]) == 2 * q
    # Bits are drawn for shards alone. Weights are whole where a product needs them so.
    for m, n in (SHAPES["w1"], SHAPES["w2"]):
        assert not re.search(rf"u32\[(1,)*{m},{n}\]", text)
    assert re.search(r"u32\[(1,)*12,40\]", text) and re.search(r"u32\[(1,)*40,8\]", text)
    size = np.abs(theirs.losses).max()
    bound = 10 * np.finfo(np.float32).eps * size / eps
    one, other = (np.asarray(s.losses).reshape(q, 2) for s in (theirs, state))
    np.testing.assert_allclose(
        (other[:, 0] - other[:, 1]) / (2 * eps), (one[:, 0] - one[:, 1]) / (2 * eps), atol=bound
    )
    assert (
        np.abs(one[:, 0] - one[:, 1]).max() / (2 * eps) > 20 * bound
    )  # a bound that says something


@KINDS
def test_draws_are_those_of_one_device(kind):
    # From given losses an estimate of signs is a sum of the same numbers, so its bits are theirs.
    with jax.enable_x64(True):
        params, xs = problem("float64")

        def tx(engine):
            return zo.estimate(zo.signs(), eps=0.5, num_directions=2, key=KEY, engine=engine)

        _, (g, state), (wanted, theirs) = spread(kind, tx, params, xs)
        np.testing.assert_allclose(state.losses, theirs.losses, rtol=1e-13)
        np.testing.assert_allclose(entries(g), entries(wanted), rtol=1e-11, atol=1e-13)
        np.testing.assert_array_equal(np.sign(entries(g)), np.sign(entries(wanted)))


def test_a_probe_that_is_not_finite():
    mesh = jax.make_mesh((4, 2), ("probe", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    probes = zo.Probes(engine=zo.sharded(mesh))
    params = {"w": jnp.zeros(3)}

    def loss(p):  # not a number at the first candidate
        return jnp.where(p["w"][1] > 0.4, jnp.nan, jnp.sum((p["w"] - 1) ** 2))

    tx = zo.ldsd(optax.sgd(0.1), candidates=4, eps=0.5, start="zero", key=KEY, probes=probes)
    updates, state = jax.jit(lambda p: tx.update(None, tx.init(p), p, value_fn=loss))(params)
    losses = np.asarray(state.probes.losses)
    np.testing.assert_array_equal(np.isfinite(losses), [False, True, True, True, True])
    assert np.isfinite(entries((updates, state.mean))).all() and updates["w"].any()
    # As on one device: the best of the finite ones is chosen, and its other side decides the step.
    alone = zo.ldsd(optax.sgd(0.1), candidates=4, eps=0.5, start="zero", key=KEY)
    same, theirs = jax.jit(lambda p: alone.update(None, alone.init(p), p, value_fn=loss))(params)
    np.testing.assert_allclose(losses, theirs.probes.losses, rtol=1e-6)
    np.testing.assert_allclose(entries(updates), entries(same), rtol=1e-5)


def test_directions_that_the_axis_does_not_divide():
    mesh = jax.make_mesh((4, 2), ("probe", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    with pytest.raises(
        ValueError, match="num_directions: got 6, wanted a multiple of 4, .*'probe'"
    ):
        zo.estimate(num_directions=6, key=KEY, engine=zo.sharded(mesh))
    with pytest.raises(ValueError, match=r"3 directions do not divide into chunked\(2\)"):
        zo.estimate(num_directions=12, key=KEY, engine=zo.sharded(mesh, engine=zo.chunked(2)))
    with pytest.raises(ValueError, match="got axis 'probes', wanted one of probe, fsdp"):
        zo.sharded(mesh, "probes")


def test_low_rank_probes_of_a_group_are_evaluated_together():
    with jax.enable_x64(True):
        mesh = jax.make_mesh((4, 2), ("probe", "fsdp"), axis_types=(AxisType.Auto,) * 2)
        params, loss = mlp("float64")

        def estimate(engine):
            tx = zo.estimate(zo.low_rank(), num_directions=8, eps=0.3, key=KEY, engine=engine)
            probe_fn = zo.beside(loss)
            return jax.jit(lambda p: tx.update(None, tx.init(p), p, probe_fn=probe_fn))(params)

        g, state = estimate(zo.sharded(mesh, engine=zo.vmapped()))
        wanted, theirs = estimate(zo.sequential())
        np.testing.assert_allclose(state.losses, theirs.losses, rtol=1e-13)
        np.testing.assert_allclose(entries(g), entries(wanted), rtol=1e-12, atol=1e-12)
