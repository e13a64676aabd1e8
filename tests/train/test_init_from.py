"""Pretraining that starts from the weights in a directory."""

import shutil
from dataclasses import replace
from typing import Any

import pytest

from jaxopt_lab.data import Tokenizer, TokenizerConfig
from jaxopt_lab.data.tokenizer import make_tokenizer
from jaxopt_lab.models import export_huggingface
from jaxopt_lab.train import FinetuneConfig, load_params, pretrain
from jaxopt_lab.train.arguments import parse_config, started_from
from jaxopt_lab.train.config.optimizers import AdamWConfig
from jaxopt_lab.train.config.run import validate
from jaxopt_lab.train.errors import ConfigError
from jaxopt_lab.train.io.checkpoints import Checkpoints
from jaxopt_lab.train.io.run_directory import read_config
from jaxopt_lab.train.loop import Run
from jaxopt_lab.train.program import build_program
from jaxopt_lab.train.start import first_state
from tests.models.decoders import largest_difference, varied_params
from tests.train.tiny_run import MODEL, tiny_config, write_text


@pytest.fixture
def given(tmp_path):
    """A directory with weights and their vocabulary, the weights, and a run that starts there."""
    tokenizer = make_tokenizer(TokenizerConfig("bytes"), ())
    assert isinstance(tokenizer, Tokenizer)
    tokenizer.save(tmp_path)
    model = replace(MODEL, qk_norm=True, head_dim=4, loop="scanned")
    params = varied_params(model)
    directory = tmp_path / "given"
    export_huggingface(model, params, directory, tmp_path / "tokenizer.json")
    config = tiny_config(write_text(tmp_path / "text"), tmp_path / "run", steps=1)
    # So small that nothing moves in float32.
    config = replace(config, optimizer=AdamWConfig(learning_rate=1e-30), ema=None)
    return directory, params, started_from(str(directory), config)


def test_the_first_state_has_the_weights(given, tmp_path):
    _, params, config = given
    program = build_program(config)
    with Checkpoints(tmp_path / "run") as checkpoints:
        run: Any = Run(config, tmp_path / "run", None, program, checkpoints, None)  # pyright: ignore
        _, state, position = first_state(run, print)
    assert position.step == 0 and largest_difference(state.params, params) == 0


@pytest.mark.slow
def test_a_run_needs_the_weights_no_more(given):
    directory, params, config = given
    assert config.model.qk_norm and config.tokenizer.directory == str(directory)
    pretrain(config)
    run = config.run_directory
    model, found, _ = load_params(run)
    assert model == config.model and largest_difference(found, params) == 0
    shutil.rmtree(directory)
    resumed = parse_config(["--resume", "--run-directory", run, "--steps", "2"], "pretrain")
    assert pretrain(resumed).summary is not None
    assert largest_difference(load_params(run)[1], params) == 0
    fork = parse_config(["--fork-from", run], "pretrain")
    assert fork.init_from is None and fork.model == config.model
    assert read_config(run).init_from == str(directory)


def test_flags(given):
    directory, *_ = given
    flags = ["--init-from", str(directory), "--optimizer", "adamw", "--model.loop", "unrolled"]
    config = parse_config(flags, "pretrain")
    assert (config.init_from, config.model.head_dim) == (str(directory), 4)
    assert config.model.loop == "unrolled"
    # The rate that was tuned for `tiny` is not for these weights.
    assert config.optimizer == AdamWConfig()


def test_what_cannot_start_is_refused(given, tmp_path):
    directory, params, config = given
    with pytest.raises(ConfigError, match=r"model.vocab_size: .* at least the 257 entries"):
        small = replace(config.model, vocab_size=256)
        cut = {**params, "embedding": {"tokens": params["embedding"]["tokens"][:256]}}
        export_huggingface(small, cut, tmp_path / "small", tmp_path / "tokenizer.json")
        pretrain(started_from(str(tmp_path / "small"), config))
    with pytest.raises(ConfigError, match=r"init_from: .*other arrays: layers/mlp/down/kernel is"):
        pretrain(replace(config, model=replace(config.model, hidden=32)))
    with pytest.raises(ConfigError, match="init_from: .*expected a directory with config.json"):
        parse_config(["--init-from", str(tmp_path / "text")], "pretrain")
    with pytest.raises(ConfigError, match="init_from: .*expected None beside fork_from"):
        validate(replace(config, fork_from="run"), 1)
    with pytest.raises(ConfigError, match="init_from: .*leave out --resume"):
        parse_config(["--resume", "--run-directory", "x", "--init-from", "y"], "pretrain")
    with pytest.raises(ConfigError, match="init_from: .*expected --model with that directory"):
        FinetuneConfig(init_from=str(directory)).check_what_moves()
    assert not (tmp_path / "run").exists()
