"""Studies in pieces: every run has its own file, and what has one is not run again."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab.report.files import read_json, rounded, write_result
from jaxopt_lab.report.progress import to_stderr
from jaxopt_lab.sweep.program import Program, Run
from jaxopt_lab.sweep.task import Task
from jaxopt_lab.sweep.tuning import rim_of

# Facts that may differ between the runs of a study.
_OF_THE_MACHINE = {"device", "jax"}
TAIL = 100
"""Steps at the end whose mean training loss stands beside the held-out one."""


class Budget:
    """Seconds that a call may take; nothing is begun that takes longer than what is left."""

    def __init__(self, seconds: float = math.inf):
        """Starts the clock."""
        self._begun, self._seconds, self._longest = time.perf_counter(), seconds, 0.0

    def allows(self) -> bool:
        """Whether a group of runs as long as the longest so far would still fit."""
        left = self._seconds - (time.perf_counter() - self._begun)
        if left >= self._longest and left > 0:
            return True
        to_stderr(f"{left:.0f} s are left, a group takes {self._longest:.0f}: stopped")
        return False

    def took(self, seconds: float) -> None:
        """A group took so long."""
        self._longest = max(self._longest, seconds)


def train_stored(
    program: Program,
    named: Sequence[tuple[Run, Path]],
    budget: Budget,
    facts: Callable[[Run], Mapping[str, Any]],
) -> bool:
    """Trains the runs that have no file, as many at once as the program has lanes.

    Args:
      program: Of their task and optimizer.
      named: Runs with their files. A file appears whole, when its run has ended.
      budget: What the call may take.
      facts: (run) -> what its file says beside losses and times.

    Returns:
      Whether all of them have a file now.
    """
    missing = [(run, path) for run, path in named if not path.exists()]
    for first in range(0, len(missing), program.lanes):
        if not budget.allows():
            return False
        group = missing[first : first + program.lanes]
        # The last group is filled up: another size would be compiled again.
        runs = [run for run, _ in group] + [group[-1][0]] * (program.lanes - len(group))
        begun = time.perf_counter()

        def progress(step: int, losses: np.ndarray, begun: float = begun) -> None:
            shown = " ".join(f"{loss:.4f}" for loss in losses)
            to_stderr(f"  {step} steps, {shown}, {time.perf_counter() - begun:.0f} s")

        curves = program.train(runs, progress)
        seconds = time.perf_counter() - begun
        budget.took(seconds)
        for lane, (run, path) in enumerate(group):
            train = curves.train[lane]
            result = {
                **facts(run),
                "seed": run.seed,
                "held_out": curves.held_out[lane],
                "held_out_se": curves.error[lane],
                "train_last_100": train[-TAIL:].mean(),
                # Means of ten steps.
                "train": train[: len(train) // 10 * 10].reshape(-1, 10).mean(1),
                "runs_at_once": program.lanes,
                "seconds": round(seconds, 1),  # of all of them
                "compile_seconds": round(program.compile_seconds, 1),
            }
            write_result(path, result)
            to_stderr(f"{path.name}: {curves.held_out[lane][-1]:.5f}")
    return True


@dataclass(frozen=True)
class Entry:
    """A row of a study with its grid.

    Args:
      name: Part of the names of its files.
      build: (numbers of a cell, which may be traced) -> optimizer.
      cells: The grid: a tuple of numbers a cell.
      family: Entries of one family, say of two values of a setting, share the final runs: the best
        cell of all of them is taken. None: the entry is alone.
    """

    name: str
    build: Callable[[tuple[Any, ...]], optax.GradientTransformation]
    cells: tuple[tuple[float, ...], ...]
    family: str | None = None

    @property
    def shared(self) -> str:
        """Name of its final runs."""
        return self.family or self.name


def run_entries(
    task: Task,
    entries: Sequence[Entry],
    directory: Path,
    budget: Budget,
    *,
    sweep_seed: int,
    seeds: Sequence[int],
    conditions: Mapping[str, Any],
) -> bool:
    """Trains all cells of every entry on one seed, then the best cell of each family on the others.

    Args:
      task: What all runs share.
      entries: The rows.
      directory: Of the files, `ENTRY-cell-K.json` and `FAMILY-seed-S.json`.
      budget: What the call may take.
      sweep_seed: Seed of the cells.
      seeds: Seeds of the final runs.
      conditions: Put into every file.

    Returns:
      Whether every run has a file now.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        named = [
            (Run(k, sweep_seed), cell_file(directory, entry, k)) for k in range(len(entry.cells))
        ]
        if not _train(task, entry, len(entry.cells), named, budget, conditions):
            return False
    for family in dict.fromkeys(entry.shared for entry in entries):
        found = best_cell(directory, [entry for entry in entries if entry.shared == family])
        if found is None:
            continue
        entry, cell = found
        named = [(Run(cell, seed), _seed_file(directory, family, seed)) for seed in seeds]
        if not _train(task, entry, len(seeds), named, budget, conditions):
            return False
    return True


