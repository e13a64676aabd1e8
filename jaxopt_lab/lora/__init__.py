"""Low-rank adapters and their optimizers."""

from jaxopt_lab.lora.lorsum import lorsum
from jaxopt_lab.lora.lorsum_variants import extrapolated_lorsum, projected_lorsum
from jaxopt_lab.lora.options import FactorMetric, LowRankSum
from jaxopt_lab.lora.preconditioned import preconditioned, scale_by_preconditioned
from jaxopt_lab.lora.scaled_lorsum import scaled_lorsum
from jaxopt_lab.lora.tap import Tap

__all__ = [
    "FactorMetric",
    "LowRankSum",
    "Tap",
    "extrapolated_lorsum",
    "lorsum",
    "preconditioned",
    "projected_lorsum",
    "scale_by_preconditioned",
    "scaled_lorsum",
]
