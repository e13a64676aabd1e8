"""The optimizers and the schedules under comparison."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

import jaxopt_lab as jol
from jaxopt_lab.core.dual_norms import DualNorms
from jaxopt_lab.parity.warmup import official_warmup
from jaxopt_lab.schedules import adaptive_warmup

SWEEP_SEED, FINAL_SEEDS = 0, (1, 2, 3)
CLIP, WEIGHT_DECAY = 0.5, 0.1
ADAM_B1, ADAM_B2 = 0.8, 0.999
# AdamW's best rate in experiments/dykaf, the same model and text; it drives all other leaves.
ADAM_RATE = 1.47e-3
# Sign rate over spectral rate of LionMuon: the best of the nine cells of experiments/lion_muon.
SIGN_RATIO = 1 / 60
# Every schedule ends at this part of its peak.
FINAL_DIV_FACTOR = 1e4

# (matrix_axes) -> direction at rate 1, decay included
Rule = Callable[[Any], optax.GradientTransformation]
Norm = DualNorms | Mapping[DualNorms, float]


@dataclass(frozen=True)
class Optimizer:
    """A rule for the matrices, AdamW for all other leaves."""

    name: str
    rule: Rule
    rates: tuple[float, ...]
    """Peak rates of the cells."""
    norm: Norm
    """The norm of its steps, for the adaptive warm-up."""
    div_factor: float = 100.0
    """Peak rate over the rate of the first step, for every schedule."""

    @property
    def slug(self) -> str:
        """Part of a file name."""
        kept = (c if c.isalnum() else "-" for c in self.name.lower())
        return "-".join(filter(None, "".join(kept).split("-")))

    def build(self, rate: Any, matrix_axes: Any) -> optax.GradientTransformation:
        """The optimizer at its peak rate, which may be traced."""
        groups = {
            "matrix": optax.chain(self.rule(matrix_axes), optax.scale_by_learning_rate(rate)),
            "other": optax.chain(
                jol.scale_by_adamw_fallback(b1=ADAM_B1, b2=ADAM_B2),
                optax.add_decayed_weights(WEIGHT_DECAY),
                optax.scale_by_learning_rate(ADAM_RATE),
            ),
        }
        labels = jax.tree.map(
            lambda layout: "other" if layout is None else "matrix", matrix_axes, is_leaf=_is_layout
        )
        return optax.partition(groups, labels)


@dataclass(frozen=True)
class Schedule:
    """One row of the table. Rows of one family are lanes of one program."""

    name: str
    family: Literal["linear", "exact", "official", "auto"]
    warmup: float = 0.0
    """Of the linear family: length as a share of the run."""
    norm: Norm | None = None
    """For kappa; None: the optimizer's own."""
    target_shift: float = 0.0
    """Added to the optimizer's target loss."""
    only: str | None = None
    """The one optimizer that has this row; None: all."""


class Cells(NamedTuple):
    """What tells the runs of a family apart, one entry a cell."""

    peak: Any  # rate of the matrices
    warmup: Any  # steps
    kappa: Any
    target: Any  # nats per token
    div_factor: Any  # peak rate over the rate of the first step

    def at(self, index: Any) -> "Cells":
        """One of them, by an index that may be traced."""
        return Cells(*(jnp.asarray(column, jnp.float32)[index] for column in self))


def scheduled(
    optimizer: Optimizer, family: str, cell: Cells, steps: int, matrix_axes: Any
) -> optax.GradientTransformation:
    """The optimizer of a cell, all of whose rates follow one schedule."""
    tx = optimizer.build(cell.peak, matrix_axes)
    if family == "linear":
        shape = functools.partial(
            linear_share, steps=steps, warmup=cell.warmup, div_factor=cell.div_factor
        )
        return optax.chain(tx, optax.scale_by_schedule(shape))
    return optax.chain(tx, warmup_of(family, cell, steps))


def warmup_of(family: str, cell: Cells, steps: int) -> optax.GradientTransformationExtraArgs:
    """The adaptive warm-up of a cell; `official` is the released one with all it does."""
    rule = official_warmup if family == "official" else adaptive_warmup
    return rule(
        cell.peak,
        steps,
        "auto" if family == "auto" else cell.target,
        cell.div_factor,
        kappa=cell.kappa,
        final_div_factor=FINAL_DIV_FACTOR,
        relative=True,
    )


