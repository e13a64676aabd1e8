"""Compiled programs on disk, so that a later start does not compile them again."""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxopt_lab.report.storage import cache_root, local

PROGRAMS = "programs"
"""Directory of compiled programs, of a user or below a run of several processes."""
# Beyond that the oldest programs go.
_LARGEST_BYTES = 4 << 30


@contextlib.contextmanager
def compiled_once(
    choice: str, message: Callable[[str], None], run_directory: Path | None = None
) -> Iterator[None]:
    """Within the block JAX keeps compiled programs in a directory and takes them from there.

    A directory that cannot be used is reported, and programs are compiled as without it.

    Args:
      choice: `auto`, `off`, or a directory. `auto` leaves JAX alone where it has a directory of its
        own already (`JAX_COMPILATION_CACHE_DIR`); else it is `programs` in the cache directory of
        the corpora, and with several processes in the run directory, since JAX writes on the first
        process alone and the others find its programs only where they see them. Several processes
        with GPUs keep none: they choose kernels together, and one that finds its program would not
        take part. (On a CPU the key of a program differs by process, so that only the first finds
        any.)
      message: Receives a line of plain text.
      run_directory: That of the run; None keeps no programs of several processes.
    """
    config: Any = jax.config
    before = config.jax_compilation_cache_dir
    own, alone = choice == "auto", jax.process_count() == 1
    shared = run_directory is not None and jax.default_backend() != "gpu"
    if choice == "off" or (own and (before or not (alone or shared))):
        yield
        return
    place = cache_root(None) if alone or run_directory is None else run_directory
    directory = place / PROGRAMS if own else local(choice).expanduser()
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError("it cannot be written")
        if own:
            _check_owner(directory)
            if jax.process_index() == 0:
                _remove_oldest(directory)
    except OSError as error:
        message(f"compiled programs are not kept in {directory}: {error.strerror or error}")
        yield
        return
    _set(str(directory))
    try:
        yield
    finally:
        _set(before)


def _set(directory: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", directory)
    compilation_cache.reset_cache()  # or JAX keeps to the directory of its first compilation


def _check_owner(directory: Path) -> None:
    """Refuses a directory that somebody else writes: what is read from there is executed."""
    about = directory.stat()
    if about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError("others can write there")


def _remove_oldest(directory: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # another process does the same
        about = [(path.stat(), path) for path in directory.iterdir()]
        total = 0
        for status, path in sorted(about, key=lambda pair: pair[0].st_mtime, reverse=True):
            total += status.st_size
            if total > _LARGEST_BYTES:
                path.unlink()
