"""The released optimizer classes: hyperparameters, their class defaults, and how we build them.

Hyperparameters that a sidecar leaves out have the defaults of the released class, which differ from
this library's. Weights are (out, in), so the output axis is 0 and all others are reduced.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab import optim
from jaxopt_lab.optim.lion_muon.muon import heavy_ball
from jaxopt_lab.optim.lion_muon.transform import averaged
from jaxopt_lab.parity import lion_muon as parity
from tests.golden.harness import Case, NotUnderstood
from tests.golden.trajectory import Plan

Precision = Literal["float64", "as-is"]
Hyperparameters = Mapping[str, Any]

# The released routing rule: matrices have at least two axes and fewer rows than this.
VOCABULARY_ROWS = 10_000

_FALLBACK = {
    "adamw_lr": 3e-4,
    "adamw_betas": (0.8, 0.999),
    "adamw_eps": 1e-8,
    "adamw_wd": 0.1,
}
_LION_MUON = _FALLBACK | {
    "lr": 2e-3,
    "lion_lr": None,
    "beta1": 0.95,
    "beta2": 0.99,
    "ns_steps": 6,
    "muon_every_k": 5,
    "srank_alpha": 0.0,
    "weight_decay": 0.0,
    "norm_diag_every_k": 0,
}
_SIGN_MUON = _FALLBACK | {
    "lr": 0.02,
    "cheap_lr": None,
    "momentum": 0.95,
    "nesterov": True,
    "ns_steps": 6,
    "muon_every_k": 5,
    "cheap_mode": "norm",
    "cheap_ns_steps": 2,
    "sign_scaling": "muon",
    "srank_alpha": 0.0,
    "weight_decay": 0.0,
}
_MUON = _FALLBACK | {
    "lr": 0.02,
    "momentum": 0.95,
    "nesterov": True,
    "ns_steps": 6,
    "weight_decay": 0.0,
}
_D_MUON = {
    "lr": 0.02,
    "weight_decay": 0.1,
    "matched_adamw_rms": 0.2,
    "momentum": 0.95,
    "nesterov": True,
    "ns_steps": 5,
    "adamw_betas": (0.95, 0.95),
    "adamw_eps": 1e-8,
}
_LION = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}
_HEAVY_BALL = {
    "lr": 1e-3,
    "momentum": 0.0,
    "dampening": 0.0,
    "nesterov": False,
    "weight_decay": 0.0,
}


class Settings(NamedTuple):
    """A case's optimizer, hyperparameters completed, parameters sorted by rule."""

    kind: str  # name of the released class
    h: Hyperparameters
    layouts: Mapping[str, MuonDimensionNumbers | None]  # None: AdamW
    rates: np.ndarray  # (T,) scheduled rate
    constant: np.ndarray  # (T,) ones, for rates that are not scheduled

    @property
    def matrices(self) -> list[str]:
        """Names of the parameters that are not AdamW's, in the order of the sidecar."""
        return [name for name, layout in self.layouts.items() if layout is not None]

    @property
    def sign_rates(self) -> np.ndarray:
        """(T,) rate of the steps that are not spectral."""
        if self.kind in ("SignMuon", "SignDMuon"):
            given, scheduled = self.h["cheap_lr"], self.constant
            default = (0.25 if self.h["cheap_mode"] in ("sign", "norm") else 1.0) * self.h["lr"]
            return scheduled * (default if given is None else given)
        lion_lr = self.h.get("lion_lr")
        return self.rates * (0.01 if lion_lr is None else lion_lr / self.h["lr"])

    def plan(self, precision: Precision) -> Plan:
        """The optimizer of this library that this case is to be replayed with."""
        return CLASSES[self.kind][1](self, precision)


def settings(case: Case) -> Settings:
    """Read a sidecar; nothing that it says may go unused."""
    named = str(case.sidecar.get("optimizer_class", ""))
    match = re.match(r"\w+", named)
    kind = match.group() if match else ""
    if kind not in CLASSES:
        raise NotUnderstood(f"unknown optimizer class {named!r}; known: {', '.join(CLASSES)}")
    given, defaults = case.sidecar["hyperparameters"], CLASSES[kind][0]
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise NotUnderstood(f"unknown hyperparameters of {kind}: {', '.join(unknown)}")
    h = defaults | given
    steps = int(case.sidecar["steps"])
    constant = np.ones(steps)
    factors = np.asarray(case.arrays.get("lr_mult", constant), np.float64)
    return Settings(kind, h, _layouts(case, kind), h["lr"] * factors, constant)


