"""How far long work has come, in lines of text."""

import time
from collections.abc import Callable

OnProgress = Callable[[str], None]

SECONDS = 10.0
"""Between two lines; work that is done before the first one is silent."""


class Pace:
    """Reports bytes, bytes/s and the time left of work, every few seconds.

    >>> seconds = iter([0.0, 20.0])
    >>> pace = Pace("read", print, total=8e9, clock=lambda: next(seconds))
    >>> pace.add(2_000_000_000)
    read 2,000 of 8,000 MB, 100.0 MB/s, 1:00 left

    Args:
        what: what was done to the bytes.
        report: receives the lines.
        total: bytes in all, about; None where they are not known.
        clock: seconds, monotonic; replaced in tests.
    """

    def __init__(
        self,
        what: str,
        report: OnProgress,
        *,
        total: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """The time starts here."""
        self._what, self._report, self._total, self._clock = what, report, total, clock
        self._started = self._told = clock()
        self._done = 0

    def add(self, size: int) -> None:
        """So many more bytes are done."""
        self._done += size
        now = self._clock()
        if now - self._told < SECONDS:
            return
        self._told = now
        speed = self._done / max(now - self._started, 1e-9)
        parts = [f"{self._what} {self._done / 1e6:,.0f} MB", f"{speed / 1e6:.1f} MB/s"]
        if self._total and self._total >= self._done:
            minutes, seconds = divmod(round((self._total - self._done) / speed), 60)
            parts[0] = f"{self._what} {self._done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB"
            parts.append(f"{minutes}:{seconds:02d} left")
        self._report(", ".join(parts))
