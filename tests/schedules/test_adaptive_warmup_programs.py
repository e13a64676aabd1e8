"""The warm-up as a transform: chains, programs, resumption, members, meshes.

What the contract suite asks of optimizers; that suite calls `update` without a loss, so a transform
that must have one cannot be a row of its table.
"""

import collections
import re

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_lab as jol
from jaxopt_lab.schedules import AdaptiveWarmupState, adaptive_warmup
from jaxopt_lab.schedules.adaptive_warmup import warmup_by
from jaxopt_lab.schedules.peak_gap import exact_where
from tests.schedules.warmup_runs import NOISY, PARAMS, PEAK, STEPS, TARGET, make, run, scan

TREE = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6), "embedding": jnp.ones((8, 4))}
BEHIND = {
    "sgd": lambda: optax.sgd(PEAK),
    "lion_muon": lambda: jol.lion_muon(
        PEAK, period=1, newton_schulz=jol.NewtonSchulz(steps=2, dtype="float32")
    ),
}


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize("name", BEHIND)
def test_relative_scales_all_rates_of_the_optimizer_before_it(name):
    tx = optax.chain(BEHIND[name](), make(relative=True))
    bare = BEHIND[name]()

    @jax.jit
    def step(state, bare_state, loss):
        updates, state = tx.update(TREE, state, TREE, value=loss)
        full, bare_state = bare.update(TREE, bare_state, TREE)
        return updates, full, state, bare_state

    state, bare_state = tx.init(TREE), bare.init(TREE)
    rates, _ = run(make(), NOISY)
    for loss, rate in zip(NOISY[:4], rates[:4], strict=True):
        updates, full, state, bare_state = step(state, bare_state, loss)
        scaled = jax.tree.map(lambda u, r=rate: u * r / PEAK, full)
        chex.assert_trees_all_close(updates, scaled, rtol=1e-5)
    assert isinstance(state[1], AdaptiveWarmupState)


def test_absolute_form_is_the_learning_rate_of_a_direction():
    tx = optax.chain(optax.scale_by_lion(), make())
    state = tx.init(TREE)
    updates, _ = tx.update(TREE, state, TREE, value=8.0)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda g: -0.01 * jnp.sign(g), TREE))


def test_compiles_once_with_donation_and_keeps_its_types():
    tx = adaptive_warmup(PEAK, STEPS, TARGET, kappa=100.0)
    state = tx.init(TREE)
    traced = chex.assert_max_traces(tx.update, n=1)
    step = jax.jit(lambda state, loss: traced(TREE, state, TREE, value=loss)[1], donate_argnums=0)
    before = types(state)
    for loss in NOISY[:5]:
        state = step(state, jnp.float32(loss))
    assert types(state) == before
    assert types(jax.eval_shape(tx.init, TREE)) == before
    assert float(state.peak_gap) > 0 and int(state.count) == 5


@pytest.mark.parametrize("at", [0, 1, 10, 30])
def test_resumed_at_any_step_the_rates_are_the_same_bit_for_bit(at):
    tx = make(smoothing=0.5)
    losses = jnp.asarray(NOISY, jnp.float32)
    whole = jax.jit(lambda losses: scan(tx, tx.init(PARAMS), losses)[1][0])(losses)
    part = jax.jit(lambda state, losses: scan(tx, state, losses))
    state, (first, _) = part(tx.init(PARAMS), losses[:at])
    saved = jax.tree.map(lambda x: np.asarray(x).tobytes(), state)
    restored = jax.tree.map(
        lambda raw, x: jnp.asarray(np.frombuffer(raw, x.dtype)[0]), saved, state
    )
    _, (rest, _) = part(restored, losses[at:])
    np.testing.assert_array_equal(np.concatenate([first, rest]), whole)


