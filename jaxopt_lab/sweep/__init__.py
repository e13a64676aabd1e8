"""Equal tuning of optimizers: learning rates and seeds of one optimizer as one vmapped program.

Models and text come in as functions and arrays, so that a study runs wherever jax, optax and numpy
are installed. `sweep.decoder_runs`, imported by its name, has those of the studies on text.
"""

from jaxopt_lab.sweep.blocks import (
    PAIRED_RULE,
    PairedNoise,
    paired_differences,
    paired_noise,
)
from jaxopt_lab.sweep.cost import StepCost, lanes_that_fit, measure_step
from jaxopt_lab.sweep.program import Curves, Program, Run
from jaxopt_lab.sweep.significance import (
    RULE,
    Difference,
    Interval,
    accuracy_interval,
    difference,
    paired_accuracy,
    seed_noise,
)
from jaxopt_lab.sweep.task import Task
from jaxopt_lab.sweep.tuning import FRESH_WINDOWS, Tuned, rim_of, tune

__all__ = [
    "FRESH_WINDOWS",
    "PAIRED_RULE",
    "RULE",
    "Curves",
    "Difference",
    "Interval",
    "PairedNoise",
    "Program",
    "Run",
    "StepCost",
    "Task",
    "Tuned",
    "accuracy_interval",
    "difference",
    "lanes_that_fit",
    "measure_step",
    "paired_accuracy",
    "paired_differences",
    "paired_noise",
    "rim_of",
    "seed_noise",
    "tune",
]
