"""Stopping politely: SIGTERM, SIGHUP and Ctrl-C ask, what cannot be interrupted is finished first.

A signal that the process was started to ignore, as a shell does for what runs in its background,
stays ignored. Handlers do not write: the stream may be the one that the signal came into, or a pipe
whose reader the same signal has ended.

Of several processes one may be asked while the others wait for it. So none of them stops by itself:
where a block ends, all agree.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

from jaxopt_lab.train.dist.agreement import agreed
from jaxopt_lab.train.errors import Terminated

TERMINATED, INTERRUPTED = 1, 2
"""Codes of the two requests; where several processes got different ones, the larger counts."""

_CODES = {signal.SIGTERM: TERMINATED, signal.SIGHUP: TERMINATED, signal.SIGINT: INTERRUPTED}
# How long the end of a block waits for a message about a signal, which is to come before what the
# program says next.
_MESSAGE_SECONDS = 1.0


class _Handler:
    """Answers a signal; `act` gets it and the number of those that nobody has acted on yet."""

    def __init__(self, act: Callable[[signal.Signals, int], None]):
        self.noted: list[signal.Signals] = []
        self._act = act

    def __call__(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.noted.append(signal.Signals(number))
        self._act(self.noted[-1], len(self.noted))

    def take(self) -> list[signal.Signals]:
        """Those noted so far, which are from now on someone else's business."""
        noted, self.noted = self.noted, []
        return noted


@contextlib.contextmanager
def interrupt_by_the_end(
    message: Callable[[str], None] | None = None, until: str = "the program is compiled"
) -> Iterator[None]:
    """Within the block, Ctrl-C raises KeyboardInterrupt and SIGTERM `Terminated`, one of its kind.

    Python raises them wherever it happens to be. Where that is a callback from native code, as
    when a tokenizer runs, the exception is lost, and the signal would seem to do nothing. So the
    end of the block raises again.

    Args:
      message: Given, the first signal only says that it was seen, and the end of the block raises,
        on all processes if one of them was asked: for work that breaks when it is torn apart, such
        as tracing and compiling, or that other processes wait for. A second one raises at once.
      until: What the end of the block means, for that message.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told: list[threading.Thread] = []

    def act(number: signal.Signals, count: int) -> None:
        if message is None or count > 1:
            raise _exception(number)
        told.append(_tell(message, f"{number.name}: stopping as soon as {until}"))

    def raise_noted() -> None:
        if noted := handler.take():
            raise _exception(noted[-1])

    with _handling(act) as handler:
        yield
        for thread in told:
            thread.join(_MESSAGE_SECONDS)
        if message is None:
            raise_noted()
        else:
            agreed(raise_noted)
    for number in handler.take():  # came while the processes agreed that there is none
        signal.raise_signal(number)


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
            handler = self._handlers.enter_context(_handling(self._request))
            self.requested = max((_CODES[number] for number in handler.noted), default=0)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Puts the previous handlers back."""
        self._handlers.close()

    def _request(self, number: signal.Signals, count: int) -> None:
        del count
        code = _CODES[number]
        if code == INTERRUPTED and self.requested == INTERRUPTED:
            raise KeyboardInterrupt
        self.requested = max(self.requested, code)
        _tell(self._message, f"{number.name}: finishing this step and saving a checkpoint")


@contextlib.contextmanager
def _handling(act: Callable[[signal.Signals, int], None]) -> Iterator[_Handler]:
    """Within the block a handler answers all signals, except those that are ignored.

    What a handler around the block has noted, and not acted on, it takes over.
    """
    handler, before = _Handler(act), dict[signal.Signals, Any]()
    try:
        for number in _CODES:
            previous = signal.getsignal(number)
            if isinstance(previous, _Handler):
                handler.noted += previous.take()
            if previous is not signal.SIG_IGN:
                # None is a handler that was not installed from Python, nor can be again.
                before[number] = signal.SIG_DFL if previous is None else previous
                signal.signal(number, handler)
        yield handler
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _exception(number: signal.Signals) -> KeyboardInterrupt:
    return (KeyboardInterrupt if number == signal.SIGINT else Terminated)(number.name)


def _tell(message: Callable[[str], None], text: str) -> threading.Thread:
    thread = threading.Thread(target=message, args=(text,), daemon=True)
    thread.start()
    return thread
