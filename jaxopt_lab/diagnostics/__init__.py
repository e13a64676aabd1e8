"""What happens during training, measured: recorders for training loops and pure functions."""

from jaxopt_lab.diagnostics.norms import (
    NormRatios,
    NormRecord,
    direction_of,
    lion_muon_momentum,
    norm_ratios,
)
from jaxopt_lab.diagnostics.recording import Every, Recorder, Recorders, Snapshot, find_state

__all__ = [
    "Every",
    "NormRatios",
    "NormRecord",
    "Recorder",
    "Recorders",
    "Snapshot",
    "direction_of",
    "find_state",
    "lion_muon_momentum",
    "norm_ratios",
]