def linear_share(count: Any, *, steps: int, warmup: Any, div_factor: Any) -> Any:
    """Linear warm-up and half a cosine, as a share of the peak; length and start may be traced.

    Starts and ends where the adaptive schedules do.
    """
    rise = 1 / div_factor + (1 - 1 / div_factor) * count / jnp.maximum(warmup, 1)
    left = jnp.clip((steps - count) / (steps - warmup), 0, 1)
    fall = 1 / FINAL_DIV_FACTOR + (1 - 1 / FINAL_DIV_FACTOR) * jnp.sin(jnp.pi / 2 * left) ** 2
    return jnp.where(count < warmup, rise, fall)


def _is_layout(node: Any) -> bool:
    return node is None or isinstance(node, MuonDimensionNumbers)


def _muon(matrix_axes: Any) -> optax.GradientTransformation:
    return optax.chain(
        jol.scale_by_lion_muon(period=1, b1=0.9, b2=0.9, matrix_axes=matrix_axes),
        optax.add_decayed_weights(WEIGHT_DECAY),
    )


def _lion_muon(matrix_axes: Any) -> optax.GradientTransformation:
    return optax.chain(
        jol.scale_by_lion_muon(period=2, b1=0.9, b2=0.99, matrix_axes=matrix_axes),
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.scale_by_schedule(jol.branch_rate(2, 1.0, SIGN_RATIO)),
    )


def _lion(matrix_axes: Any) -> optax.GradientTransformation:
    del matrix_axes
    return optax.chain(
        optax.scale_by_lion(b1=0.9, b2=0.99), optax.add_decayed_weights(WEIGHT_DECAY)
    )


def _normalized_sgd(matrix_axes: Any) -> optax.GradientTransformation:
    """`jol.normalized_sgd` with a norm for each matrix of a stacked leaf, as kappa counts them."""

    def normalized(layout: Any, x: Any) -> Any:
        if isinstance(x, optax.MaskedNode):
            return x
        inner = (*_axes(layout.reduction_axis), *_axes(layout.output_axis))
        return x / (jnp.sqrt(jnp.sum(x * x, axis=inner, keepdims=True)) + 1e-8)

    def normalize(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map(normalized, matrix_axes, updates, is_leaf=_is_layout)

    return optax.chain(
        optax.trace(0.95), optax.stateless(normalize), optax.add_decayed_weights(WEIGHT_DECAY)
    )


def _axes(axis: Any) -> tuple[int, ...]:
    return (axis,) if isinstance(axis, int) else tuple(axis)


def _grid(lowest: float, ratio: float) -> tuple[float, ...]:
    """Every row gets this many cells."""
    return tuple(float(f"{lowest * ratio**k:.3g}") for k in range(4))


OPTIMIZERS = (
    Optimizer("Muon", _muon, _grid(3e-3, 1.6), "spectral"),
    Optimizer("LionMuon P=2", _lion_muon, _grid(3e-3, 1.6), {"spectral": 0.5, "sign": 0.5}),
    Optimizer("Lion", _lion, _grid(5e-5, 2.0), "sign"),
    # The published start: a fifth of the peak.
    Optimizer("Normalized SGD", _normalized_sgd, _grid(0.0125, 2.8), "frobenius", div_factor=5.0),
)

REFERENCE = "linear-10"
"""The row whose final training loss gives the target."""

SCHEDULES = (
    Schedule("none", "linear"),
    *(Schedule(f"linear-{percent}", "linear", percent / 100) for percent in (1, 3, 10, 20, 40)),
    Schedule("exact", "exact"),
    Schedule("exact-kappa-of-muon", "exact", norm="spectral", only="LionMuon P=2"),
    Schedule("exact-kappa-of-lion", "exact", norm="sign", only="LionMuon P=2"),
    Schedule("exact-target-low", "exact", target_shift=-1.0, only="Muon"),
    Schedule("exact-target-high", "exact", target_shift=1.0, only="Muon"),
    Schedule("official", "official"),
    Schedule("auto", "auto"),
)


def schedules_of(optimizer: Optimizer) -> list[Schedule]:
    """The rows of an optimizer."""
    return [s for s in SCHEDULES if s.only in (None, optimizer.name)]
