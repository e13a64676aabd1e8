"""`jaxopt-lab VERB`: answers SIGTERM and Ctrl-C from its first line on; the verbs come after that.

Until a verb has something to finish or to clear away (`train.interrupts`) a signal ends the process
at once, without an exception: one that is raised while packages are imported may get lost there.
"""

import os
import signal
import sys

_EXIT = {signal.SIGTERM: 0, signal.SIGINT: 130}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: What stands after the command; by default those of the process.

    Returns:
      0 on success and after SIGTERM, 1 when a run failed, 2 for a mistake in the arguments, 130
      after Ctrl-C, 141 where the reader of the output has gone, as `head` does.
    """
    before = {}
    try:
        for number in _EXIT:
            before[number] = signal.signal(number, _end)
    except ValueError:
        pass  # only the main thread may: a caller's own thread
    try:
        from jaxopt_lab import verbs

        return verbs.main(sys.argv[1:] if arguments is None else arguments)
    finally:
        if arguments is not None:  # otherwise the process is about to end
            for number, handler in before.items():
                signal.signal(number, handler)


def _end(number: int, frame: object) -> None:
    del frame
    text = "stopped by SIGTERM" if number == signal.SIGTERM else "error: interrupted"
    os.write(2, f"jaxopt-lab: {text}\n".encode())
    os._exit(_EXIT[signal.Signals(number)])


if __name__ == "__main__":
    sys.exit(main())
