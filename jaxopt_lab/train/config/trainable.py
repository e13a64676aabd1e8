"""What moves in a fine-tuning run: one frozen dataclass each, by the names of `TRAINABLES`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxopt_lab.lora.config import ALL_LINEAR, LoraConfig
from jaxopt_lab.train.config.bounds import Average, Count, CountOrZero, Positive, check_bounds
from jaxopt_lab.train.errors import ConfigError


@dataclass(frozen=True)
class TrainableConfig:
    """What moves, by name; everything else is frozen, without gradient and optimizer state."""

    adapters: ClassVar[bool] = False  # whether low-rank adapters move beside a frozen base

    def validate(self) -> None:
        """Checks the values.

        Raises:
          ConfigError: For a number that is out of bounds.
        """
        check_bounds(self, "trainable.")


@dataclass(frozen=True)
class FullConfig(TrainableConfig):
    """Every parameter."""


@dataclass(frozen=True)
class HeadConfig(TrainableConfig):
    """The head alone."""

    modules: tuple[str, ...] = ()
    """What moves instead, by path or the end of one: `final_norm`, `layers.mlp`."""


@dataclass(frozen=True)
class LoraAdaptersConfig(TrainableConfig):
    """Low-rank adapters beside frozen kernels: x W + s (x a) b with s = alpha / rank."""

    rank: Count = 8
    """Columns of `a`, rows of `b`."""
    alpha: Positive = 16.0
    """The scale is alpha / rank."""
    target: tuple[str, ...] = (ALL_LINEAR,)
    """Modules or matrices with an adapter, by name or the end of one (`qkv`, `q_proj`);
    `all-linear`: all but embeddings and heads."""
    exclude: tuple[str, ...] = ()
    """Those without one, likewise."""
    layers: tuple[CountOrZero, ...] | None = None
    """Numbers of the layers with adapters; None: all."""
    whole: tuple[str, ...] = ()
    """Modules trained whole beside the adapters (peft's modules_to_save); a fresh head is one."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases trained whole: none, all, or those of adapted modules."""
    dropout: Average = 0.0
    """Of the inputs of adapters, in training."""
    init: Literal["default", "gaussian", "wlora", "pissa", "olora"] = "default"
    """Start of `a`; `b` starts at zero. `wlora` is the wider start of the released WeightLoRA.
    `pissa` and `olora` start both from the kernel, which loses their product; the adapters that a
    run leaves have twice the rank, and stand beside the kernel as it was."""
    rslora: bool = False
    """Scale by alpha over the root of the rank."""
    adapters: ClassVar[bool] = True
    dora: ClassVar[bool] = False

    def lora(self, *, weights: bool, heads: tuple[str, ...] = ()) -> LoraConfig:
        """The adapters that are wanted.

        Args:
          weights: Whether each has a weight, for an optimizer that chooses among them.
          heads: Modules that are trained whole in any case.

        Raises:
          ConfigError: For a value that cannot work.
        """
        try:
            return LoraConfig(
                rank=self.rank,
                alpha=self.alpha,
                target=ALL_LINEAR if self.target == (ALL_LINEAR,) else self.target,
                exclude=self.exclude,
                layers=self.layers,
                init=self.init,
                dropout=self.dropout,
                rslora=self.rslora,
                dora=self.dora,
                weights=weights,
                full=tuple(dict.fromkeys((*self.whole, *heads))),
                bias=self.bias,
            )
        except ValueError as error:
            raise ConfigError.inside("trainable", error) from error


@dataclass(frozen=True)
class DoraAdaptersConfig(LoraAdaptersConfig):
    """LoRA that learns the norm of each output apart from its direction."""

    dora: ClassVar[bool] = True


TRAINABLES: dict[str, type[TrainableConfig]] = {
    "full": FullConfig,
    "head": HeadConfig,
    "lora": LoraAdaptersConfig,
    "dora": DoraAdaptersConfig,
}
