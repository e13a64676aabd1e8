"""Option objects of the optimizers of adapters; see `jaxopt_lab.optim.options` for the rules."""

from dataclasses import dataclass
from typing import Any, Literal

from jaxopt_lab.core.checks import DECAY, NOT_NEGATIVE, POSITIVE, check_number


def require(owner: Any, field: str, holds: bool, wanted: str) -> None:
    """Raise `ValueError` for a field of an option object that does not hold what it should."""
    if not holds:
        name = f"{type(owner).__name__}.{field}"
        raise ValueError(f"{name}: got {getattr(owner, field)!r}, wanted {wanted}")


@dataclass(frozen=True, eq=False)
class LowRankSum:
    """How `lorsum` and `scaled_lorsum` project a step back to rank r."""

    sweeps: int = 1
    """Rounds of alternating least squares; 0 updates both factors from the old ones (Jacobi). The
    released code of `lorsum` does not move at all with 0, and that of `scaled_lorsum` loses its
    momentum; to reproduce the published runs with 0 take `b1=None`, a tenth of their rate and ten
    times their `rho`."""

    start: Literal["a", "b"] = "a"
    """The factor that moves first in a sweep."""

    momentum_rank: float = 1.0
    """Rank of the momentum over that of the adapter."""

    jitter: float = 1e-6
    """Added to every matrix before its Cholesky decomposition."""

    scale_rho_by_lr: bool = True
    """The proximal weight is the rate times `rho`, as in the released code. A bare `rho`, as the
    paper's equations have it, dominates where the rate is small."""

    ignore_scale: bool = False
    """Step as if the layer added a b, as the released code does. Otherwise a step of rate eta moves
    scale a b by -eta times the gradient of the kernel, whatever the scale."""

    clip_scales_stats: bool = True
    """A clipped gradient is clipped through its layer inputs, so that their statistics shrink with
    the square, as in the released code. False clips the gradient alone."""

    seed: int = 0
    """Of the start of the momentum, whose left factor must not be zero."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        sweeps = self.sweeps
        is_count = isinstance(sweeps, int) and not isinstance(sweeps, bool) and sweeps >= 0
        require(self, "sweeps", is_count, "an integer >= 0")
        require(self, "start", self.start in ("a", "b"), "a or b")
        check_number("LowRankSum.momentum_rank", self.momentum_rank, POSITIVE)
        check_number("LowRankSum.jitter", self.jitter, DECAY)
        require(self, "seed", isinstance(self.seed, int), "an integer")


@dataclass(frozen=True, eq=False)
class FactorMetric:
    """The statistics whose powers precondition `scaled_lorsum`."""

    kind: Literal["kfac", "shampoo"] = "kfac"
    """"kfac" (second moments of layer inputs and of output gradients) or "shampoo" (of the rows and
    columns of the gradient)."""

    form: Literal["diagonal", "dense"] = "diagonal"
    """Numbers or matrices for the two sides."""

    power: float = 0.5
    """p: the step is D_out^-p G D_in^-p. 0.5 is the published runs' root of K-FAC, 1 the natural
    gradient, 0 plain LoRSum; 0.25 with "shampoo" is Shampoo."""

    init: float = 1.0
    """The statistics start as this multiple of ones, or of the identity."""

    warmup: bool = False
    """Decay the averages by min(b2, 1 - 1 / (t + 1)) in step t = 1, 2, ..."""

    loss: Literal["mean", "sum"] = "mean"
    """Over the rows: it decides by what the gradients at the outputs are multiplied, so that both
    give the same statistics."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        require(self, "kind", self.kind in ("kfac", "shampoo"), "kfac or shampoo")
        require(self, "form", self.form in ("diagonal", "dense"), "diagonal or dense")
        require(self, "loss", self.loss in ("mean", "sum"), "mean or sum")
        is_power = isinstance(self.power, int | float) and 0 <= self.power < 4
        require(self, "power", is_power, "a Python number in [0, 4)")
        check_number("FactorMetric.init", self.init, NOT_NEGATIVE)
