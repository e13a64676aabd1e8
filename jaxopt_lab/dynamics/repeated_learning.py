"""Repeated learning: a learner is trained on data that its own predictions replace.

The density of the residuals then collapses (a positive feedback loop), escapes (error
amplification) or stays. Theory and set-ups: A. Veprikov, A. Afanasiev, A. Khritankov, "A
Mathematical Model of the Hidden Feedback Loop Effect in Machine Learning Systems",
arXiv 2405.02726.
"""

from jaxopt_lab.dynamics.loop.autonomy import AutonomyFit, fit_line, fit_pieces
from jaxopt_lab.dynamics.loop.config import LoopConfig
from jaxopt_lab.dynamics.loop.csv_data import CsvData, read_csv
from jaxopt_lab.dynamics.loop.data import (
    Data,
    check_data,
    friedman_data,
    linear_data,
)
from jaxopt_lab.dynamics.loop.density_checks import (
    check_autonomy,
    check_limit_set,
    check_moments,
    check_norms,
    check_transformation,
)
from jaxopt_lab.dynamics.loop.density_family import (
    family_statistics,
    normal_density,
    psi_from_center,
    quadrature,
    scale_density,
    scaled_mass,
    scaled_moment,
    scaled_norm,
    uniform_density,
)
from jaxopt_lab.dynamics.loop.learners import (
    LEARNERS,
    Learner,
    LinearModel,
    linear_predict,
    optax_learner,
    ridge,
    sgd,
)
from jaxopt_lab.dynamics.loop.mean_field import (
    ResidualScale,
    critical_adherence,
    gain,
    obedient_mass,
    relative_deviation,
    relative_scale,
    sampling_scale,
    sampling_slope,
)
from jaxopt_lab.dynamics.loop.mean_field_window import (
    window_first_pass,
    window_growth_rate,
    window_scale,
    window_stationary,
)
from jaxopt_lab.dynamics.loop.metrics import (
    Statistics,
    density_at_zero,
    log_moment_sum,
    mass,
    normality,
    statistics,
)
from jaxopt_lab.dynamics.loop.replay import RecordedDraws, Replay, replay
from jaxopt_lab.dynamics.loop.run import LoopRecord, run, run_many
from jaxopt_lab.dynamics.loop.study import (
    LoopStudy,
    Surface,
    run_study,
    run_surface,
)
from jaxopt_lab.dynamics.loop.study_config import LoopStudyConfig
from jaxopt_lab.dynamics.loop.verdict import (
    Band,
    Interval,
    Verdict,
    band_over_seeds,
    expect,
    fit_autonomy,
    judge,
    record_at,
)

__all__ = [
    "LEARNERS",
    "AutonomyFit",
    "Band",
    "CsvData",
    "Data",
    "Interval",
    "Learner",
    "LinearModel",
    "LoopConfig",
    "LoopRecord",
    "LoopStudy",
    "LoopStudyConfig",
    "RecordedDraws",
    "Replay",
    "ResidualScale",
    "Statistics",
    "Surface",
    "Verdict",
    "band_over_seeds",
    "check_autonomy",
    "check_data",
    "check_limit_set",
    "check_moments",
    "check_norms",
    "check_transformation",
    "critical_adherence",
    "density_at_zero",
    "expect",
    "family_statistics",
    "fit_autonomy",
    "fit_line",
    "fit_pieces",
    "friedman_data",
    "gain",
    "judge",
    "linear_data",
    "linear_predict",
    "log_moment_sum",
    "mass",
    "normal_density",
    "normality",
    "obedient_mass",
    "optax_learner",
    "psi_from_center",
    "quadrature",
    "read_csv",
    "record_at",
    "relative_deviation",
    "relative_scale",
    "replay",
    "ridge",
    "run",
    "run_many",
    "run_study",
    "run_surface",
    "sampling_scale",
    "sampling_slope",
    "scale_density",
    "scaled_mass",
    "scaled_moment",
    "scaled_norm",
    "sgd",
    "statistics",
    "uniform_density",
    "window_first_pass",
    "window_growth_rate",
    "window_scale",
    "window_stationary",
]
