"""The step that trainer, sweep, benchmarks and experiments share."""

import ast
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_lab
from jaxopt_lab import models
from jaxopt_lab.report.hlo import collectives
from jaxopt_lab.step import Step, accumulated, backprop, merged, split
from jaxopt_lab.tasks import Evaluation, language_model, language_model_loss
from jaxopt_lab.train.config.sections import MeshConfig
from jaxopt_lab.train.dist.mesh import make_mesh, to_global
from jaxopt_lab.train.evaluation import HeldOut
from jaxopt_lab.train.step import make_step
from tests.train import stand_in

TINY = models.DecoderConfig(vocab_size=32, width=16, depth=1, heads=2, context=8)
PACKAGE = pathlib.Path(jaxopt_lab.__file__).parent


def tokens(rows=4):
    drawn = np.random.default_rng(0).integers(0, 32, (rows, 9))
    return {"tokens": jnp.asarray(drawn, jnp.int32)}


def records_value():
    return optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros(()),
        lambda updates, state, params=None, *, value, **extra: (updates, value),
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_the_z_loss_is_in_the_gradient_and_neither_in_the_loss_nor_in_what_schedules_see(parts):
    params, batch, key = models.init_params(TINY, jax.random.key(0)), tokens(), jax.random.key(1)
    found = {}
    for weight in (0.0, 0.1):
        loss = language_model_loss(TINY, z_loss=weight)
        step = Step(loss, records_value(), accumulated(parts))
        state = step.start(params, key)
        found[weight] = jax.jit(
            lambda s, step=step: (step.take(s, batch), step.estimate(s, batch).grads)
        )(state)
    (_, plain), plain_grads = found[0.0]
    (state, metrics), grads = found[0.1]
    np.testing.assert_allclose(metrics["loss"], plain["loss"], rtol=1e-6)
    np.testing.assert_allclose(state.opt_state, plain["loss"], rtol=1e-6)
    assert "z_loss" not in plain and float(metrics["z_loss"]) > 0.5

    def objective(params):
        return models.loss(TINY, params, batch, z_loss=0.1)[0]

    wanted, expected = jax.value_and_grad(objective)(params)
    np.testing.assert_allclose(metrics["loss"] + metrics["z_loss"], wanted, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, expected)
    assert not np.allclose(grads["embedding"]["tokens"], plain_grads["embedding"]["tokens"])


def squares(params, batch, key):
    del key
    # Away from zero, so that float32 would round both the loss and the gradient.
    return jnp.mean((batch["x"] - params["w"]) ** 2), batch["x"].shape[0], {}


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_gradients_keep_their_dtype_class(dtype, parts):
    with jax.enable_x64(True):
        params = {"w": jnp.asarray(1 / 3, dtype)}
        batch = {"x": jnp.asarray(np.linspace(1, 2, 8)[:, None], dtype)}
        step = Step(squares, optax.sgd(0.1), accumulated(parts), clip=0.7)
        state = step.start(params, jax.random.key(0))
        found = step.estimate(state, batch)
        wide = "float64" if dtype == "float64" else "float32"
        assert found.grads["w"].dtype == found.metrics["loss"].dtype == wide
        state, _ = jax.jit(step.take)(state, batch)
        assert state.params["w"].dtype == dtype
        if dtype == "float64":
            expected = np.mean(2 * (1 / 3 - np.linspace(1, 2, 8)))
            np.testing.assert_allclose(found.grads["w"], expected, rtol=1e-14)
            np.testing.assert_allclose(state.params["w"], 1 / 3 + 0.07, rtol=1e-14)


MOVES = {"table": True, "head": False, "bias": True}


@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_frozen_has_no_gradient_no_state_and_no_collective(parts):
    mesh = make_mesh(MeshConfig(8))
    specs = stand_in.SPECS_UNSPLIT
    step = make_step(
        stand_in.init_params, stand_in.loss_fn, optax.adam(0.1), mesh=mesh, param_specs=specs,
        gradient=accumulated(parts), trainable=MOVES,
    )  # fmt: skip
    state = step.init(jax.random.key(0))
    head = np.asarray(state.frozen["head"])
    trained, every = (
        [x.shape for x in jax.tree.leaves(tree)] for tree in (state.opt_state[0].mu, state.params)
    )
    assert trained == every == [(14,), (13, 16)]
    batch = to_global(mesh, stand_in.batch_at(0), 32)
    assert [g.shape for g in jax.tree.leaves(step.value_and_grad(state, batch)[1])] == trained
    text = step.update.lower(step.abstract_state, batch).compile().as_text()
    moved = collectives(text)["all-reduce"].bytes
    assert set(collectives(text)) == {"all-reduce"} and moved < 4 * (14 + 13 * 16 + 16 * 14)
    before = stand_in.init_params(jax.random.key(0))
    state, _ = step.update(state, batch)
    np.testing.assert_array_equal(state.frozen["head"], head)
    assert np.any(np.asarray(state.params["table"]) != np.asarray(before["table"]))
    whole = merged(state.params, state.frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(before)


def test_a_mask_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="bias"):
        split(stand_in.init_params(jax.random.key(0)), {"table": True, "head": False})


