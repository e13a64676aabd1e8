"""The warm-up as a transform: chains, programs, resumption, members, meshes.

What the contract suite asks of optimizers; that suite calls `update` without a loss, so a transform
that must have one cannot be a row of its table.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_lab as jol
from jaxopt_lab.schedules import AdaptiveWarmupState, adaptive_warmup
from tests.schedules.warmup_runs import NOISY, PARAMS, PEAK, STEPS, TARGET, make, run, scan

TREE = {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6), "embedding": jnp.ones((8, 4))}
BEHIND = {
    "sgd": lambda: optax.sgd(PEAK),
    "lion_muon": lambda: jol.lion_muon(PEAK, period=1, ns_steps=2, ns_dtype="float32"),
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


@pytest.mark.parametrize("members", [None, 2])
def test_the_search_runs_only_where_it_is_needed(monkeypatch, members):
    calls = []

    def counted(*args):
        calls.append(args)
        return 1.0

    monkeypatch.setattr("jaxopt_lab.schedules.warmup_phases.quadrature_peak_gap", counted)
    # A number that no other test compiles for.
    tx = adaptive_warmup(0.125, STEPS, TARGET, kappa=7.0, delta_star_rule="official")
    one = lambda losses: scan(tx, tx.init(PARAMS), losses)[1]  # noqa: E731
    losses = jnp.asarray(NOISY[:6], jnp.float32)
    if members is None:
        jax.block_until_ready(jax.jit(one)(losses))
        assert len(calls) == 1
    else:
        # The second run sees its first finite loss a step later: two searches of two members.
        together = jnp.stack([losses, losses.at[0].set(jnp.nan)])
        jax.block_until_ready(jax.jit(jax.vmap(one))(together))
        assert len(calls) == 4


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
