"""Tensors of a Hugging Face directory: read from one file or several, checked, stacked."""

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.flax import load_file

WEIGHTS = "model.safetensors"
_INDEX = f"{WEIGHTS}.index.json"
# Others, float8 among them, mean nothing without scales.
_FLOATS = ("float16", "bfloat16", "float32", "float64")


class Place(NamedTuple):
    """Where one of our leaves is in theirs."""

    names: tuple[str, ...]  # the pieces of the leaf; {} stands for the layer
    transposed: bool  # whether their matrices are (out, in)


def read_tensors(directory: pathlib.Path) -> dict[str, jax.Array]:
    """All tensors of a directory, by name.

    Raises:
        FileNotFoundError: for no weights, or shards that the index names and that are not there.
        ValueError: for shards that the index does not name, or whose tensors are not those that
            it says.
    """
    if not (directory / _INDEX).exists():
        if not (directory / WEIGHTS).exists():
            raise FileNotFoundError(f"{directory}: no {WEIGHTS}, and no {_INDEX} of several files")
        return load_file(directory / WEIGHTS)
    shard_of = json.loads((directory / _INDEX).read_text())["weight_map"]
    shards = sorted(set(shard_of.values()))
    # `model.safetensors` is one, or a second copy beside them.
    found = {path.name for path in directory.glob("model*.safetensors")} - {WEIGHTS}
    if missing := [name for name in shards if not (directory / name).is_file()]:
        raise FileNotFoundError(f"{directory}: no {', '.join(missing)}, which {_INDEX} names")
    if unknown := sorted(found - set(shards)):
        raise ValueError(f"{directory}: {', '.join(unknown)} not in {_INDEX}")
    tensors: dict[str, jax.Array] = {}
    for shard in shards:
        part = load_file(directory / shard)
        listed = {name for name, its in shard_of.items() if its == shard}
        if wrong := sorted(listed ^ set(part)):
            raise ValueError(
                f"{directory / shard}: has other tensors than {_INDEX} says: {', '.join(wrong)}"
            )
        tensors |= part
    return tensors


def check_tensors(
    directory: pathlib.Path,
    tensors: Mapping[str, jax.Array],
    wanted: Mapping[str, tuple[int, ...]],
    unread: Sequence[str] = (),
) -> None:
    """Compares names, shapes and dtypes.

    Args:
        directory: for the message.
        tensors: found.
        wanted: their shapes by name.
        unread: parts of the names of tensors that are left alone.

    Raises:
        ValueError: one for all tensors that are missing, unknown or of another shape or kind.
    """
    missing = [f"{name} {shape}" for name, shape in wanted.items() if name not in tensors]
    unknown = [
        f"{name} {tensor.shape}"
        for name, tensor in tensors.items()
        if name not in wanted and not any(part in name for part in unread)
    ]
    wrong = [
        f"{name} {tensors[name].shape} {tensors[name].dtype} instead of {shape} in floats"
        for name, shape in wanted.items()
        if name in tensors
        and (tensors[name].shape != shape or str(tensors[name].dtype) not in _FLOATS)
    ]
    found = {"missing": missing, "unknown": unknown, "not as config.json says": wrong}
    if any(found.values()):
        each = "; ".join(f"{what}: {', '.join(names)}" for what, names in found.items() if names)
        raise ValueError(f"{directory}: {each}")


def shapes(
    path: tuple[str, ...], leaf: jax.ShapeDtypeStruct, place: Place
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of one of our leaves."""
    layers, shape = _split(path, leaf)
    if len(place.names) > 1:
        shape = (*shape[:-2], shape[-1])  # one of queries, keys and values
    elif path[-1] == "bias":
        shape = (math.prod(shape),)
    elif len(shape) > 2:
        shape = (shape[0], math.prod(shape[1:]))
    shape = shape[::-1] if place.transposed else shape
    return {name.format(i): shape for i in range(layers) for name in place.names}


def stacked(
    path: tuple[str, ...],
    leaf: jax.ShapeDtypeStruct,
    place: Place,
    tensors: Mapping[str, jax.Array],
) -> jax.Array:
    """One of our leaves, made of their tensors, which have the right shapes."""
    layers, shape = _split(path, leaf)
    rows = []
    for i in range(layers):
        pieces = [np.asarray(tensors[name.format(i)]) for name in place.names]
        pieces = [piece.T if place.transposed else piece for piece in pieces]
        # Our axis of query, key and value is the last but one, in kernels and biases alike.
        row = np.stack(pieces, -2) if len(pieces) > 1 else pieces[0]
        rows.append(row.reshape(shape))
    return jnp.asarray(np.stack(rows) if path[0] == "layers" else rows[0], leaf.dtype)


def _split(path: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> tuple[int, tuple[int, ...]]:
    """Number of layers, and the shape of one."""
    return (leaf.shape[0], leaf.shape[1:]) if path[0] == "layers" else (1, leaf.shape)
