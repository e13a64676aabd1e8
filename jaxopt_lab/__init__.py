"""Research optimizers as pure Optax transforms, and a stack that trains with them.

Importing this is cheap: transforms, adapters, schedules, diagnostics and dynamics, which need jax,
optax, jaxtyping and numpy, are loaded when they are first asked for, so that the command line can
answer signals before it loads anything. `jaxopt_lab.models`, `.data`, `.train`, `.report` and
`.bench` are imported by name.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxopt_lab import diagnostics, dynamics, lora, schedules, zeroth_order
    from jaxopt_lab.optim import (
        AdamW,
        Eigenbasis,
        Graft,
        InverseRoot,
        MeshWork,
        NewtonSchulz,
        Routing,
        branch_rate,
        d_muon,
        describe,
        dykaf,
        flax_matrix_axes,
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
        scale_by_stable_rank,
        shampoo,
        sign_muon,
        signum,
        soap,
        state_shardings,
        track_params_ema,
    )
    from jaxopt_lab.parity.dykaf import dykaf_official
    from jaxopt_lab.parity.lion_muon import legacy_sign_muon
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
    "branch_rate",
    "d_muon",
    "describe",
    "diagnostics",
    "dynamics",
    "dykaf",
    "dykaf_official",
    "flax_matrix_axes",
    "legacy_sign_muon",
    "lion_muon",
    "lora",
    "muon",
    "normalized_sgd",
    "params_ema",
    "scale_by_adamw_fallback",
    "scale_by_dykaf",
    "scale_by_lion_muon",
    "scale_by_normalized_heavy_ball",
    "scale_by_soap",
    "scale_by_stable_rank",
    "scale_by_shampoo",
    "schedules",
    "shampoo",
    "sign_muon",
    "signum",
    "soap",
    "state_shardings",
    "track_params_ema",
    "zeroth_order",
]

_PACKAGES = (
    *("core", "diagnostics", "dynamics", "lora", "optim", "parity", "schedules"),
    "zeroth_order",
)
_HOMES = {
    "adaptive_warmup": "schedules",
    "dykaf_official": "parity.dykaf",
    "legacy_sign_muon": "parity.lion_muon",
}


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOMES.get(name, 'optim')}")
    value = getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
