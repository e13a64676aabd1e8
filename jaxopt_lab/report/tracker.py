"""Metrics on disk: one JSON object a line, TensorBoard events beside it.

`metrics.jsonl` is the record that figures, comparisons and resumed runs read. It is only ever
appended to, and flushed after every row, so a killed process loses at most the row it was
writing.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxopt_lab.report.files import naming
from jaxopt_lab.report.storage import local, path_of, staged

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIRECTORY = "tensorboard"

# JSON has no literal for these. As strings the file stays valid JSON and the value is not lost.
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Tracker:
    """Writes the metrics of a run.

    A row is `{"step": ..., "time": ..., **metrics}`, where `time` counts the seconds the run has
    been active. A resumed run continues the clock of its last kept row, so the pause between two
    processes does not appear in it.

    Args:
      directory: The run directory; made if missing.
      tensorboard: Also write TensorBoard events, to `tensorboard/` below the run directory.
      resume_step: Number of steps of the checkpoint a run continues from. Rows with a later step
        were written by a process that died after that checkpoint; they are dropped, so that every
        step appears once. None keeps all complete rows.
      forward: Called as `forward(step, metrics)` after each row, for example
        `lambda step, metrics: wandb.log(metrics, step=step)`.

    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> with Tracker(directory, tensorboard=False) as tracker:
    ...     tracker.log(1, {"loss": 8.25})
    >>> read_metrics(directory)[0]["loss"]
    8.25
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        tensorboard: bool = True,
        resume_step: int | None = None,
        forward: Callable[[int, Mapping[str, float]], None] | None = None,
    ):
        """Repairs what a killed process left behind, then opens the files for appending."""
        self.directory = local(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / METRICS_FILE
        seconds_before = _repair(path, resume_step)
        self._started = time.monotonic() - seconds_before
        with naming(path):
            self._file = path.open("a", encoding="utf-8")
        self._forward = forward
        self._events = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(
                str(self.directory / TENSORBOARD_DIRECTORY),
                purge_step=None if resume_step is None else resume_step + 1,
            )

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one row and flushes it.

        Args:
          step: Number of optimizer steps taken.
          metrics: Names and values: Python or NumPy numbers or scalar arrays.

        Raises:
          ValueError: If a metric is called `step` or `time`, or is not a scalar.
        """
        reserved = {"step", "time"} & metrics.keys()
        if reserved:
            raise ValueError(f"metrics: {sorted(reserved)} are written by the tracker itself")
        values = {name: _scalar(name, value) for name, value in metrics.items()}
        row = {"step": int(step), "time": round(time.monotonic() - self._started, 3)}
        row |= {name: _to_json(value) for name, value in values.items()}
        with naming(self.directory / METRICS_FILE):
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        if self._forward is not None:
            self._forward(step, values)

    def close(self) -> None:
        """Closes the files; later calls do nothing."""
        with naming(self.directory / METRICS_FILE):
            self._file.close()
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> "Tracker":
        """Returns the tracker itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes the files, also when the block raised."""
        self.close()


def read_metrics(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the rows of a run, in the order they were written.

    A last line without its newline is what a killed process leaves behind; it is ignored.

    Args:
      run_dir: A run directory, or the path of a `metrics.jsonl` file.

    Returns:
      One dict per row, with `step`, `time` and the metrics; non-finite values are floats again.

    Raises:
      ValueError: If the directory holds no metrics, or a complete line is no row of numbers.
    """
    path = path_of(run_dir)
    path = path / METRICS_FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{run_dir}: no {METRICS_FILE} here; expected a run directory")
    path = Path(staged(path))
    return [row for _, row in _complete_rows(path)]


def _complete_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # What is no UTF-8 becomes replacement characters, which are no JSON; the line is then named.
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON: {line[:80]!r}") from error
            row = _from_json(row) if isinstance(row, dict) else {}
            numbers = all(isinstance(value, int | float) for value in row.values())
            if type(row.get("step")) is not int or not numbers:
                raise ValueError(f"{path}, line {number}: not a metrics row: {line[:80]!r}")
            yield line, row


def _repair(path: Path, resume_step: int | None) -> float:
    """Keeps the complete rows up to `resume_step`; returns the clock of the last of them."""
    if not path.exists():
        return 0.0
    kept, seconds = [], 0.0
    for line, row in _complete_rows(path):
        if resume_step is None or row["step"] <= resume_step:
            kept.append(line)
            seconds = max(seconds, row.get("time", 0.0))
    text = "".join(kept)
    if path.stat().st_size != len(text.encode("utf-8")):
        # Replaced in one step: a kill right here must not lose the rows that were already safe.
        partial = path.with_suffix(".partial")
        with naming(path), partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    return seconds


def _scalar(name: str, value: Any) -> float | int:
    if isinstance(value, bool | int):
        return int(value)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metric {name!r}: expected a scalar, got {value!r}") from error


def _to_json(value: float | int) -> float | int | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _from_json(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in row.items()}