def noisy(params, batch, key):
    drawn = jax.random.normal(key, batch["x"].shape)
    return jnp.mean((params["w"] + drawn) ** 2), batch["x"].shape[0], {"drawn": jnp.mean(drawn)}


def test_every_step_and_microbatch_has_a_key_of_its_own_that_a_restart_finds_again():
    batch, params = {"x": jnp.zeros((4, 3))}, {"w": jnp.zeros(())}
    step = Step(noisy, optax.sgd(0.0), accumulated(2))
    take = jax.jit(step.take)
    state = step.start(params, jax.random.key(5))
    assert state.key.dtype == np.uint32
    drawn, states = [], [state]
    for _ in range(3):
        state, metrics = take(states[-1], batch)
        states.append(state)
        drawn.append(float(metrics["drawn"]))
    assert len(set(drawn)) == 3
    again = jax.tree.map(jnp.asarray, jax.device_get(states[1]))
    assert float(take(again, batch)[1]["drawn"]) == drawn[1]
    one = Step(noisy, optax.sgd(0.0), backprop)
    halves = one.take(states[0], {"x": batch["x"][:2]})[1]["drawn"]
    assert abs(float(halves) - drawn[0]) > 1e-6


def test_the_task_of_a_decoder_tells_its_batches():
    mesh = make_mesh(MeshConfig(1))
    task = language_model(TINY, mesh)
    batch = task.abstract_batch(4)
    assert batch["tokens"].shape == (4, 9) and set(batch) == {"tokens"}
    params = jax.eval_shape(task.init, jax.random.key(0))
    loss, weight, _ = jax.eval_shape(task.loss, params, batch, jax.random.key(0))
    assert loss.shape == weight.shape == ()
    specs = jax.tree.structure(task.param_specs, is_leaf=lambda x: isinstance(x, P))
    assert specs == jax.tree.structure(params)


def with_hits(params, batch, key):
    loss, weight, _ = stand_in.loss_fn(params, batch, key)
    return 2 * loss, weight, {"loss": loss, "hits": jnp.mean(batch["tokens"] < 6)}


def test_each_evaluation_reports_its_own_metrics():
    mesh, batches = make_mesh(MeshConfig(2)), [stand_in.batch_at(i, 4) for i in range(2)]
    evaluations = {
        "plain": Evaluation(batches, with_hits, {"loss": lambda means: means["loss"]}),
        "hits": Evaluation(batches[:1], with_hits, {"percent": lambda m: 100 * m["hits"]}),
    }
    specs = {name: NamedSharding(mesh, P()) for name in stand_in.SPECS}
    held_out = HeldOut(evaluations, mesh, specs)
    assert held_out.names == ("loss", "percent")
    params = stand_in.init_params(jax.random.key(0))
    scores = held_out.scores(jax.device_put(params, specs))
    wanted = np.mean([stand_in.loss_fn(params, batch)[0] for batch in batches])
    np.testing.assert_allclose(scores["loss"], wanted, rtol=1e-6)
    hits = np.mean(batches[0]["tokens"] < 6)
    np.testing.assert_allclose(scores["percent"], 100 * hits, rtol=1e-6)
    assert hits not in (0, np.mean(batches[1]["tokens"] < 6))


# Bare optimizer steps are what these measure, dynamics trains no model, and a replay has no loss.
OWN_UPDATES = {
    "step/update.py",
    "zeroth_order/replay.py",
    # Bare optimizer steps, timed or only compiled, and two regressions without a model.
    "bench/timing.py",
    "experiments/lorsum/synthetic/run.py",
    "experiments/weight_lora/planted/run.py",
    "experiments/zeroth_order/memory/run.py",
}


def test_nobody_else_applies_updates():
    found = set()
    sources = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "experiments").rglob("*.py")]
    for source in sources:
        if {"dynamics", "sgd_dynamics"} & set(source.parts):
            continue
        for node in ast.walk(ast.parse(source.read_text())):
            own = isinstance(node, ast.Attribute) and node.attr == "apply_updates"
            if own and isinstance(node.value, ast.Name) and node.value.id == "optax":
                found.add(source.relative_to(PACKAGE.parent).as_posix().removeprefix("jaxopt_lab/"))
    assert found == OWN_UPDATES


@pytest.mark.parametrize(
    "module",
    [
        *("sweep/task.py", "bench/training.py", "bench/scaling.py", "bench/zeroth_order.py"),
        *("bench/adapter_memory.py", "bench/fine_tuning.py"),
        "train/step.py",
    ],
)
def test_sweep_benchmarks_and_trainer_take_the_one_step(module):
    tree = ast.parse((PACKAGE / module).read_text())
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "jaxopt_lab.step"
        for alias in node.names
    }
    assert "Step" in imported
    assert not any(getattr(n, "attr", "") == "value_and_grad" for n in ast.walk(tree))
