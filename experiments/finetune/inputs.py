"""MiniLM and the movie sentences as arrays: from fetched packages, or from one file."""

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxopt_lab import data, models
from jaxopt_lab.core.keys import path_names
from jaxopt_lab.lora.adapters import put

LENGTH = 48


class Inputs(NamedTuple):
    """The base without a head, and all sentences in the order of their ids."""

    config: models.EncoderConfig  # with two classes
    # float32, rounded to float16. Rows of the embedding that no sentence uses are left out: nothing
    # would ever move them.
    params: Any
    ids: np.ndarray  # int32 (rows,)
    tokens: np.ndarray  # uint16 (rows, LENGTH)
    count: np.ndarray  # uint8 (rows,): tokens that are no padding
    label: np.ndarray  # uint8 (rows,)


def fetched() -> Inputs:
    """From the packages of `jaxopt-lab data fetch minilm movie-sentences`."""
    directory = data.find("minilm")
    config, params = models.load_bert(directory)
    rows = [row for part in data.MovieSentences().read().rows.values() for row in part]
    rows.sort(key=lambda row: row.id)
    tokenizer = data.WordPiece.load(directory)
    found = tokenizer.encode([row.text for row in rows], length=LENGTH)
    used, tokens = np.unique(found.tokens, return_inverse=True)
    params["embedding"]["tokens"] = np.asarray(params["embedding"]["tokens"])[used]
    return Inputs(
        dataclasses.replace(config, classes=2, vocab_size=len(used)),
        jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), params),
        np.array([int(row.id) for row in rows], np.int32),
        tokens.reshape(found.tokens.shape).astype(np.uint16),
        found.mask.sum(1).astype(np.uint8),
        np.array([row.label for row in rows], np.uint8),
    )


def save(inputs: Inputs, path: pathlib.Path) -> None:
    """Writes one file of 31 MB."""
    leaves = {
        ".".join(("params", *path_names(path))): x.astype(np.float16)
        for path, x in jax.tree_util.tree_leaves_with_path(inputs.params)
    }
    arrays = {name: getattr(inputs, name) for name in Inputs._fields[2:]}
    config = json.dumps(dataclasses.asdict(inputs.config))
    with path.open("wb") as file:
        np.savez_compressed(file, config=np.array(config), **arrays, **leaves)


def load(path: pathlib.Path) -> Inputs:
    """Reads what `save` wrote."""
    with np.load(path) as stored:
        config = models.EncoderConfig(**json.loads(str(stored["config"])))
        params: dict[str, Any] = {}
        for name in stored.files:
            if name.startswith("params."):
                put(params, tuple(name.split(".")[1:]), stored[name].astype(np.float32))
        return Inputs(config, params, *(stored[name] for name in Inputs._fields[2:]))
