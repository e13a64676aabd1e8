"""Stopping politely: SIGTERM and Ctrl-C ask, the training loop finishes its step."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

TERMINATED, INTERRUPTED = 1, 2
"""Codes of the two requests; where several processes got different ones, the larger counts."""

_CODES = {signal.SIGTERM: TERMINATED, signal.SIGINT: INTERRUPTED}


@contextlib.contextmanager
def interrupt_by_the_end(message: Callable[[str], None] | None = None) -> Iterator[None]:
    """Within the block, Ctrl-C raises KeyboardInterrupt, at the end of the block at the latest.

    Python raises it wherever it happens to be. Where that is a callback from native code, as when
    a tokenizer runs, the exception is lost, and Ctrl-C would seem to do nothing.

    Args:
      message: Given, the first Ctrl-C only says that it was seen, and the end of the block raises:
        for work that breaks when it is torn apart, such as tracing and compiling. A second one
        raises at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    requested = False

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        del number, frame
        again, requested = requested, True
        if message is None or again:
            raise KeyboardInterrupt
        message("SIGINT: stopping as soon as the program is compiled")

    before = signal.signal(signal.SIGINT, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if requested:
        raise KeyboardInterrupt


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
