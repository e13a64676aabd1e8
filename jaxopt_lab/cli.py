"""`jaxopt-lab VERB`: answers signals from its first line on; the verbs come after that.

Until a verb has something to finish or to clear away (`train.interrupts`) a signal ends the process
at once, without an exception: one that is raised while packages are imported may get lost there.
"""

import os
import signal
import sys
from collections.abc import Sequence

_INTERRUPTED = 130
_CONTINUED = ("pretrain", "finetune", "compare")


def sigterm_exit(arguments: Sequence[str]) -> int:
    """The status after SIGTERM or SIGHUP: 0 only for a verb whose work the next start continues.

    A command that a launcher repeats says that it is to be repeated.
    """
    if "--restartable" in arguments:
        return os.EX_TEMPFAIL
    return 0 if arguments and arguments[0] in _CONTINUED else 128 + signal.SIGTERM


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: What stands after the command; by default those of the process.

    Returns:
      0 on success, 1 when a run failed, 2 for a mistake in the arguments, 130 after Ctrl-C, 141
      where the reader of the output has gone, as `head` does. After SIGTERM, or SIGHUP from a
      terminal that was closed, 143, but 0 for `pretrain`, `finetune` and `compare`, which the
      next start continues, or 75 with `--restartable`.
    """
    words = sys.argv[1:] if arguments is None else arguments
    stopped = sigterm_exit(words)
    codes = {signal.SIGTERM: stopped, signal.SIGHUP: stopped, signal.SIGINT: _INTERRUPTED}

    def end(number: int, frame: object) -> None:
        del frame
        name = signal.Signals(number).name
        text = "error: interrupted" if name == "SIGINT" else f"stopped by {name}"
        try:
            os.write(2, f"jaxopt-lab: {text}\n".encode())
        finally:  # also where nobody reads that any more
            os._exit(codes[signal.Signals(number)])

    before = {}
    try:
        for number in codes:
            previous = signal.getsignal(number)
            if previous is not signal.SIG_IGN:  # what this process was started to ignore stays so
                signal.signal(number, end)
                before[number] = signal.SIG_DFL if previous is None else previous
    except ValueError:
        pass  # only the main thread may: a caller's own thread
    try:
        from jaxopt_lab import verbs

        return verbs.main(words, stopped)
    finally:
        if arguments is not None:  # otherwise the process is about to end
            for number, handler in before.items():
                signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
