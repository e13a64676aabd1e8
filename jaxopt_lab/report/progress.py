"""What a run shows while it works: one live line, or plain lines where there is no terminal."""

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TextIO

# Speed is measured over this much of the recent past: long enough to be steady, short enough to
# follow a change.
_WINDOW_SECONDS = 20.0
_REFRESHES_PER_SECOND = 4

WAIT_WORTH_TELLING = 0.05
"""Share of a step's time; a shorter wait for data is nobody's bottleneck."""


class Progress:
    """The live line of a run.

    On a terminal it is one line that is redrawn, with messages and evaluations printed above it.
    Elsewhere (a file, a pipe, a batch job) it is a plain line every few seconds. Where nobody reads
    it any more, as when Ctrl-C has also ended `tee`, it is silent.

    Args:
      total_steps: Steps of the whole run.
      start_step: Steps already taken by the run that is resumed.
      tokens_per_step: Tokens of one optimizer step over all devices; None leaves out tokens/s.
      utilization: Share of the devices' peak that the model uses at one step a second; None leaves
        out MFU.
      optimizer_share: Share of the step's FLOPs in the optimizer; None leaves it out.
      stream: Where to write; standard error by default, so that output can still be piped.
      interval: Seconds between plain lines.
      clock: Seconds, monotonic; replaced in tests.

    >>> with Progress(10, stream=sys.stdout, interval=0.0, clock=lambda: 0.0) as progress:
    ...     progress.update(1, loss=8.25, rate=1e-3)
    step 1/10  loss 8.2500  rate 1.00e-03
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        tokens_per_step: int | None = None,
        utilization: float | None = None,
        optimizer_share: float | None = None,
        stream: TextIO | None = None,
        interval: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Starts the live line where the stream is a terminal."""
        self.total_steps = total_steps
        self.tokens_per_step = tokens_per_step
        self._utilization, self._optimizer_share = utilization, optimizer_share
        self._stream = sys.stderr if stream is None else stream
        self._interval = interval
        self._clock = clock
        self._recent: deque[tuple[float, int, float]] = deque()  # (time, step, wait for data)
        self._next_line = clock()
        self._live = _live_line(self._stream, total_steps, start_step)

    def update(
        self,
        step: int,
        *,
        loss: float,
        rate: float | None = None,
        data_wait: float = 0.0,
        memory: float | None = None,
    ) -> None:
        """Shows the state after `step` optimizer steps.

        Args:
          step: Optimizer steps taken.
          loss: Training loss in nats/token.
          rate: Learning rate of that step.
          data_wait: Seconds for which that step waited for its batch.
          memory: Bytes that a device needs; None leaves them out.
        """
        now = self._clock()
        self._recent.append((now, step, data_wait))
        while now - self._recent[0][0] > _WINDOW_SECONDS and len(self._recent) > 2:
            self._recent.popleft()
        if self._live is not None:
            text = self._describe(step, loss, rate, memory)
            with contextlib.suppress(OSError):
                self._live.update(self._live.task_ids[0], completed=step, text=text)
        elif now >= self._next_line or step >= self.total_steps:
            self._next_line = now + self._interval
            text = self._describe(step, loss, rate, memory)
            self._write(f"step {step}/{self.total_steps}  {text}")

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Prints one line with the results of an evaluation, above the live line.

        The time it took is left out of tokens/s.
        """
        errors = {error_of(name) for name in metrics}
        parts = []
        for name in [name for name in metrics if name not in errors]:
            error = metrics.get(error_of(name))
            beside = "" if error is None else f" \N{PLUS-MINUS SIGN} {error:.4f}"
            parts.append(f"{name} {metrics[name]:.4f}{beside}")
        values = "  ".join(parts)
        self.message(f"step {step}/{self.total_steps}  evaluation  {values}")
        self._recent.clear()

    def message(self, text: str) -> None:
        """Prints a line above the live line."""
        if self._live is not None:
            # No markup: a path with brackets must appear as it is.
            with contextlib.suppress(OSError):
                self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._write(text)

    def close(self) -> None:
        """Leaves the last state of the line on the screen; later calls do nothing."""
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.stop()

    def __enter__(self) -> "Progress":
        """Returns the progress itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Releases the terminal, also when the block raised."""
        self.close()

    def steps_per_second(self) -> float | None:
        """Speed over the recent past; None before two updates."""
        if len(self._recent) < 2:
            return None
        (first_time, first_step, _), (last_time, last_step, _) = self._recent[0], self._recent[-1]
        seconds = last_time - first_time
        return (last_step - first_step) / seconds if seconds > 0 else None

    def _describe(self, step: int, loss: float, rate: float | None, memory: float | None) -> str:
        parts = [f"loss {loss:.4f}"]
        if rate is not None:
            parts.append(f"rate {rate:.2e}")
        speed = self.steps_per_second()
        if speed and self.tokens_per_step:
            parts.append(f"{_short(speed * self.tokens_per_step)} tokens/s")
        # What matters least comes last: a narrow terminal cuts it off.
        if speed:
            waited = sum([wait for _, _, wait in self._recent][1:]) / (len(self._recent) - 1)
            parts.append(f"eta {_duration((self.total_steps - step) / speed)}")
            if self._utilization:
                parts.append(f"mfu {_percent(speed * self._utilization)}")
            parts.append(f"{_seconds(1 / speed)}/step")
            if waited * speed >= WAIT_WORTH_TELLING:
                parts.append(f"data {_percent(waited * speed)}")
        if memory is not None:
            parts.append(f"memory {memory / 2**30:.1f} GiB")
        if speed and self._optimizer_share is not None:
            parts.append(f"optimizer {_percent(self._optimizer_share)}")
        return "  ".join(parts)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text + "\n")
            self._stream.flush()


def error_of(name: str) -> str:
    """What the standard error of a score is called in the log."""
    return f"{name}_se"


def to_stderr(text: str) -> None:
    """Prints a line to standard error, if anybody still reads it.

    Ctrl-C also ends what reads a pipe, such as `tee`, and a run must outlive that to save.
    """
    with contextlib.suppress(OSError):
        sys.stderr.write(text + "\n")


def _live_line(stream: TextIO, total_steps: int, start_step: int):
    """The redrawn line, or None where the stream is no terminal."""
    if not stream.isatty():
        return None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichProgress
    from rich.table import Column

    # What does not fit on a narrow terminal is the end of the text.
    rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    live = RichProgress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=10),
        TextColumn("{task.fields[text]}", markup=False, table_column=rest),
        console=Console(file=stream),
        expand=True,
        refresh_per_second=_REFRESHES_PER_SECOND,
    )
    live.add_task("train", total=total_steps, completed=start_step, text="")
    live.start()
    return live


def _short(number: float) -> str:
    for limit, divisor, suffix in ((1e4, 1.0, ""), (1e7, 1e3, "k"), (1e10, 1e6, "M")):
        if number < limit:
            return f"{number / divisor:.0f}{suffix}"
    return f"{number / 1e9:.0f}G"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _seconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
