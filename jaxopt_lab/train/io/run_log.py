"""What a run shows and records: one process does, the others stay silent."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxopt_lab.report.progress import Progress
from jaxopt_lab.report.tracker import METRICS_FILE, Tracker, read_metrics
from jaxopt_lab.train.config.run import PretrainConfig
from jaxopt_lab.train.meter import StartClock, peak_of
from jaxopt_lab.train.program import Program

# What `RunLog` adds to every row by itself.
_ADDED = ("step", "time", "tokens", "forward_passes", "optimizer_flops")
# And what a hook must not be called: the log's own names, and those of every step.
RESERVED = (
    *_ADDED, "loss", "grad_norm", "skipped", "step_seconds", "data_wait_seconds",
    "peak_memory_bytes", "tokens_per_second", "mfu", "optimizer_share_of_flops",
)  # fmt: skip


def logged_at(directory: Path, step: int) -> dict[str, Any]:
    """The metrics that an earlier process of the run has logged for a step, rows put together."""
    if not (directory / METRICS_FILE).is_file():
        return {}
    row: dict[str, Any] = {}
    for found in read_metrics(directory):
        if found["step"] == step:
            row |= found
    return {name: value for name, value in row.items() if name not in _ADDED}


def losses_between(directory: Path, first: int, last: int) -> list[float]:
    """Training losses that are logged for the steps after `first`, up to `last`."""
    if not (directory / METRICS_FILE).is_file():
        return []
    rows = [row for row in read_metrics(directory) if first < row["step"] <= last]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    return [losses[step] for step in sorted(losses)]


class RunLog:
    """Metrics on disk and the live line, in process 0; nothing elsewhere.

    Args:
      config: The run.
      program: Its program, whose FLOPs are counted.
      directory: The run directory.
      start_step: Steps already taken by the run that is resumed.
      start_sample: Windows consumed by them.
      clock: What the time to the first step is measured with, and told once.
    """

    def __init__(
        self,
        config: PretrainConfig,
        program: Program,
        directory: Path,
        start_step: int,
        start_sample: int = 0,
        clock: StartClock | None = None,
    ):
        """Opens the files and starts the live line."""
        self._tokens_per_step = config.batch_size * config.row_tokens
        # Batches may have had another size before.
        self._tokens_before = start_sample * config.row_tokens
        self._start_step, self._clock = start_step, clock
        self._passes_per_step = config.optimizer.forward_passes
        of_model, self._flops_per_step = program.flops
        self._optimizer_share = self._flops_per_step / (of_model + self._flops_per_step)
        peak = peak_of(jax.devices()[0].device_kind, config.peak_tflops)
        # The MFU of one step a second.
        self._utilization = peak and of_model / (1e12 * peak.tflops * program.mesh.size)
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
                config.steps,
                start_step=start_step,
                tokens_per_step=self._tokens_per_step,
                utilization=self._utilization,
                optimizer_share=self._optimizer_share,
            )
            if peak:
                self._progress.message(
                    f"mfu: share of {peak.tflops:g} TFLOP/s a device ({peak.source})"
                )

    def training(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records one optimizer step: what it reports, and what `Meter` and hooks measured."""
        if self._tracker and self._progress:
            if self._clock is not None:
                self._clock.lap("first step")
                self.message(f"first step after {self._clock}")
                self._clock = None
            self._tracker.log(step, {**metrics, **self._speed(metrics), **self._spent(step)})
            self._progress.update(
                step,
                loss=float(metrics["loss"]),
                rate=metrics.get("rate"),
                data_wait=metrics.get("data_wait_seconds", 0.0),
                memory=metrics.get("peak_memory_bytes"),
            )

    def _speed(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """What follows from the time of a step."""
        speed = {"optimizer_share_of_flops": self._optimizer_share}
        seconds = metrics.get("step_seconds")
        if seconds:
            speed["tokens_per_second"] = self._tokens_per_step / seconds
            if self._utilization:
                speed["mfu"] = self._utilization / seconds
        return speed

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records an evaluation after `step` optimizer steps."""
        if self._tracker and self._progress:
            if self._clock is not None:
                self._clock.lap("evaluation")
            self._tracker.log(step, {**metrics, **self._spent(step)})
            self._progress.evaluation(step, metrics)

    def message(self, text: str) -> None:
        """Prints a line above the live line."""
        if self._progress:
            self._progress.message(text)

    def _spent(self, step: int) -> dict[str, float]:
        return {
            "tokens": self._tokens_before + (step - self._start_step) * self._tokens_per_step,
            "forward_passes": step * self._passes_per_step,
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

    from jaxopt_lab.train.config.serialize import to_json

    run = wandb.init(dir=str(directory), name=directory.name, config=json.loads(to_json(config)))
    return lambda step, metrics: run.log(dict(metrics), step=step)
