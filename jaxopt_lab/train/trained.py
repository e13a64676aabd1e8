"""What a run leaves behind, used: its parameters, a Hugging Face directory, a continuation."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxopt_lab import lora, models, optim
from jaxopt_lab.data import Tokenizer
from jaxopt_lab.lora.adapters import whole_leaves
from jaxopt_lab.lora.inits import FROM_KERNEL
from jaxopt_lab.models import DecoderConfig, Params
from jaxopt_lab.optim.params_ema import ParamsEmaState
from jaxopt_lab.report.storage import path_of, staged
from jaxopt_lab.step import merged, split
from jaxopt_lab.train.base import Base, placed, read_base
from jaxopt_lab.train.config.finetune import FinetuneConfig
from jaxopt_lab.train.config.run import PretrainConfig
from jaxopt_lab.train.config.sections import MeshConfig
from jaxopt_lab.train.errors import CheckpointError, ConfigError, within
from jaxopt_lab.train.io.run_directory import TOKENIZER_FILE, read_config
from jaxopt_lab.train.io.stored import checkpoint_path, read_item, read_leaves, select_step
from jaxopt_lab.train.leaves import describe_leaves, first_difference
from jaxopt_lab.train.loop import Run
from jaxopt_lab.train.program import build_program
from jaxopt_lab.train.step import TrainState
from jaxopt_lab.train.trainable import Trained

# Stands for a leaf that is not read; orbax's own placeholder.
_UNREAD: Any = ...

Step = int | Literal["best"] | None
"""A checkpoint's label, "best" for the one with the lowest held-out loss, None for the newest."""


def load_params(
    run_directory: str | os.PathLike[str], *, step: Step = None, average: bool = False
) -> tuple[DecoderConfig, Params, Tokenizer]:
    """Reads the model of a run, in one process and on any number of devices.

    Only the parameters are read, into host memory: neither the mesh of the run nor room for the
    optimizer state is needed.

    Args:
      run_directory: What `pretrain` wrote.
      step: Label of a kept checkpoint, "best" for the lowest held-out loss among them, None for
        the newest. The last two pass over doubtful ones, with a warning (`stored.select_step`).
      average: Take the average of the weights, of a run with `ema`.

    Returns:
      The decoder's configuration, its parameters as NumPy arrays, and the tokenizer.

    Raises:
      ConfigError: If there is no run in the directory, or it keeps no average.
      CheckpointError: If there is no such checkpoint, or it cannot be read.
    """
    config = read_config(run_directory)
    if isinstance(config, FinetuneConfig) and config.is_labelled:
        wanted = "which has learnt labels: expected a run on text (its adapters are in adapter/)"
        raise ConfigError("run_directory", str(run_directory), wanted)
    found = _read(run_directory, config, MeshConfig(1, 1, 1), step, average)
    params = found.params
    if isinstance(config, FinetuneConfig):
        base = read_base(config, config.model)
        if base.digest != found.stored["model"]:
            raise other_base(base, found.stored["model"])
        trained, frozen = found.trained, base.params
        if not trained.leaves_base:
            frozen = jax.tree.map(jnp.asarray, frozen)
            start = trained.beside(frozen, jax.random.key(config.seed))
            frozen = trained.beneath(frozen, start)
        params = jax.tree.map(np.asarray, whole(frozen, params, trained))
    model: Any = config.model
    return model, params, found.tokenizer


class _Read(NamedTuple):
    """What a checkpoint holds of a model."""

    params: PyTree  # what moves, NumPy arrays
    tokenizer: Tokenizer
    stored: Mapping[str, Any]  # what stands beside the state
    trained: Trained


def whole(base: Params, moving: PyTree, trained: Trained) -> Params:
    """A model that needs nothing beside its parameters."""
    if trained.spec is not None:
        base, moving = (jax.tree.map(jnp.asarray, tree) for tree in (base, moving))
        found: Any = lora.merge(whole_leaves(base, moving, trained.spec), moving, trained.spec)
        return found
    return merged(moving, split(base, trained.moves)[1])


def other_base(base: Base, stored: str) -> ConfigError:
    """The refusal of other weights than a run was trained on."""
    return ConfigError("model", base.digest, f"but the run was trained on weights of {stored}")


def forked_params(run: Run) -> Params:
    """The weights that a run starts from, taken from the newest checkpoint of another run.

    Raises:
      ConfigError: If there is no such run, or its tokenizer is another one.
      CheckpointError: If it has no checkpoint that can be read, or another model; the first
        differing leaf is named.
    """
    source = run.config.fork_from
    assert source is not None
    with within("fork_from"):
        config = read_config(source)
    wanted = run.program.step.abstract_state.params
    if isinstance(config, FinetuneConfig):
        ours = getattr(run.config, "trainable", None)
        init, theirs = (getattr(each, "init", None) for each in (ours, config.trainable))
        if init != theirs and FROM_KERNEL & {init, theirs}:
            raise ConfigError(
                "trainable.init", init, f"but the adapters of {source} started from {theirs}"
            )
        found: Any = read_leaves(source, select_step(source, None), {"params": _host(wanted)})
        return placed(found["params"], jax.tree.map(lambda leaf: leaf.sharding, wanted))
    found = _read(source, config, run.config.mesh, None, average=False)
    params, tokenizer = found.params, found.tokenizer
    if tokenizer.hash != run.identity["tokenizer"]:
        raise ConfigError(
            "tokenizer",
            run.config.tokenizer,
            f"but the weights of {source} know its own tokens: expected "
            f"TokenizerConfig(kind='saved', directory={source!r})",
        )
    if difference := first_difference(describe_leaves(wanted), describe_leaves(params)):
        raise CheckpointError(f"{source} has another model: {difference}")
    return placed(params, jax.tree.map(lambda leaf: leaf.sharding, wanted))


