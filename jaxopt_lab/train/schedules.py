"""The schedules a run can name: one frozen dataclass each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxopt_lab import schedules
from jaxopt_lab.schedules import DecayShape
from jaxopt_lab.train.errors import ConfigError
from jaxopt_lab.train.optimizers import ModelInfo, OptimizerConfig


class Rule(NamedTuple):
    """An optimizer ready for the step."""

    tx: optax.GradientTransformation
    rates: Callable[[Array], dict[str, Array]]  # (step) -> learning rates to report


@dataclass(frozen=True)
class ScheduleConfig:
    """A schedule by name."""

    def validate(self, steps: int) -> None:
        """Checks the values against the length of the run."""

    def rate(self, peak: float, steps: int) -> optax.Schedule:
        """(number of steps taken) -> learning rate."""
        raise NotImplementedError

    def apply(self, optimizer: OptimizerConfig, model: ModelInfo, steps: int) -> Rule:
        """Builds the optimizer under this schedule.

        A schedule that is a transformation of its own (one that reads the loss, say) overrides
        this and chains itself behind the optimizer.
        """
        rate = self.rate(optimizer.learning_rate, steps)
        tx = optimizer.build(rate, model)
        return Rule(tx, lambda step: optimizer.rates(jnp.asarray(rate(step))))


@dataclass(frozen=True)
class ConstantConfig(ScheduleConfig):
    """The peak rate at every step."""

    def rate(self, peak: float, steps: int) -> optax.Schedule:
        """See the base class."""
        return schedules.constant(peak)


@dataclass(frozen=True)
class _WarmupConfig(ScheduleConfig):
    warmup_fraction: float = 0.05
    """Share of the steps in which the rate rises linearly from 1 % of the peak."""

    warmup_steps: int | None = None
    """Number of those steps; overrides the share."""

    def validate(self, steps: int) -> None:
        """Checks the length of the warm-up."""
        if not 0 <= self.warmup_fraction <= 1:
            raise ConfigError(
                "schedule.warmup_fraction", self.warmup_fraction, "expected a share in [0, 1]"
            )
        if self.warmup_steps is not None and not 0 <= self.warmup_steps <= steps:
            raise ConfigError(
                "schedule.warmup_steps", self.warmup_steps, f"expected 0 to steps = {steps}"
            )

    def warmup(self, steps: int) -> int:
        """Number of warm-up steps of a run of `steps`."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return round(self.warmup_fraction * steps)


@dataclass(frozen=True)
class CosineConfig(_WarmupConfig):
    """Linear warm-up, then half a cosine to zero."""

    def rate(self, peak: float, steps: int) -> optax.Schedule:
        """See the base class."""
        return schedules.warmup_cosine(peak, steps, self.warmup(steps))


@dataclass(frozen=True)
class WsdConfig(_WarmupConfig):
    """Linear warm-up, plateau, decay over the last part of the run."""

    decay_fraction: float = 0.2
    """Share of the steps in which the rate decays."""

    decay_shape: DecayShape = "linear"
    """Form of the decay."""

    final_fraction: float = 0.0
    """Share of the peak that is left at the end."""

    def validate(self, steps: int) -> None:
        """Also checks the decay."""
        super().validate(steps)
        try:
            self.rate(1.0, steps)
        except ValueError as error:
            raise ConfigError.inside("schedule", error) from error

    def rate(self, peak: float, steps: int) -> optax.Schedule:
        """See the base class."""
        return schedules.warmup_stable_decay(
            peak, steps, self.warmup(steps),
            decay_fraction=self.decay_fraction, decay_shape=self.decay_shape,
            final_fraction=self.final_fraction,
        )  # fmt: skip


SCHEDULES: dict[str, type[ScheduleConfig]] = {
    "cosine": CosineConfig,
    "wsd": WsdConfig,
    "constant": ConstantConfig,
}
