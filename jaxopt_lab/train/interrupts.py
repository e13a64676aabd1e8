"""Stopping politely: SIGTERM and Ctrl-C ask, the training loop finishes its step."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

TERMINATED, INTERRUPTED = 1, 2
"""Codes of the two requests; where several processes got different ones, the larger counts."""

_CODES = {signal.SIGTERM: TERMINATED, signal.SIGINT: INTERRUPTED}


class StopRequests:
    """Within the block, SIGTERM and SIGINT set `requested` instead of ending the process.

    A second Ctrl-C raises KeyboardInterrupt at once. Outside the main thread Python allows no
    handlers, and signals keep their meaning.

    Args:
      message: Receives one line when a request arrives.
    """

    def __init__(self, message: Callable[[str], None]):
        """Does not touch any handler yet."""
        self.requested = 0
        self._message = message
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequests":
        """Installs the handlers."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._request) for number in _CODES}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Puts the previous handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        del frame
        code = _CODES[signal.Signals(number)]
        if code == INTERRUPTED and self.requested == INTERRUPTED:
            raise KeyboardInterrupt
        self.requested = max(self.requested, code)
        name = signal.Signals(number).name
        self._message(f"{name}: finishing this step and saving a checkpoint")