def _layouts(case: Case, kind: str) -> dict[str, MuonDimensionNumbers | None]:
    shapes = case.sidecar["param_shapes"]
    fallback = case.sidecar.get("adamw_fallback_params")
    if fallback is None and kind not in ("Lion", "Signum", "NormalizedSGD"):
        fallback = [p for p, s in shapes.items() if len(s) < 2 or s[0] >= VOCABULARY_ROWS]
    return {
        # A parameter of more than two axes is the matrix (dim0, rest).
        name: None
        if name in (fallback or ())
        else MuonDimensionNumbers(reduction_axis=tuple(range(1, len(shape))), output_axis=0)
        for name, shape in shapes.items()
    }


def _built(factory: Callable[..., Any]) -> Callable[..., optax.GradientTransformation]:
    """A factory from flat numbers: the option objects are made inside of the compiled function."""

    @functools.wraps(factory)
    def build(
        learning_rate: Any, *, ns_steps: int, ns_dtype: str, adam_learning_rate: Any, adam_b1: Any,
        adam_b2: Any, adam_eps: Any, adam_weight_decay: Any, **options: Any,
    ) -> optax.GradientTransformation:  # fmt: skip
        return factory(
            learning_rate,
            newton_schulz=optim.NewtonSchulz(ns_steps, dtype=ns_dtype, eps=1e-7),
            fallback=optim.AdamW(
                adam_learning_rate,
                b1=adam_b1,
                b2=adam_b2,
                eps=adam_eps,
                weight_decay=adam_weight_decay,
            ),
            **options,
        )

    return build


def _released(b1: Any, *, average: str, b2: Any = None, **options: Any):
    """`parity.released_muon` with a momentum rule by name."""
    rule = {
        "averaged": lambda: averaged(b1, b2),
        "nesterov": lambda: heavy_ball(b1, True),
        "buffer": lambda: heavy_ball(b1, False),
        "gradient": lambda: parity.raw_gradient(b1),
    }[average]()
    return parity.released_muon(average=rule, **options)


lion_muon, legacy_sign_muon, muon, d_muon = map(
    _built, (optim.lion_muon, parity.legacy_sign_muon, optim.muon, optim.d_muon)
)
released = _built(
    lambda learning_rate, **options: _released(learning_rate=learning_rate, **options)
)


def _lion_muon(s: Settings, precision: Precision) -> Plan:
    h = s.h
    numbers = _numbers(h, h["adamw_wd"]) | {"b1": h["beta1"], "b2": h["beta2"]} | _trigger(h)
    # The released infinity is a large period: its step 0 is spectral.
    numbers["period"] = min(h["muon_every_k"], 2**30)
    options = {"ns_steps": h["ns_steps"]}
    options |= _rounding(precision, "float32" if s.kind == "LiDMuon" else "bfloat16")
    rates = _rates(s, s.rates * (h["adamw_lr"] / h["lr"]))
    if precision == "float64":
        return Plan(lion_muon, options, numbers, rates, s.layouts)
    return Plan(released, options | {"average": "averaged"}, numbers, rates, s.layouts)


def _sign_muon(s: Settings, precision: Precision) -> Plan:
    h = s.h
    numbers = _numbers(h, h["adamw_wd"])
    options = {name: h[name] for name in ("ns_steps", "cheap_mode", "sign_scaling")}
    options["period"] = h["muon_every_k"]
    options |= _rounding(precision, "float32" if s.kind == "SignDMuon" else "bfloat16")
    # The defect of this class: only the spectral rate is scheduled.
    rates = _rates(s, s.constant * h["adamw_lr"])
    if precision == "float64" and h["cheap_ns_steps"] == 2 and not _trigger(h):
        options["nesterov"], numbers["momentum"] = h["nesterov"], h["momentum"]
        return Plan(legacy_sign_muon, options, numbers, rates, s.layouts)
    options |= {"average": "nesterov" if h["nesterov"] else "buffer", "measures_momentum": True}
    options["cheap_ns_steps"] = h["cheap_ns_steps"]
    numbers |= {"b1": h["momentum"]} | _trigger(h)
    return Plan(released, options, numbers, rates, s.layouts)


