"""Paths that may lie in object storage: `gs://BUCKET/...` beside local ones.

A store has no directories, no renames, no locks, and objects are written whole: what needs more is
done in a local directory, and its files are brought in (`staged`) or out (`uploading`). Whatever
goes wrong there is a `StorageError` in one line that names the path.
"""

import contextlib
import datetime
import fcntl
import functools
import glob
import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
AnyPath = str | os.PathLike[str]

_SCHEME, _GLOB = "gs://", re.compile(r"[*?[]")
# How long a bucket has for its first answer. The library beneath goes on trying for minutes.
_PATIENCE_SECONDS = 60.0
_THREADS = 8
_LONGEST_REASON = 300


class StorageError(OSError):
    """Object storage that cannot be used, or not for this."""


def is_remote(name: AnyPath) -> bool:
    """Whether a name or path is one in object storage.

    >>> is_remote("gs://bucket/run"), is_remote("runs/1")
    (True, False)
    """
    return os.fspath(name).startswith(_SCHEME)


def path_of(name: AnyPath) -> Path:
    """The path that a user names: a `pathlib.Path`, or etils' `epath.Path` in object storage.

    The first path of a bucket waits for its answer, a minute at most.

    >>> path_of("runs/1").name
    '1'

    Raises:
      StorageError: For another scheme, without the packages of the extra `gcs`, and for a bucket
        that does not answer or must not be read.
    """
    text = os.fspath(name)
    if not is_remote(text):
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) or text.startswith("gs:/"):
            raise StorageError(f"{text}: expected a local path or gs://BUCKET/PATH")
        return Path(name)
    # Or etils, and orbax with it, takes TensorFlow's client where that happens to be installed.
    os.environ.setdefault("EPATH_USE_TF", "false")
    _reach(text)
    from etils import epath

    path: Any = epath.Path(text.rstrip("/"))
    return path


def absolute(name: AnyPath) -> Path:
    """The path that a user names, independent of the working directory."""
    path = path_of(name)
    return path if is_remote(path) else path.absolute()


def local(name: AnyPath) -> Path:
    """The path that a user names, where only a local one will do.

    Raises:
      StorageError: For any other.
    """
    if is_remote(name):
        raise StorageError(f"{os.fspath(name)}: expected a local path")
    return path_of(name)


def names_in(directory: Path) -> list[str]:
    """Names in a directory; none where there is none.

    Raises:
      OSError: If it cannot be listed.
    """
    if not is_remote(directory):
        return os.listdir(directory) if directory.is_dir() else []
    with asking(directory), contextlib.suppress(FileNotFoundError):
        found = _file_system().ls(str(directory), detail=False)
        root = _key(directory) + "/"
        return sorted(
            {name.removeprefix(root).strip("/") for name in found} - {"", _key(directory)}
        )
    return []


def files_below(path: Path) -> list[str]:
    """Relative names of all files below a directory, ascending."""
    if is_remote(path):
        return sorted(_objects(path))
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


def delete_below(path: Path, first: Iterable[str] = ()) -> None:
    """Deletes all objects below a path in the store, some of them one by one before the others."""
    with asking(path):
        for name in first:
            with contextlib.suppress(FileNotFoundError):
                _file_system().rm_file(f"{path}/{name}")
        with contextlib.suppress(FileNotFoundError):
            _file_system().rm(str(path), recursive=True)


def copy_below(source: Path, target: Path) -> None:
    """Copies all objects below a path; the store does it, nothing comes through this machine."""
    with asking(target):
        _in_parallel(
            lambda name: _file_system().cp_file(f"{source}/{name}", f"{target}/{name}"),
            _objects(source),
        )


def create(path: Path, content: bytes) -> bool:
    """Writes an object unless there is one already; whether it was written."""
    with asking(path):
        try:
            _file_system().pipe_file(str(path), content, mode="create")
        except FileExistsError:
            return False
    return True


def staged(name: AnyPath) -> str:
    """A local copy of a file, directory or glob in the store; a local name as it is.

    Copies are kept in the cache. What has the size and the time of its object is not brought again,
    and what is gone from the store is removed.

    Raises:
      StorageError: If it cannot be read.
    """
    text = os.fspath(name)
    if not is_remote(text):
        path_of(text)  # refuses other schemes
        return text
    _reach(text)
    key = _key(text)
    home = cache_root(None) / "staged" / hashlib.sha256(key.encode()).hexdigest()[:16]
    home.mkdir(parents=True, exist_ok=True)
    with open(home.with_suffix(".lock"), "wb") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        _synchronize(text, home)
    return f"{glob.escape(str(home)) if _GLOB.search(key) else home}/{key}"


