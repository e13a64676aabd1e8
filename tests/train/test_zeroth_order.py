"""Zero-order optimizers in the trainer: forward passes alone, through the one step."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab import cli
from jaxopt_lab import zeroth_order as zo
from jaxopt_lab.models import PRESETS, abstract_params, flops_per_token, matrix_axes
from jaxopt_lab.report.hlo import collectives
from jaxopt_lab.report.tracker import read_metrics
from jaxopt_lab.step import Step, backprop, forward_only
from jaxopt_lab.sweep.cost import measure_step
from jaxopt_lab.sweep.program import Program, Run
from jaxopt_lab.train.arguments import parse_config
from jaxopt_lab.train.config.comparison import CompareConfig, validate_comparison
from jaxopt_lab.train.config.optimizers import AdamWConfig, ModelInfo
from jaxopt_lab.train.config.optimizers_zeroth_order import (
    ZEROTH_ORDER,
    JaguarMuonConfig,
    LdsdConfig,
    MeZOConfig,
    ZoSignSgdConfig,
)
from jaxopt_lab.train.config.run import PretrainConfig, validate
from jaxopt_lab.train.config.schedules import AdaptiveWarmupConfig
from jaxopt_lab.train.config.sections import DiagnosticsConfig, MeshConfig
from jaxopt_lab.train.dist.mesh import make_mesh, to_global
from jaxopt_lab.train.errors import ConfigError
from jaxopt_lab.train.program import build_program
from jaxopt_lab.train.run import pretrain
from jaxopt_lab.train.step import make_step
from tests.quick_compile import OPTIONS
from tests.sweep.tasks import TASK
from tests.train import stand_in
from tests.train.test_step import masked, nan_at_token
from tests.train.tiny_run import losses_of, restored, tiny_config

KEY = jax.random.key(3)
INFO = ModelInfo({"bias": None, "head": MuonDimensionNumbers(0, 1), "table": None}, key=KEY)


def placed(tx, mesh=None, gradient=None, **options):
    return make_step(
        stand_in.init_params,
        options.pop("loss", stand_in.loss_fn),
        tx,
        mesh=mesh or make_mesh(MeshConfig(1)),
        param_specs=stand_in.SPECS,
        gradient=gradient or forward_only(),
        compiler_options=OPTIONS,
        **options,
    )


def probes(state):
    def is_probes(node):
        return isinstance(node, zo.ProbeState)

    return next(x for x in jax.tree.leaves(state, is_leaf=is_probes) if is_probes(x))


def wide_loss(params, batch, key):
    del key
    x = batch["x"]
    for kernel in params:
        x = jnp.tanh(x @ kernel)
    return jnp.mean(x**2), x.size, {}


def test_there_is_no_backward_pass_and_no_gradient_in_the_program():
    """One perturbed copy of the parameters lives at a time, and nothing else of their size."""
    params = [jnp.ones((256, 256)) for _ in range(6)]
    size, batch = sum(p.nbytes for p in params), {"x": jnp.ones((2, 256))}

    def compiled(tx, gradient):
        step = Step(wide_loss, tx, gradient)
        state = jax.eval_shape(step.start, params, KEY)
        return jax.jit(step.take, donate_argnums=0).lower(state, batch).compile()

    forward = compiled(zo.mezo(1e-2, key=KEY, probes=zo.Probes(zo.signs())), forward_only())
    both = compiled(optax.sgd(1e-2), backprop)
    assert "transpose(jvp" in both.as_text()
    assert "transpose(jvp" not in forward.as_text() and "jvp" not in forward.as_text()
    # One evaluation in the loop over both sides; that of the weight is gone.
    assert forward.as_text().count(" dot(") == len(params)
    # A gradient beside the copy would make it 2.
    assert forward.memory_analysis().temp_size_in_bytes < 1.1 * size


@pytest.mark.parametrize("name", ZEROTH_ORDER)
def test_every_row_takes_the_step_and_resumes_with_the_same_bits(name):
    # Candidates are compiled one by one.
    optimizer = ZEROTH_ORDER[name](**({"candidates": 2} if "ldsd" in name else {}))
    step = placed(
        optimizer.build(optax.constant_schedule(1e-3), INFO), gradient=optimizer.gradient(1, INFO)
    )
    batches = [to_global(make_mesh(MeshConfig(1)), stand_in.batch_at(i), 32) for i in range(4)]
    start = step.init(jax.random.key(0))
    before = jax.device_get(start.params)
    loss, _, _ = stand_in.loss_fn(before, stand_in.batch_at(0))
    straight, seen = jax.tree.map(jnp.copy, start), []
    for batch in batches:
        straight, metrics = step.update(straight, batch)
        seen.append(float(metrics["loss"]))
    # LDSD reports its candidates; the others are exact up to the square of the distance.
    np.testing.assert_allclose(seen[0], loss, rtol=2e-2 if "ldsd" in name else 1e-5)
    assert len(set(seen)) == 4 and "grad_norm" not in metrics and metrics["weight"] == 256
    moved = jax.tree.map(lambda a, b: np.any(np.asarray(a) != b), straight.params, before)
    assert moved["head"]
    # What is asked for is what is counted.
    assert probes(straight.opt_state).losses.size == optimizer.forward_passes
    again = start
    for index, batch in enumerate(batches):
        again, _ = step.update(again, batch)
        if index == 1:
            again = jax.device_put(jax.device_get(again), step.shardings)
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (straight, again)))
    assert step.update._cache_size() == 1


@pytest.mark.parametrize("parts", [1, 4])
def test_a_step_without_a_finite_loss_changes_nothing_but_the_counters(parts):
    tx = zo.mezo(1e-2, momentum=0.9, key=KEY)
    step = placed(tx, loss=nan_at_token(stand_in.VOCAB - 1), gradient=forward_only(parts))
    mesh = make_mesh(MeshConfig(1))
    good = {"tokens": np.minimum(stand_in.batch_at(0)["tokens"], stand_in.VOCAB - 2)}
    bad = {"tokens": good["tokens"].copy()}
    bad["tokens"][5, 3] = stand_in.VOCAB - 1
    state, _ = step.update(step.init(jax.random.key(0)), to_global(mesh, good, 32))
    before = jax.device_get(state)
    state, metrics = step.update(state, to_global(mesh, bad, 32))
    after = jax.device_get(state)
    assert not metrics["finite"] and metrics["skipped"] == 1 and np.isnan(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    momentum = [s.trace for s in (before.opt_state[2], after.opt_state[2])]
    assert any(np.any(x) for x in jax.tree.leaves(momentum[0]))
    jax.tree.map(np.testing.assert_array_equal, *momentum)
    counted = probes(after.opt_state)
    assert (int(after.step), int(counted.count), int(counted.notfinite_count)) == (2, 2, 2)
    state, metrics = step.update(state, to_global(mesh, good, 32))
    assert metrics["finite"] and metrics["skipped"] == 1
    assert np.any(np.asarray(state.params["head"]) != after.params["head"])


def test_one_bad_candidate_is_left_out_and_does_not_drop_the_step():
    def loss(params, batch, key):
        value, weight, metrics = stand_in.loss_fn(params, batch)
        return jnp.where(params["head"][0, 0] > edge, jnp.nan, value), weight, metrics

    # Half of the candidates lie beyond.
    edge = stand_in.init_params(jax.random.key(0))["head"][0, 0]
    step = placed(zo.ldsd(optax.sgd(1e-2), candidates=5, key=KEY), loss=loss)
    batch = to_global(make_mesh(MeshConfig(1)), stand_in.batch_at(0), 32)
    state, metrics = step.update(step.init(jax.random.key(0)), batch)
    losses = np.asarray(probes(state.opt_state).losses)
    assert 0 < np.isnan(losses).sum() < 6 and metrics["finite"] and metrics["skipped"] == 0
    np.testing.assert_allclose(metrics["loss"], np.nanmean(losses), rtol=1e-6)


def test_microbatches_average_their_losses_before_differences_are_formed():
    batch = masked(stand_in.batch_at(0))
    tx = zo.mezo(1e-2, key=KEY)
    found = []
    for parts in (1, 4):
        step = Step(stand_in.loss_fn, tx, forward_only(parts))
        state = step.start(stand_in.init_params(jax.random.key(0)), KEY)
        new, metrics = jax.jit(step.take, compiler_options=OPTIONS)(state, batch)
        found.append((probes(new.opt_state).losses, metrics["weight"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *found)
    with pytest.raises(ValueError, match="microbatches: got 0"):
        forward_only(0)


def noisy(params, batch, key):
    # A number of the key; a draw from it would be refused, as dropout is.
    shift = jax.random.key_data(key)[-1].astype(jnp.float32) * 2.0**-31
    return jnp.sum(params["w"]) + shift, batch["x"].shape[0], {}


def test_dropout_is_refused():
    def loss(params, batch, key):
        return jnp.sum(params["w"]) + jax.random.normal(key), batch["x"].shape[0], {}

    step = Step(loss, zo.mezo(1e-2, key=KEY), forward_only())
    state = step.start({"w": jnp.zeros(3)}, jax.random.key(5))
    with pytest.raises(ValueError, match="draws random numbers, as dropout does"):
        step.take(state, {"x": jnp.zeros((4, 1))})


@pytest.mark.parametrize("parts", [1, 2])
def test_all_losses_of_a_step_see_one_key_and_each_step_another(parts):
    step = Step(noisy, zo.mezo(1e-2, key=KEY), forward_only(parts))
    state = step.start({"w": jnp.zeros(3)}, jax.random.key(5))
    middles = []
    for _ in range(2):
        state, _ = step.take(state, {"x": jnp.zeros((4, 1))})
        plus, minus = np.asarray(probes(state.opt_state).losses)
        assert abs(plus - minus) < 0.02  # eps times the direction, twice
        middles.append((plus + minus) / 2)
    assert abs(middles[0] - middles[1]) > 0.02


@pytest.mark.parametrize("config", [MeshConfig(8), MeshConfig(2, 4)], ids=str)
def test_meshes_agree_and_only_losses_are_exchanged(config):
    tx, mesh = zo.mezo(1e-2, key=KEY), make_mesh(config)
    losses = []
    for each in (make_mesh(MeshConfig(1)), mesh):
        step = placed(tx, each)
        state, _ = step.update(
            step.init(jax.random.key(0)), to_global(each, stand_in.batch_at(0), 32)
        )
        losses.append(np.asarray(probes(state.opt_state).losses))
        assert state.params["table"].sharding == step.shardings.params["table"]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    if config == MeshConfig(8):
        batch = to_global(mesh, stand_in.batch_at(0), 32)
        text = step.update.lower(step.abstract_state, batch).compile().as_text()
        found = collectives(text)
        assert set(found) == {"all-reduce"} and found["all-reduce"].bytes < 100


def test_what_is_frozen_is_neither_moved_nor_drawn():
    moves = {"table": True, "head": False, "bias": True}
    step = placed(zo.mezo(1e-1, momentum=0.9, key=KEY), trainable=moves)
    state = step.init(jax.random.key(0))
    head = np.asarray(state.frozen["head"])
    assert [x.shape for x in jax.tree.leaves(state.opt_state[2])] == [(14,), (13, 16)]
    batch = to_global(make_mesh(MeshConfig(1)), stand_in.batch_at(0), 32)
    before = np.asarray(state.params["table"])
    state, metrics = step.update(state, batch)
    assert metrics["finite"] and np.any(np.asarray(state.params["table"]) != before)
    np.testing.assert_array_equal(state.frozen["head"], head)


def test_engines_of_a_row_give_the_same_losses_and_decay_is_decoupled():
    batch, params = stand_in.batch_at(0), stand_in.init_params(jax.random.key(0))
    losses, moved = [], []
    for changes in ({}, {"engine": "vmapped"}, {"engine": "chunked", "chunk": 2},
                    {"weight_decay": 0.5, "decay": "all"}):  # fmt: skip
        optimizer = MeZOConfig(directions=4, distribution="signs", **changes)
        step = Step(
            stand_in.loss_fn, optimizer.build(optax.constant_schedule(0.1), INFO),
            optimizer.gradient(1, INFO),
        )  # fmt: skip
        state, _ = jax.jit(step.take, compiler_options=OPTIONS)(step.start(params, KEY), batch)
        losses.append(np.asarray(probes(state.opt_state).losses))
        moved.append(np.asarray(state.params["head"]))
    for other in losses[1:]:
        np.testing.assert_allclose(losses[0], other, rtol=1e-6)
    np.testing.assert_allclose(moved[3], moved[0] - 0.1 * 0.5 * params["head"], atol=2e-4)
    with pytest.raises(ValueError, match="ModelInfo.key: got None"):
        MeZOConfig().build(optax.constant_schedule(0.1), INFO._replace(key=None))


def test_lanes_of_one_seed_share_their_draws():
    task = replace(TASK, steps=2, evaluate_every=2, gradient=forward_only(), keyed=True)

    def build(rate, key):
        return MeZOConfig().build(lambda count: rate, INFO._replace(key=key))

    program = Program(task, build, 3)
    curves = program.train([Run(1e-2, 1), Run(3e-2, 1), Run(1e-2, 2)])
    first = curves.train[:, 0]
    np.testing.assert_allclose(first[0], first[1], rtol=1e-6)
    assert curves.train[0, 1] != curves.train[1, 1] and abs(first[0] - first[2]) > 1e-3
    state = program.begin(np.float32([1e-2, 3e-2, 1e-2]), np.int32([1, 1, 2]))
    keys, count = probes(state.opt_state).key, probes(state.opt_state).count
    assert (keys[0] == keys[1]).all() and (keys[0] != keys[2]).any() and count.shape == ()
    cost = measure_step(task, build, 1e-2, steps=2, rounds=1)
    assert cost.step_seconds > 0 and cost.gradient_seconds > 0


def test_the_losses_alone_are_as_many_as_a_step_evaluates():
    """What a comparison subtracts to find the cost of the update."""
    seen = []

    def loss(params, batch, key):
        jax.debug.callback(lambda: seen.append(1))
        return stand_in.loss_fn(params, batch)

    task = replace(TASK, loss=loss, gradient=forward_only(), keyed=True)

    optimizer = LdsdConfig(candidates=2)

    def build(rate, key):
        return optimizer.build(lambda count: rate, INFO._replace(key=key))

    measure_step(task, build, 1e-2, steps=1, rounds=1)
    jax.effects_barrier()
    # A warm-up and a round, of a step and of its losses, and the weight of each.
    assert len(seen) == 4 * (optimizer.forward_passes + 1)


def test_work_is_counted_in_forward_passes():
    model = PRESETS["tiny"]
    tokens = 8 * model.context
    run = PretrainConfig(batch_size=8)
    for optimizer, passes in (
        (AdamWConfig(), 3), (MeZOConfig(), 2), (MeZOConfig(directions=4), 8), (LdsdConfig(), 6),
        (ZEROTH_ORDER["conservative"](), 5), (ZEROTH_ORDER["subspace-muon"](), 5),
    ):  # fmt: skip
        assert optimizer.forward_passes == passes
        of_model, _ = build_program(replace(run, optimizer=optimizer)).flops
        np.testing.assert_allclose(of_model, flops_per_token(model) * tokens * passes / 3)
    shapes, axes = abstract_params(model), matrix_axes(model)
    entries = sum(x.size for x in jax.tree.leaves(shapes))
    # Two perturbed copies and the update's sum, and a rate times it.
    assert MeZOConfig().mean_flops(shapes, axes) == 2 * entries * (2 + 1) + 2 * entries
    muon = JaguarMuonConfig().mean_flops(shapes, axes)
    embedding = 5 * 2 * 256**2 * (2 * 4096 + 256)
    assert muon > 1.2 * embedding  # which is a matrix there


def test_a_run_logs_resumes_and_is_compared_by_forward_passes(text, tmp_path):
    optimizer = replace(MeZOConfig(), learning_rate=1e-3, distribution="signs")
    config = tiny_config(text, tmp_path / "whole", optimizer=optimizer, accumulation=2)
    assert pretrain(config).status == "finished"
    rows = [row for row in read_metrics(tmp_path / "whole") if "loss" in row]
    assert [row["forward_passes"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert rows[0]["tokens"] == 64 and "grad_norm" not in rows[0]
    halves = tmp_path / "halves"

    class Stop(BaseException):
        pass

    def stop(step, *arguments):
        if step == 4:
            raise Stop

    with pytest.raises(Stop):
        pretrain(replace(config, run_directory=str(halves)), callbacks=[stop])
    assert pretrain(replace(config, run_directory=str(halves), resume=True)).status == "finished"
    assert losses_of(halves) == losses_of(tmp_path / "whole")
    states = restored(config, halves), restored(config, tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert probes(states[0][1].opt_state).count == 6
    figure = tmp_path / "loss.png"
    assert cli.main(["plot", str(halves), "--x", "forward_passes", "--out", str(figure)]) == 0
    assert figure.stat().st_size > 5_000
    manifest = json.loads((halves / "config.json").read_text())
    assert manifest["optimizer"]["name"] == "mezo"


def test_flags_choose_engine_and_distribution():
    words = (
        "--optimizer ldsd --optimizer.engine chunked --optimizer.chunk 5 --optimizer.start random"
    )
    found = parse_config(words.split(), "pretrain").optimizer
    assert found == LdsdConfig(engine="chunked", chunk=5, start="random")
    with pytest.raises(ConfigError, match="optimizer.distribution: got 'cauchy', expected normal"):
        parse_config("--optimizer mezo --optimizer.distribution cauchy".split(), "pretrain")


MEZO = PretrainConfig(optimizer=MeZOConfig())
BAD = {
    "z-loss": (replace(MEZO, z_loss=0.1), "z_loss: got 0.1, expected 0: mezo sees one number"),
    "schedule": (
        replace(MEZO, schedule=AdaptiveWarmupConfig(target_loss=1.0)),
        "schedule: got 'adaptive-warmup', expected another",
    ),
    "diagnostics": (
        replace(MEZO, diagnostics=DiagnosticsConfig(record=("smoothness",))),
        "diagnostics.record: got .* MeZOConfig has no gradient",
    ),
    "bfloat16 weights": (
        replace(MEZO, model=replace(MEZO.model, param_dtype="bfloat16")),
        r"optimizer: eps is 0.001 and leaf \['embedding'\]\['tokens'\] is bfloat16",
    ),
    "chunk": (
        replace(MEZO, optimizer=MeZOConfig(directions=3, engine="chunked", chunk=2)),
        "optimizer.chunk: got 2, expected a divisor of optimizer.directions = 3",
    ),
    "chunk of candidates": (
        replace(MEZO, optimizer=LdsdConfig(engine="chunked", chunk=2)),
        "optimizer.chunk: got 2, expected a divisor of optimizer.candidates = 5",
    ),
    "scalar rule": (
        replace(MEZO, optimizer=ZoSignSgdConfig(rule="scalar", b1=0.9)),
        "optimizer.b1: got 0.9, expected None",
    ),
    "selected": (
        replace(MEZO, optimizer=LdsdConfig(candidates=2, selection="mean")),
        "optimizer.selected: got 3, expected at most optimizer.candidates = 2",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_that_need_a_gradient_are_refused_by_name(name):
    config, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        validate(config, device_count=1)


def test_a_comparison_refuses_them_too():
    config = CompareConfig(optimizers=("adamw", "mezo"), z_loss=0.1)
    with pytest.raises(ConfigError, match="z_loss: got 0.1, expected 0"):
        validate_comparison(config)
    found = validate_comparison(replace(config, z_loss=0.0))
    assert [entrant.optimizer.forward_passes for entrant in found] == [3, 2]
