"""The table of first-order optimizers under contract; a new one joins by one row."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import jaxopt_lab as jol


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
}
