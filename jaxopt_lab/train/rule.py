"""An optimizer under a schedule: what the training step applies, and what it reports."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from jaxopt_lab.train.config.optimizer_base import ModelInfo, OptimizerConfig
from jaxopt_lab.train.config.schedules import ScheduleConfig


class Rule(NamedTuple):
    """An optimizer ready for the step."""

    tx: optax.GradientTransformation
    # (steps taken, optimizer state) -> learning rates of the next step, and what explains them
    rates: Callable[[Array, PyTree], dict[str, Array]]
    # (optimizer state at the end) -> how the schedule went, as numbers and in a sentence
    outcome: Callable[[PyTree], tuple[dict[str, Any], str]] | None = None


def build_rule(
    optimizer: OptimizerConfig, schedule: ScheduleConfig, model: ModelInfo, steps: int
) -> Rule:
    """Builds an optimizer under a schedule.

    Args:
      optimizer: The optimizer, with its peak rate.
      schedule: The schedule. One that follows the run scales the updates behind the optimizer,
        which then has its peak rate at every step.
      model: Facts about the model.
      steps: Length of the run.
    """
    peak = optimizer.learning_rate
    follower = schedule.follower(peak, steps, optimizer.step_norm(), model.matrix_axes)
    if follower is None:
        rate = schedule.rate(peak, steps)
        tx = optimizer.build(rate, model)
        return Rule(tx, lambda step, _: optimizer.rates(jnp.asarray(rate(step))))

    def rates(step: Array, opt_state: PyTree) -> dict[str, Array]:
        now, explained = follower.rate(opt_state)
        return optimizer.rates(now) | explained

    tx = optax.chain(optimizer.build(optax.constant_schedule(peak), model), follower.scaling)
    return Rule(tx, rates, follower.outcome)
