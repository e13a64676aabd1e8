"""The files of a run: in its directory, or in a local one whose files go to object storage.

A log is appended to, figures and events are written by other libraries, and a store can do neither.
So everything but checkpoints is written locally and uploaded, when something is committed, now and
then, and at the end.
"""

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxopt_lab.report import storage
from jaxopt_lab.train.io.lease import only_launcher

_UPLOAD_SECONDS = 60.0
# A log is uploaded whole: of the time, uploads take this share at most.
_UPLOAD_SHARE = 0.1
_UNFINISHED = ".partial"

Message = Callable[[str], None]


def _nothing() -> None:
    pass


class RunFiles(NamedTuple):
    """Where a run is, and where its files are written."""

    directory: Path
    """As the user names it; checkpoints lie below it."""
    local: Path
    """The same, or a local directory for everything but checkpoints."""
    publish: Callable[[], None] = _nothing
    """Makes what was written to `local` appear in `directory`; raises what prevents that."""
    check: Callable[[], None] = _nothing
    """Raises where another launcher has taken the run over."""


@contextlib.contextmanager
def run_files(
    directory: Path, *, writes: bool, below: Sequence[str], say: Message
) -> Iterator[RunFiles]:
    """Gives the files of a run directory; in object storage those there are brought first.

    Args:
      directory: The run.
      writes: Whether this process writes it. It then holds the lease, and uploads to the end.
      below: Directories in it that are needed as well; other ones stay where they are.
      say: Receives lines of plain text.

    Raises:
      NotReadyError: If another launcher writes there.
      StorageError: If it cannot be read, or what was written last could not be uploaded; names the
        local directory that is then kept.
    """
    if not storage.is_remote(directory):
        yield RunFiles(directory, directory)
        return
    with contextlib.ExitStack() as held:
        check = held.enter_context(only_launcher(directory, say)) if writes else _nothing
        home = Path(tempfile.mkdtemp(prefix="jaxopt-lab-"))
        mirror = _Mirror(directory, home / directory.name)

        def publish() -> None:
            check()
            if writes:
                mirror.upload()

        def not_uploaded(error: Exception) -> str:
            return (
                f"{directory}: what was written last could not be uploaded and is in "
                f"{mirror.local}: {storage.one_line(error)}"
            )

        try:
            mirror.bring(below)
        except BaseException:
            shutil.rmtree(home, ignore_errors=True)
            raise
        try:
            with _now_and_then(publish, say):
                yield RunFiles(directory, mirror.local, publish, check)
        except BaseException:
            try:
                publish()
            except Exception as error:  # what went wrong before matters more
                say(not_uploaded(error))
            else:
                shutil.rmtree(home, ignore_errors=True)
            raise
        try:
            publish()
        except Exception as error:
            raise storage.StorageError(not_uploaded(error)) from error
        shutil.rmtree(home, ignore_errors=True)


class _Mirror:
    """A local directory and what of it is in the store."""

    def __init__(self, directory: Path, local: Path):
        self.local = local
        self._directory = directory
        self._copy = local.with_name("uploading")
        self._uploading = threading.Lock()
        self._known: dict[str, tuple[int, int]] = {}
        local.mkdir()

    def bring(self, below: Sequence[str]) -> None:
        for name in storage.files_below(self._directory):
            if "/" in name and name.partition("/")[0] not in below or name.startswith("."):
                continue
            file = self.local / name
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f"{_UNFINISHED}-{file.name}")  # is never uploaded
            storage.download(self._directory / name, partial)
            partial.replace(file)
            self._known[name] = _signature(file)

    def upload(self) -> None:
        """Uploads what has changed, and deletes what is gone."""
        with self._uploading:
            found = {}
            for name in storage.files_below(self.local):
                with contextlib.suppress(FileNotFoundError):
                    found[name] = _signature(self.local / name)
            for name, signature in found.items():
                if _UNFINISHED in name or self._known.get(name) == signature:
                    continue
                with contextlib.suppress(FileNotFoundError):  # written under another name, say
                    # The store is told the size first, and logs grow.
                    shutil.copyfile(self.local / name, self._copy)
                    storage.upload(self._copy, self._directory / name)
                    self._known[name] = signature
            for name in self._known.keys() - found.keys():
                storage.delete_below(self._directory / name)
                del self._known[name]


@contextlib.contextmanager
def _now_and_then(publish: Callable[[], None], say: Message) -> Iterator[None]:
    """Uploads in the background within the block; what fails is said and tried again."""
    ended = threading.Event()

    def work() -> None:
        pause, failed = _UPLOAD_SECONDS, False
        while not ended.wait(pause):
            before = time.monotonic()
            try:
                publish()
                failed = False
            except Exception as error:
                if not failed:
                    say(f"the log could not be uploaded: {storage.one_line(error)}")
                failed = True
            pause = max(_UPLOAD_SECONDS, (time.monotonic() - before) / _UPLOAD_SHARE)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_UPLOAD_SECONDS)


def _signature(file: Path) -> tuple[int, int]:
    about = os.stat(file)
    return about.st_size, about.st_mtime_ns
