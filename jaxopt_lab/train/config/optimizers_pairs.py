"""Optimizers that know the two factors of an adapter as one: they need `--trainable lora`."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import optax
from jaxtyping import Array

from jaxopt_lab import lora, optim
from jaxopt_lab.train.config.bounds import Average, Count, Positive, PositiveOrZero
from jaxopt_lab.train.config.optimizer_base import ADAM_FLOPS, ModelInfo, OptimizerConfig
from jaxopt_lab.train.errors import ConfigError


@dataclass(frozen=True)
class PairConfig(OptimizerConfig):
    """An optimizer of pairs of low-rank factors, and AdamW for what else moves."""

    weight_decay: PositiveOrZero = 0.0
    """Decoupled weight decay of the factors, as a multiple of the rate."""
    needs_taps: ClassVar[bool] = False  # layer inputs and output gradients
    needs_weights: ClassVar[bool] = False  # a weight for each adapter
    _element_flops: ClassVar[tuple[int, int]] = (ADAM_FLOPS, ADAM_FLOPS)

    def validate(self) -> None:
        """Also refuses a choice of what decays."""
        super().validate()
        if self.decay != "matrices":
            raise ConfigError(
                "optimizer.decay", self.decay, "expected matrices: factors alone decay"
            )

    def changes(self, steps: int) -> tuple[int, ...]:
        """The steps after which adapters leave or grow (`jaxopt_lab.lora.resize`)."""
        return ()


@dataclass(frozen=True)
class _AdamPairsConfig(PairConfig):
    b1: Average = 0.9
    """Average of the gradient."""
    b2: Average = 0.999
    """Average of its square."""
    eps: PositiveOrZero = 1e-8
    """Added to the root of the second average."""

    def _adam(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("b1", "b2", "eps", "weight_decay")}


@dataclass(frozen=True)
class LoraPlusConfig(_AdamPairsConfig):
    """AdamW with a larger rate for one factor than for the other."""

    learning_rate: Positive = 1e-4
    """Peak rate of `a` and of what is trained whole."""
    ratio: Positive = 16.0
    """Rate of `b` over that of `a`."""

    def build(self, rate: optax.Schedule, model: ModelInfo) -> optax.GradientTransformation:
        """See the base class."""
        return lora.lora_plus(rate, ratio=self.ratio, **self._adam())


@dataclass(frozen=True)
class LoraFaConfig(_AdamPairsConfig):
    """`a` stays; `b` moves by AdamW, preconditioned by `a`."""

    def build(self, rate: optax.Schedule, model: ModelInfo) -> optax.GradientTransformation:
        """See the base class."""
        return lora.lora_fa(rate, **self._adam())


@dataclass(frozen=True)
class PreconditionedConfig(PairConfig):
    """Scaled gradient descent: each factor's gradient preconditioned by the other factor."""

    learning_rate: Positive = 1e-2
    """Peak learning rate."""
    rho: PositiveOrZero = 1e-2
    """Added to the Gram matrices."""
    momentum: Average | None = 0.9
    """Heavy-ball momentum; None: AdamW."""

    def validate(self) -> None:
        """Also refuses decay, which the method does not have."""
        super().validate()
        if self.weight_decay:
            raise ConfigError("optimizer.weight_decay", self.weight_decay, "expected 0")

    def build(self, rate: optax.Schedule, model: ModelInfo) -> optax.GradientTransformation:
        """See the base class."""
        return lora.preconditioned(rate, rho=self.rho, momentum=self.momentum)


@dataclass(frozen=True)
class _WeightedConfig(_AdamPairsConfig):
    eps: PositiveOrZero = 1e-6
    """Added to the root of the second average."""
    weight_learning_rate: Positive = 5.0
    """Rate of the adapters' weights; follows the schedule as well."""
    needs_weights: ClassVar[bool] = True

    def _arguments(self, rate: optax.Schedule) -> dict[str, Any]:
        # One schedule for both rates, as in the released code.
        share = self.weight_learning_rate / self.learning_rate
        return {"weight_learning_rate": lambda count: share * rate(count), **self._adam()}

    def rates(self, rate: Array) -> dict[str, Array]:
        """Reports the rates of factors and weights."""
        return {
            "rate": rate,
            "weight_rate": rate * (self.weight_learning_rate / self.learning_rate),
        }


@dataclass(frozen=True)
class WeightLoraConfig(_WeightedConfig):
    """WeightLoRA: weights of the adapters choose which of them stay."""

    keep: Count = 6
    """Adapters that stay."""
    every: Count = 1
    """Steps between projections."""
    freeze_after: Count | None = None
    """Steps after which the weights stay, and adapters of weight zero leave the program; None:
    never."""
    threshold: Literal["value", "abs"] = "value"
    """Keep the largest values or the largest absolute ones."""

    def build(self, rate: optax.Schedule, model: ModelInfo) -> optax.GradientTransformation:
        """See the base class."""
        return lora.weight_lora(
            rate, keep=self.keep, every=self.every, freeze_after=self.freeze_after,
            threshold=self.threshold, **self._arguments(rate),
        )  # fmt: skip

    def changes(self, steps: int) -> tuple[int, ...]:
        """See the base class."""
        if self.freeze_after is None:
            return ()
        if self.freeze_after >= steps:
            raise ConfigError(
                "optimizer.freeze_after", self.freeze_after, f"expected less than steps = {steps}"
            )
        return (self.freeze_after,)


