"""Files whose errors say which file it was."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within the block, an OSError without a file name gets one: a full disk has none to give."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
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


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file in one piece: readers see the old one or the new one."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    partial = path.with_name(path.name + ".partial")
    try:
        with naming(path):
            partial.write_text(text)
            partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
