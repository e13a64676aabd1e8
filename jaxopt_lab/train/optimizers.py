"""The optimizers a run can name: one frozen dataclass each, with a `build` method.

A new optimizer joins the trainer and the command line by one class and one row of `OPTIMIZERS`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import optax
from jaxtyping import Array, PyTree

from jaxopt_lab import optim
from jaxopt_lab.core.dual_norms import DualNorms
from jaxopt_lab.core.newton_schulz import newton_schulz_flops
from jaxopt_lab.train.errors import ConfigError
from jaxopt_lab.train.optimizer_config import (
    SIGN_FLOPS,
    ModelInfo,
    OptimizerConfig,
    adam_flops,
    matrix_method_flops,
)
from jaxopt_lab.train.optimizers_kronecker import DyKAFConfig, ShampooConfig, SoapConfig

__all__ = [
    "OPTIMIZERS",
    "AdamWConfig",
    "DyKAFConfig",
    "LionConfig",
    "LionMuonConfig",
    "ModelInfo",
    "MuonConfig",
    "OptaxMuonConfig",
    "OptimizerConfig",
    "ShampooConfig",
    "SignMuonConfig",
    "SignumConfig",
    "SoapConfig",
]

Period = int | Literal["inf"]


@dataclass(frozen=True)
class LionMuonConfig(OptimizerConfig):
    """Spectral step every `period`-th time, sign step otherwise, one momentum buffer."""

    learning_rate: float = 1e-2
    """Peak rate of the spectral step."""

    period: Period = 2
    """A spectral step every so many steps; 1 always, inf never."""

    sign_lr_ratio: float = 0.05
    """Rate of the sign step over the spectral rate."""

    adam_lr_ratio: float = 1.0
    """Rate of AdamW (embeddings, norms, biases) over the spectral rate."""

    b1: float = 0.9
    """Average that forms the direction."""

    b2: float = 0.99
    """Average that is stored."""

    ns_steps: int = 5
    """Newton-Schulz iterations."""

    ns_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the Newton-Schulz products."""

    mu_dtype: Literal["float32", "bfloat16"] | None = None
    """Stored precision of the momentum; None: that of the parameters."""

    replicated_work: Literal["repeat", "share"] = "repeat"
    """Whether replicas repeat the spectral work or share it out and gather the result."""

    def build(self, rate: optax.Schedule, model: ModelInfo) -> optax.GradientTransformation:
        """See the base class."""
        return optim.lion_muon(
            rate,
            sign_learning_rate=lambda count: self.sign_lr_ratio * rate(count),
            period=math.inf if self.period == "inf" else self.period,
            b1=self.b1,
            b2=self.b2,
            weight_decay=self.weight_decay,
            mask=self.decay_mask(model),
            matrix_axes=model.matrix_axes,
            mu_dtype=self.mu_dtype,
            newton_schulz=optim.NewtonSchulz(steps=self.ns_steps, dtype=self.ns_dtype),
            routing=optim.Routing(on_uncovered="error"),
            fallback=optim.AdamW(lr_ratio=self.adam_lr_ratio),
            mesh=optim.MeshWork(model.param_shardings, self.replicated_work),
        )

    def rates(self, rate: Array) -> dict[str, Array]:
        """Reports the rates of all three branches."""
        sign, adam = rate * self.sign_lr_ratio, rate * self.adam_lr_ratio
        return {"rate": rate, "sign_rate": sign, "adam_rate": adam}

    def step_norm(self) -> dict[DualNorms, float]:
        """By the shares of spectral and of sign steps."""
        return {"spectral": self._spectral_share(), "sign": 1 - self._spectral_share()}

    def mean_flops(self, params: PyTree, matrix_axes: PyTree) -> float:
        """See the base class."""
        return _spectral_flops(params, matrix_axes, self.ns_steps, self._spectral_share())

    def _spectral_share(self) -> float:
        return 0.0 if self.period == "inf" else 1 / self.period