@dataclass(frozen=True)
class WeightLoraPlusConfig(_WeightedConfig):
    """WeightLoRA+: half the adapters leave and the others double their rank, in rounds."""

    every: Count = 10
    """Steps between selections."""
    halvings: Count = 2
    """Number of selections."""

    def build(self, rate: optax.Schedule, model: ModelInfo) -> optax.GradientTransformation:
        """See the base class."""
        return lora.weight_lora_plus(
            rate, every=self.every, halvings=self.halvings, **self._arguments(rate)
        )

    def changes(self, steps: int) -> tuple[int, ...]:
        """See the base class."""
        if self.every * self.halvings >= steps:
            raise ConfigError(
                "optimizer.every", self.every,
                f"expected its product with halvings = {self.halvings} below steps = {steps}",
            )  # fmt: skip
        return tuple(self.every * round for round in range(1, self.halvings + 1))


@dataclass(frozen=True)
class _ProjectedConfig(PairConfig):
    learning_rate: Positive = 1e-2
    """Peak rate, of the kernel."""
    weight_decay: PositiveOrZero = 0.0
    """Decay of the product of the factors, as a multiple of the rate."""
    rho: PositiveOrZero = 1e-2
    """Pull towards the present factors, times the rate."""
    sweeps: int = 1
    """Rounds of alternating least squares of a projection; 0 updates both factors at once."""
    momentum_rank: Positive = 1.0
    """Rank of the momentum over that of the adapter."""
    needs_taps: ClassVar[bool] = True

    def _projection(self) -> lora.LowRankSum:
        try:
            return lora.LowRankSum(sweeps=self.sweeps, momentum_rank=self.momentum_rank)
        except ValueError as error:
            raise ConfigError.inside("optimizer", error) from error

    def validate(self) -> None:
        """Also checks the options of the projection."""
        super().validate()
        self._projection()


@dataclass(frozen=True)
class LorsumConfig(_ProjectedConfig):
    """LoRSum: gradient descent on the kernel, each step projected to the adapter's rank."""

    momentum: Average | None = 0.9
    """Heavy-ball momentum; None keeps none."""

    def build(self, rate: optax.Schedule, model: ModelInfo) -> optax.GradientTransformation:
        """See the base class."""
        return lora.lorsum(
            rate, rho=self.rho, momentum=self.momentum, weight_decay=self.weight_decay,
            clip=model.clip, projection=self._projection(),
        )  # fmt: skip


@dataclass(frozen=True)
class ProjectedLorsumConfig(_ProjectedConfig):
    """LoRSum with momentum in the space of the factors ("Proj. PSI-LoRA")."""

    momentum: Average = 0.9
    """Heavy-ball momentum, carried from the old factors to the new ones."""
    _factory: ClassVar[Any] = staticmethod(lora.projected_lorsum)

    def validate(self) -> None:
        """Also refuses what the method does not have."""
        super().validate()
        for name, usual in (("weight_decay", 0.0), ("momentum_rank", 1.0)):
            if getattr(self, name) != usual:
                raise ConfigError(f"optimizer.{name}", getattr(self, name), f"expected {usual:g}")

    def build(self, rate: optax.Schedule, model: ModelInfo) -> optax.GradientTransformation:
        """See the base class."""
        return self._factory(
            rate, rho=self.rho, momentum=self.momentum, clip=model.clip,
            projection=self._projection(),
        )  # fmt: skip


@dataclass(frozen=True)
class ExtrapolatedLorsumConfig(ProjectedLorsumConfig):
    """LoRSum with Nesterov's extrapolation of the product."""

    momentum: Average = 0.5
    """How far the product is extrapolated."""
    _factory: ClassVar[Any] = staticmethod(lora.extrapolated_lorsum)


@dataclass(frozen=True)
class ScaledLorsumConfig(_ProjectedConfig):
    """F-LoRSum: the step preconditioned by diagonal K-FAC, projected to the adapter's rank."""

    learning_rate: Positive = 0.2
    """Peak rate, of the kernel."""
    b1: Average | None = 0.9
    """Decay of the momentum; None keeps none."""
    b2: Average = 0.99
    """Decay of the statistics."""
    damping: PositiveOrZero = 1e-5
    """Added to the statistics."""
    adam_lr_ratio: PositiveOrZero = 5e-4
    """Rate of AdamW, for what is trained whole, over the rate."""

    def build(self, rate: optax.Schedule, model: ModelInfo) -> optax.GradientTransformation:
        """See the base class."""
        return lora.scaled_lorsum(
            rate, b1=self.b1, b2=self.b2, damping=self.damping, rho=self.rho,
            weight_decay=self.weight_decay, clip=model.clip, projection=self._projection(),
            fallback=optim.AdamW(lr_ratio=self.adam_lr_ratio),
        )  # fmt: skip

    def rates(self, rate: Array) -> dict[str, Array]:
        """Reports the rate of AdamW as well."""
        return {"rate": rate, "adam_rate": rate * self.adam_lr_ratio}


PAIR_OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    "lora-plus": LoraPlusConfig,
    "lora-fa": LoraFaConfig,
    "preconditioned": PreconditionedConfig,
    "weight-lora": WeightLoraConfig,
    "weight-lora-plus": WeightLoraPlusConfig,
    "lorsum": LorsumConfig,
    "projected-lorsum": ProjectedLorsumConfig,
    "extrapolated-lorsum": ExtrapolatedLorsumConfig,
    "scaled-lorsum": ScaledLorsumConfig,
}
"""Rows of the optimizers' table for adapters."""
