"""Equal tuning: learning rates on one seed, then the best of them on fresh seeds."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxopt_lab.sweep.program import Curves, Program, Run
from jaxopt_lab.sweep.task import BuildOptimizer, Task

FRESH_WINDOWS = 100
"""Windows whose training loss stands beside the held-out one, where there are as many."""

OnProgress = Callable[[str, int, int, float], None]
"""(stage, steps done, steps in all, lowest held-out loss) after every evaluation; steps are
counted over all runs."""


@dataclass(frozen=True)
class Tuned:
    """Outcome of one optimizer. Non-finite losses stand for runs that diverged."""

    rates: tuple[float, ...]
    """Learning rates of the cells, increasing."""

    sweep_losses: tuple[float, ...]
    """Final held-out loss of every cell on the sweep's seed."""

    best: int | None
    """Index of the cell with the lowest finite loss; None if every cell diverged."""

    seeds: tuple[int, ...]
    """Seeds of the final runs."""

    evaluated_steps: tuple[int, ...]
    """Where the curves were evaluated."""

    held_out: np.ndarray
    """Held-out losses of the best cell, (seeds, evaluations); no rows if every cell diverged."""

    errors: tuple[float, ...]
    """Standard error over documents of the final held-out loss of every seed; NaN where the
    documents are not told. It is about the text: optimizers share it, so that it says little about
    their differences."""

    train_losses: tuple[float, ...]
    """Mean training loss of the last 100 windows, of each before it was learnt from, for every
    seed. Optimizers see the same windows on the same seed."""

    runs_at_once: int
    """Largest number of runs in one program."""

    seconds: float
    """Of all runs, compilation included."""

    compile_seconds: float
    """Of their programs."""

    @property
    def best_rate(self) -> float | None:
        """Learning rate of the best cell."""
        return None if self.best is None else self.rates[self.best]

    @property
    def rim(self) -> Literal["lowest", "highest"] | None:
        """Which end of the grid the best cell lies on; its optimum may lie beyond."""
        return None if self.best is None else rim_of(self.best, len(self.rates))

    @property
    def final_losses(self) -> tuple[float, ...]:
        """Final held-out loss of every seed."""
        return tuple(float(curve[-1]) for curve in self.held_out)

    @property
    def finite(self) -> bool:
        """Whether every seed ended with a loss."""
        return bool(self.final_losses) and all(map(math.isfinite, self.final_losses))

    def to_json(self) -> dict[str, Any]:
        """Everything as strict JSON values; None for a loss that is not finite."""
        return {
            "rates": list(self.rates),
            "sweep_losses": [_finite(x) for x in self.sweep_losses],
            "best_cell": self.best,
            "best_rate": self.best_rate,
            "best_cell_on_rim": self.rim,
            "seeds": list(self.seeds),
            "evaluated_steps": list(self.evaluated_steps),
            "held_out": [[_finite(x) for x in curve] for curve in self.held_out],
            "held_out_se": [_finite(x) for x in self.errors],
            "train_losses": [_finite(x) for x in self.train_losses],
            "runs_at_once": self.runs_at_once,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Tuned":
        """Reads what `to_json` returned; stored results without errors over documents have NaN."""
        evaluated = tuple(values["evaluated_steps"])
        curves = [[_number(x) for x in curve] for curve in values["held_out"]]
        return cls(
            rates=tuple(values["rates"]),
            sweep_losses=tuple(_number(x) for x in values["sweep_losses"]),
            best=values["best_cell"],
            seeds=tuple(values["seeds"]),
            evaluated_steps=evaluated,
            held_out=np.asarray(curves, np.float64).reshape(len(curves), len(evaluated)),
            errors=tuple(_number(x) for x in values.get("held_out_se", [None] * len(curves))),
            train_losses=tuple(_number(x) for x in values["train_losses"]),
            runs_at_once=values["runs_at_once"],
            seconds=values["seconds"],
            compile_seconds=values["compile_seconds"],
        )


def tune(
    task: Task,
    build: BuildOptimizer,
    rates: Sequence[float],
    *,
    sweep_seed: int,
    seeds: Sequence[int],
    lanes: int = 1,
    on_progress: OnProgress | None = None,
) -> Tuned:
    """Trains every learning rate on the sweep's seed, then the best one on the final seeds.

    Args:
      task: What every run shares.
      build: The optimizer of a learning rate.
      rates: Learning rates, increasing.
      sweep_seed: Seed of the sweep; not among `seeds`, or the best cell would be chosen by the
        runs that it is then judged by.
      seeds: Seeds of the final runs.
      lanes: Largest number of runs in one vmapped program; 1 trains one after the other.
      on_progress: Called after every evaluation.

    Raises:
      ValueError: For rates that do not increase, or seeds that repeat.
    """
    check_rates(rates)
    check_seeds(sweep_seed, seeds)
    before = time.perf_counter()
    trainer = _Trainer(task, build, lanes, (len(rates) + len(seeds)) * task.steps, on_progress)
    sweep = trainer.train("sweep", [Run(rate, sweep_seed) for rate in rates])
    losses = sweep.held_out[:, -1]
    best = int(np.nanargmin(losses)) if np.isfinite(losses).any() else None
    evaluated = task.evaluated_steps()
    final = Curves(np.zeros((0, task.steps)), np.zeros((0, len(evaluated))), np.zeros(0))
    if best is not None:
        final = trainer.train("seeds", [Run(rates[best], seed) for seed in seeds])
    rows = next(iter(task.batches(sweep_seed, 0, 1).values())).shape[1]
    tail = math.ceil(FRESH_WINDOWS / rows)
    return Tuned(
        rates=tuple(map(float, rates)),
        sweep_losses=tuple(map(float, losses)),
        best=best,
        seeds=tuple(seeds),
        evaluated_steps=tuple(evaluated),
        held_out=final.held_out,
        errors=tuple(map(float, final.error)),
        train_losses=tuple(map(float, final.train[:, -tail:].mean(axis=1))),
        runs_at_once=max(lanes for lanes, _ in trainer.programs),
        seconds=time.perf_counter() - before,
        compile_seconds=sum(p.compile_seconds for p in trainer.programs.values()),
    )


def rim_of(best: int, cells: int) -> Literal["lowest", "highest"] | None:
    """Which end of an increasing grid its best cell is; the optimum may lie beyond.

    >>> rim_of(0, 5), rim_of(2, 5), rim_of(4, 5)
    ('lowest', None, 'highest')

    Args:
      best: Index of the best cell.
      cells: Cells of the grid.
    """
    if best == 0:
        return "lowest"
    return "highest" if best == cells - 1 else None


def check_rates(rates: Sequence[float]) -> None:
    """Raises a ValueError unless the rates are positive, finite and increasing."""
    increasing = all(a < b for a, b in zip(rates, rates[1:], strict=False))
    if not rates or not increasing or not rates[0] > 0 or not math.isfinite(rates[-1]):
        raise ValueError(f"rates: got {list(rates)}, expected positive numbers that increase")


def check_seeds(sweep_seed: int, seeds: Sequence[int]) -> None:
    """Raises a ValueError unless there are two fresh seeds or more, none of them twice."""
    if len(seeds) < 2 or len(set(seeds)) < len(seeds) or sweep_seed in seeds:
        raise ValueError(
            f"seeds: got {list(seeds)}, expected at least two different ones besides the sweep's "
            f"{sweep_seed}: the noise between seeds decides which differences count"
        )


class _Trainer:
    """Trains lists of runs in groups, one compiled program for each group size."""

    def __init__(
        self,
        task: Task,
        build: BuildOptimizer,
        lanes: int,
        total_steps: int,
        on_progress: OnProgress | None,
    ):
        self.programs: dict[tuple[int, bool], Program] = {}
        self._task, self._build, self._lanes = task, build, lanes
        self._on_progress = on_progress
        self._total, self._finished = total_steps, 0

    def train(self, stage: str, runs: Sequence[Run]) -> Curves:
        # Groups of equal size, the last one filled up: each size is one more compilation.
        groups = -(-len(runs) // self._lanes)
        size = -(-len(runs) // groups)
        program = self._program(size, stage == "sweep" and self._task.keyed and size > 1)
        curves = []
        for first in range(0, len(runs), size):
            group = list(runs[first : first + size])
            padded = group + [group[-1]] * (size - len(group))
            trained = program.train(padded, self._reporter(stage, len(group)))
            curves.append(Curves(*(x[: len(group)] for x in trained)))
            self._finished += len(group) * self._task.steps
        return Curves(*(np.concatenate(parts) for parts in zip(*curves, strict=True)))

    def _program(self, size: int, one_seed: bool) -> Program:
        if (size, one_seed) not in self.programs:
            options: Any = {"vectorized": self._lanes > 1, "one_seed": one_seed}
            self.programs[size, one_seed] = Program(self._task, self._build, size, **options)
        return self.programs[size, one_seed]

    def _reporter(self, stage: str, runs: int) -> Callable[[int, np.ndarray], None]:
        def report(step: int, losses: np.ndarray) -> None:
            if self._on_progress is not None:
                finite = losses[np.isfinite(losses)]
                lowest = float(finite.min()) if len(finite) else math.nan
                self._on_progress(stage, self._finished + runs * step, self._total, lowest)

        return report


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value
