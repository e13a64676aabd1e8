"""Replay of the smoothness analyzer: norms of one step, and fits of planted points."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.diagnostics import fit_smoothness, local_smoothness, smoothness_points
from tests.golden.harness import Case, Check, NotUnderstood, Result

# Relative. Singular values and least squares of two libraries in float64.
TOLERANCE = 1e-10

PAIRS = {"fro": "frobenius", "muon": "spectral", "signum": "sign"}
FITS = {"rho2": 2.0, "rho_free": None}
TREES = ("prev_grad", "cur_grad", "prev_w", "cur_w")
POINTS = ("fit.delta", "fit.weight_diff_norm", "fit.grad_diff_norm")


def replay_analyzer(case: Case) -> list[Result]:
    """One result for the norms, one for the fits."""
    shapes = case.sidecar["shapes"]
    known = {f"{tree}.{i}" for tree in TREES for i in range(len(shapes))} | set(POINTS)
    known |= {f"norms.{name}" for name in PAIRS} | {f"fit.{name}" for name in FITS}
    if known != set(case.arrays):
        raise NotUnderstood(f"arrays {sorted(known ^ set(case.arrays))}")
    label = f"{case.family}/{case.name}"
    return [
        Result(f"{label} norms", tuple(_norms(case, len(shapes)))),
        Result(f"{label} fits", tuple(_fits(case))),
    ]


def _norms(case: Case, leaves: int) -> list[Check]:
    with jax.enable_x64(True):
        before, after, w_before, w_after = (
            [jnp.asarray(case.arrays[f"{tree}.{i}"]) for i in range(leaves)] for tree in TREES
        )
        found = jax.device_get(local_smoothness(before, after, w_before, w_after))
    gap = case.sidecar["loss"] - case.sidecar["f_star"]
    checks = []
    for name, pair in PAIRS.items():
        difference, step, ratio = found[pair]
        wanted = case.arrays[f"norms.{name}"]
        got = [difference, step, gap]
        checks.append(Check.of(f"{name} norms", got, wanted, TOLERANCE, relative=True))
        quotient = wanted[0] / wanted[1]
        checks.append(Check.of(f"{name} ratio", ratio, quotient, TOLERANCE, relative=True))
    return checks


def _fits(case: Case) -> list[Check]:
    gap, step_norm, difference = (case.arrays[name] for name in POINTS)
    points = smoothness_points(np.arange(len(gap)), gap, difference, step_norm)
    return [
        Check.of(
            name, fit_smoothness(points.gap, points.ratio, rho)[:5], case.arrays[f"fit.{name}"],
            TOLERANCE, relative=True,
        )
        for name, rho in FITS.items()
    ]  # fmt: skip
