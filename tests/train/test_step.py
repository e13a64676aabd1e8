import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_lab.report.hlo import collectives
from jaxopt_lab.step import accumulated
from jaxopt_lab.train.config.sections import MeshConfig
from jaxopt_lab.train.dist.mesh import flag_sharding, make_mesh, to_global
from jaxopt_lab.train.evaluation import make_eval
from jaxopt_lab.train.step import make_step
from tests.train import stand_in

MESHES = [MeshConfig(1), MeshConfig(8), MeshConfig(2, 4), MeshConfig(2, 2, 2)]


def built(mesh, tx=None, **kwargs):
    return make_step(
        stand_in.init_params,
        kwargs.pop("loss_fn", stand_in.loss_fn),
        tx or optax.adamw(1e-2),
        mesh=mesh,
        param_specs=stand_in.SPECS,
        **kwargs,
    )


def run(step, mesh, batches):
    state = step.init(jax.random.key(0))
    metrics = []
    for batch in batches:
        state, m = step.update(state, to_global(mesh, batch, len(batch["tokens"])))
        metrics.append(jax.device_get(m))
    return state, metrics


def masked(batch, seed=0):
    # Very uneven: some rows keep one token, so means of microbatch means would be far off.
    rng = np.random.default_rng(seed)
    tokens = batch["tokens"]
    keep = rng.random(tokens[:, 1:].shape) < rng.choice([0.1, 0.9], (len(tokens), 1))
    keep[:, 0] = True
    return {"tokens": tokens, "mask": keep.astype(np.float32)}


@pytest.mark.parametrize("uneven", [False, True], ids=["full", "masked"])
def test_four_microbatches_of_8_are_a_batch_of_32(uneven):
    batch = stand_in.batch_at(0)
    batch = masked(batch) if uneven else batch
    params = stand_in.init_params(jax.random.key(1))
    arguments = (stand_in.loss_fn, params, batch, jax.random.key(0))
    whole, parts = (jax.jit(accumulated(n), static_argnums=0)(*arguments) for n in (1, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), whole, parts)


def test_accumulation_moves_no_rows_between_devices():
    # Microbatches that were contiguous parts of the batch would cost an all-to-all or gather.
    mesh = make_mesh(MeshConfig(8))
    step = built(mesh, gradient=accumulated(4))
    batch = to_global(mesh, stand_in.batch_at(0), 32)
    text = step.update.lower(step.abstract_state, batch).compile().as_text()
    assert set(collectives(text)) == {"all-reduce"}


@pytest.mark.parametrize("config", MESHES[1:], ids=str)
def test_meshes_agree_with_one_device(config):
    batches = [stand_in.batch_at(i) for i in range(3)]
    one, several = make_mesh(MESHES[0]), make_mesh(config)
    state, metrics = run(built(one, clip=0.1), one, batches)
    other, others = run(built(several, clip=0.1, gradient=accumulated(2)), several, batches)
    for a, b in zip(metrics, others, strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        jax.device_get(state.params), jax.device_get(other.params),
    )  # fmt: skip


def test_state_lies_where_it_was_asked_to_and_is_donated():
    mesh = make_mesh(MeshConfig(2, 4))
    step = built(mesh)
    state = step.init(jax.random.key(0))
    for _ in range(2):
        assert state.opt_state[0].mu["table"].sharding.spec == P(None, "fsdp")
        jax.tree.map(
            lambda x, s: pytest.fail(f"{x.sharding} is not {s}") if x.sharding != s else None,
            state, step.shardings,
        )  # fmt: skip
        old = state
        state, _ = step.update(state, to_global(mesh, stand_in.batch_at(0), 32))
        assert all(x.is_deleted() for x in jax.tree.leaves(old))
    assert step.update._cache_size() == 1


def test_clip_covers_all_parameters_together():
    mesh = make_mesh(MeshConfig(1))
    batch = stand_in.batch_at(0)
    step = built(mesh, optax.sgd(1.0), clip=1e-3)
    before = jax.device_get(step.init(jax.random.key(0)).params)
    state, (metrics,) = run(step, mesh, [batch])
    moved = jax.tree.map(lambda a, b: np.asarray(a) - b, jax.device_get(state.params), before)
    np.testing.assert_allclose(optax.tree.norm(moved), 1e-3, rtol=1e-3)
    assert metrics["grad_norm"] > 1e-2


def nan_at_token(poison):
    """A loss that is NaN, with NaN gradients, when the batch contains one token."""

    def loss_fn(params, batch, key):
        loss, weight, metrics = stand_in.loss_fn(params, batch)
        bad = jnp.any(batch["tokens"] == poison)
        return jnp.where(bad, jnp.nan, 1.0) * loss, weight, metrics

    return loss_fn


