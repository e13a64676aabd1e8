"""The optimizers under comparison: a rule for the matrices, the same AdamW for all other leaves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

import jaxopt_lab as jol

CLIP, WEIGHT_DECAY = 0.5, 0.1
ADAM_B1, ADAM_B2 = 0.8, 0.999
# What the Kronecker methods share, so that only the preconditioner differs.
KRONECKER = {"b1": 0.95, "b2": 0.95, "precondition_frequency": 10}
# Sign rate over spectral rate of LionMuon: the best of the nine cells of experiments/lion_muon.
SIGN_RATIO = 1 / 60

Schedule = Callable[[Any], Any]
Rule = Callable[[Any], optax.GradientTransformation]  # (matrix_axes) -> direction, decay included


@dataclass(frozen=True)
class Method:
    """One optimizer and the learning rates of its cells.

    AdamW has no rule of its own: the learning rate drives all leaves.
    """

    name: str
    rates: tuple[float, ...]
    rule: Rule | None = None

    @property
    def slug(self) -> str:
        """Part of a file name."""
        kept = (c if c.isalnum() else "-" for c in self.name.lower())
        return "-".join(filter(None, "".join(kept).split("-")))

    def build(
        self, rate: Any, adam_rate: Any, schedule: Schedule, matrix_axes: Any
    ) -> optax.GradientTransformation:
        """The optimizer.

        Args:
          rate: Peak rate of the matrices, a number or traced; of everything for AdamW.
          adam_rate: Peak rate of AdamW on embedding and norm gains.
          schedule: From 0 to 1.
          matrix_axes: Tree of layouts, None for leaves that are not matrices.
        """

        def follow(peak: Any) -> Schedule:
            return lambda count: peak * schedule(count)

        if self.rule is None:
            return _adamw(follow(rate))
        groups = {
            "matrix": optax.chain(
                self.rule(matrix_axes), optax.scale_by_learning_rate(follow(rate))
            ),
            "other": _adamw(follow(adam_rate)),
        }
        labels = jax.tree.map(
            lambda layout: "other" if layout is None else "matrix", matrix_axes, is_leaf=_is_layout
        )
        return optax.partition(groups, labels)


def _adamw(rate: Schedule) -> optax.GradientTransformation:
    return optax.chain(
        jol.scale_by_adamw_fallback(b1=ADAM_B1, b2=ADAM_B2),
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.scale_by_learning_rate(rate),
    )


def _is_layout(node: Any) -> bool:
    return node is None or isinstance(node, MuonDimensionNumbers)


def _adam_short(matrix_axes: Any) -> optax.GradientTransformation:
    """AdamW with the averages of the Kronecker methods: SOAP in the identity basis."""
    del matrix_axes
    return optax.chain(
        optax.scale_by_adam(b1=KRONECKER["b1"], b2=KRONECKER["b2"]),
        optax.add_decayed_weights(WEIGHT_DECAY),
    )


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


def _decaying(direction: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(direction, optax.add_decayed_weights(WEIGHT_DECAY))


def _soap(matrix_axes: Any) -> optax.GradientTransformation:
    return _decaying(jol.scale_by_soap(**KRONECKER, matrix_axes=matrix_axes))


def _shampoo(matrix_axes: Any) -> optax.GradientTransformation:
    return optax.chain(
        jol.scale_by_shampoo(**KRONECKER, matrix_axes=matrix_axes),
        optax.add_decayed_weights(WEIGHT_DECAY),
    )


def _dykaf(**options: Any) -> Rule:
    def rule(matrix_axes: Any) -> optax.GradientTransformation:
        return _decaying(jol.scale_by_dykaf(**KRONECKER, **options, matrix_axes=matrix_axes))

    return rule


def _grid(lowest: float, ratio: float) -> tuple[float, ...]:
    """Every method gets this many cells."""
    return tuple(float(f"{lowest * ratio**k:.3g}") for k in range(6))


_ADAM, _ROTATED, _SPECTRAL = _grid(3e-4, 1.7), _grid(5e-4, 1.8), _grid(2.4e-3, 1.6)

_RANK_ONE = jol.Eigenbasis(second_moment="rank_one")

# AdamW first: its best rate drives embedding and norm gains of all others.
METHODS = (
    Method("AdamW", _ADAM),
    Method("AdamW 0.95", _ADAM, _adam_short),
    Method("Muon", _SPECTRAL, _muon),
    Method("LionMuon P=2", _SPECTRAL, _lion_muon),
    Method("Shampoo", _ROTATED, _shampoo),
    Method("SOAP", _ROTATED, _soap),
    Method("DyKAF", _ROTATED, _dykaf(integrator="ksl")),
    Method("DyKAF parallel", _ROTATED, _dykaf(integrator="parallel")),
    # Its steps are longer where the rank-one fit is too small.
    Method("DyKAF rank-1", _grid(1e-4, 2.0), _dykaf(eigenbasis=_RANK_ONE)),
)
