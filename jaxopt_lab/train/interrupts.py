"""Stopping politely: SIGTERM and Ctrl-C ask, what cannot be interrupted is finished first.

A signal that the process was started to ignore, as a shell does for what runs in its background,
stays ignored. Handlers do not write: the stream may be the one that the signal came into, or a pipe
whose reader the same signal has ended.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

TERMINATED, INTERRUPTED = 1, 2
"""Codes of the two requests; where several processes got different ones, the larger counts."""

_CODES = {signal.SIGTERM: TERMINATED, signal.SIGINT: INTERRUPTED}


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C; the command line ends with 0 or 143 instead of 130."""


_RAISED = {signal.SIGTERM: Terminated, signal.SIGINT: KeyboardInterrupt}
# How long the end of a block waits for a message about a signal, which is to come before what the
# program says next.
_MESSAGE_SECONDS = 1.0


@contextlib.contextmanager
def interrupt_by_the_end(
    message: Callable[[str], None] | None = None, until: str = "the program is compiled"
) -> Iterator[None]:
    """Within the block, Ctrl-C raises KeyboardInterrupt and SIGTERM `Terminated`, one of its kind.

    Python raises them wherever it happens to be. Where that is a callback from native code, as
    when a tokenizer runs, the exception is lost, and the signal would seem to do nothing. So the
    end of the block raises again.

    Args:
      message: Given, the first signal only says that it was seen, and the end of the block raises:
        for work that breaks when it is torn apart, such as tracing and compiling. A second one
        raises at once.
      until: What the end of the block means, for that message.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    requests: list[type[KeyboardInterrupt]] = []
    told: list[threading.Thread] = []

    def request(number: int, frame: FrameType | None) -> None:
        del frame
        requests.append(_RAISED[signal.Signals(number)])
        if message is None or len(requests) > 1:
            raise requests[-1]
        told.append(_tell(message, f"{signal.Signals(number).name}: stopping as soon as {until}"))

    with _handling(request):
        yield
    for thread in told:
        thread.join(_MESSAGE_SECONDS)
    if requests:
        raise requests[-1]


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
        self._handlers = contextlib.ExitStack()

    def __enter__(self) -> "StopRequests":
        """Installs the handlers."""
        if threading.current_thread() is threading.main_thread():
            self._handlers.enter_context(_handling(self._request))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Puts the previous handlers back."""
        self._handlers.close()

    def _request(self, number: int, frame: FrameType | None) -> None:
        del frame
        code = _CODES[signal.Signals(number)]
        if code == INTERRUPTED and self.requested == INTERRUPTED:
            raise KeyboardInterrupt
        self.requested = max(self.requested, code)
        name = signal.Signals(number).name
        _tell(self._message, f"{name}: finishing this step and saving a checkpoint")


@contextlib.contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within the block `handler` answers both signals, except one that is ignored."""
    before: dict[signal.Signals, Any] = {}
    try:
        for number in _CODES:
            previous = signal.getsignal(number)
            if previous is not signal.SIG_IGN:
                # None is a handler that was not installed from Python, nor can be again.
                before[number] = signal.SIG_DFL if previous is None else previous
                signal.signal(number, handler)
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _tell(message: Callable[[str], None], text: str) -> threading.Thread:
    thread = threading.Thread(target=message, args=(text,), daemon=True)
    thread.start()
    return thread
