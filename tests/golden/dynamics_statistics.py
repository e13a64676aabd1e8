"""Means over seeds against references of which mean, deviation and number of seeds are stored."""

from typing import Any

import numpy as np

from jaxopt_lab.dynamics.repeated_learning import Statistics
from tests.golden.harness import Case, Check, NotUnderstood

STANDARD_ERRORS = 4.0
# Masses and p-values saturate, where their spread over seeds says nothing.
MASS_FLOOR, NORMALITY_FLOOR, CELL_FLOOR = 0.01, 0.05, 0.03
# From this growth of the residuals on, the logarithms are compared in place of heavy tails.
GROWTH = np.log(2.0)
KAPPAS = (0.4, 0.5, 0.6)


def means_agree(case: Case, entry: dict, mine: Statistics, rows: np.ndarray) -> list[Check]:
    """One check a statistic, the error in units of what is allowed.

    Args:
      case: The reference.
      entry: Of the sidecar.
      mine: (seeds, records) in front.
      rows: Records of the steps of the entry.
    """
    stored = {
        name: case.arrays[f"case{entry['case']}_{name}"]
        for name in ("mean", "sd", "lnstd_mean", "lnstd_sd", "lnf0_mean", "lnf0_sd")
    }
    grown = stored["lnstd_mean"] - stored["lnstd_mean"][0] > GROWTH
    checks = []
    for column, name in enumerate(case.sidecar["stat_keys"]):
        got, floor, heavy = _statistic(name, mine)
        mean, sd = stored["mean"][:, column], stored["sd"][:, column]
        skipped = grown if heavy else np.zeros_like(grown)
        checks.append(_compare(name, got[:, rows], mean, sd, entry["seeds"], floor, skipped))
    for name, got in (("lnstd", mine.dev), ("lnf0", mine.density_at_zero)):
        mean, sd = stored[f"{name}_mean"], stored[f"{name}_sd"]
        with np.errstate(divide="ignore"):
            got = np.log(got[:, rows])
        # The density of a few residuals is often zero in some seed.
        skipped = np.isnan(mean) | ~np.isfinite(got).all(axis=0)
        checks.append(_compare(name, got, mean, sd, entry["seeds"], 0.0, skipped))
    return checks


def _statistic(name: str, mine: Statistics) -> tuple[Any, float, bool]:
    """(values (seeds, records), floor, whether its logarithm replaces it where residuals grow)."""
    if name.startswith("mass") and float(name[4:]) in KAPPAS:
        return mine.mass[..., KAPPAS.index(float(name[4:]))], MASS_FLOOR, False
    if name.startswith("nu") and 1 <= int(name[2:]) <= mine.moments.shape[-1]:
        return mine.moments[..., int(name[2:]) - 1], 0.0, False
    plain = {
        "std": (mine.dev, 0.0, True),
        "mae": (mine.mae, 0.0, False),
        "f0": (mine.density_at_zero, 0.0, True),
        "p": (mine.normality, NORMALITY_FLOOR, False),
    }
    if name not in plain:
        raise NotUnderstood(f"statistic {name!r}")
    return plain[name]


def _compare(
    what: str, got: np.ndarray, mean: np.ndarray, sd: np.ndarray, seeds: int, floor: float,
    skipped: np.ndarray,
) -> Check:  # fmt: skip
    allowed = STANDARD_ERRORS * sd * np.sqrt(1 / got.shape[0] + 1 / seeds) + floor
    error = np.where(skipped, 0.0, (got.mean(axis=0) - mean) / allowed)
    return Check.of(f"{what}, of what is allowed", error, np.zeros_like(error), 1.0)


def cells_agree(got: Any, stored: np.ndarray, grid: dict) -> Check:
    """Deviation of the residuals on a grid of settings, (s, p, seeds) against (s, p, 2)."""
    seeds, replicas = got.shape[-1], grid["replicas"]
    mean, sd = stored[..., 0], stored[..., 1]
    pooled = (seeds - 1) * got.var(axis=-1, ddof=1) + (replicas - 1) * sd**2
    error = np.sqrt(pooled / (seeds + replicas - 2) * (1 / seeds + 1 / replicas))
    ratio = (got.mean(axis=-1) - mean) / (STANDARD_ERRORS * error + CELL_FLOOR * mean)
    return Check.of("std, of what is allowed", ratio, np.zeros_like(ratio), 1.0)
