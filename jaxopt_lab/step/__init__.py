"""The training step as pure functions: trainer, sweep, benchmarks and experiments take this one."""

from jaxopt_lab.step.compilation import compiler_options
from jaxopt_lab.step.gradients import (
    Batch,
    Estimate,
    Estimator,
    Loss,
    accumulated,
    backprop,
    forward_only,
    measured,
)
from jaxopt_lab.step.state import Adapted, TrainState, merged, split, state_layout
from jaxopt_lab.step.update import Step, apply_updates

__all__ = [
    "Adapted",
    "Batch",
    "Estimate",
    "Estimator",
    "Loss",
    "Step",
    "TrainState",
    "accumulated",
    "apply_updates",
    "backprop",
    "compiler_options",
    "forward_only",
    "measured",
    "merged",
    "split",
    "state_layout",
]
