"""The model that is fine-tuned: read from its source, on the host, and known by a digest."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jaxopt_lab import models
from jaxopt_lab.core.keys import path_names, purpose_key
from jaxopt_lab.core.packed import as_shapes
from jaxopt_lab.models import PRESETS, DecoderConfig, EncoderConfig, encoder
from jaxopt_lab.models.encoder_config import ModelConfig
from jaxopt_lab.train.config.finetune import FinetuneConfig, gguf_file, model_directory
from jaxopt_lab.train.errors import ConfigError
from jaxopt_lab.train.leaves import describe_leaves, first_difference


class Base(NamedTuple):
    """The parameters of a model as they were found."""

    params: PyTree  # NumPy arrays, some of them packed perhaps
    digest: str  # SHA-256 of paths, dtypes, shapes and values, without a fresh head


def read_base(config: FinetuneConfig, model: ModelConfig) -> Base:
    """Reads the model of a run; a preset has the random weights of the run's seed, as has a head.

    Args:
      config: The run.
      model: That of the run, with the classes of its task.

    Raises:
      ConfigError: If it cannot be read, or its arrays are not those of `config.model`.
    """
    key = config.weights_key
    if isinstance(config.model, DecoderConfig) and config.preset in PRESETS:
        params = models.init_params(config.model, key)
    else:
        params = read_params("model", config.preset, config.model, packed=config.packed)
    host = jax.tree.map(np.asarray, params)
    found = digest(host)
    if isinstance(model, EncoderConfig) and model.classes is not None:
        _, params = encoder.with_head(model, host, model.classes, purpose_key(key, "head"))
        host = jax.tree.map(np.asarray, params)
    return Base(host, found)


def read_params(field: str, name: str, model: ModelConfig, *, packed: bool = False) -> PyTree:
    """The parameters of a model in a directory, in the precision of `model.param_dtype`.

    Args:
      field: What names the directory, for messages.
      name: Its path, or a package that was fetched.
      model: As a run has it, without a fresh head.
      packed: Keep the blocks of a GGUF file, and its precisions.

    Raises:
      ConfigError: If it cannot be read, or its arrays are not those of the model.
    """
    directory = model_directory(field, name)
    try:
        params = _read(directory, model, packed=packed)
    except (OSError, ValueError) as error:
        raise ConfigError(field, name, f"which cannot be read: {error}") from error
    positions = params["embedding"].get("positions")
    if positions is not None:  # a shorter context reads a part of the table
        params["embedding"]["positions"] = positions[: model.context]
    if not packed:
        params = jax.tree.map(lambda x: x.astype(model.param_dtype), params)
    wanted = describe_leaves(models.abstract_params(model))
    if difference := first_difference(wanted, describe_leaves(as_shapes(params))):
        raise ConfigError(field, name, f"which has other arrays: {difference}")
    return params


def _read(directory: Path, model: ModelConfig, *, packed: bool) -> PyTree:
    if isinstance(model, EncoderConfig):
        return models.load_bert(directory)[1]
    if (file := gguf_file(directory)) is not None:
        return models.load_gguf(file, packed=packed)[1]
    return models.load_huggingface(directory)[1]


def digest(params: PyTree) -> str:
    """SHA-256 of every leaf of a tree: its path, dtype, shape and values.

    >>> digest({"a": np.zeros(2)}) == digest({"a": np.zeros(2)})
    True
    >>> digest({"a": np.zeros(2)}) == digest({"b": np.zeros(2)})
    False
    """
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.ascontiguousarray(leaf)
        total.update(f"{'.'.join(path_names(path))} {array.dtype} {array.shape} ".encode())
        total.update(array.tobytes())
    return total.hexdigest()


def placed(params: PyTree, shardings: PyTree) -> PyTree:
    """Host arrays on the devices; each process needs the whole of them."""
    return jax.tree.map(
        lambda x, sharding: jax.make_array_from_callback(
            x.shape, sharding, lambda index, x=x: x[index]
        ),
        params,
        shardings,
    )
