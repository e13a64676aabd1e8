"""Features and a target from a CSV file, for the repeated-learning loop."""

import csv
import math
import os
from typing import NamedTuple, NoReturn

import numpy as np
from jaxtyping import Float

_DELIMITERS = (",", ";", "\t")


class CsvData(NamedTuple):
    """A regression data set."""

    x: Float[np.ndarray, "items features"]
    y: Float[np.ndarray, "items"]
    names: tuple[str, ...]  # of the features, then of the target


def read_csv(path: str | os.PathLike[str], target: str | None = None) -> CsvData:
    """Reads numbers from a CSV file.

    Columns are separated by commas, semicolons or tabs. A first row without any number is a
    header; without one the columns are called "1", "2", ... Empty lines are skipped.

    Args:
      path: The file, UTF-8.
      target: Name of the column to predict; the last by default. All others are features.

    Returns:
      Features, target and names, in float64 and in the order of the file.

    Raises:
      OSError: If the file cannot be read.
      ValueError: For an unknown target, fewer than two columns or rows, rows of different lengths,
        cells that are not finite numbers, or a constant target. The message names the file, and
        the row (line of the file, from 1) and column of the first mistake.
    """
    rows = _read_rows(path)
    names = _header(rows[0][1])
    if names is None:
        names = tuple(str(number + 1) for number in range(len(rows[0][1])))
    else:
        rows = rows[1:]
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        _fail(path, f"column {repeated!r} stands in the header more than once")
    if len(names) < 2:
        _fail(path, f"got {len(names)} column, expected at least one feature and the target")
    if target is not None and target not in names:
        _fail(path, f"target: got {target!r}, expected one of {', '.join(names)}")
    if len(rows) < 2:
        _fail(path, f"got {len(rows)} rows of data, expected at least 2")
    values = np.array([_numbers(path, names, line, cells) for line, cells in rows])
    column = len(names) - 1 if target is None else names.index(target)
    y = values[:, column]
    if np.all(y == y[0]):
        _fail(path, f"target column {names[column]!r} is constant ({y[0]:g}): nothing to learn")
    features = [i for i in range(len(names)) if i != column]
    ordered = (*(names[i] for i in features), names[column])
    return CsvData(values[:, features], y, ordered)


def _read_rows(path: str | os.PathLike[str]) -> list[tuple[int, list[str]]]:
    """Line numbers and cells of the rows that hold anything."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            delimiter = max(_DELIMITERS, key=first.count)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            rows = [
                (reader.line_num, [cell.strip() for cell in cells])
                for cells in reader
                if any(cell.strip() for cell in cells)
            ]
    except (UnicodeDecodeError, csv.Error) as error:
        _fail(path, f"expected UTF-8 text with separated columns: {error}")
    if not rows:
        _fail(path, "the file is empty")
    return rows


def _header(cells: list[str]) -> tuple[str, ...] | None:
    if any(_number(cell) is not None for cell in cells):
        return None
    return tuple(cell or str(i + 1) for i, cell in enumerate(cells))


def _numbers(
    path: str | os.PathLike[str], names: tuple[str, ...], line: int, cells: list[str]
) -> list[float]:
    if len(cells) != len(names):
        _fail(path, f"row {line}: got {len(cells)} cells, expected {len(names)}")
    values = []
    for name, cell in zip(names, cells, strict=True):
        value = _number(cell)
        if value is None or not math.isfinite(value):
            _fail(path, f"row {line}, column {name!r}: got {cell!r}, expected a finite number")
        values.append(value)
    return values


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _fail(path: str | os.PathLike[str], text: str) -> NoReturn:
    raise ValueError(f"{os.fspath(path)}: {text}")
