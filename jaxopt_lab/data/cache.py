"""A directory of finished results: built once, complete or absent, checked when opened."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxopt_lab.report.files import naming
from jaxopt_lab.report.storage import cache_root as cache_root

_MANIFEST = "entry.json"
_CHUNK = 1 << 20
_BACKDATED_NS = 10 * 10**9

Manifest = dict[str, Any]


def open_or_build(
    entry: Path,
    write: Callable[[Path], Manifest],
    on_progress: Callable[[str], None],
    fits: Callable[[Manifest], bool] = lambda manifest: True,
) -> Manifest:
    """Returns the manifest of a cache entry, building the entry where it is absent or damaged.

    The entry is written into a temporary directory beside it and renamed, so a reader sees all of
    it or nothing. Processes that want the same entry wait for the first one; where the file system
    knows no locks they build it twice and the first rename wins.

    Args:
        entry: the entry's directory.
        write: fills a directory and returns what the manifest shall say about it (JSON values).
        on_progress: told when a damaged entry is rebuilt.
        fits: whether an intact entry is still what is wanted; otherwise it is built again.
    """
    with naming(entry):
        return _open_or_build(entry, write, on_progress, fits)


def _open_or_build(
    entry: Path,
    write: Callable[[Path], Manifest],
    on_progress: Callable[[str], None],
    fits: Callable[[Manifest], bool],
) -> Manifest:
    manifest = intact_manifest(entry)
    if manifest is not None and fits(manifest):
        return manifest
    entry.parent.mkdir(parents=True, exist_ok=True)
    with _lock(entry.with_name(entry.name + ".lock")) as locked:
        manifest = intact_manifest(entry)
        if manifest is not None and fits(manifest):
            return manifest
        if entry.exists() and manifest is None:
            on_progress(f"the cached {entry} is damaged: building it again")
        if locked:
            _remove_leftovers(entry)
        return _build(entry, write)


def read_manifest(entry: Path) -> Manifest | None:
    """The manifest of an entry, or None where there is none that can be read."""
    try:
        manifest = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "files" in manifest else None


def intact_manifest(entry: Path) -> Manifest | None:
    """The manifest of an entry whose files are all there as they were written, or None."""
    manifest = read_manifest(entry)
    return manifest if manifest is not None and is_intact(entry, manifest) else None


def is_intact(entry: Path, manifest: Manifest) -> bool:
    """Whether every file of the entry is there with the bytes that were written.

    A file with the size, time and inode of then is not read; another one, as in a copy of the
    cache, is compared by its hash.
    """
    stats = manifest.get("stats", {})
    try:
        return all(
            stat_of(entry / name) == stats.get(name) or _digest(entry / name) == digest
            for name, digest in manifest["files"].items()
        )
    except OSError:
        return False


def stat_of(path: Path) -> list[int]:
    """Size, time of the last change (ns) and inode of a file: they differ if it was changed."""
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def _build(entry: Path, write: Callable[[Path], Manifest]) -> Manifest:
    building = Path(tempfile.mkdtemp(prefix=f".{entry.name}-", dir=entry.parent))
    try:
        manifest = write(building)
        files = sorted(path for path in building.rglob("*") if path.is_file())
        names = {path.relative_to(building).as_posix(): path for path in files}
        manifest["files"] = {name: _digest(path) for name, path in names.items()}
        for path in files:
            # A change within the tick of the clock that wrote the file would not show otherwise.
            before = time.time_ns() - _BACKDATED_NS
            os.utime(path, ns=(before, before))
        manifest["stats"] = {name: stat_of(path) for name, path in names.items()}
        (building / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        building.chmod(0o755)  # mkdtemp's 0700 would hide a shared cache from other users
        if entry.exists():
            damaged = Path(tempfile.mkdtemp(prefix=f".{entry.name}-", dir=entry.parent))
            os.rename(entry, damaged)
            shutil.rmtree(damaged, ignore_errors=True)
        try:
            os.rename(building, entry)
        except OSError:
            # Another process finished first (only where locks do not work): same content.
            manifest = read_manifest(entry)
            if manifest is None:
                raise
        return manifest
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _remove_leftovers(entry: Path) -> None:
    """Removes what killed processes left, of any entry beside; call with the entry's lock held."""
    for leftover in entry.parent.glob(".*-*"):
        name = leftover.name[1:].rpartition("-")[0]
        if name == entry.name or _is_free(leftover.with_name(f"{name}.lock")):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_free(lock: Path) -> bool:
    """Whether a lock is there and nobody holds it."""
    try:
        with open(lock, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Holds an exclusive lock; yields False where the file system has none."""
    with open(path, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
