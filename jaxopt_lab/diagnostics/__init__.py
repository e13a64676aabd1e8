"""What happens during training, measured: recorders for training loops and pure functions."""

from jaxopt_lab.diagnostics.fisher import (
    ApproximationErrors,
    Fisher,
    FullFisher,
    approximation_errors,
    basis_distance,
    kronecker_distance,
    softmax_hessian,
)
from jaxopt_lab.diagnostics.fisher_recorder import FisherErrors
from jaxopt_lab.diagnostics.fisher_samples import (
    ProbedFisher,
    SampledFisher,
    moving_average_weights,
)
from jaxopt_lab.diagnostics.norms import (
    NormRatios,
    NormRecord,
    direction_of,
    lion_muon_momentum,
    norm_ratios,
)
from jaxopt_lab.diagnostics.recording import Every, Recorder, Recorders, Snapshot, find_state
from jaxopt_lab.diagnostics.smoothness import LocalSmoothness, Smoothness, local_smoothness
from jaxopt_lab.diagnostics.smoothness_fit import (
    SmoothnessFit,
    SmoothnessPoints,
    fit_smoothness,
    smoothness_points,
)

__all__ = [
    "ApproximationErrors",
    "Every",
    "Fisher",
    "FisherErrors",
    "FullFisher",
    "LocalSmoothness",
    "NormRatios",
    "NormRecord",
    "ProbedFisher",
    "Recorder",
    "Recorders",
    "SampledFisher",
    "Smoothness",
    "SmoothnessFit",
    "SmoothnessPoints",
    "Snapshot",
    "approximation_errors",
    "basis_distance",
    "direction_of",
    "find_state",
    "fit_smoothness",
    "kronecker_distance",
    "lion_muon_momentum",
    "local_smoothness",
    "moving_average_weights",
    "norm_ratios",
    "smoothness_points",
    "softmax_hessian",
]