def test_members_with_their_own_peaks_kappas_and_losses():
    peaks, kappas = jnp.array([0.02, 0.1, 0.5]), jnp.array([1e3, 1e4, 1e5])
    losses = jnp.stack([jnp.asarray(NOISY[:8] + d, jnp.float32) for d in (0.0, 1.0, 2.0)])

    def member(peak, kappa, losses):
        tx = adaptive_warmup(peak, STEPS, TARGET, kappa=kappa)
        return scan(tx, tx.init(PARAMS), losses)[1]

    updates, states = jax.jit(jax.vmap(member))(peaks, kappas, losses)
    for i in range(3):
        alone, state = jax.jit(member)(peaks[i], kappas[i], losses[i])
        np.testing.assert_allclose(updates[i], alone, rtol=1e-5)
        np.testing.assert_allclose(states.peak_gap[i], state.peak_gap, rtol=1e-6)
    assert len(set(np.asarray(states.peak_gap[:, -1]))) == 3


def control_flow(program, platform, *args):
    """How often the program for a platform branches or loops, by the name of the operation."""
    lowered = jax.jit(program).trace(*args).lower(lowering_platforms=(platform,))
    return collections.Counter(re.findall(r"stablehlo\.(while|case|if)\b", lowered.as_text()))


@pytest.mark.parametrize("target_loss", [TARGET, "auto"])
@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_on_a_gpu_nothing_depends_on_data_that_the_host_would_have_to_read(target_loss, platform):
    tx = adaptive_warmup(PEAK, STEPS, target_loss, kappa=100.0)
    state, loss = tx.init(TREE), jnp.float32(8.0)

    def step(state, loss):
        return tx.update(TREE, state, TREE, value=loss)

    def choice(x):
        return jax.lax.platform_dependent(x, cuda=jnp.sin, rocm=jnp.sin, default=jnp.cos)

    # The choice of a platform is a case of constants, which XLA resolves.
    assert control_flow(step, platform, state, loss) == control_flow(choice, platform, loss)
    # Members on a GPU share the search of one.
    members = jax.tree.map(lambda x: jnp.stack([x, x]), (state, loss))
    assert not control_flow(jax.vmap(step), platform, *members)["while"]
    assert control_flow(step, "cpu", state, loss)["while"]
    compiled = jax.jit(step).lower(state, loss).compile().as_text()
    assert "while(" in compiled and "conditional(" not in compiled


def on_gpu(*args, cuda, **others):
    del others
    return cuda(*args)


def test_the_program_for_a_gpu_gives_the_same_rates(monkeypatch):
    losses = jnp.stack([jnp.asarray(NOISY[::3] + d, jnp.float32) for d in (0.0, 1.0)])
    losses = losses.at[1, 0].set(jnp.nan)

    def members(tx):
        return jax.jit(jax.vmap(lambda losses: scan(tx, tx.init(PARAMS), losses)[1]))(losses)

    updates, states = members(adaptive_warmup(PEAK, STEPS, TARGET, kappa=1e4))
    monkeypatch.setattr(jax.lax, "platform_dependent", on_gpu)
    # Not the function that is compiled already.
    rule = {"peak_lr": PEAK, "total_steps": STEPS, "target_loss": TARGET, "div_factor": 100.0}
    search = exact_where.__wrapped__
    tx = warmup_by(**rule, fallback_after=0.5, search=search, kappa=1e4)
    at_once, at_once_states = members(tx)
    np.testing.assert_allclose(at_once, updates, rtol=1e-5)
    chex.assert_trees_all_close(at_once_states, states, rtol=1e-5)
    assert states.switch_step[0, -1] > 0 and (states.peak_gap[:, -1] > 0).all()


def test_exported_for_several_platforms():
    tx = adaptive_warmup(PEAK, STEPS, TARGET, kappa=100.0)
    state, loss = tx.init(TREE), jnp.float32(8.0)
    step = jax.jit(lambda state, loss: tx.update(TREE, state, TREE, value=loss))
    exported = jax.export.export(step, platforms=("cpu", "cuda", "tpu"))(state, loss)
    chex.assert_trees_all_equal(exported.call(state, loss), step(state, loss))


