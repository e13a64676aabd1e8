"""Runs of the real trainer on a model of a few thousand parameters."""

import inspect
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from jaxopt_lab.data import TextFiles, TokenizerConfig
from jaxopt_lab.models import DecoderConfig
from jaxopt_lab.report.tracker import read_metrics
from jaxopt_lab.train.config.run import PretrainConfig
from jaxopt_lab.train.config.sections import CheckpointConfig, EvalConfig, MeshConfig
from jaxopt_lab.train.io.checkpoints import Checkpoints
from jaxopt_lab.train.program import build_program

MODEL = DecoderConfig(vocab_size=257, width=16, depth=1, heads=2, context=16)


class Killed(BaseException):
    """Ends a run where a hook raises it; after other failures of hooks a run saves."""


def write_text(directory):
    """Twenty short documents of real text."""
    directory.mkdir(parents=True, exist_ok=True)
    text = inspect.getsource(json) + inspect.getsource(json.decoder)
    for number in range(20):
        (directory / f"{number}.txt").write_text(text[600 * number : 600 * (number + 1)])
    return str(directory / "*.txt")


def tiny_config(text, run_directory, **changes):
    config = PretrainConfig(
        model=MODEL,
        corpus=TextFiles((text,)),
        tokenizer=TokenizerConfig(kind="bytes"),
        validation_fraction=0.2,
        steps=6,
        batch_size=4,
        mesh=MeshConfig(data=1),
        eval=EvalConfig(every=3, batches=2, sample_tokens=0),
        checkpoint=CheckpointConfig(every_steps=3, keep_newest=5),
        run_directory=None if run_directory is None else str(run_directory),
        tensorboard=False,
    )
    return replace(config, **changes)


def losses_of(directory):
    return {row["step"]: row["loss"] for row in read_metrics(directory) if "loss" in row}


def restored(config, directory):
    """The newest checkpoint of a run, as host arrays."""
    with Checkpoints(Path(directory)) as checkpoints:
        result = checkpoints.restore(build_program(config).step.abstract_state)
    return result.step, jax.tree.map(_host, result.state)


def _host(x):
    if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x)
