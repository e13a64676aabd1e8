"""A profiler trace of a few steps, which is closed whatever ends them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxopt_lab.train.errors import ConfigError

PROFILE_DIRECTORY = "profile"


def profiled_steps(text: str | None, steps: int) -> range:
    """The steps that `START:STEPS` stands for, the first step of a run being 1.

    >>> list(profiled_steps("10:3", steps=300))
    [10, 11, 12]
    >>> profiled_steps("5", steps=300)
    Traceback (most recent call last):
    jaxopt_lab.train.errors.ConfigError: profile: got '5', expected START:STEPS, as 10:3 for steps \
10 to 12

    Args:
      text: The setting; None stands for no step.
      steps: Length of the run.

    Raises:
      ConfigError: For anything but two numbers of at least 1, and steps beyond the run.
    """
    if text is None:
        return range(0)
    found = re.fullmatch(r"([0-9]{1,10}):([0-9]{1,10})", text)
    first, count = map(int, found.groups()) if found else (0, 0)
    if first < 1 or count < 1:
        raise ConfigError("profile", text, "expected START:STEPS, as 10:3 for steps 10 to 12")
    last = first + count - 1
    if last > steps:
        wanted = f"expected steps between 1 and {steps}, not {first} to {last}"
        raise ConfigError("profile", text, wanted)
    return range(first, last + 1)


class Trace:
    """Traces some steps of a run into its directory, in process 0.

    Waits for the device where the trace begins and where it ends, and nowhere else. A profiler that
    fails is reported, and training goes on. The end of the block closes a trace that is still open.

    Args:
      steps: Numbers of the steps, in a row; none of them makes everything here do nothing.
      directory: Where the trace goes.
      message: Receives lines of plain text.
    """

    def __init__(self, steps: range, directory: Path, message: Callable[[str], None]):
        """Starts nothing yet."""
        self._left = steps if jax.process_index() == 0 else range(0)
        self._directory, self._message = directory, message
        self._open = False

    def before(self, step: int, state: Any) -> None:
        """Opens the trace if the step belongs to it, also behind the first, as after a resume."""
        if not self._left or self._open or step < self._left[0]:
            return
        if step > self._left[-1]:
            self._message(f"profile: nothing was traced, step {self._left[-1]} was taken before")
            self._left = range(0)
            return
        jax.block_until_ready(state)
        self._open = self._try(self._start)

    def after(self, step: int, state: Any) -> None:
        """Closes the trace if this was its last step."""
        if self._open and step == self._left[-1]:
            jax.block_until_ready(state)
            self._close()

    def _start(self) -> None:
        # Before JAX finds out at the end, when it would take the trace for open from then on.
        self._directory.mkdir(parents=True, exist_ok=True)
        jax.profiler.start_trace(str(self._directory))

    def _close(self) -> None:
        if self._open:
            self._open, self._left = False, range(0)
            if self._try(jax.profiler.stop_trace):
                self._message(f"profile: {self._directory}")

    def _try(self, action: Callable[[], None]) -> bool:
        try:
            action()
        except (OSError, RuntimeError) as error:
            self._left = range(0)
            reason = " ".join(str(error).split())
            self._message(f"profile: could not be written to {self._directory}: {reason}")
            return False
        return True

    def __enter__(self) -> "Trace":
        """Returns the trace itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes the trace, also when the block raised."""
        self._close()
