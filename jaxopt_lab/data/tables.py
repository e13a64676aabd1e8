"""Rows of numbers with labels, from packages: a9a, mushroom and Fashion-MNIST."""

import csv
import gzip
import os
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from jaxopt_lab.data import packages

_IDX_HEADER = {1: 8, 3: 16}  # bytes, by the number of dimensions


class Table(NamedTuple):
    """One part of a data set."""

    features: np.ndarray  # (rows, columns) bool, or images (rows, 28, 28) uint8
    labels: np.ndarray  # int32 (rows,): +1 and -1, or the class of an image


def a9a(
    split: Literal["train", "test"] = "train", *, cache_dir: str | os.PathLike[str] | None = None
) -> Table:
    """Adult, encoded as a9a is: categories, and numbers by their quintiles, as indicators.

    Levels and quintiles are those of the training rows; a missing value has no indicator. Gains and
    losses are zero or not. Of the 123 columns of the original two are empty, and left out. The
    label is +1 for an income above 50 000 dollars.

    Args:
        split: 32 561 or 16 281 rows.
        cache_dir: as for `prepare`.

    Raises:
        ValueError: the package is not here; names the command.
    """
    directory = packages.find("a9a", cache_dir=cache_dir)
    train = _rows(directory / "adult.data")
    # A comment is the first row of the test file.
    table = train if split == "train" else _rows(directory / "adult.test")[1:]
    seen, given = (np.array(part).T for part in (train, table))
    categories, numbers, signs = (1, 3, 5, 6, 7, 8, 9, 13), (0, 2, 4, 12), (10, 11)
    columns = [_indicators(given[k], seen[k]) for k in categories]
    for k in numbers:
        edges = np.unique(np.quantile(seen[k].astype(float), [0.2, 0.4, 0.6, 0.8]))
        columns.append(
            _indicators(*(np.searchsorted(edges, c[k].astype(float)) for c in (given, seen)))
        )
    columns += [_indicators(*(c[k].astype(float) > 0 for c in (given, seen))) for k in signs]
    positive = np.char.rstrip(given[14], ".") == ">50K"
    return Table(np.concatenate(columns, 1), np.where(positive, 1, -1).astype(np.int32))


def mushroom(*, cache_dir: str | os.PathLike[str] | None = None) -> Table:
    """The 5 644 mushrooms without missing values, one indicator a category; +1 is poisonous.

    Raises:
        ValueError: the package is not here; names the command.
    """
    table = _rows(packages.find("mushroom", cache_dir=cache_dir) / "mushroom.dat")
    columns = np.array(table).T
    features = np.concatenate([_indicators(column, column) for column in columns[:22]], 1)
    return Table(features, np.where(columns[22] == "p", 1, -1).astype(np.int32))


def fashion_mnist(
    split: Literal["train", "test"] = "train", *, cache_dir: str | os.PathLike[str] | None = None
) -> Table:
    """Images of clothes in ten classes, 60 000 for training and 10 000 for the test.

    Raises:
        ValueError: the package is not here; names the command.
    """
    directory = packages.find("fashion-mnist", cache_dir=cache_dir)
    name = "train" if split == "train" else "t10k"
    images = read_idx(directory / f"{name}-images-idx3-ubyte.gz")
    labels = read_idx(directory / f"{name}-labels-idx1-ubyte.gz")
    return Table(images, labels.astype(np.int32))


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of bytes, one or three dimensions.

    Raises:
        ValueError: it is none, or not complete.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}: not a complete gzip file: {error}") from error
    header = _IDX_HEADER.get(content[3] if len(content) > 3 else 0)
    if header is None or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: got the header {content[:4]!r}, wanted that of an IDX file")
    shape = tuple(np.frombuffer(content[4:header], ">u4").astype(int))
    if len(content) - header != np.prod(shape):
        raise ValueError(f"{path}: got {len(content) - header} bytes, wanted those of {shape}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _indicators(column: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """One column for each level of `seen`, sorted."""
    return column[:, None] == np.array(sorted(set(seen.tolist()) - {"?"}))


def _rows(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return [row for row in csv.reader(file, skipinitialspace=True) if row]