def test_inside_a_shard_map_every_device_finds_the_same():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = adaptive_warmup(PEAK, STEPS, TARGET, kappa=100.0)

    def step(state, losses):
        loss = jax.lax.pmean(losses[0], "data")
        return tx.update(PARAMS, state, PARAMS, value=loss)[1]

    sharded = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    state = jax.jit(sharded)(tx.init(PARAMS), jnp.arange(4.0, 12.0))
    np.testing.assert_allclose(state.peak_gap, run(tx, [7.5])[1].peak_gap[0], rtol=1e-6)
    assert not control_flow(sharded, "cuda", tx.init(PARAMS), jnp.arange(8.0))["while"]


def test_injected_hyperparameters():
    factory = optax.inject_hyperparams(adaptive_warmup)
    options = {"norm": "frobenius", "delta_star_rule": 0.25}
    tx = factory(PEAK, STEPS, TARGET, 10.0, **options)
    state = tx.init(PARAMS)
    assert {"peak_lr", "target_loss", "div_factor", "smoothing"} <= set(state.hyperparams)
    step = jax.jit(lambda state, loss: tx.update(PARAMS, state, PARAMS, value=loss))
    rates, _ = run(make(), NOISY)
    for loss, rate in zip(NOISY[:6], rates[:6], strict=True):
        updates, state = step(state, loss)
        np.testing.assert_allclose(-updates[0, 0], rate, rtol=1e-5)
    state.hyperparams["peak_lr"] = jnp.asarray(2 * PEAK)
    _, state = step(state, NOISY[6])
    np.testing.assert_allclose(
        state.inner_state.rate, 2 * run(make(), NOISY[:7])[1].rate[-1], rtol=1e-5
    )


def test_low_precision_updates_keep_their_dtype_and_are_rounded_once():
    updates = {"w": jnp.full((2, 2), 3.0, jnp.bfloat16), "v": jnp.ones(3)}
    tx = make()
    new, _ = tx.update(updates, tx.init(updates), updates, value=jnp.bfloat16(8.0))
    assert types(new) == types(updates)
    np.testing.assert_array_equal(new["w"], jnp.bfloat16(-0.03))


def test_masked_leaves_pass_and_unknown_arguments_are_ignored():
    tx = optax.masked(make(), {"kernel": True, "bias": False, "embedding": True})
    updates, _ = tx.update(TREE, tx.init(TREE), TREE, value=8.0, key=jax.random.key(0))
    np.testing.assert_array_equal(updates["bias"], TREE["bias"])
    np.testing.assert_allclose(updates["kernel"], -0.01)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_state_is_replicated_on_a_mesh(axis_type):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(axis_type,))
    params = {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)}
    shardings = {"kernel": NamedSharding(mesh, P("fsdp")), "bias": NamedSharding(mesh, P())}
    tx = adaptive_warmup(PEAK, STEPS, TARGET, kappa=100.0)
    placed = jol.state_shardings(tx, params, shardings)
    assert all(s.spec == P() for s in jax.tree.leaves(placed))
    params = jax.device_put(params, shardings)
    with jax.set_mesh(mesh):
        state = jax.device_put(tx.init(params), placed)
        loss = jax.device_put(jnp.float32(8.0), NamedSharding(mesh, P()))
        step = jax.jit(
            lambda p, s, loss: tx.update(p, s, p, value=loss),
            in_shardings=(shardings, placed, None) if axis_type == AxisType.Auto else None,
        )
        for _ in range(2):
            updates, state = step(params, state, loss)
    alone, _ = run(adaptive_warmup(PEAK, STEPS, TARGET, kappa=100.0), [8.0, 8.0])
    np.testing.assert_allclose(updates["kernel"], -alone[1], rtol=1e-6)
    assert updates["kernel"].sharding.is_equivalent_to(shardings["kernel"], 2)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))


def test_describe_counts_the_state_as_shared():
    table = jol.describe(optax.chain(optax.scale_by_lion(), make()), TREE)
    assert table.shared_bytes == 4 + 9 * 4  # Lion's counter and ours