def _synchronize(name: str, home: Path) -> None:
    with asking(name):
        if _GLOB.search(_key(name)):
            found = _file_system().glob(name, detail=True)
        else:
            found = _file_system().find(name, detail=True)
    # A name that ends in a slash is what consoles make to show an empty folder.
    found = {k: v for k, v in found.items() if v["type"] == "file" and not k.endswith("/")}

    def bring(key: str) -> None:
        target, size, written = home / key, found[key]["size"], _seconds(found[key])
        with contextlib.suppress(FileNotFoundError):
            about = target.stat()
            if about.st_size == size and abs(about.st_mtime - written) < 1e-3:
                return
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".partial-{target.name}")
        with asking(f"gs://{key}"):
            _file_system().get_file(key, str(partial))
        os.utime(partial, (written, written))
        partial.replace(target)

    _in_parallel(bring, found)
    for path in [path for path in home.rglob("*") if path.is_file()]:
        if path.relative_to(home).as_posix() not in found:
            path.unlink()


def origin(path: Path) -> Path:
    """Bucket and name of a file of a `staged` copy, as a path; any other path as it is."""
    home = cache_root(None) / "staged"
    return Path("/", *path.relative_to(home).parts[1:]) if path.is_relative_to(home) else path


@contextlib.contextmanager
def uploading(target: Path) -> Iterator[Path]:
    """Gives a local path for a file or directory; it is at `target` at the end of the block.

    Files of a directory appear in the order in which they were written. A local target is the path
    itself.
    """
    if not is_remote(target):
        yield target
        return
    with tempfile.TemporaryDirectory(prefix="jaxopt-lab-") as home:
        written = Path(home) / target.name
        yield written
        if written.is_file():
            upload(written, target)
            return
        files = [path for path in written.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.stat().st_mtime_ns):
            upload(path, target / path.relative_to(written).as_posix())


def upload(file: Path, target: Path) -> None:
    """Writes a local file to the store."""
    with asking(target):
        _file_system().put_file(str(file), str(target))


def download(source: Path, file: Path) -> None:
    """Writes an object to a local file."""
    with asking(source):
        _file_system().get_file(str(source), str(file))


def cache_root(cache_dir: AnyPath | None) -> Path:
    """The cache directory: the argument, else `JAXOPT_LAB_CACHE`, else the XDG cache directory."""
    if cache_dir is not None:
        return local(cache_dir).expanduser()
    if own := os.environ.get("JAXOPT_LAB_CACHE"):
        return local(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "jaxopt-lab"


def one_line(error: BaseException) -> str:
    """What went wrong, in one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."


@contextlib.contextmanager
def asking(path: AnyPath) -> Iterator[None]:
    """Makes errors of the libraries beneath, which are of many kinds, one that names the path."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, StorageError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # of the local disk
        raise StorageError(f"{os.fspath(path)}: {one_line(error)}") from error


@functools.cache
def _file_system() -> Any:
    """The store as fsspec knows it; `epath` goes through the same."""
    import fsspec
    from fsspec.config import conf

    # Listings kept in memory would not know what orbax and other processes have written since.
    conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem("gcs", finalize_on_close=True)


_reached: set[str] = set()


def _reach(name: str) -> None:
    """Asks a bucket once whether it answers."""
    bucket = _key(name).partition("/")[0]
    if not bucket:
        raise StorageError(f"{name}: expected gs://BUCKET/PATH")
    if bucket in _reached:
        return
    try:
        _file_system()
    except ImportError:
        raise StorageError(
            f"{name}: object storage needs a package: pip install 'jaxopt-lab[gcs]'"
        ) from None
    with asking(name), contextlib.suppress(FileNotFoundError):
        _in_time(name, lambda: _file_system().info(_key(name)))
    _reached.add(bucket)


def _in_time(name: str, work: Callable[[], Result]) -> Result:
    outcome: Future[Result] = Future()

    def answer() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    # No thread of a pool, which the end of the process would wait for.
    threading.Thread(target=answer, daemon=True).start()
    try:
        return outcome.result(_PATIENCE_SECONDS)
    except TimeoutError:
        raise StorageError(f"{name}: no answer within {_PATIENCE_SECONDS:g} s") from None


def _objects(path: Path) -> dict[str, Any]:
    """Relative name -> what the store says about it."""
    root = _key(path) + "/"
    with asking(path):
        found = _file_system().find(str(path), detail=True)
    names = {key.removeprefix(root): about for key, about in found.items() if key.startswith(root)}
    return {name: about for name, about in names.items() if name and not name.endswith("/")}


def _key(name: AnyPath) -> str:
    """Bucket and name of the object."""
    return os.fspath(name).removeprefix(_SCHEME).rstrip("/")


def _seconds(about: dict[str, Any]) -> float:
    """When an object was written."""
    written = about.get("mtime")
    return written.timestamp() if isinstance(written, datetime.datetime) else float(written or 0)


def _in_parallel(work: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(work, names):
            pass
