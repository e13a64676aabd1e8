"""Configuration of a study of repeated learning: what the command line sets."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from jaxopt_lab.dynamics.loop.config import LoopConfig, Rule, Setup, check_rates
from jaxopt_lab.dynamics.loop.csv_data import read_csv
from jaxopt_lab.dynamics.loop.data import DATA, Data
from jaxopt_lab.dynamics.loop.learners import LEARNERS
from jaxopt_lab.report.storage import local


@dataclass(frozen=True)
class LoopStudyConfig:
    """A study of repeated learning; the defaults are the published experiment's three settings.

    `usage` and `adherence` are paired: the i-th usage runs with the i-th adherence, and a single
    value of one goes with all values of the other.
    """

    setup: Setup = "sampling"
    """`window`: new items replace the oldest. `sampling`: items of a fixed set are relabelled."""

    data: str = "linear"
    """`linear`, `friedman`, or the path of a CSV file."""

    target: str | None = None
    """Column of the CSV file to predict; the last by default."""

    items: int = 2000
    """Number of items of the generated data."""

    noise: float = 1.0
    """Standard deviation of the noise of the generated data."""

    learner: str = "ridge0"
    """`ridge0` (least squares), `ridge0.1`, or `sgd50` (at most 50 epochs)."""

    usage: tuple[float, ...] = (1.0, 0.1, 1.0)
    """p: probabilities that a user adopts the label of the model."""

    adherence: tuple[float, ...] = (0.0, 0.9, 3.0)
    """s: spread of adopted labels, in units of the error of the model; 0 is exact obedience."""

    rule: Rule = "mae"
    """Spread of adopted labels: `mae` is s·MAE, `var` is √s·RMSE."""

    seeds: int = 16
    """Repetitions of every setting; generated data are drawn anew for each."""

    steps: int | None = None
    """By default until the pool is empty (window), or 10 000 (sampling)."""

    refit_every: int = 10
    """Steps between refits."""

    held_out: float = 0.2
    """Share of the active set on which the error is measured."""

    window: float = 0.3
    """Active items of a window: a share of the data if below 1, else their number."""

    density: Literal["left", "centre", "kernel"] = "left"
    """Estimate of f_t(0); `left` is that of the published figures."""

    margin: float = 0.2
    """Change of ln(std of residuals) below which a loop is called neutral."""

    surface_seeds: int = 0
    """Seeds of the (p, s) surface of 11 × 15 settings after 1400 steps; 0 leaves it out."""

    seed: int = 0
    """Of the random numbers."""

    out: str | None = None
    """Where everything is written; by default `runs/dynamics-loop-SETUP`."""

    def validate(self) -> None:
        """Finds out before anything is compiled whether the study can run.

        Raises:
          OSError: If the CSV file cannot be read.
          ValueError: For a setting that cannot work; it names the field, or the file with row and
            column.
        """
        for name, least in (("seeds", 2), ("items", 2), ("surface_seeds", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        for name in ("noise", "margin"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a number from 0")
        if self.learner not in LEARNERS:
            raise ValueError(
                f"learner: got {self.learner!r}, expected one of {', '.join(LEARNERS)}"
            )
        if self.steps is not None and self.steps < self.refit_every:
            raise ValueError(
                f"steps: got {self.steps}, expected at least one round of refit_every = "
                f"{self.refit_every}"
            )
        check_rates(self.usage, self.adherence)
        self.settings()
        self.loop().check_items(self.num_items())

    def settings(self) -> tuple[tuple[float, float], ...]:
        """The pairs (p, s).

        >>> LoopStudyConfig(usage=(0.5,), adherence=(0.0, 1.0)).settings()
        ((0.5, 0.0), (0.5, 1.0))
        """
        count = max(len(self.usage), len(self.adherence))
        if not count or any(len(v) not in (1, count) for v in (self.usage, self.adherence)):
            raise ValueError(
                f"usage, adherence: got {len(self.usage)} and {len(self.adherence)} values, "
                "expected equally many, or one of either"
            )
        usage, adherence = (v * (count // len(v)) for v in (self.usage, self.adherence))
        return tuple(zip(usage, adherence, strict=True))

    def loop(self) -> LoopConfig:
        """The loop that the study runs."""
        return LoopConfig(
            setup=self.setup, rule=self.rule, steps=self.steps, refit_every=self.refit_every,
            held_out=self.held_out, window=self.window, density=self.density,
        )  # fmt: skip

    def make_data(self) -> Callable[..., Data] | tuple[np.ndarray, np.ndarray]:
        """A function from a key to data, or features and targets of the file."""
        if self.data in DATA:
            return _generator(self.data, self.items, self.noise)
        if not Path(self.data).suffix and not Path(self.data).exists():
            raise ValueError(f"data: got {self.data!r}, expected {', '.join(DATA)} or a CSV file")
        content = read_csv(self.data, self.target)
        return content.x, content.y

    def directory(self) -> Path:
        """Where everything is written."""
        return local(self.out or f"runs/dynamics-loop-{self.setup}")

    def num_items(self) -> int:
        """N."""
        data = self.make_data()
        return len(data[1]) if isinstance(data, tuple) else self.items


@functools.cache
def _generator(name: str, items: int, noise: float) -> Callable[..., Data]:
    # Programs are compiled for a function: the same data must be the same function.
    return functools.partial(DATA[name], num_items=items, noise=noise)
