"""Research optimizers as pure Optax transforms, and a stack that trains with them.

Importing this is cheap: it brings transforms, schedules, diagnostics and dynamics, which need jax,
optax, jaxtyping and numpy. `jaxopt_lab.models`, `.data`, `.train`, `.report` and `.bench` are
imported by name.
"""

from jaxopt_lab import diagnostics, dynamics, schedules
from jaxopt_lab.optim import (
    AdamW,
    Eigenbasis,
    Graft,
    InverseRoot,
    MeshWork,
    NewtonSchulz,
    Routing,
    d_muon,
    describe,
    dykaf,
    legacy_sign_muon,
    lion_muon,
    muon,
    normalized_sgd,
    params_ema,
    scale_by_adamw_fallback,
    scale_by_dykaf,
    scale_by_lion_muon,
    scale_by_normalized_heavy_ball,
    scale_by_shampoo,
    scale_by_soap,
    shampoo,
    sign_muon,
    signum,
    soap,
    state_shardings,
    track_params_ema,
)
from jaxopt_lab.parity.dykaf import dykaf_official
from jaxopt_lab.schedules import adaptive_warmup

__all__ = [
    "AdamW",
    "Eigenbasis",
    "Graft",
    "InverseRoot",
    "MeshWork",
    "NewtonSchulz",
    "Routing",
    "adaptive_warmup",
    "d_muon",
    "describe",
    "diagnostics",
    "dynamics",
    "dykaf",
    "dykaf_official",
    "legacy_sign_muon",
    "lion_muon",
    "muon",
    "normalized_sgd",
    "params_ema",
    "scale_by_adamw_fallback",
    "scale_by_dykaf",
    "scale_by_lion_muon",
    "scale_by_normalized_heavy_ball",
    "scale_by_soap",
    "scale_by_shampoo",
    "schedules",
    "shampoo",
    "sign_muon",
    "signum",
    "soap",
    "state_shardings",
    "track_params_ema",
]
