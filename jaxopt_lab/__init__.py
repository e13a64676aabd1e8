"""Research optimizers as pure Optax transforms, and a stack that trains with them.

Importing this is cheap: transforms, schedules, diagnostics and dynamics, which need jax, optax,
jaxtyping and numpy, are loaded when they are first asked for, so that the command line can answer
signals before it loads anything. `jaxopt_lab.models`, `.data`, `.train`, `.report` and `.bench` are
imported by name.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
        dykaf_official,
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

_PACKAGES = ("core", "diagnostics", "dynamics", "optim", "schedules")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "schedules" if name == "adaptive_warmup" else "optim"
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
