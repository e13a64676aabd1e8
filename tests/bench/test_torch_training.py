"""The step of PyTorch that ours is timed against; most of it needs torch."""

import dataclasses
import sys

import jax
import pytest

from jaxopt_lab import models
from jaxopt_lab.bench.command import main
from jaxopt_lab.bench.torch_training import TorchTrainer, peer_for
from jaxopt_lab.bench.training import run_training

SMALL = {"vocab_size": 64, "width": 32, "depth": 2, "heads": 2, "hidden": 32, "context": 16}


def test_what_there_is_no_peer_for_is_named(monkeypatch, capsys):
    with pytest.raises(ValueError, match="peers: got keras; wanted torch or none"):
        run_training("tiny", peers=["keras"])

    monkeypatch.setitem(sys.modules, "torch", None)
    assert main("train --model tiny --peers torch --batch 1 --context 8 --steps 1".split()) == 2
    assert "error: peers: torch is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["gpt2-124m", "llama-124m"])
def test_the_peer_is_the_same_model(preset):
    pytest.importorskip("torch")
    config = dataclasses.replace(models.PRESETS[preset], **SMALL)
    params = jax.tree.map(lambda x: 5 * x, models.init_params(config, jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (2, 17), 0, config.vocab_size)
    trainer = TorchTrainer(config, params, tokens, rate=1e-3, decay=0.0)
    wanted = models.loss(config, params, {"tokens": tokens})[0]
    assert trainer.loss() == pytest.approx(float(wanted), rel=1e-6)
    trainer.run(3)
    assert trainer.loss() < wanted - 0.05


def test_a_decoder_that_the_peer_does_not_have_is_refused():
    config = dataclasses.replace(models.PRESETS["llama-124m"], **SMALL, tied=False)
    with pytest.raises(ValueError, match="peers: the PyTorch step has no biases"):
        peer_for(config)
