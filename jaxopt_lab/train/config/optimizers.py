"""The optimizers a run can name: one frozen dataclass each, with a factory or a `build` method.

A new optimizer joins the trainer and the command line by one class and one row of `OPTIMIZERS`.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import jax
import optax
from jaxtyping import Array

from jaxopt_lab import optim
from jaxopt_lab.core.newton_schulz import newton_schulz_flops
from jaxopt_lab.train.config.bounds import Average, Bound, Count, Positive, PositiveOrZero
from jaxopt_lab.train.config.optimizer_base import (
    ADAM_FLOPS,
    SIGN_FLOPS,
    ModelInfo,
    OptimizerConfig,
    WholeMatrixConfig,
)
from jaxopt_lab.train.config.optimizers_kronecker import DyKAFConfig, ShampooConfig, SoapConfig
from jaxopt_lab.train.config.optimizers_zeroth_order import ZEROTH_ORDER
from jaxopt_lab.train.errors import ConfigError

Period = Count | Literal["inf"]
# They are unrolled in the program; five suffice in bfloat16, twelve in float32.
Iterations = Annotated[int, Bound(1, 100)]


@dataclass(frozen=True)
class LionMuonConfig(WholeMatrixConfig):
    """Spectral step every `period`-th time, sign step otherwise, one momentum buffer."""

    learning_rate: Positive = 1e-2
    """Peak rate of the spectral step."""
    period: Period = 2
    """A spectral step every so many steps; 1 always, inf never."""
    sign_lr_ratio: PositiveOrZero = 0.05
    """Rate of the sign step over the spectral rate."""
    adam_lr_ratio: PositiveOrZero = 1.0
    """Rate of AdamW (embeddings, norms, biases) over the spectral rate."""
    b1: Average = 0.9
    """Average that forms the direction."""
    b2: Average = 0.99
    """Average that is stored."""
    ns_steps: Iterations = 5
    """Newton-Schulz iterations."""
    ns_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the Newton-Schulz products."""
    mu_dtype: Literal["float32", "bfloat16"] | None = None
    """Stored precision of the momentum; None: that of the parameters."""
    _element_flops: ClassVar[tuple[int, int]] = (SIGN_FLOPS, ADAM_FLOPS)

    def build(self, rate: optax.Schedule, model: ModelInfo) -> optax.GradientTransformation:
        """See the base class."""
        return optim.lion_muon(
            rate,
            sign_learning_rate=lambda count: self.sign_lr_ratio * rate(count),
            period=math.inf if self.period == "inf" else self.period,
            b1=self.b1,
            b2=self.b2,
            mu_dtype=self.mu_dtype,
            newton_schulz=optim.NewtonSchulz(steps=self.ns_steps, dtype=self.ns_dtype),
            fallback=optim.AdamW(lr_ratio=self.adam_lr_ratio),
            **self._common_arguments(model),
        )

    def rates(self, rate: Array) -> dict[str, Array]:
        """Reports the rates of all three branches."""
        sign, adam = rate * self.sign_lr_ratio, rate * self.adam_lr_ratio
        return {"rate": rate, "sign_rate": sign, "adam_rate": adam}

    def _spectral_share(self) -> float:
        return 0.0 if self.period == "inf" else 1 / self.period

    def _product_flops(self, m: int, n: int) -> float:
        return self._spectral_share() * newton_schulz_flops(m, n, self.ns_steps)


@dataclass(frozen=True)
class SignMuonConfig(LionMuonConfig):
    """LionMuon whose direction is its momentum buffer: one average instead of two."""

    b2: Average = 0.9
    """Average that is stored; equal to b1 in SignMuon."""

    def validate(self) -> None:
        """Also checks that the two averages are one."""
        super().validate()
        if self.b1 != self.b2:
            raise ConfigError("optimizer.b2", self.b2, f"expected b1 = {self.b1}; or lion-muon")


@dataclass(frozen=True)
class MuonConfig(SignMuonConfig):
    """Muon with an averaged momentum: SignMuon that is spectral at every step."""

    period: Period = 1


@dataclass(frozen=True)
class AdamWConfig(OptimizerConfig):
    """Optax AdamW on every parameter."""

    learning_rate: Positive = 3e-3
    b1: Average = 0.9
    """Average of the gradient."""
    b2: Average = 0.95
    """Average of its square."""
    eps: PositiveOrZero = 1e-8
    """Added to the root of the second average."""
    _element_flops: ClassVar[tuple[int, int]] = (ADAM_FLOPS, ADAM_FLOPS)
    _factory = staticmethod(optax.adamw)


@dataclass(frozen=True)
class LionConfig(OptimizerConfig):
    """Optax Lion on every parameter."""

    b1: Average = 0.9
    """Average that forms the direction."""
    b2: Average = 0.99
    """Average that is stored."""
    _factory = staticmethod(optax.lion)


@dataclass(frozen=True)
class SignumConfig(OptimizerConfig):
    """Sign of the momentum on every parameter."""

    momentum: Average = 0.9
    """Decay of the momentum."""
    _factory = staticmethod(optim.signum)


@dataclass(frozen=True)
class OptaxMuonConfig(OptimizerConfig):
    """The Muon that comes with Optax, with its AdamW for everything else."""

    learning_rate: Positive = 1e-2
    beta: Average = 0.95
    """Decay of the momentum."""
    ns_steps: Iterations = 5
    """Newton-Schulz iterations."""
    _element_flops: ClassVar[tuple[int, int]] = (SIGN_FLOPS, ADAM_FLOPS)

    def build(self, rate: optax.Schedule, model: ModelInfo) -> optax.GradientTransformation:
        """See the base class."""
        mask = self._decay(model)["mask"]
        muon = optax.contrib.muon(
            rate,
            ns_steps=self.ns_steps,
            beta=self.beta,
            weight_decay=self.weight_decay,
            weight_decay_mask=mask,
            adam_weight_decay=self.weight_decay if mask is None else 0.0,
            muon_weight_dimension_numbers=model.matrix_axes,
            # The scale of the other spectral optimizers here, so that rates can be compared.
            consistent_rms=0.2,
        )
        # Its AdamW takes no mask, so a head of its own decays behind it.
        if mask is None:
            return muon
        head = jax.tree.map(lambda d, axes: d and axes is None, model.decays, model.matrix_axes)
        if not any(jax.tree.leaves(head)):
            return muon
        decay = optax.add_decayed_weights(lambda count: -self.weight_decay * rate(count), head)
        return optax.chain(muon, decay)

    def _spectral_share(self) -> float:
        return 1.0

    def _product_flops(self, m: int, n: int) -> float:
        return newton_schulz_flops(m, n, self.ns_steps)


OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    "lion-muon": LionMuonConfig,
    "sign-muon": SignMuonConfig,
    "muon": MuonConfig,
    "lion": LionConfig,
    "signum": SignumConfig,
    "adamw": AdamWConfig,
    "optax-muon": OptaxMuonConfig,
    "soap": SoapConfig,
    "dykaf": DyKAFConfig,
    "shampoo": ShampooConfig,
    **ZEROTH_ORDER,
}
