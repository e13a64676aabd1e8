"""One launcher writes a run in object storage at a time: there are no locks, so it leaves a lease.

The lease is an object that its holder writes anew every few seconds. Whoever finds one watches it:
one that changes is held, and the start is refused; one that does not belongs to a process that
died, and is taken over. Clocks of different machines are not compared. A holder that finds the
lease of someone else has lost its own and commits nothing more.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxopt_lab.report import storage
from jaxopt_lab.train.errors import CheckpointError, NotReadyError

LEASE_FILE = ".lease.json"
_BEAT_SECONDS = 10.0
# Three beats: one may be late.
_WATCH_SECONDS, _POLL_SECONDS = 3 * _BEAT_SECONDS, 1.0
# Of two that take over the same lease at the same time, the later one has written by then.
_SETTLE_SECONDS = 3.0
# A beat that is under way would bring the lease back.
_LAST_BEAT_SECONDS = 60.0

Message = Callable[[str], None]


@contextlib.contextmanager
def only_launcher(directory: Path, say: Message) -> Iterator[Callable[[], None]]:
    """Holds the lease of a run directory within the block.

    Args:
      directory: The run, in object storage.
      say: Receives lines of plain text.

    Returns:
      A function that raises CheckpointError if the lease was lost, or OSError if nobody can tell.

    Raises:
      NotReadyError: If a launcher that is alive holds it; names that process.
    """
    lease = _Lease(directory)
    lease.acquire(say)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT_SECONDS):
            # The next one may succeed; that the lease is lost is said where it matters.
            with contextlib.suppress(OSError, CheckpointError):
                lease.beat()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield lease.check
    finally:
        ended.set()
        thread.join(_LAST_BEAT_SECONDS)
        with contextlib.suppress(OSError):
            lease.release()


class _Lease:
    """The object, and what this process wrote to it."""

    def __init__(self, directory: Path):
        self._directory, self._path = directory, directory / LEASE_FILE
        self._about = {
            "token": uuid.uuid4().hex,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "beat": 0,
        }

    def acquire(self, say: Message) -> None:
        taken_over = False
        while (found := self._read()) is not None or not storage.create(
            self._path, self._content()
        ):
            if found is not None and self._is_dead(found, say):
                storage.delete_below(self._path)
                taken_over = True
        if taken_over:
            time.sleep(_SETTLE_SECONDS)
            if not self._is_ours(found := self._read()):
                raise self._refusal(found)

    def _is_dead(self, found: dict[str, Any], say: Message) -> bool:
        """Whether the lease has not changed for a while; False where it was released meanwhile."""
        say(
            f"{self._directory}: {_named(found)} holds the lease; watching for "
            f"{_WATCH_SECONDS:g} s whether it is alive"
        )
        end = time.monotonic() + _WATCH_SECONDS
        while time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
            now = self._read()
            if now is None:
                return False
            if now != found:
                raise self._refusal(now)
        say(f"{_named(found)} has died: its lease is taken over")
        return True

    def beat(self) -> None:
        self.check()
        self._about["beat"] += 1
        with storage.asking(self._path):
            self._path.write_bytes(self._content())

    def check(self) -> None:
        if not self._is_ours(found := self._read()):
            raise CheckpointError(
                f"{self._directory}: {_named(found)} has taken over the lease; this run commits "
                "nothing more"
            )

    def release(self) -> None:
        if self._is_ours(self._read()):
            storage.delete_below(self._path)

    def _read(self) -> dict[str, Any] | None:
        """What the lease says; None where there is none."""
        try:
            with storage.asking(self._path):
                content = self._path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            found = json.loads(content)
        except ValueError:  # written by something else
            return {}
        return found if isinstance(found, dict) else {}

    def _is_ours(self, found: dict[str, Any] | None) -> bool:
        return found is not None and found.get("token") == self._about["token"]

    def _content(self) -> bytes:
        return json.dumps(self._about).encode()

    def _refusal(self, found: dict[str, Any] | None) -> NotReadyError:
        return NotReadyError(
            "run_directory",
            str(self._directory),
            f"which {_named(found)} is writing: wait for it or end it",
        )


def _named(found: dict[str, Any] | None) -> str:
    try:
        assert found is not None
        return f"process {found['pid']} on {found['host']} (since {found['since']})"
    except (AssertionError, KeyError):
        return "another process"