def best_cell(directory: Path, entries: Sequence[Entry]) -> tuple[Entry, int] | None:
    """Entry and number of the cell with the lowest held-out loss; None if all have diverged.

    Args:
      directory: Of the files.
      entries: Of one family, with a file for each cell.
    """
    losses = {}
    for entry in entries:
        for k in range(len(entry.cells)):
            loss = json.loads(cell_file(directory, entry, k).read_text())["held_out"][-1]
            if loss is not None:
                losses[entry.name, k] = loss
    if not losses:
        return None
    name, cell = min(losses, key=losses.__getitem__)
    return next(entry for entry in entries if entry.name == name), cell


def read_runs(directory: Path, family: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The final runs of a family that are there.

    Args:
      directory: Of the files.
      family: Name of its entries.
      seeds: Of the final runs.
    """
    paths = [_seed_file(directory, family, seed) for seed in seeds]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def cell_in_words(entry: Entry, cell: int) -> str:
    """The numbers of a cell; which of them lie on the rim of the grid is said.

    >>> cell_in_words(Entry("a", lambda cell: None, ((1.0, 3.0), (2.0, 3.0))), 1)
    '2 (highest) 3'
    """
    words = []
    for column, value in zip(zip(*entry.cells, strict=True), entry.cells[cell], strict=True):
        values = sorted(set(column))
        rim = rim_of(values.index(value), len(values)) if len(values) > 1 else None
        words.append(f"{value:.3g}" + (f" ({rim})" if rim else ""))
    return " ".join(words)


def slug(name: str) -> str:
    """A name as part of that of a file.

    >>> slug("LionMuon P=2, b2 0.95")
    'lionmuon-p-2-b2-0.95'
    """
    kept = "".join(c if c.isalnum() or c == "." else "-" for c in name.lower())
    return "-".join(filter(None, kept.split("-")))


def cell_file(directory: Path, entry: Entry, cell: int) -> Path:
    """The file of a cell.

    Args:
      directory: Of the files.
      entry: The row.
      cell: Number of the cell.
    """
    return directory / f"{slug(entry.name)}-cell-{cell}.json"


def _seed_file(directory: Path, family: str, seed: int) -> Path:
    return directory / f"{slug(family)}-seed-{seed}.json"


def _train(
    task: Task,
    entry: Entry,
    lanes: int,
    named: Sequence[tuple[Run, Path]],
    budget: Budget,
    conditions: Mapping[str, Any],
) -> bool:
    def build(index: Any) -> optax.GradientTransformation:
        # A run's "rate" is the number of its cell.
        columns = [jnp.asarray(column, jnp.float32) for column in zip(*entry.cells, strict=True)]
        return entry.build(tuple(column[jnp.asarray(index, jnp.int32)] for column in columns))

    def facts(run: Run) -> dict[str, Any]:
        cell = int(run.rate)
        return {"name": entry.name, "cell": cell, "numbers": entry.cells[cell], **conditions}

    _check_stored(named, facts)
    if all(path.exists() for _, path in named):
        return True
    to_stderr(f"{entry.name}: {len(named)} runs")
    return train_stored(Program(task, build, lanes), named, budget, facts)


def _check_stored(
    named: Sequence[tuple[Run, Path]], facts: Callable[[Run], Mapping[str, Any]]
) -> None:
    """Refuses files of another grid or other conditions, which only share the name."""
    for run, path in named:
        if not path.exists():
            continue
        stored, wanted = read_json(path), rounded(facts(run))
        for name in sorted(wanted.keys() - _OF_THE_MACHINE):
            if stored.get(name) != wanted[name]:
                raise ValueError(
                    f"{path}: {name}: got {stored.get(name)!r}, wanted {wanted[name]!r}: remove "
                    "the file or choose another directory"
                )
