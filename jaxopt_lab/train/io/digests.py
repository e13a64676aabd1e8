"""Digests of a checkpoint's files: they make it committed, and they find damage later.

After the rename that completes a checkpoint, each process writes the size and the SHA-256 of its
files to `_DIGESTS-<process>-of-<count>.json`. A checkpoint whose digests are all there is sealed.
The digest file has a digest of its own, so that no bit of it changes unnoticed either.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxopt_lab.report.files import naming, read_text, sync_to_disk, write_text
from jaxopt_lab.report.storage import files_below, is_remote, names_in

FINITE, NOT_FINITE = "_FINITE", "_NOT_FINITE"
"""Empty files in a checkpoint: whether the loss of its parameters was finite."""
_NAME = re.compile(r"_DIGESTS-(\d+)-of-(\d+)\.json")
_WRITER = re.compile(r"(?:.*\.)?process_(\d+)")
_THREADS = 4  # hashing releases the interpreter lock
# What is gone, is something else now, or lies on a bad sector; lacking rights, say, are no damage.
_UNREADABLE = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.EBADMSG, errno.EUCLEAN,
}  # fmt: skip


def seal(
    path: Path, step: int, held_out_loss: float | None, process: int = 0, count: int = 1
) -> None:
    """Writes the digests of the files that one process has written.

    All of them are on the disk, and not only in its cache, before the digests say that they are:
    others may be deleted because this one exists.

    Args:
      path: The checkpoint.
      step: Its label.
      held_out_loss: What ranks it among the best, if it was evaluated.
      process: Index of this process.
      count: Number of processes.
    """
    names = [name for name in _files(path) if _writer(name, count) == process]
    if not is_remote(path):
        for directory in {path, *((path / name).parent for name in names)}:
            sync_to_disk(directory)
    body = {
        "checkpoint": step,
        "held_out_loss": held_out_loss,
        "files": dict(zip(names, _digests(path, names, sync=True), strict=True)),
    }
    target = path / f"_DIGESTS-{process}-of-{count}.json"
    write_text(target, json.dumps({**body, "digest": _digest_of(body)}))
    if not is_remote(path):
        sync_to_disk(path.parent)


def is_sealed(path: Path) -> bool:
    """Whether the digests of all processes are there."""
    found = [_NAME.fullmatch(name) for name in names_in(path)]
    numbers = {(int(match[1]), int(match[2])) for match in found if match}
    return any(all((k, count) in numbers for k in range(count)) for _, count in numbers)


def damage(path: Path, step: int) -> str | None:
    """What is wrong with a sealed checkpoint; None if every file is as it was written."""
    for file in (path / name for name in sorted(names_in(path)) if _NAME.fullmatch(name)):
        body = _read(file)
        if body is None:
            return f"{file.name} is not what was written"
        if body["checkpoint"] != step:
            return f"it is called {step} and holds step {body['checkpoint']}"
        wanted = body["files"]
        for name, expected, found in zip(
            wanted, wanted.values(), _digests(path, wanted), strict=True
        ):
            if isinstance(found, str):
                return f"{name} {found}"
            if found[0] != expected[0]:
                return f"{name} should have {expected[0]} bytes and has {found[0]}"
            if found != expected:
                return f"the content of {name} is not what was written"
    return None


def held_out_loss(path: Path) -> float | None:
    """The loss that ranks a checkpoint; None if it was not evaluated or cannot be told."""
    for name in names_in(path):
        match = _NAME.fullmatch(name)
        if match and match[1] == "0" and (body := _read(path / name)) is not None:
            return body["held_out_loss"]
    return None


def _files(path: Path) -> list[str]:
    # Marks and digests come after the commit; see `checkpoints`.
    return [name for name in files_below(path) if "/" in name or not is_ours(name)]


def is_digests(name: str) -> bool:
    """Whether a file holds the digests of a process."""
    return _NAME.fullmatch(name) is not None


def is_ours(name: str) -> bool:
    """Whether a file is not orbax's."""
    return name.startswith("_DIGESTS-") or name in (FINITE, NOT_FINITE)


def _writer(name: str, count: int) -> int:
    """The process that wrote a file; the first one writes what all share."""
    for part in name.split("/"):
        match = _WRITER.fullmatch(part)
        if match and int(match[1]) < count:
            return int(match[1])
    return 0


def _digests(path: Path, names: Iterable[str], *, sync: bool = False) -> Iterator[list[Any] | str]:
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(lambda name: _digest_file(path / name, sync), names)


def _digest_file(path: Path, sync: bool) -> list[Any] | str:
    """Size and digest; a text where the file cannot be read because of damage."""
    try:
        with naming(path), path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if sync and not is_remote(path):
                os.fsync(file.fileno())
            return [file.tell(), digest]
    except OSError as error:
        # Those of a store have no number.
        missing = isinstance(error, FileNotFoundError)
        if sync or not (missing or error.errno in _UNREADABLE):
            raise
        return "is missing" if missing else f"cannot be read: {error.strerror}"


def _read(file: Path) -> dict[str, Any] | None:
    try:
        body = json.loads(read_text(file))
        return body if body.pop("digest") == _digest_of(body) else None
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None
    except OSError as error:
        if not isinstance(error, FileNotFoundError) and error.errno not in _UNREADABLE:
            raise
        return None


def _digest_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