def counting_branch(rate):
    """Every second update is zero, decided by `lax.cond` on a counter, as periodic methods do."""

    def init(params):
        return {"count": jnp.zeros((), jnp.int32), "mu": jax.tree.map(jnp.zeros_like, params)}

    def update(updates, state, params=None, *, value, **extra):
        del params, extra
        mu = jax.tree.map(lambda m, g: 0.9 * m + g, state["mu"], updates)
        out = jax.lax.cond(
            state["count"] % 2 == 0,
            lambda: jax.tree.map(lambda m: -rate * value * m, mu),
            lambda: jax.tree.map(jnp.zeros_like, mu),
        )
        return out, {"count": state["count"] + 1, "mu": mu}

    return optax.GradientTransformationExtraArgs(init, update)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_non_finite_step_changes_nothing_but_the_counters(accumulation):
    mesh = make_mesh(MeshConfig(2))
    step = built(
        mesh, counting_branch(0.1), loss_fn=nan_at_token(stand_in.VOCAB - 1),
        gradient=accumulated(accumulation),
    )  # fmt: skip
    good = {"tokens": np.minimum(stand_in.batch_at(0)["tokens"], stand_in.VOCAB - 2)}
    bad = {"tokens": good["tokens"].copy()}
    bad["tokens"][5, 3] = stand_in.VOCAB - 1
    before, _ = run(step, mesh, [good])
    before = jax.device_get(before)
    after, (_, metrics) = run(step, mesh, [good, bad])
    after = jax.device_get(after)
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    jax.tree.map(np.testing.assert_array_equal, before.opt_state["mu"], after.opt_state["mu"])
    assert (int(after.step), int(after.skipped), int(after.opt_state["count"])) == (2, 1, 2)
    assert not metrics["finite"] and metrics["skipped"] == 1 and np.isnan(metrics["loss"])


def test_the_guard_leaves_the_branch_of_a_periodic_optimizer_a_branch():
    mesh = make_mesh(MeshConfig(1))
    step = built(mesh, counting_branch(0.1))
    batch = to_global(mesh, stand_in.batch_at(0), 32)
    text = step.update.lower(step.abstract_state, batch).compile().as_text()
    assert " conditional(" in text


def test_the_loss_of_the_whole_step_reaches_the_optimizer():
    seen = optax.GradientTransformationExtraArgs(
        lambda params: {"value": jnp.zeros(())},
        lambda updates, state, params=None, *, value, **extra: (updates, {"value": value}),
    )
    mesh = make_mesh(MeshConfig(8))
    state, (metrics,) = run(
        built(mesh, seen, gradient=accumulated(4)), mesh, [masked(stand_in.batch_at(0))]
    )
    params = stand_in.init_params(jax.random.key(0))
    expected, _, _ = stand_in.loss_fn(params, masked(stand_in.batch_at(0)))
    np.testing.assert_allclose(state.opt_state["value"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("config", [MeshConfig(8), MeshConfig(2, 2, 2)], ids=str)
def test_signals_of_one_device_come_back_from_all(config):
    mesh = make_mesh(config)
    rows = np.zeros((8, 2), np.int32)
    rows[5, 1] = 1
    step = built(mesh)
    batch = to_global(mesh, stand_in.batch_at(0), 32)
    batch["signals"] = jax.device_put(rows, flag_sharding(mesh))
    _, metrics = step.update(step.init(jax.random.key(0)), batch)
    assert metrics["signals"].tolist() == [0, 1]


def test_bfloat16_parameters_keep_their_dtype_everywhere():
    def init_params(key):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), stand_in.init_params(key))

    mesh = make_mesh(MeshConfig(2, 4))
    step = make_step(
        init_params, stand_in.loss_fn, optax.adam(1e-2), mesh=mesh,
        param_specs=stand_in.SPECS, gradient=accumulated(2),
    )  # fmt: skip
    state, _ = run(step, mesh, [stand_in.batch_at(0)] * 2)
    dtypes = {x.dtype for x in jax.tree.leaves((state.params, state.opt_state[0].mu))}
    assert dtypes == {jnp.dtype("bfloat16")}


def test_eval_sums_nats_and_tokens():
    mesh = make_mesh(MeshConfig(8))
    params = stand_in.init_params(jax.random.key(0))
    shardings = jax.tree.map(
        lambda s: NamedSharding(mesh, s), stand_in.SPECS, is_leaf=lambda x: isinstance(x, P)
    )
    evaluate = make_eval(stand_in.loss_fn, mesh=mesh, param_shardings=shardings)
    batch = masked(stand_in.batch_at(0))
    sums, tokens = evaluate(jax.device_put(params, shardings), to_global(mesh, batch, 32))
    expected, _, _ = stand_in.loss_fn(params, batch)
    assert tokens == batch["mask"].sum()
    np.testing.assert_allclose(sums["loss"] / tokens, expected, rtol=1e-5)
