"""What a run shows and records: one process does, the others stay silent."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxopt_lab.report.progress import Progress
from jaxopt_lab.report.tracker import METRICS_FILE, Tracker, read_metrics
from jaxopt_lab.train.config import PretrainConfig
from jaxopt_lab.train.program import step_flops

# What `RunLog` adds to every row by itself.
_ADDED = ("step", "time", "tokens", "optimizer_flops")


def logged_at(directory: Path, step: int) -> dict[str, Any]:
    """The metrics that an earlier process of the run has logged for a step, rows put together."""
    if not (directory / METRICS_FILE).is_file():
        return {}
    row: dict[str, Any] = {}
    for found in read_metrics(directory):
        if found["step"] == step:
            row |= found
    return {name: value for name, value in row.items() if name not in _ADDED}


class RunLog:
    """Metrics on disk and the live line, in process 0; nothing elsewhere.

    Args:
      config: The run.
      directory: The run directory.
      start_step: Steps already taken by the run that is resumed.
      start_sample: Windows consumed by them.
    """

    def __init__(
        self, config: PretrainConfig, directory: Path, start_step: int, start_sample: int = 0
    ):
        """Opens the files and starts the live line."""
        self._tokens_per_step = config.batch_size * config.model.context
        # Batches may have had another size before.
        self._tokens_before = start_sample * config.model.context
        self._start_step = start_step
        _, self._flops_per_step = step_flops(config)
        self._tracker: Tracker | None = None
        self._progress: Progress | None = None
        if jax.process_index() == 0:
            self._tracker = Tracker(
                directory,
                tensorboard=config.tensorboard,
                # A run that starts from the beginning once more keeps no row.
                resume_step=(start_step or -1) if config.resume else None,
                forward=_wandb(config, directory) if config.wandb else None,
            )
            self._progress = Progress(
                config.steps, start_step=start_step, tokens_per_step=self._tokens_per_step
            )

    def training(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records one optimizer step."""
        if self._tracker and self._progress:
            self._tracker.log(step, {**metrics, **self._spent(step)})
            rate = metrics.get("rate")
            self._progress.update(
                step, loss=float(metrics["loss"]), rate=None if rate is None else float(rate)
            )

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records an evaluation after `step` optimizer steps."""
        if self._tracker and self._progress:
            self._tracker.log(step, {**metrics, **self._spent(step)})
            self._progress.evaluation(step, metrics)

    def message(self, text: str) -> None:
        """Prints a line above the live line."""
        if self._progress:
            self._progress.message(text)

    def _spent(self, step: int) -> dict[str, float]:
        return {
            "tokens": self._tokens_before + (step - self._start_step) * self._tokens_per_step,
            "optimizer_flops": step * self._flops_per_step,
        }

    def __enter__(self) -> "RunLog":
        """Returns the log itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes the files and releases the terminal."""
        if self._tracker and self._progress:
            self._progress.close()
            self._tracker.close()


def _wandb(config: PretrainConfig, directory: Path) -> Callable[[int, Mapping[str, float]], None]:
    import json

    import wandb  # pyright: ignore[reportMissingImports]

    from jaxopt_lab.train.serialize import to_json

    run = wandb.init(dir=str(directory), name=directory.name, config=json.loads(to_json(config)))
    return lambda step, metrics: run.log(dict(metrics), step=step)
