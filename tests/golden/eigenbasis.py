"""Comparisons of methods that run Adam in eigenbases of Kronecker factors: SOAP and DyKAF."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxopt_lab.optim.options import Eigenbasis
from tests.golden.eigenbasis_run import Recipe, Stored, Values, run_case
from tests.golden.harness import Case, Check, NotUnderstood, Result
from tests.reference.soap import rotate_back

SIDECAR = {
    *("method", "source", "factor_update", "dtype", "precision_note", "torch", "T", "seed"),
    *("hyperparameters", "hyperparameter_notes", "spec_options", "lr_schedule", "note", "params"),
    "how_to_compare",
}
HYPERPARAMETERS = {
    *("lr", "betas", "shampoo_beta", "eps", "weight_decay", "precondition_frequency"),
    *("max_precond_dim", "merge_dims", "precondition_1d", "normalize_grads", "data_format"),
    "correct_bias",
}
OPTIONS = {"f", "b", "skip_first_step"}
ARRAY = re.compile(r"param_init|grads|params|exp_avg|exp_avg_sq|l|r|factor\d|Q\d|Q\d_steps")
# The sidecars of the two dtypes name these for single steps.
ONE_STEP_TOLERANCE = {"float64": 1e-11, "float32": 1e-4}
# A column of the Q of X is compared where the diagonal of its R is above this share of the largest
# (the column is then determined to about the reciprocal times the rounding), to this tolerance.
COLUMN_SHARE = {"float64": 1e-4, "float32": 3e-2}
COLUMN_TOLERANCE = {"float64": 1e-9, "float32": 1e-3}


def check_understood(case: Case, method: str, hyperparameters: set[str], options: set[str]) -> None:
    """Raise `NotUnderstood` for anything in sidecar or arrays that the replay would ignore."""
    sidecar, h, o = case.sidecar, case.sidecar["hyperparameters"], case.sidecar["spec_options"]
    for what, found, known in (
        ("sidecar entries", sidecar, SIDECAR),
        ("hyperparameters", h, HYPERPARAMETERS | hyperparameters),
        ("spec_options", o, OPTIONS | options),
    ):
        if set(found) != known:
            raise NotUnderstood(f"{what}: {', '.join(sorted(set(found) ^ known))}")
    b = h["betas"][1] if h["shampoo_beta"] < 0 else h["shampoo_beta"]
    for name, found, wanted in (
        ("method", sidecar["method"], method),
        ("f", o["f"], h["precondition_frequency"]),
        ("b", o["b"], b),
        ("skip_first_step", o["skip_first_step"], True),
    ):
        if found != wanted:
            raise NotUnderstood(f"{name} is {found!r}, expected {wanted!r}")
    if sidecar["dtype"] not in ONE_STEP_TOLERANCE:
        raise NotUnderstood(f"dtype {sidecar['dtype']}")
    four_axes = any(len(info["shape"]) == 4 for info in sidecar["params"].values())
    if h["data_format"] != "channels_first" and four_axes:
        raise NotUnderstood(f"data_format {h['data_format']}")
    for name in case.arrays:
        p, _, array = name.rpartition("/")
        if name != "state_steps" and not (p in sidecar["params"] and ARRAY.fullmatch(array)):
            raise NotUnderstood(f"unknown array {name}")


@functools.cache
def eigenbasis(orthogonalizer: str, **options: Any) -> Eigenbasis:
    """One object for equal options, so that cases share a compiled scan."""
    # In float64 all products are exact; for the float32 cases they must be said to be.
    exact: Any = {"factor_precision": "highest", "rotation_precision": "highest"}
    return Eigenbasis(orthogonalizer=orthogonalizer, **exact, **options)  # pyright: ignore


def common_options(
    case: Case, orthogonalizer: str, **basis: Any
) -> tuple[dict[str, Any], dict[str, float]]:
    """The options of a recipe that both methods have: static ones and numbers."""
    h = case.sidecar["hyperparameters"]
    options = {
        "factor_decay": case.sidecar["spec_options"]["b"],  # 1 changes the rule
        "merge_dims": h["merge_dims"],
        "precondition_1d": h["precondition_1d"],
        "normalize_grads": h["normalize_grads"],
        "correct_bias": h["correct_bias"],
        "eigenbasis": eigenbasis(orthogonalizer, max_precond_dim=h["max_precond_dim"], **basis),
    }
    numbers = {
        "b1": h["betas"][0],
        "b2": h["betas"][1],
        "eps": h["eps"],
        "weight_decay": h["weight_decay"],
        "precondition_frequency": h["precondition_frequency"],
    }
    return options, numbers


def compare(
    case: Case, recipe: Callable[[Case, str], Recipe], *, also_panels: bool = True
) -> list[Result]:
    """All comparisons of one case; `recipe` takes the orthogonaliser."""
    label = f"{case.family}/{case.name}"
    infos = case.sidecar["params"]
    free = [p for p, info in infos.items() if info["free_run_ok"]]
    householder, panels = recipe(case, "householder"), recipe(case, "cholesky_qr")
    note = "" if free else "single steps only"
    with jax.enable_x64(True):
        stored = Stored(case, np.float64)
        results = [Result(label, tuple(_all_checks(case, stored, householder)), note)]
        if free and also_panels and case.sidecar["dtype"] == "float64":
            checks = _free_run(case, stored, panels, states=False)
            results.append(Result(f"{label}[panels]", tuple(checks)))
    if case.sidecar["dtype"] == "float32":
        stored = Stored(case, np.float32)
        stored.stop_at_ties(run_case(case, stored, householder, inject="bases"))
        for name, chosen in (("float32", householder), ("float32, panels", panels)):
            checks = _all_checks(case, stored, chosen)
            results.append(Result(f"{label}[{name}]", tuple(checks), stored.note))
    return results


def _all_checks(case: Case, stored: Stored, recipe: Recipe) -> list[Check]:
    checks = _one_step(case, stored, recipe)
    checks += _free_run(case, stored, recipe, states=True)
    infos = case.sidecar["params"]
    closed = [p for p, info in infos.items() if info["no_injection_ok"]]
    if closed:
        run = run_case(case, stored, recipe, inject=None)
        for p in closed:
            what, tolerance = f"{p}/params, no injection", infos[p]["no_injection_tol"]
            got, wanted = (x[: stored.end[p]] for x in (run.params[p], stored.arrays[p]["params"]))
            checks.append(Check.of(what, got, wanted, tolerance))
    return checks


def _relative(what: str, got: np.ndarray, wanted: np.ndarray, tolerance: float) -> Check:
    """Relative to the largest entry."""
    size = np.abs(np.asarray(wanted, np.float64)).max(initial=0.0) or 1.0
    return Check.of(what, np.asarray(got, np.float64) / size, wanted / size, tolerance)


def _free_run(case: Case, stored: Stored, recipe: Recipe, *, states: bool) -> list[Check]:
    names = [p for p, info in case.sidecar["params"].items() if info["free_run_ok"]]
    if not names:
        return []
    run = run_case(case, stored, recipe, inject="bases")
    exact = ONE_STEP_TOLERANCE[case.sidecar["dtype"]]
    checks = []
    for p in names:
        tolerance = case.sidecar["params"][p]["free_run_tol"]
        end = stored.end[p]
        got, wanted = (x[:end] for x in (run.params[p], stored.arrays[p]["params"]))
        checks.append(Check.of(f"{p}/params", got, wanted, tolerance))
        for t in stored.steps[stored.steps <= end] if states else ():
            got = {name: x[t - 1] for name, x in run.states[p].items()}
            for name in (name for name in got if re.fullmatch(r"exp_avg_sq|l|r|factor\d", name)):
                wanted = stored.values[p][name][t - 1]
                # No basis enters a factor.
                limit = exact if name.startswith("factor") else max(exact, tolerance)
                checks.append(_relative(f"{p}/{name} after {t}", got[name], wanted, limit))
            bases = [got.get(f"Q{k}") for k in range(len(stored.shapes[p]))]
            momentum = rotate_back(got["mu"].reshape(stored.shapes[p]), bases)
            wanted = stored.momentum(p)[t - 1]
            checks.append(_relative(f"{p}/momentum after {t}", momentum, wanted, exact))
    return checks


def _one_step(case: Case, stored: Stored, recipe: Recipe) -> list[Check]:
    run = run_case(case, stored, recipe, inject="everything")
    tolerance = ONE_STEP_TOLERANCE[case.sidecar["dtype"]]
    checks = []
    for p, arrays in stored.arrays.items():
        for t in (t for t in stored.steps if t - 1 in stored.steps and t <= stored.end[p]):
            wanted = arrays["params"][t - 1]
            checks.append(Check.of(f"{p}/params step {t}", run.params[p][t - 1], wanted, tolerance))
            got = {name: x[t - 1] for name, x in run.states[p].items()}
            for name in (name for name in got if re.fullmatch(r"exp_avg_sq|l|r|factor\d", name)):
                wanted = stored.values[p][name][t - 1]
                checks.append(_relative(f"{p}/{name} step {t}", got[name], wanted, tolerance))
            checks += _compare_bases(case, stored, p, int(t), got)
    return checks


def _compare_bases(case: Case, stored: Stored, p: str, t: int, got: Values) -> list[Check]:
    """Orthogonal, and where the step refreshed them the Q of (factor @ sorted old basis)."""
    dtype = case.sidecar["dtype"]
    tolerance = ONE_STEP_TOLERANCE[dtype]
    checks = []
    for k, (old, new) in enumerate(zip(stored.bases(p, t - 1), stored.bases(p, t), strict=True)):
        if old is None or new is None:
            continue
        q = np.asarray(got[f"Q{k}"], np.float64)
        what = f"{p}/Q{k} step {t}"
        checks.append(Check.of(f"{what}, orthogonality", q.T @ q, np.eye(len(q)), tolerance))
        if new is old or np.array_equal(new, old):
            checks.append(Check.of(what, q, old, 0.0))
            continue
        factor = np.asarray(stored.values[p][f"factor{k}"][t - 1], np.float64)
        order = np.argsort(-np.einsum("ij,ik,kj->j", old, factor, old), kind="stable")
        image = factor @ old[:, order]
        triangle = q.T @ image
        lower = np.tril(triangle, -1)
        checks.append(_relative(f"{what}, triangle", triangle - lower, triangle, tolerance))
        diagonal = np.abs(np.diag(new.T @ image))
        well = np.logical_and.accumulate(diagonal > COLUMN_SHARE[dtype] * diagonal.max())
        overlap = np.abs(new.T.astype(np.float64) @ q)[:, well]
        eye = np.eye(len(q))[:, well]
        checks.append(Check.of(f"{what}, columns", overlap, eye, COLUMN_TOLERANCE[dtype]))
    return checks
