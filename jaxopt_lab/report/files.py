"""Files whose errors say which file it was."""

import contextlib
import errno
import importlib.util
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxopt_lab.report.storage import StorageError, asking, is_remote, uploading


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within the block, an OSError without a file name gets one: a full disk has none to give."""
    if is_remote(path):
        with asking(path):
            yield
        return
    try:
        yield
    except OSError as error:
        if error.filename is not None or isinstance(error, StorageError):
            raise
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_text(path: Path) -> str:
    """Reads a UTF-8 file.

    Raises:
      OSError: If it cannot be read.
      ValueError: If it is not UTF-8; names the file.
    """
    with naming(path):
        content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
      OSError: If it cannot be read.
      ValueError: If it is not JSON; names the file.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


@contextlib.contextmanager
def appearing_whole(path: Path) -> Iterator[Path]:
    """Gives a path to write to; at the end of the block the file appears under its own name.

    A process that is killed before leaves what was there as it was.
    """
    if is_remote(path):
        with uploading(path) as local:
            yield local
        return
    partial = path.with_name(f".partial-{path.name}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sync_to_disk(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot do that for directories
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file in one piece: readers see the old one or the new one."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file in one piece, and waits until it is on the disk."""
    if is_remote(path):
        with naming(path):
            path.write_bytes(text.encode())
        return
    partial = path.with_name(path.name + ".partial")
    try:
        with naming(path):
            partial.write_bytes(text.encode())
            sync_to_disk(partial)
            partial.replace(path)
            sync_to_disk(path.parent)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def rounded(value: Any, digits: int = 6) -> Any:
    """Results as JSON values: floats rounded, None for what is not finite, arrays as lists.

    >>> rounded({"loss": [1.23456789, float("nan")], "steps": 3})
    {'loss': [1.23457, None], 'steps': 3}

    Args:
      value: A tree of dicts, lists, tuples and arrays.
      digits: Significant ones that are kept.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value


def write_result(path: Path, result: Any, digits: int = 6) -> None:
    """Writes a result of an experiment, `rounded`, in one line and in one piece.

    Whoever stops the experiment finds the file whole or not at all.
    """
    text = json.dumps(rounded(result, digits), allow_nan=False) + "\n"
    with appearing_whole(path) as partial:
        partial.write_text(text)


def open_gguf(path: str | os.PathLike[str]) -> Any:
    """Opens a file with weights as `gguf.GGUFReader`: metadata in `fields`, and `tensors`.

    Raises:
      ModuleNotFoundError: Without the package gguf.
      OSError: If it cannot be read.
      ValueError: If it is no GGUF file, or a damaged one; names the file.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            f"{path}: reading it needs the package gguf: pip install 'jaxopt-lab[finetune]'"
        )
    import gguf

    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path}: not a GGUF file, or a damaged one: {error}") from error
