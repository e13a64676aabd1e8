"""What the records of local smoothness of a run add up to: fits and a figure."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxopt_lab.core.dual_norms import DUAL_NORMS, DualNorms
from jaxopt_lab.diagnostics import (
    Smoothness,
    SmoothnessFit,
    SmoothnessPoints,
    fit_smoothness,
    smoothness_points,
)
from jaxopt_lab.diagnostics.smoothness_fit import FEWEST_POINTS
from jaxopt_lab.report.smoothness import SmoothnessSeries, smoothness_figure
from jaxopt_lab.report.tracker import read_metrics
from jaxopt_lab.train.config.optimizer_base import OptimizerConfig
from jaxopt_lab.train.config.optimizers import LionMuonConfig
from jaxopt_lab.train.io.run_directory import read_config

_TITLES: Mapping[DualNorms, str] = {
    "spectral": "nuclear / spectral norm",
    "sign": "sum / largest of the entries",
    "frobenius": "Frobenius / Frobenius norm",
}


def fit_run(
    run_dir: str | os.PathLike[str],
    *,
    target_loss: float | None = None,
    rho: float | None = 2.0,
    start: int = 0,
    end: int | None = None,
    drop_outliers: bool = False,
    figure: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Fits the smoothness that a run recorded as a polynomial of the gap to a target loss.

    Spectral and sign steps of an optimizer that alternates between them are fitted apart: they go
    in different directions, and the ratio depends on the direction.

    Args:
      run_dir: A run directory whose log has records of `smoothness`.
      target_loss: Loss from which the gap is measured, nats per token; None takes the lowest
        held-out loss of the run.
      rho: The power of the gap; None takes the best of a range.
      start: First step to fit.
      end: First step not to fit any more; None fits all.
      drop_outliers: Whether to drop ratios outside the 1st to the 99th percentile.
      figure: File to draw points and curves into; None draws nothing.

    Returns:
      `target_loss`, and `fits`: for each kind of steps (`all_steps`, or `spectral_steps` and
      `sign_steps`) and pair of norms the fields of `SmoothnessFit`, or None where fewer than 10
      records can be used.

    Raises:
      ConfigError: If there is no run.
      ValueError: If the run has no records, none that lies above the target, or no target.
    """
    kind_of = _kinds_of_steps(read_config(run_dir).optimizer)
    rows = read_metrics(run_dir)
    records: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if _name("loss_after") in row:
            records.setdefault(kind_of(row["step"]), []).append(row)
    if not records:
        raise ValueError(
            f"{run_dir}: no records of smoothness; they are written with --diagnostics smoothness"
        )
    target = _lowest_held_out(run_dir, rows) if target_loss is None else target_loss
    points = {
        (kind, pair): _points(some, pair, target, start, end, drop_outliers)
        for kind, some in records.items()
        for pair in DUAL_NORMS
    }
    if not any(len(some.gap) for some in points.values()):
        raise ValueError(
            f"target_loss: got {target:.4g}, but no record of smoothness in the window has a loss "
            "above it"
        )
    fits = {
        key: fit_smoothness(some.gap, some.ratio, rho) if len(some.gap) >= FEWEST_POINTS else None
        for key, some in points.items()
    }
    if figure is not None:
        panels = {
            f"{pair}: {_TITLES[pair]}": [
                _series(kind, points[kind, pair], fits[kind, pair]) for kind in records
            ]
            for pair in DUAL_NORMS
        }
        smoothness_figure(panels, figure, target_loss=target)
    fields = {kind: {pair: _fields(fits[kind, pair]) for pair in DUAL_NORMS} for kind in records}
    return {"target_loss": target, "fits": fields}


def _kinds_of_steps(optimizer: OptimizerConfig) -> Callable[[int], str]:
    period = optimizer.period if isinstance(optimizer, LionMuonConfig) else 1
    if period in (1, "inf"):
        return lambda step: "all_steps"
    return lambda step: "sign_steps" if (step - 1) % int(period) else "spectral_steps"


def _name(metric: str) -> str:
    return f"{Smoothness.name}/{metric}"


def _lowest_held_out(run_dir: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> float:
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        raise ValueError(f"{run_dir}: no held-out loss to take the target from; give target_loss")
    return min(finite)


def _points(
    records: Sequence[Mapping[str, Any]],
    pair: DualNorms,
    target: float,
    start: int,
    end: int | None,
    drop_outliers: bool,
) -> SmoothnessPoints:
    return smoothness_points(
        [row["step"] for row in records],
        [row[_name("loss_after")] - target for row in records],
        [row[_name(f"{pair}/gradient_difference")] for row in records],
        [row[_name(f"{pair}/step_norm")] for row in records],
        start=start,
        end=end,
        drop_outliers=drop_outliers,
    )


def _series(kind: str, points: SmoothnessPoints, fit: SmoothnessFit | None) -> SmoothnessSeries:
    label = f"{kind.replace('_', ' ')}: "
    if fit is None:
        return SmoothnessSeries(f"{label}too few for a fit", *points)
    label += f"$R^2$ = {fit.r2:.3f}, {100 * fit.share_above:.0f} % above"
    if fit.rho != 2:
        label += f", power {fit.rho:.3g}"
    return SmoothnessSeries(label, *points, curve=fit.curve)


def _fields(fit: SmoothnessFit | None) -> dict[str, float | None] | None:
    if fit is None:
        return None
    # JSON has no NaN.
    return {name: value if math.isfinite(value) else None for name, value in fit._asdict().items()}
