"""Replay of the adaptive warm-up: rates over given losses, both rules of the peak gap, tables."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core.dual_norms import DualNorms
from jaxopt_lab.parity.warmup import OBJECTIVES, official_warmup
from jaxopt_lab.schedules import Curvature, exact_peak_gap, fit_curvature, gap_rate, warmup_kappa
from tests.golden.adaptive_warmup_decays import DECAY_OPTIONS, decay_options
from tests.golden.harness import Case, Check, NotUnderstood, Result

RATE_TOLERANCE = 5e-14
CURVATURE_TOLERANCE = 1e-13
# Rates from the coefficients cancel in the denominator.
TABLE_TOLERANCE = dict.fromkeys(("eta", "eta_prime", "eta_second"), 1e-12)

NORMS: dict[str, DualNorms] = {
    **dict.fromkeys(("muon", "d-muon"), "spectral"),
    **dict.fromkeys(("lion", "signum", "signsgd", "sign-sgd"), "sign"),
    **dict.fromkeys(("normalized-sgd", "normalized_sgd", "normsgd"), "frobenius"),
}
# Spelled as in the released code.
MODES = {name: name for name in OBJECTIVES} | {
    "linear_and_linaer": "linear_and_linear",
    "intergral_0_x0": "integral_0_x0",
    "func_prime_0x*": "func_prime_0xs",
}
SIDECAR = {
    *("case", "source", "torch", "scipy", "hyperparameters", "shapes", "kappa", "param_groups"),
    *("keys", "official_numbers", "independent_reference", "notes", "spec_options"),
    *("how_to_compare", "tolerance"),
}
HYPERPARAMETERS = {
    *("opt", "lr_max", "div_factor", "loss_star", "sigma_F", "mode", "target", "rho"),
    *("iterations", "scheduler", "final_div_factor", "K0", "K1", "Krho"),
}
# Options of ours that a sidecar may name.
OPTIONS = {"official_first_step", "use_current_loss", "smoothing", "fallback_after"}
ARRAYS = {"loss", "lr_used", "lr_after_last", "K", "delta_star", "switch_step"}
COLUMNS = ["lr_max", "div", "Delta0", "Delta_star", "K0", "K1", "K2", "Delta"]


def replay(case: Case) -> list[Result]:
    """All comparisons of one case."""
    if "columns" in case.sidecar:
        return [_eta_table(case)]
    if any(name.startswith(("fit.", "norms.")) for name in case.arrays):
        from tests.golden.adaptive_warmup_analyzer import replay_analyzer

        return replay_analyzer(case)
    _check_understood(case)
    with jax.enable_x64(True):
        results = [Result(f"{case.family}/{case.name}", tuple(_official(case)))]
        if case.sidecar.get("independent_reference"):
            label = f"{case.family}/{case.name}[exact]"
            results.append(Result(label, tuple(_exact(case))))
    return results


def _check_understood(case: Case) -> None:
    h = case.sidecar.get("hyperparameters", {})
    for what, unknown in (
        ("sidecar entries", set(case.sidecar) - SIDECAR),
        ("hyperparameters", set(h) - HYPERPARAMETERS - OPTIONS - DECAY_OPTIONS),
        ("arrays", set(case.arrays) - ARRAYS),
    ):
        if unknown:
            raise NotUnderstood(f"unknown {what}: {', '.join(sorted(unknown))}")
    missing = {"opt", "lr_max", "div_factor", "loss_star", "iterations"} - set(h)
    missing |= {"loss", "lr_used"} - set(case.arrays)
    if missing:
        raise NotUnderstood(f"missing: {', '.join(sorted(missing))}")
    if h["opt"] not in NORMS:
        raise NotUnderstood(f"opt {h['opt']!r}")
    if _mode(h) not in OBJECTIVES:
        raise NotUnderstood(f"mode {h['mode']!r}")
    if _by_hand(h) is None and h.get("rho", 2.0) != 2.0:
        raise NotUnderstood(f"rho {h['rho']} without constants by hand")


def _mode(h: Any) -> str:
    return MODES.get(h.get("mode", "linear_and_cos"), "")


def _by_hand(h: Any) -> Curvature | None:
    given = [name for name in ("K0", "K1", "Krho") if name in h]
    if given and len(given) < 3:
        raise NotUnderstood(f"only {', '.join(given)} of K0, K1, Krho")
    return Curvature(h["K0"], h["K1"], h["Krho"], h.get("rho", 2.0)) if given else None


def _official(case: Case) -> list[Check]:
    h, stored = case.sidecar["hyperparameters"], case.arrays
    by_hand = _by_hand(h)
    tx = official_warmup(
        h["lr_max"],
        h["iterations"],
        h["loss_star"],
        h["div_factor"],
        kappa=_kappa(case),
        sigma=h.get("sigma_F", 1e-3),
        objective=_mode(h),  # pyright: ignore[reportArgumentType]
        target=h.get("target", "linear"),
        curvature=by_hand,
        **decay_options(h),
        **{name: h[name] for name in OPTIONS & set(h)},
    )
    rates, state = _run(tx, stored["loss"])
    # All groups follow the first, in the proportion of their base rates.
    share = stored["lr_used"][0] / stored["lr_used"][0, 0]
    peak = h["lr_max"] * share
    wanted_kappa = case.sidecar["kappa"]
    checks = [
        Check.of("kappa", _kappa(case), wanted_kappa, 1e-15, relative=True),
        _compare_rates("lr_used", rates[:, None] * share, stored["lr_used"], peak),
    ]
    if "lr_after_last" in stored:
        last, wanted = state.rate * share, stored["lr_after_last"]
        checks.append(_compare_rates("lr_after_last", last, wanted, peak))
    if "switch_step" in stored:
        checks.append(Check.of("switch_step", state.switch_step, stored["switch_step"], 0.0))
    if "delta_star" in stored:
        # The search must choose the stored candidate; a closed form may round.
        tolerance = CURVATURE_TOLERANCE if by_hand else 0.0
        checks.append(Check.of("delta_star", state.peak_gap, stored["delta_star"], tolerance))
    if "K" in stored:
        k = by_hand or fit_curvature(
            h["lr_max"], h["div_factor"], float(state.initial_gap), state.peak_gap
        )
        wanted = stored["K"]
        checks.append(Check.of("K", k[:3], wanted, CURVATURE_TOLERANCE, relative=True))
    return checks


def _compare_rates(what: str, got: np.ndarray, wanted: np.ndarray, peak: np.ndarray) -> Check:
    """Relative, but for one rounding of the peak: that of 1 + cos near -1 in the released decay."""
    scale = np.abs(wanted) + peak * np.finfo(float).eps / RATE_TOLERANCE
    return Check.of(what, got / scale, wanted / scale, RATE_TOLERANCE)


def _run(tx: Any, losses: np.ndarray) -> tuple[np.ndarray, Any]:
    """(rate of every step, last state)."""

    def step(state: Any, loss: jax.Array) -> tuple[Any, jax.Array]:
        update, state = tx.update(jnp.ones(()), state, value=loss)
        return state, -update

    state, rates = jax.jit(lambda x: jax.lax.scan(step, tx.init(jnp.ones(())), x))(losses)
    return np.asarray(rates), jax.tree.map(np.asarray, state)


def _kappa(case: Case) -> float:
    """From the shapes, where the sidecar lists them or describes a model of the known form."""
    shapes, norm = case.sidecar.get("shapes"), NORMS[case.sidecar["hyperparameters"]["opt"]]
    if isinstance(shapes, str):
        found = re.search(r"d=(\d+), ff=(\d+),.*\((\d+),\d+\); (\d+) layers", shapes)
        if found is None:
            raise NotUnderstood(f"shapes {shapes!r}")
        d, ff, vocabulary, layers = map(int, found.groups())
        layer = [(3 * d, d), (d, d), (ff, d), (ff, d), (d, ff)]
        shapes = layers * layer + [(vocabulary, d)]
    leaves = [jax.ShapeDtypeStruct(tuple(shape), np.float64) for shape in shapes or ()]
    return warmup_kappa(leaves, norm)


def _exact(case: Case) -> list[Check]:
    h, reference = case.sidecar["hyperparameters"], case.sidecar["independent_reference"]
    gap = float(case.arrays["loss"][0]) - h["loss_star"]
    if _mode(h) != "linear_and_cos":
        raise NotUnderstood(f"independent_reference of mode {h['mode']!r}")
    sharpness = _kappa(case) * h.get("sigma_F", 1e-3)
    found = jax.jit(exact_peak_gap)(gap, sharpness, h["div_factor"])
    # The grid is formed in another order: one rounding.
    checks = [Check.of("delta_star_exact", found, reference["delta_star_exact"], 1e-14)]
    k = fit_curvature(h["lr_max"], h["div_factor"], gap, found)
    for name, value in zip(("K0_exact", "K1_exact", "K2_exact"), k[:3], strict=True):
        if name in reference:
            checks.append(
                Check.of(name, value, reference[name], CURVATURE_TOLERANCE, relative=True)
            )
    return checks


def _eta_table(case: Case) -> Result:
    columns = case.sidecar["columns"]
    if columns[: len(COLUMNS)] != COLUMNS or set(columns[len(COLUMNS) :]) - set(TABLE_TOLERANCE):
        raise NotUnderstood(f"columns {', '.join(columns)}")
    table = dict(zip(columns, case.arrays["table"].T, strict=True))
    with jax.enable_x64(True):
        k = fit_curvature(*(table[name] for name in COLUMNS[:4]))
        checks = [
            Check.of(name, value, table[name], CURVATURE_TOLERANCE, relative=True)
            for name, value in zip(("K0", "K1", "K2"), k[:3], strict=True)
        ]
        rate = lambda gap, *k: gap_rate(gap, Curvature(*k))  # noqa: E731
        functions = {
            "eta": rate,
            "eta_prime": jax.grad(rate),
            "eta_second": jax.grad(jax.grad(rate)),
        }
        for name, tolerance in TABLE_TOLERANCE.items():
            if name in table:
                got = jax.vmap(functions[name])(table["Delta"], *k[:3])
                checks.append(Check.of(name, got, table[name], tolerance, relative=True))
    return Result(f"{case.family}/{case.name}", tuple(checks))
