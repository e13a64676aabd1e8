"""The optimizers a run can name: one frozen dataclass each, with a `build` method.

A new optimizer joins the trainer and the command line by one class and one row of `OPTIMIZERS`.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import jax
import optax
from jaxtyping import Array, PyTree

from jaxopt_lab import optim
from jaxopt_lab.core.matrices import resolve_layout
from jaxopt_lab.core.newton_schulz import newton_schulz_flops
from jaxopt_lab.train.errors import ConfigError

# Operations per element.
_SIGN_FLOPS, _ADAM_FLOPS = 6, 12

Period = int | Literal["inf"]


class ModelInfo(NamedTuple):
    """What an optimizer may need to know about the model."""

    matrix_axes: PyTree = None  # of MuonDimensionNumbers, None for leaves that are not matrices
    param_shardings: PyTree = None  # of NamedSharding
    vocab_size: int | None = None


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer by name, with the settings that all of them have."""

    learning_rate: float = 1e-3
    """Peak learning rate."""

    weight_decay: float = 0.1
    """Decoupled weight decay of all parameters, as a multiple of the rate."""

    def validate(self) -> None:
        """Checks the values.

        Raises:
          ConfigError: For a rate, decay or average outside its range, or a period below 1.
        """
        for field_name in (field.name for field in fields(self)):
            value: Any = getattr(self, field_name)
            if value is None:
                continue
            name = f"optimizer.{field_name}"
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(name, value, "expected a finite number")
            if field_name.endswith(("learning_rate", "weight_decay")):
                if value < 0 or (field_name == "learning_rate" and value == 0):
                    raise ConfigError(name, value, "expected a positive number")
            if field_name.endswith(("b1", "b2", "beta")) and not 0 <= value < 1:
                raise ConfigError(name, value, "expected an average in [0, 1)")
            if field_name == "period" and value != "inf" and value < 1:
                raise ConfigError(name, value, "expected at least 1, or inf for never spectral")

    def build(self, rate: optax.Schedule, model: ModelInfo) -> optax.GradientTransformation:
        """Builds the transformation; its updates are added to the parameters.

        Args:
          rate: Schedule of the learning rate, or a constant where the schedule scales afterwards.
          model: Facts about the model.
        """
        raise NotImplementedError

    def rates(self, rate: Array) -> dict[str, Array]:
        """Learning rates to report while the scheduled one is `rate`."""
        return {"rate": rate}

    def mean_flops(self, params: PyTree, matrix_axes: PyTree) -> float:
        """FLOPs of one optimizer step, averaged over the kinds of steps it takes.

        Newton-Schulz is counted by its products, everything else as 6 operations per element for
        a momentum and its sign and 12 for AdamW.

        Args:
          params: Tree of arrays or shapes.
          matrix_axes: Tree of MuonDimensionNumbers, None for leaves that are not matrices.
        """
        return float(_SIGN_FLOPS * _elements(params))


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
        return optim.lion_muon(rate, b2=self.b2, **self._arguments(model))

    def rates(self, rate: Array) -> dict[str, Array]:
        """Reports the rates of all three branches."""
        sign, adam = rate * self.sign_lr_ratio, rate * self.adam_lr_ratio
        return {"rate": rate, "sign_rate": sign, "adam_rate": adam}

    def mean_flops(self, params: PyTree, matrix_axes: PyTree) -> float:
        """See the base class."""
        share = 0.0 if self.period == "inf" else 1 / self.period
        return _matrix_method_flops(params, matrix_axes, self.ns_steps, share)

    def _arguments(self, model: ModelInfo) -> dict[str, Any]:
        return {
            "sign_lr_ratio": self.sign_lr_ratio,
            "adam_lr_ratio": self.adam_lr_ratio,
            "period": math.inf if self.period == "inf" else self.period,
            "b1": self.b1,
            "ns_steps": self.ns_steps,
            "ns_dtype": self.ns_dtype,
            "mu_dtype": self.mu_dtype,
            "weight_decay": self.weight_decay,
            "matrix_axes": model.matrix_axes,
            "param_shardings": model.param_shardings,
            "on_uncovered": "error",
            "replicated_work": self.replicated_work,
        }


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
        return optax.adamw(rate, self.b1, self.b2, self.eps, weight_decay=self.weight_decay)

    def mean_flops(self, params: PyTree, matrix_axes: PyTree) -> float:
        """See the base class."""
        return float(_ADAM_FLOPS * _elements(params))


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
        return optax.lion(rate, self.b1, self.b2, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class SignumConfig(OptimizerConfig):
    """Sign of the momentum on every parameter."""

    learning_rate: float = 1e-3
    """Peak learning rate."""

    momentum: float = 0.9
    """Decay of the momentum."""

    def build(self, rate: optax.Schedule, model: ModelInfo) -> optax.GradientTransformation:
        """See the base class."""
        return optim.signum(rate, momentum=self.momentum, weight_decay=self.weight_decay)


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
        return optax.contrib.muon(
            rate,
            ns_steps=self.ns_steps,
            beta=self.beta,
            weight_decay=self.weight_decay,
            adam_weight_decay=self.weight_decay,
            muon_weight_dimension_numbers=model.matrix_axes,
            # The scale of the other spectral optimizers here, so that rates can be compared.
            consistent_rms=0.2,
        )

    def mean_flops(self, params: PyTree, matrix_axes: PyTree) -> float:
        """See the base class."""
        return _matrix_method_flops(params, matrix_axes, self.ns_steps, 1.0)


OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    "lion-muon": LionMuonConfig,
    "sign-muon": SignMuonConfig,
    "muon": MuonConfig,
    "lion": LionConfig,
    "signum": SignumConfig,
    "adamw": AdamWConfig,
    "optax-muon": OptaxMuonConfig,
}


def _elements(params: PyTree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _matrix_method_flops(
    params: PyTree, matrix_axes: PyTree, ns_steps: int, spectral_share: float
) -> float:
    """Mean FLOPs of an optimizer with spectral steps on matrices and AdamW elsewhere."""
    leaves, structure = jax.tree.flatten(params)
    spectral = elements = 0
    for leaf, layout in zip(leaves, structure.flatten_up_to(matrix_axes), strict=True):
        if layout is not None:
            count, rows, columns = resolve_layout(leaf.shape, layout).matrix_shape(leaf.shape)
            spectral += count * newton_schulz_flops(rows, columns, ns_steps)
            elements += math.prod(leaf.shape)
    rest = _elements(params) - elements
    return spectral_share * spectral + _SIGN_FLOPS * elements + _ADAM_FLOPS * rest