@dataclass(frozen=True)
class SignMuonConfig(LionMuonConfig):
    """LionMuon whose direction is its momentum buffer: one average instead of two."""

    b2: float = 0.9
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
    """A spectral step every so many steps."""


@dataclass(frozen=True)
class AdamWConfig(OptimizerConfig):
    """Optax AdamW on every parameter."""

    learning_rate: float = 3e-3
    """Peak learning rate."""

    b1: float = 0.9
    """Average of the gradient."""

    b2: float = 0.95
    """Average of its square."""

    eps: float = 1e-8
    """Added to the root of the second average."""

    def build(self, rate: optax.Schedule, model: ModelInfo) -> optax.GradientTransformation:
        """See the base class."""
        return optax.adamw(
            rate,
            self.b1,
            self.b2,
            self.eps,
            weight_decay=self.weight_decay,
            mask=self.decay_mask(model),
        )

    def mean_flops(self, params: PyTree, matrix_axes: PyTree) -> float:
        """See the base class."""
        return adam_flops(params)


@dataclass(frozen=True)
class LionConfig(OptimizerConfig):
    """Optax Lion on every parameter."""

    learning_rate: float = 1e-3
    """Peak learning rate."""

    b1: float = 0.9
    """Average that forms the direction."""

    b2: float = 0.99
    """Average that is stored."""

    def build(self, rate: optax.Schedule, model: ModelInfo) -> optax.GradientTransformation:
        """See the base class."""
        mask = self.decay_mask(model)
        return optax.lion(rate, self.b1, self.b2, weight_decay=self.weight_decay, mask=mask)


@dataclass(frozen=True)
class SignumConfig(OptimizerConfig):
    """Sign of the momentum on every parameter."""

    learning_rate: float = 1e-3
    """Peak learning rate."""

    momentum: float = 0.9
    """Decay of the momentum."""

    def build(self, rate: optax.Schedule, model: ModelInfo) -> optax.GradientTransformation:
        """See the base class."""
        return optim.signum(
            rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            mask=self.decay_mask(model),
        )


@dataclass(frozen=True)
class OptaxMuonConfig(OptimizerConfig):
    """The Muon that comes with Optax, with its AdamW for everything else."""

    learning_rate: float = 1e-2
    """Peak learning rate."""

    beta: float = 0.95
    """Decay of the momentum."""

    ns_steps: int = 5
    """Newton-Schulz iterations."""

    def build(self, rate: optax.Schedule, model: ModelInfo) -> optax.GradientTransformation:
        """See the base class."""
        mask = self.decay_mask(model)
        return optax.contrib.muon(
            rate,
            ns_steps=self.ns_steps,
            beta=self.beta,
            weight_decay=self.weight_decay,
            weight_decay_mask=mask,
            # Its AdamW takes no mask. What is left to it are norms, biases and embeddings, and a
            # head of its own, which then does not decay either.
            adam_weight_decay=self.weight_decay if mask is None else 0.0,
            muon_weight_dimension_numbers=model.matrix_axes,
            # The scale of the other spectral optimizers here, so that rates can be compared.
            consistent_rms=0.2,
        )

    def step_norm(self) -> dict[DualNorms, float]:
        """See the base class."""
        return {"spectral": 1.0}

    def mean_flops(self, params: PyTree, matrix_axes: PyTree) -> float:
        """See the base class."""
        return _spectral_flops(params, matrix_axes, self.ns_steps, 1.0)


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
}


def _spectral_flops(params: PyTree, matrix_axes: PyTree, ns_steps: int, share: float) -> float:
    """Newton-Schulz in a share of the steps, a momentum and its sign, AdamW elsewhere."""

    def of_matrix(m: int, n: int) -> float:
        return share * newton_schulz_flops(m, n, ns_steps)

    return matrix_method_flops(params, matrix_axes, of_matrix, SIGN_FLOPS)