def _muon(s: Settings, precision: Precision) -> Plan:
    h = s.h
    numbers = _numbers(h, h["adamw_wd"])
    options = {"ns_steps": h["ns_steps"]} | _rounding(precision, "bfloat16")
    rates = _rates(s, s.rates * (h["adamw_lr"] / h["lr"]))
    del rates["sign_learning_rate"]
    if precision == "float64" and h["nesterov"]:
        numbers["momentum"] = h["momentum"]
        return Plan(muon, options, numbers, rates, s.layouts)
    options |= {"average": "nesterov" if h["nesterov"] else "gradient", "spectral_scale": "fan"}
    numbers["b1"] = h["momentum"]
    return Plan(released, options, numbers, rates, s.layouts)


def _d_muon(s: Settings, precision: Precision) -> Plan:
    h = s.h
    numbers = _numbers(h, h["weight_decay"])
    options = {"ns_steps": h["ns_steps"]} | _rounding(precision, "bfloat16")
    # Our factor is 0.2: another is another rate of the matrices, which their decay must not see.
    factor = h["matched_adamw_rms"] / 0.2
    rates = _rates(s, s.rates) | {"learning_rate": factor * s.rates}
    del rates["sign_learning_rate"]
    if precision == "float64" and factor == 1:
        options["nesterov"], numbers["momentum"] = h["nesterov"], h["momentum"]
        return Plan(d_muon, options, numbers, rates, s.layouts)
    options["average"] = "nesterov" if h["nesterov"] else "buffer"
    if precision == "as-is":
        # This class converts back to float32 before it scales.
        options["round_update"] = False
    numbers |= {"b1": h["momentum"], "weight_decay": h["weight_decay"] / factor}
    return Plan(released, options, numbers, rates, s.layouts)


def _lion(s: Settings, precision: Precision) -> Plan:
    del precision
    b1, b2 = s.h["betas"]
    numbers = {"b1": b1, "b2": b2, "weight_decay": s.h["weight_decay"]}
    return Plan(optax.lion, {}, numbers, {"learning_rate": s.rates})


def _heavy_ball(s: Settings, precision: Precision) -> Plan:
    del precision
    norm = "sign" if s.kind == "Signum" else "frobenius"
    options = {"nesterov": bool(s.h["nesterov"]), "norm": norm}
    numbers = {name: s.h[name] for name in ("momentum", "dampening", "weight_decay")}
    return Plan(parity.released_heavy_ball, options, numbers, {"learning_rate": s.rates})


def _rates(s: Settings, adam_rates: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "learning_rate": s.rates,
        "sign_learning_rate": s.sign_rates,
        "adam_learning_rate": adam_rates,
    }


def _rounding(precision: Precision, as_is_dtype: str) -> dict[str, Any]:
    if precision == "float64":
        return {"ns_dtype": "float64"}
    rounds = as_is_dtype == "bfloat16"
    return {"ns_dtype": as_is_dtype, "round_newton_schulz": rounds, "round_update": True}


def _numbers(h: Hyperparameters, adam_weight_decay: float) -> dict[str, float]:
    b1, b2 = h["adamw_betas"]
    return {
        "adam_b1": b1,
        "adam_b2": b2,
        "adam_eps": h["adamw_eps"],
        "adam_weight_decay": adam_weight_decay,
        "weight_decay": h["weight_decay"],
    }


def _trigger(h: Hyperparameters) -> dict[str, float]:
    return {"stable_rank_threshold": h["srank_alpha"]} if h["srank_alpha"] > 0 else {}


# Name of the released class -> its hyperparameters with their defaults, and how we build it.
CLASSES: dict[str, tuple[dict[str, Any], Callable[[Settings, Precision], Plan]]] = {
    "LionMuon": (_LION_MUON, _lion_muon),
    "LiDMuon": (_LION_MUON, _lion_muon),
    "SignMuon": (_SIGN_MUON, _sign_muon),
    "SignDMuon": (_SIGN_MUON, _sign_muon),
    "Muon": (_MUON, _muon),
    "DistributedMuon": (_D_MUON, _d_muon),
    "Lion": (_LION, _lion),
    "Signum": (_HEAVY_BALL, _heavy_ball),
    "NormalizedSGD": (_HEAVY_BALL, _heavy_ball),
}
