"""Replay of the LionMuon family through the public API."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab.core.spectral import power_iteration
from jaxopt_lab.diagnostics import norm_ratios
from jaxopt_lab.optim import LionMuonState
from jaxopt_lab.parity.lion_muon import CachedState, ReleasedTraceState
from tests.golden import lion_muon_primitives
from tests.golden.harness import Case, Check, NotUnderstood, Result
from tests.golden.lion_muon_classes import Settings, settings
from tests.golden.trajectory import Replay, compare_params, final_state, find_states
from tests.golden.trajectory import replay as run

PARAM_TOLERANCE = 1e-12
STATE_TOLERANCE = 1e-11
# The stored norms were computed in float32.
NORM_RATIO_TOLERANCE = 2e-6

# Float32 arithmetic that rounds to bfloat16 in the same places: at least this, and one spacing of
# the largest weight. With decay the released code forms (1 - eta decay) W - eta U and an Optax
# update W + (-eta (U + decay W)), which may differ by half a spacing at every step.
AS_IS_TOLERANCE = 2e-7
AS_IS_TOLERANCE_WITH_DECAY = 3e-6
# Another order of summation may round an entry of a spectral update to the other neighbour: in this
# share of the entries (one in any case) the parameter may jump by the rate times the spacing of
# bfloat16 around 1.
AS_IS_SHARE = 0.01
AS_IS_SPACING = 2.0**-7

# What the released power iteration adds to norms.
RELEASED_EPS = 1e-7

# Buffers of the released classes, and where we keep what they hold.
MOMENTUM_BUFFERS = {"exp_avg", "momentum_buffer", "muon_buffer"}
MOMENTA = {LionMuonState: "mu", optax.ScaleByLionState: "mu", ReleasedTraceState: "trace"}
ADAMW_BUFFERS = {
    "moment1": "mu",
    "moment2": "nu",
    "adamw_exp_avg": "mu",
    "adamw_exp_avg_sq": "nu",
}
ARRAYS = {
    *("init", "grads", "grads_f64", "grads_asis", "params_f64", "params_asis"),
    *("state_final_f64", "state_final_asis", "quad_H", "quad_target", "loss_f64", "loss_asis"),
    *("lr_mult", "probe", "trace", "diag"),
}


def replay(case: Case) -> list[Result]:
    """All comparisons of one case: float64, and as released where that was recorded."""
    primitive = lion_muon_primitives.recognise(case)
    if primitive is not None:
        return [primitive(case)]
    chosen = settings(case)
    unknown = sorted({name.split(".")[0] for name in case.arrays} - ARRAYS)
    if unknown:
        raise NotUnderstood(f"unknown arrays {', '.join(unknown)}")
    results = [_float64(case, chosen)]
    if any(name.startswith("params_asis.") for name in case.arrays):
        results.append(_as_is(case, chosen))
    return results


def _float64(case: Case, chosen: Settings) -> Result:
    closed_loop = case.sidecar.get("closed_loop_quadratic", False)
    with jax.enable_x64(True):
        ours = run(chosen.plan("float64"), case, np.float64, None if closed_loop else "grads")
        checks = compare_params(case, ours.params, "params_f64", PARAM_TOLERANCE)
        checks += _compare_state(case, chosen, ours)
        if closed_loop:
            checks += compare_params(case, ours.grads, "grads_f64", STATE_TOLERANCE)
            wanted = case.arrays["loss_f64"]
            checks.append(Check.of("loss_f64", ours.losses, wanted, STATE_TOLERANCE, relative=True))
        checks += _compare_traces(case, chosen, ours)
        checks += _compare_norm_ratios(case, chosen, ours)
    return Result(f"{case.family}/{case.name}", tuple(checks))


def _as_is(case: Case, chosen: Settings) -> Result:
    # Open loop also on the quadratic: near a minimum the rounding decides about signs.
    grads = "grads_asis" if case.sidecar.get("closed_loop_quadratic") else "grads"
    ours = run(chosen.plan("as-is"), case, np.float32, grads)
    decays = any(chosen.h.get(name) for name in ("weight_decay", "adamw_wd"))
    stored = [case.arrays[f"params_asis.{name}"] for name in ours.params]
    spacing = float(np.spacing(np.float32(max(np.abs(w).max(initial=0.0) for w in stored))))
    tolerance = max(AS_IS_TOLERANCE, spacing)
    if decays:
        tolerance = max(AS_IS_TOLERANCE_WITH_DECAY, spacing * len(chosen.rates) / 2)
    off = entries = 0
    worst = 0.0
    for (name, values), wanted in zip(ours.params.items(), stored, strict=True):
        if values.shape != wanted.shape or not np.isfinite(values).all():
            raise ValueError(f"params_asis.{name}: got shape {values.shape} or non-finite values")
        error = np.abs(np.asarray(values, np.float64) - wanted).max(axis=0)
        off += int((error > tolerance).sum())
        entries += error.size
        worst = max(worst, float(error.max()))
    spectral = chosen.matrices and chosen.kind not in ("Lion", "Signum", "NormalizedSGD")
    limit = AS_IS_SPACING * float(chosen.rates.max()) if spectral else tolerance
    allowed = worst <= limit and off <= max(1, AS_IS_SHARE * entries)
    check = Check("params_asis", worst, tolerance, off == 0 or allowed)
    note = f"{off} of {entries} entries rounded the other way" if off else ""
    return Result(f"{case.family}/{case.name}[as-is]", (check,), note)


def _compare_state(case: Case, chosen: Settings, ours: Replay) -> list[Check]:
    final = final_state(ours)
    prefix = "state_final_f64."
    checks = []
    for key in (k for k in case.arrays if k.startswith(prefix)):
        name, _, buffer = key.removeprefix(prefix).rpartition(".")
        tolerance = STATE_TOLERANCE
        if buffer == "cached_direction" and chosen.h["cheap_mode"] != "cached":
            # We store it only where it is read; what it would hold can be seen in the parameters,
            # up to their rounding over the rate.
            value, rate = _last_spectral_direction(case, chosen, ours, name)
            tolerance += 4 * np.finfo(float).eps * np.abs(ours.params[name]).max() / rate
        elif buffer == "cached_direction":
            (state,) = find_states(final, CachedState)
            value = state.cached[name]
        elif buffer in MOMENTUM_BUFFERS:
            value = _momentum(final)[name]
        elif buffer in ADAMW_BUFFERS:
            (state,) = find_states(final, optax.ScaleByAdamState)
            value = getattr(state, ADAMW_BUFFERS[buffer])[name]
        else:
            raise NotUnderstood(f"unknown buffer {key}")
        wanted = case.arrays[key]
        checks.append(Check.of(key, np.reshape(value, wanted.shape), wanted, tolerance))
    return checks


def _momentum(states):
    for kind, field in MOMENTA.items():
        for state in find_states(states, kind):
            return getattr(state, field)
    raise ValueError("our optimizer state holds no momentum")


def _directions(case: Case, chosen: Settings, ours: Replay, name: str) -> np.ndarray:
    """(T, m, n) what the family orthogonalises or takes the sign of, without Nesterov."""
    momentum = _momentum(ours.states)[name]
    if "beta1" in chosen.h:
        before = np.concatenate([np.zeros_like(momentum[:1]), momentum[:-1]])
        b1 = chosen.h["beta1"]
        momentum = b1 * before + (1 - b1) * ours.grads[name]
    return momentum.reshape(*momentum.shape[:2], -1)


def _spectral_steps(case: Case, chosen: Settings, ours: Replay, name: str) -> np.ndarray:
    """(T,) bool: our decisions, by period or by the stable rank of our own directions."""
    h = chosen.h
    if h.get("srank_alpha", 0) > 0:
        norm, sigma = _norm_and_sigma(case, chosen, ours, name)
        shape = ours.params[name].shape
        smaller = min(shape[1], int(np.prod(shape[2:])))
        return norm**2 / (sigma**2 + 1e-12) <= h["srank_alpha"] * smaller
    return np.arange(len(chosen.rates)) % h["muon_every_k"] == 0


def _norm_and_sigma(case: Case, chosen: Settings, ours: Replay, name: str):
    directions = _directions(case, chosen, ours, name)
    probes = jnp.asarray(case.arrays[f"probe.{name}"])
    sigma = power_iteration(jnp.asarray(directions), probes, eps=RELEASED_EPS)
    return np.linalg.norm(directions, axis=(1, 2)), np.asarray(sigma)


def _steps_taken(case: Case, chosen: Settings, ours: Replay, name: str) -> np.ndarray:
    """(T, *shape) scaled directions times their rates, recovered from the parameters."""
    rates = np.where(
        _spectral_steps(case, chosen, ours, name), chosen.rates, chosen.sign_rates
    ).reshape(-1, *[1] * (ours.params[name].ndim - 1))
    before = np.concatenate([case.arrays[f"init.{name}"][None], ours.params[name][:-1]])
    return (1 - rates * chosen.h["weight_decay"]) * before - ours.params[name]


def _last_spectral_direction(case: Case, chosen: Settings, ours: Replay, name: str):
    last = np.flatnonzero(_spectral_steps(case, chosen, ours, name))[-1]
    rate = chosen.rates[last]
    if rate == 0:
        raise NotUnderstood(f"cached_direction of {name}: its step had a rate of zero")
    return _steps_taken(case, chosen, ours, name)[last] / rate, rate


def _compare_traces(case: Case, chosen: Settings, ours: Replay) -> list[Check]:
    checks = []
    for key in (k for k in case.arrays if k.startswith("trace.")):
        if key == "trace.srank_ratio":
            pairs = [_norm_and_sigma(case, chosen, ours, name) for name in chosen.matrices]
            columns = [norm / (sigma + 1e-12) for norm, sigma in pairs]
        elif key == "trace.used_spectral":
            columns = [_spectral_steps(case, chosen, ours, name) for name in chosen.matrices]
        else:
            raise NotUnderstood(f"unknown trace {key}")
        checks.append(Check.of(key, np.stack(columns, 1), case.arrays[key], STATE_TOLERANCE))
    return checks


def _compare_norm_ratios(case: Case, chosen: Settings, ours: Replay) -> list[Check]:
    if "diag.step" not in case.arrays:
        return []
    momentum = _momentum(ours.states)
    taken = {name: _steps_taken(case, chosen, ours, name) for name in chosen.matrices}
    layouts = {name: chosen.layouts[name] for name in chosen.matrices}
    measure = jax.jit(functools.partial(norm_ratios, matrix_axes=layouts))
    records, previous = [], None
    for step in case.arrays["diag.step"]:
        t = int(step) - 1

        def before(name: str, values, first, t=t):
            return values[name][t - 1] if t else first

        ratios, previous = measure(
            {name: ours.grads[name][t] for name in layouts},
            {name: before(name, ours.params, case.arrays[f"init.{name}"]) for name in layouts},
            {name: taken[name][t] for name in layouts},
            {name: before(name, momentum, np.zeros_like(momentum[name][0])) for name in layouts},
            previous,
        )
        records.append(ratios)
    return [
        Check.of(
            f"diag.{name}",
            [record[name] for record in records],
            case.arrays[f"diag.{name}"],
            NORM_RATIO_TOLERANCE,
            relative=True,
        )
        for name in records[0]
    ]
