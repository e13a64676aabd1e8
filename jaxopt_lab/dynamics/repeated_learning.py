"""Repeated learning: a learner is trained on data that its own predictions replace.

The density of the residuals then collapses (a positive feedback loop), escapes (error
amplification) or stays. Theory and set-ups: A. Veprikov, A. Afanasiev, A. Khritankov, "A
Mathematical Model of the Hidden Feedback Loop Effect in Machine Learning Systems",
arXiv 2405.02726.
"""

from jaxopt_lab.dynamics.loop.config import LoopConfig
from jaxopt_lab.dynamics.loop.data import Data, check_data, friedman_data, linear_data
from jaxopt_lab.dynamics.loop.learners import (
    LEARNERS,
    Learner,
    LinearModel,
    linear_predict,
    optax_learner,
    ridge,
    sgd,
)
from jaxopt_lab.dynamics.loop.metrics import (
    Statistics,
    density_at_zero,
    log_moment_sum,
    mass,
    normality,
    statistics,
)
from jaxopt_lab.dynamics.loop.run import (
    LoopRecord,
    RecordedDraws,
    Replay,
    replay,
    run,
    run_many,
)

__all__ = [
    "LEARNERS",
    "Data",
    "Learner",
    "LinearModel",
    "LoopConfig",
    "LoopRecord",
    "RecordedDraws",
    "Replay",
    "Statistics",
    "check_data",
    "density_at_zero",
    "friedman_data",
    "linear_data",
    "linear_predict",
    "log_moment_sum",
    "mass",
    "normality",
    "optax_learner",
    "replay",
    "ridge",
    "run",
    "run_many",
    "sgd",
    "statistics",
]