def _read(
    run_directory: str | os.PathLike[str],
    config: PretrainConfig,
    mesh: MeshConfig,
    step: Step,
    average: bool,
) -> _Read:
    if average and config.ema is None:
        raise ConfigError("average", True, "but the run kept no average of its weights (--ema)")
    tokenizer_file = path_of(run_directory) / TOKENIZER_FILE
    if not tokenizer_file.is_file():
        raise CheckpointError(f"{run_directory} has no {TOKENIZER_FILE}: no step was taken there")
    try:
        tokenizer = Tokenizer.load(run_directory)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    label = select_step(run_directory, step)
    stored = read_item(checkpoint_path(run_directory, label), "data")
    spec = lora.spec_from_json(stored["adapters"]) if "adapters" in stored else None
    program = build_program(replace(config, mesh=mesh), spec=spec)
    abstract = program.step.abstract_state._replace(frozen=())
    state = read_leaves(run_directory, label, _target(abstract, average))
    params: Any = optim.params_ema(state["opt_state"]) if average else state["params"]
    return _Read(params, tokenizer, stored, program.trained)


def export_run(
    run_directory: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    step: Step = None,
    average: bool = False,
) -> Path:
    """Writes the model of a run as a directory that Hugging Face libraries load.

    It holds `config.json`, `model.safetensors` and `tokenizer.json`.

    Args:
      run_directory: What `pretrain` wrote.
      directory: Where the model goes; must not hold one yet.
      step: As for `load_params`.
      average: As for `load_params`.

    Returns:
      The directory written.

    Raises:
      ConfigError: If there is no run, or `directory` is in use, or neither GPT-2 nor LLaMA can
        represent the decoder.
      CheckpointError: If there is no such checkpoint, or it cannot be read.
    """
    config, params, _ = load_params(run_directory, step=step, average=average)
    try:
        models.export_huggingface(
            config, params, path_of(directory), staged(path_of(run_directory) / TOKENIZER_FILE)
        )
    except FileExistsError:
        raise ConfigError(
            "directory", str(directory), "which already holds a model: choose a new one"
        ) from None
    except ValueError as error:
        raise ConfigError.inside("model", error) from error
    return path_of(directory)


def continue_text(
    run_directory: str | os.PathLike[str],
    prompt: str,
    *,
    tokens: int = 96,
    temperature: float = 0.8,
    seed: int = 0,
    step: Step = None,
    average: bool = False,
) -> str:
    """Samples a continuation of a text from the model of a run.

    Args:
      run_directory: What `pretrain` wrote.
      prompt: The beginning; without one the model starts a document.
      tokens: Length of the continuation.
      temperature: Divides the logits; 0 takes the most likely token.
      seed: Of the sampling.
      step: As for `load_params`.
      average: As for `load_params`.

    Returns:
      The continuation alone.

    Raises:
      ConfigError: If there is no run, or a number is negative.
      CheckpointError: If there is no such checkpoint, or it cannot be read.
    """
    for name, value in (("tokens", tokens), ("temperature", temperature)):
        if not value >= 0:
            raise ConfigError(name, value, "expected at least 0")
    config, params, tokenizer = load_params(run_directory, step=step, average=average)
    ids: Sequence[int] = tokenizer.encode(prompt).tolist() or [tokenizer.end_of_text]
    drawn = models.generate(
        config, params, jnp.asarray(ids), steps=tokens, temperature=temperature,
        key=jax.random.key(seed),
    )  # fmt: skip
    return tokenizer.decode(np.asarray(drawn)[len(ids) :])


def _host(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: np.empty(x.shape, x.dtype), tree)


def _target(abstract: TrainState, average: bool) -> dict[str, PyTree]:
    """Fields of the state, with host arrays where something is to be read."""

    def only_average(node: Any) -> Any:
        if isinstance(node, ParamsEmaState):
            return ParamsEmaState(_UNREAD, _host(node.ema))
        return _UNREAD

    if not average:
        return {"params": _host(abstract.params)}
    opt_state = jax.tree.map(
        only_average, abstract.opt_state, is_leaf=lambda node: isinstance(node, ParamsEmaState)
    )
    unread = jax.tree.map(lambda leaf: _UNREAD, abstract)
    return unread._replace(opt_state=opt_state)._asdict()
