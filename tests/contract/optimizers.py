"""The table of first-order optimizers under contract; a new one joins by one row."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import jaxopt_lab as jol
from tests.contract.own_optimizer import row_descent


class Entry(NamedTuple):
    """One public factory and what Optax's own tests call it with."""

    factory: Callable[..., optax.GradientTransformationExtraArgs]
    kwargs: dict[str, Any]


# Rates that converge on Optax's four problems within its 30 000 constant-rate steps.
OPTIMIZERS = {
    "lion_muon": Entry(jol.lion_muon, {"learning_rate": 1e-2}),
    "sign_muon": Entry(jol.sign_muon, {"learning_rate": 1e-2}),
    "legacy_sign_muon": Entry(
        jol.legacy_sign_muon,
        {"learning_rate": 1e-2, "fallback": jol.AdamW(learning_rate=1e-2, weight_decay=0.0)},
    ),
    "soap": Entry(jol.soap, {"learning_rate": 1e-2, "weight_decay": 0.0}),
    "dykaf": Entry(jol.dykaf, {"learning_rate": 1e-2, "weight_decay": 0.0}),
    "shampoo": Entry(jol.shampoo, {"learning_rate": 1e-2}),
    "muon": Entry(jol.muon, {"learning_rate": 1e-2}),
    "d_muon": Entry(jol.d_muon, {"learning_rate": 1e-2, "weight_decay": 0.0}),
    "signum": Entry(jol.signum, {"learning_rate": 1e-3}),
    "normalized_sgd": Entry(jol.normalized_sgd, {"learning_rate": 1e-3}),
    "row_descent": Entry(row_descent, {"learning_rate": 1e-2}),
}


# Public factories at their default options, over trees of every kind of leaf.
WHOLE_MODEL: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    **{name: (entry.factory, {"learning_rate": 1e-2}) for name, entry in OPTIMIZERS.items()},
    "dykaf_official": (jol.dykaf_official, {"learning_rate": 1e-2}),
    "adaptive_warmup": (
        jol.adaptive_warmup,
        {"peak_lr": 1e-2, "total_steps": 100, "target_loss": 1.0},
    ),
}

# Directions over trees of matrices alone.
DIRECTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "scale_by_lion_muon": (jol.scale_by_lion_muon, {}),
    "scale_by_soap": (jol.scale_by_soap, {}),
    "scale_by_dykaf": (jol.scale_by_dykaf, {}),
    "scale_by_shampoo": (jol.scale_by_shampoo, {}),
    "scale_by_normalized_heavy_ball": (jol.scale_by_normalized_heavy_ball, {"norm": "sign"}),
}

FACTORIES = WHOLE_MODEL | DIRECTIONS

# Their matrices move by the singular vectors or signs of the momentum, so scale never matters.
SCALE_FREE = ("lion_muon", "sign_muon", "muon", "d_muon", "signum", "scale_by_lion_muon")
