"""Engines as rows of the trainer: the same losses, in less memory or on several devices."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxopt_lab.models import DecoderConfig
from jaxopt_lab.train.arguments import parse_config
from jaxopt_lab.train.config.finetune import FinetuneConfig
from jaxopt_lab.train.config.optimizers import ModelInfo
from jaxopt_lab.train.config.optimizers_zeroth_order import ZEROTH_ORDER, MeZOConfig
from jaxopt_lab.train.config.run import PretrainConfig, check_optimizer, validate
from jaxopt_lab.train.config.sections import MeshConfig
from jaxopt_lab.train.dist.mesh import flags, to_global
from jaxopt_lab.train.errors import ConfigError
from jaxopt_lab.train.program import build_program, compile_step
from tests.distributed.test_probe_axis import COLLECTIVE, devices_together
from tests.train.test_zeroth_order import probes
from tests.zeroth_order.problems import cheap_normals

MODEL = DecoderConfig(vocab_size=96, width=8, depth=2, heads=2, hidden=16, context=8)
SIGNS = MeZOConfig(learning_rate=1e-2, distribution="signs", directions=2)
ONE = MeshConfig(1)
LOW_RANK = replace(SIGNS, distribution="low-rank", rank=2)


def run_of(optimizer, mesh=ONE, **changes):
    return PretrainConfig(model=MODEL, optimizer=optimizer, mesh=mesh, batch_size=4, **changes)


def first_step(config):
    """The compiled step of a run, the state after it, and the losses that it evaluated."""
    program = build_program(config)
    compiled = compile_step(config, program)
    tokens = np.random.default_rng(0).integers(0, 96, (4, 9), np.int32)
    batch = to_global(program.mesh, {"tokens": tokens}, 4)
    batch["signals"] = flags(program.mesh, [0, 0])
    state, _ = compiled(program.step.init(jax.random.key(0), None), batch)
    return compiled, state, np.asarray(probes(state.opt_state).losses)


@pytest.fixture(scope="module")
def layerwise():
    return first_step(run_of(SIGNS))


def test_layer_by_layer_no_gradient_and_the_same_losses(layerwise):
    """`auto` perturbs layer by layer; the same directions decide the same update."""
    compiled, state, losses = layerwise
    text = compiled.as_text()
    assert "transpose(jvp" not in text and "jvp" not in text
    _, wanted, others = first_step(run_of(replace(SIGNS, engine="sequential")))
    np.testing.assert_allclose(losses, others, rtol=1e-6)
    assert np.ptp(losses) > 1e-4
    # An update of two directions is D1 z1 + D2 z2; rounding of the losses reaches D alone.
    assert_close(state.params, wanted.params)


def assert_close(params, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, wanted)


@pytest.mark.slow  # compiles for a quarter of a minute
def test_probes_beside_the_weights_are_those_that_layers_have(monkeypatch):
    cheap_normals(monkeypatch)
    _, state, losses = first_step(run_of(LOW_RANK))
    _, wanted, others = first_step(run_of(replace(LOW_RANK, engine="layerwise")))
    np.testing.assert_allclose(losses, others, rtol=1e-6)
    assert_close(state.params, wanted.params)


def test_groups_of_devices_share_the_probes_and_exchange_losses(layerwise):
    mesh = MeshConfig(data=2, fsdp=2, probe=2)
    compiled, state, losses = first_step(run_of(SIGNS, mesh))
    np.testing.assert_allclose(losses, layerwise[2], rtol=1e-6)
    assert_close(state.params, layerwise[1].params)
    # Groups are the last axis, so every other place in the order of the mesh is of one group.
    found = COLLECTIVE.findall(compiled.as_text())
    across = {
        (shape.partition("{")[0], what)
        for shape, what, groups in found
        if any(len({place % 2 for place in row}) > 1 for row in devices_together(groups))
    }
    pairs = re.findall(r"source_target_pairs=(\{\{.*?\}\})", compiled.as_text())
    moved = [pair for text in pairs for pair in devices_together(text)]
    assert all(start % 2 == end % 2 for start, end in moved)
    # Losses of two directions, and the flags by which processes agree on stopping.
    assert across == {("f32[2,2]", "all-gather"), ("s32[2]", "all-reduce")}, across
    assert len(found) > 3


def test_a_step_needs_the_memory_of_inference():
    # A layer is a sixteenth of it. In training its loop would be unrolled.
    model = replace(MODEL, vocab_size=256, width=64, depth=16, hidden=256)
    config = replace(run_of(replace(SIGNS, directions=1)), model=model, batch_size=1)
    program = build_program(config)
    found = compile_step(config, program).memory_analysis()
    size = 4 * program.parameters
    assert found.temp_size_in_bytes < 0.2 * size
    assert found.argument_size_in_bytes + found.temp_size_in_bytes < 1.2 * size


def test_which_engine_a_row_has():
    for name, kind in ZEROTH_ORDER.items():
        own = "sequential" if name in ("sampling-muon", "subspace-muon") else "layerwise"
        assert kind().evaluation(whole=True)[0] == own
        assert kind().evaluation(whole=False) == ("sequential", "trees")
    assert LOW_RANK.evaluation(whole=True) == ("vmapped", "beside")
    assert replace(LOW_RANK, engine="sequential").evaluation(whole=True)[1] == "beside"
    assert replace(LOW_RANK, engine="layerwise").evaluation(whole=True)[1] == "layers"
    # The update adds up factors: two directions of rank two, where dense ones are added six times.
    assert (LOW_RANK._sums(), SIGNS._sums()) == (4, 6)
    with pytest.raises(ConfigError, match="optimizer.distribution: got 'low-rank'"):
        LOW_RANK.gradient(1, ModelInfo())


BAD = {
    "--optimizer mezo --mesh.probe 2": r"^mesh.probe: got 2, expected a divisor of "
    r"optimizer.directions = 1",
    "--optimizer ldsd --mesh.probe 2": r"^mesh.probe: got 2, .* optimizer.candidates = 5",
    "--optimizer conservative --mesh.probe 2": "^mesh.probe: got 2, .* the directions = 1",
    "--optimizer adamw --mesh.probe 2": "^mesh.probe: got 2, expected 1: adamw evaluates no probes",
    "--optimizer mezo --mesh.probe 0": "^mesh.probe: got 0, expected at least 1",
    "--optimizer mezo --mesh.probe 3": r"^mesh: got 'data -1 x fsdp 1 x tensor 1 x probe 3'.* 3 "
    r"must divide the number of devices, 8",
    "--optimizer mezo --mesh.probe 2 --optimizer.directions 4 --optimizer.engine chunked "
    "--optimizer.chunk 4": r"^optimizer.chunk: got 4, expected a divisor of optimizer.directions / "
    r"mesh.probe = 2",
    "--optimizer subspace-muon --optimizer.engine layerwise": r"^optimizer.engine: got 'layerwise'"
    r", expected another: its directions are whole matrices",
    "--optimizer mezo --optimizer.engine fast": r"optimizer.engine: got .fast., expected auto",
    "--optimizer jaguar-muon --optimizer.distribution low-rank": r"optimizer.distribution: got "
    r"'low-rank', but there is no such setting",
    "--optimizer mezo --optimizer.distribution low-rank --optimizer.rank 0": r"^optimizer.rank: ",
}


def test_dropout_of_adapters_is_refused_before_anything_is_read():
    flags = ["--trainable", "lora", "--trainable.dropout", "0.1", "--optimizer", "mezo"]
    config = parse_config(flags, "finetune", FinetuneConfig)
    with pytest.raises(ConfigError, match="^trainable.dropout: got 0.1, expected 0: mezo compares"):
        check_optimizer(config, config.optimizer)


@pytest.mark.parametrize("words", BAD)
def test_what_cannot_be_evaluated_so_is_refused_by_name(words):
    with pytest.raises(ConfigError, match=BAD[words]) as refused:
        validate(parse_config([*words.split(), "--batch-size", "24"], "pretrain"), 8)
    assert "\n" not in str(refused.value)
