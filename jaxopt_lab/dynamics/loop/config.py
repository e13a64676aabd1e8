"""What a repeated-learning loop does, apart from data, learner, usage and adherence."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from jaxopt_lab.dynamics.loop.metrics import Density

Setup = Literal["window", "sampling"]
Rule = Literal["mae", "var"]
RecordOn = Literal["held-out", "fresh"]

# Of the published sampling runs; a window ends with its pool.
SAMPLING_STEPS = 10_000


@dataclass(frozen=True)
class LoopConfig:
    """The loop; every default is the published experiment's."""

    setup: Setup = "sampling"
    """`window`: new items replace the oldest. `sampling`: items of a fixed set are relabelled."""

    rule: Rule = "mae"
    """Spread of adopted labels: `mae` is s·MAE (as published figures were made), `var` √s·RMSE."""

    steps: int | None = None
    """None: until the pool is empty (window), or 10 000 (sampling)."""

    refit_every: int = 10
    """T, steps of a round."""

    held_out: float = 0.2
    """Share of the active set that a refit does not see, rounded up."""

    window: float | int = 0.3
    """Active items of a window: a share of the data if below 1, else their number."""

    record_on: RecordOn = "held-out"
    """Residuals of the statistics: of the part held out at the refit, or of a fresh split of the
    active set, which overlaps the training items (as older released code did)."""

    record_every: int = 1
    """Rounds between records. The last refit is always recorded."""

    keep: Literal["statistics", "residuals"] = "statistics"
    """`residuals` also keeps the held-out residuals of every record."""

    kappas: tuple[float, ...] = (0.4, 0.5, 0.6)
    """Half-widths of the masses."""

    density: Density = "left"
    """Estimate of f_t(0)."""

    def __post_init__(self) -> None:
        """Raises ValueError on a field that no loop can have."""
        for name, allowed in (
            ("setup", Setup), ("rule", Rule), ("record_on", RecordOn), ("density", Density),
            ("keep", Literal["statistics", "residuals"]),
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in get_args(allowed):
                raise ValueError(f"{name} is {value!r}; one of {', '.join(get_args(allowed))}")
        for name in ("refit_every", "record_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted at least 1")
        if self.steps is not None and self.steps < 0:
            raise ValueError(f"steps is {self.steps}; wanted at least 0")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; wanted a share between 0 and 1")
        if not self.window > 0:
            raise ValueError(
                f"window is {self.window}; wanted a share or a number of items above 0"
            )
        if any(kappa < 0 for kappa in self.kappas):
            raise ValueError(f"kappas are {self.kappas}; wanted half-widths of at least 0")

    def num_active(self, num_items: int) -> int:
        """W of so many items."""
        if self.setup == "sampling":
            return num_items
        return round(self.window * num_items) if self.window < 1 else int(self.window)

    def num_held_out(self, num_active: int) -> int:
        """Items that a refit does not see."""
        # A share like 0.1 of 30 items must not be rounded up to four.
        return math.ceil(round(self.held_out * num_active, 9))

    def num_steps(self, num_items: int) -> int:
        """Steps of a loop over so many items."""
        if self.steps is not None:
            return self.steps
        return (
            SAMPLING_STEPS if self.setup == "sampling" else num_items - self.num_active(num_items)
        )

    def num_rounds(self, num_items: int) -> int:
        """Refits but for the first; the last round may have fewer steps."""
        return -(-self.num_steps(num_items) // self.refit_every)

    def recorded_rounds(self, num_items: int) -> np.ndarray:
        """Numbers of the refits that are recorded, increasing; 0 is the first fit."""
        last = self.num_rounds(num_items)
        return np.unique(np.append(np.arange(0, last + 1, self.record_every), last))

    def recorded_steps(self, num_items: int) -> np.ndarray:
        """Steps taken before each recorded refit."""
        taken = self.recorded_rounds(num_items) * self.refit_every
        return np.minimum(taken, self.num_steps(num_items))

    def check_items(self, num_items: int) -> None:
        """Raises ValueError where so many items cannot be looped over."""
        active = self.num_active(num_items)
        if active > num_items:
            raise ValueError(
                f"window is {self.window}, {active} items, but the data have {num_items}"
            )
        held_out = self.num_held_out(active)
        if held_out < 1 or active - held_out < 2:
            raise ValueError(
                f"{active} active items of which held_out={self.held_out} are not trained on leave "
                f"{active - held_out} to train on; wanted at least 2"
            )
        if self.setup == "window" and self.refit_every > active:
            raise ValueError(
                f"refit_every is {self.refit_every}, more steps than the window has items, {active}"
            )
        pool = num_items - active
        if self.setup == "window" and self.num_steps(num_items) > pool:
            raise ValueError(
                f"steps is {self.steps}, but the pool outside the window has {pool} items"
            )


def check_rates(usage: Any, adherence: Any) -> None:
    """Raises ValueError unless every p lies in [0, 1] and every s is finite and at least 0."""
    p, s = np.asarray(usage, np.float64), np.asarray(adherence, np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"usage is {usage}; wanted a probability p in [0, 1]")
    if not ((s >= 0) & np.isfinite(s)).all():
        raise ValueError(f"adherence is {adherence}; wanted finite s of at least 0")


def merge_settings(config: LoopConfig | None, settings: dict[str, Any]) -> LoopConfig:
    """The configuration with some of its fields set anew."""
    fields = {} if config is None else vars(config)
    return LoopConfig(**fields | settings)
