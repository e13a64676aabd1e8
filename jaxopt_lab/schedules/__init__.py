"""Learning-rate schedules."""

from jaxopt_lab.schedules.adaptive_warmup import adaptive_warmup
from jaxopt_lab.schedules.decay import DecayShape, warmup_stable_decay
from jaxopt_lab.schedules.gap_rate import (
    Curvature,
    fit_curvature,
    gap_rate,
    peak_gap_of,
    relative_rate,
    warmup_kappa,
)
from jaxopt_lab.schedules.peak_gap import exact_peak_gap
from jaxopt_lab.schedules.warmup_phases import AdaptiveWarmupState

__all__ = [
    "AdaptiveWarmupState",
    "Curvature",
    "DecayShape",
    "adaptive_warmup",
    "exact_peak_gap",
    "fit_curvature",
    "gap_rate",
    "peak_gap_of",
    "relative_rate",
    "warmup_kappa",
    "warmup_stable_decay",
]
