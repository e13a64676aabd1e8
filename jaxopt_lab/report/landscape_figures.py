"""Figures of SGD in a fluctuating landscape: theory drawn over simulation.

Plain arrays come in and a file goes out; what the arrays mean is settled by the caller.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jaxopt_lab.report.figures import PALETTE, save_figure

# The same colour for a regime in every figure.
REGIME_COLORS = {
    "confined": PALETTE[0],
    "transitional": PALETTE[4],
    "diffusive": PALETTE[2],
    "unstable": PALETTE[1],
}


def variance_figure(
    measured: ArrayLike,
    predicted: ArrayLike,
    out_path: str | os.PathLike[str],
    *,
    regimes: Sequence[str],
    comparison: ArrayLike | None = None,
    predicted_label: str = "finite-time prediction",
    comparison_label: str = "stationary proxy",
    title: str | None = None,
) -> Path:
    """Draws measured against predicted variances, one point a direction, with the identity.

    Directions without noise have a variance of zero, which has no place on a logarithmic axis: they
    are left out and counted below the points.

    Args:
      measured: Variance over replicas, shape (D,).
      predicted: What it is compared with, shape (D,).
      out_path: File to write; the suffix (png, svg, pdf) decides the format.
      regimes: Regime of every direction, which decides its colour, D of them.
      comparison: A second prediction, shape (D,), drawn faintly behind.
      predicted_label: Name of the prediction, for the horizontal axis.
      comparison_label: Name of the second one.
      title: Text above the axes.

    Returns:
      The path written.

    Raises:
      ValueError: If the arrays differ in length or no direction has a positive variance.
    """
    measured, predicted = _row("measured", measured), _row("predicted", predicted)
    names = np.asarray(regimes)
    size = len(measured)
    _same_length(size, predicted=predicted, regimes=names)
    visible = (measured > 0) & (predicted > 0)
    if not visible.any():
        raise ValueError("measured: no direction has both a measured and a predicted variance")
    figure, axes = _axes(5.6, 5.2)
    if comparison is not None:
        other = _row("comparison", comparison)
        _same_length(size, comparison=other)
        seen = (measured > 0) & (other > 0)
        axes.scatter(
            other[seen], measured[seen], s=10, color="0.6", alpha=0.45, linewidth=0, zorder=1,
            label=comparison_label,
        )  # fmt: skip
    for name, color in REGIME_COLORS.items():
        chosen = visible & (names == name)
        if chosen.any():
            axes.scatter(
                predicted[chosen], measured[chosen], s=16, color=color, alpha=0.8, linewidth=0,
                zorder=3, label=f"{name} ({chosen.sum()})",
            )  # fmt: skip
    axes.set(xscale="log", yscale="log", title=title)
    low = min(predicted[visible].min(), measured[visible].min())
    high = max(predicted[visible].max(), measured[visible].max())
    axes.plot([low, high], [low, high], color="black", linewidth=1, zorder=2, label="equal")
    axes.set(xlabel=f"variance, {predicted_label}", ylabel="variance over replicas, measured")
    if hidden := size - int(visible.sum()):
        axes.text(
            0.98, 0.02, f"{hidden} directions without noise left out", fontsize=8, color="0.4",
            ha="right", transform=axes.transAxes,
        )  # fmt: skip
    return _save(figure, axes, out_path)


def spectrum_figure(
    curvature: ArrayLike,
    memory: ArrayLike,
    out_path: str | os.PathLike[str],
    *,
    theory: tuple[ArrayLike, ArrayLike],
    bands: Mapping[str, tuple[float, float]],
    linear_below: float,
    title: str | None = None,
) -> Path:
    r"""Draws variances against curvature, the regimes shaded and the theory over the points.

    The variance is taken in units of one step's noise, eta^2 d: then all directions follow one
    curve, the number of steps that a direction remembers. Flat ones remember all of them.

    Args:
      curvature: Eigenvalue of every direction, shape (D,).
      memory: Measured variance over eta^2 d, shape (D,); values that are not positive or not finite
        (no noise) are left out.
      out_path: File to write; the suffix (png, svg, pdf) decides the format.
      theory: Curvatures and the curve at them, both shape (m,).
      bands: Lowest and highest curvature of every regime by name; infinite ends are allowed, and a
        name may come twice with a number behind it ("transitional 2").
      linear_below: Curvatures below it in size are on a linear scale, larger ones logarithmic.
      title: Text above the axes.

    Returns:
      The path written.

    Raises:
      ValueError: If the arrays differ in length or no direction has noise.
    """
    curvature, memory = _row("curvature", curvature), _row("memory", memory)
    _same_length(len(curvature), memory=memory)
    visible = np.isfinite(memory) & (memory > 0)
    if not visible.any():
        raise ValueError("memory: no direction has a positive finite value")
    figure, axes = _axes(7.5, 4.6)
    axes.scatter(
        curvature[visible], memory[visible], s=12, color=PALETTE[0], alpha=0.7, linewidth=0,
        zorder=3, label="measured",
    )  # fmt: skip
    axes.plot(*theory, color="black", linewidth=1.4, zorder=4, label="theory")
    axes.set_xscale("symlog", linthresh=linear_below, linscale=0.5)
    axes.set(yscale="log", xlabel="curvature", title=title)
    axes.set_ylabel("variance / noise of one step  [steps]")
    margin = 1.6
    largest = max(float(np.abs(curvature).max()), linear_below) * margin
    left = float(curvature.min())
    axes.set_xlim(left * margin if left < -linear_below else -linear_below, largest)
    _thin_symlog_ticks(axes, linear_below)
    _shade(axes, bands)
    return _save(figure, axes, out_path)


def growth_figure(
    steps: ArrayLike,
    measured: ArrayLike,
    out_path: str | os.PathLike[str],
    *,
    theory_steps: ArrayLike,
    theory: ArrayLike,
    labels: Sequence[str],
    regimes: Sequence[str] | None = None,
    relative_error: float | None = None,
    title: str | None = None,
) -> Path:
    """Draws variances of a few directions against the step, theory over simulation.

    Args:
      steps: Steps at which variances were measured, shape (m,).
      measured: Variances over replicas, shape (m, k).
      out_path: File to write; the suffix (png, svg, pdf) decides the format.
      theory_steps: Steps of the curves, shape (t,).
      theory: The curves, shape (t, k).
      labels: Name of every direction, k of them.
      regimes: Regime of every direction, which decides its colour; None takes colours in turn.
      relative_error: Standard error of a measured variance over the variance (with Gaussian
        replicas, the root of 2 / (R - 1)); draws bars of two of them.
      title: Text above the axes.

    Returns:
      The path written.

    Raises:
      ValueError: If the shapes do not fit each other.
    """
    at, theory_at = _row("steps", steps), _row("theory_steps", theory_steps)
    points, curves = np.asarray(measured, np.float64), np.asarray(theory, np.float64)
    for name, array, rows in (("measured", points, at), ("theory", curves, theory_at)):
        if array.shape != (len(rows), len(labels)):
            raise ValueError(
                f"{name}: got shape {array.shape}, expected {(len(rows), len(labels))}: steps and "
                "labels"
            )
    figure, axes = _axes(7.0, 4.8)
    for index, label in enumerate(labels):
        in_turn = PALETTE[index % len(PALETTE)]
        color = in_turn if regimes is None else REGIME_COLORS[regimes[index]]
        y = np.where(points[:, index] > 0, points[:, index], np.nan)
        bars = None if relative_error is None else 2 * relative_error * y
        axes.errorbar(
            at, y, yerr=bars, color=color, linestyle="none", marker="o", markersize=4,
            markerfacecolor="white", elinewidth=0.8, label=label, zorder=3,
        )  # fmt: skip
        curve = np.where(curves[:, index] > 0, curves[:, index], np.nan)
        axes.plot(theory_at, curve, color=color, linewidth=1.4, zorder=2)
    axes.plot([], [], color="0.3", linewidth=1.4, label="theory")
    axes.set(xscale="log", yscale="log", title=title)
    axes.set(xlabel="SGD step", ylabel="variance over replicas")
    return _save(figure, axes, out_path)


def stability_figure(
    learning_rate: ArrayLike,
    sgd_bound: ArrayLike,
    langevin_bound: ArrayLike,
    out_path: str | os.PathLike[str],
    *,
    points: tuple[ArrayLike, ArrayLike, ArrayLike],
    title: str | None = None,
) -> Path:
    """Draws the phase diagram of the second moment: learning rate against curvature variance.

    Between the two bounds the Langevin equation calls stable what SGD is not: shaded.

    Args:
      learning_rate: Rates at which the bounds are given, shape (m,), increasing.
      sgd_bound: Largest curvature variance that SGD stands, shape (m,).
      langevin_bound: The same of the Langevin equation, shape (m,).
      out_path: File to write; the suffix (png, svg, pdf) decides the format.
      points: Rates, curvature variances and whether the variance of the exact recursion grows
        without end, three arrays of shape (p,).
      title: Text above the axes.

    Returns:
      The path written.

    Raises:
      ValueError: If the arrays differ in length.
    """
    rate = _row("learning_rate", learning_rate)
    sgd = np.maximum(_row("sgd_bound", sgd_bound), 0)
    langevin = _row("langevin_bound", langevin_bound)
    _same_length(len(rate), sgd_bound=sgd, langevin_bound=langevin)
    at, variance = (_row("points", part) for part in points[:2])
    grows = np.asarray(points[2], bool)
    _same_length(len(at), curvature_variances=variance, grows=grows)
    figure, axes = _axes(6.6, 4.8)
    axes.fill_between(
        rate, sgd, langevin, color=PALETTE[4], alpha=0.3, linewidth=0,
        label="stable for Langevin, unstable for SGD",
    )  # fmt: skip
    axes.plot(rate, sgd, color=PALETTE[0], linewidth=1.6, label="bound of SGD")
    axes.plot(
        rate, langevin, color=PALETTE[1], linewidth=1.6, linestyle="--", label="bound of Langevin"
    )
    for chosen, marker, label in ((~grows, "o", "stays finite"), (grows, "x", "grows")):
        axes.scatter(
            at[chosen], variance[chosen], marker=marker, s=22, color="black", linewidth=1.2,
            zorder=3, label=f"exact recursion: {label}",
        )  # fmt: skip
    top = 1.15 * max(float(variance.max(initial=0.0)), float(sgd.min()))
    axes.set(xlim=(rate.min(), rate.max()), ylim=(0, top), title=title)
    axes.set(xlabel="learning rate", ylabel="curvature variance")
    _finish(axes)
    # Below the axes, where it covers no point.
    axes.get_legend().remove()
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return save_figure(figure, out_path)


def intervention_figure(
    ratios: Mapping[str, Mapping[str, float]],
    out_path: str | os.PathLike[str],
    *,
    expected: Mapping[str, float],
    alpha: tuple[ArrayLike, ArrayLike],
    title: str | None = None,
) -> Path:
    """Draws what interventions on the noise do to variances, as ratios to untouched SGD.

    Left the noise inside a subspace is scaled and the variance inside it measured; right all of it
    is scaled by alpha, with the square law of a quadratic loss as a line.

    Args:
      ratios: By intervention ("suppressed", say), by kind of directions: the variance ratio.
      out_path: File to write; the suffix (png, svg, pdf) decides the format.
      expected: Ratio on a quadratic loss, by intervention.
      alpha: Values of alpha and the ratios of total variance, both shape (m,).
      title: Text above the panels.

    Returns:
      The path written.

    Raises:
      ValueError: If there is no ratio.
    """
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(kind for by_kind in ratios.values() for kind in by_kind))
    if not kinds:
        raise ValueError("ratios: empty, there is nothing to draw")
    figure = Figure(figsize=(9.0, 4.0), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_ratios(left, ratios, kinds, expected)
    at, values = (_row("alpha", part) for part in alpha)
    line = np.linspace(0, max(float(at.max()), 1.0), 100)
    right.plot(line, line**2, color="black", linewidth=1.2, label="square law", zorder=2)
    right.plot(
        at, values, color=PALETTE[0], marker="o", markersize=5, markerfacecolor="white",
        linestyle="none", label="measured", zorder=3,
    )  # fmt: skip
    right.set(xlabel="alpha, share of the noise", ylabel="variance / that of SGD")
    for axes in (left, right):
        _finish(axes)
    if title is not None:
        figure.suptitle(title, fontsize=11)
    return save_figure(figure, out_path)


def _draw_ratios(
    axes: Any,
    ratios: Mapping[str, Mapping[str, float]],
    kinds: Sequence[str],
    expected: Mapping[str, float],
) -> None:
    """Bars from 1; a suppression to rounding level is cut off and its value written."""
    floor = 1e-4
    width = 0.8 / len(ratios)
    axes.set_yscale("log")
    for index, (name, by_kind) in enumerate(ratios.items()):
        color = PALETTE[index % len(PALETTE)]
        for kind, ratio in by_kind.items():
            x = kinds.index(kind) + (index - (len(ratios) - 1) / 2) * width
            shown = max(ratio, floor)
            axes.bar(
                x, shown - 1, width, bottom=1, color=color, alpha=0.8, zorder=2,
                label=name if kind == next(iter(by_kind)) else None,
            )  # fmt: skip
            axes.annotate(
                f"{ratio:.2g}", (x, shown), (0, 3 if shown > 1 else -3), ha="center", fontsize=8,
                textcoords="offset points", va="bottom" if shown > 1 else "top",
            )  # fmt: skip
        if expected.get(name, 0.0) > 0:
            axes.axhline(expected[name], color=color, linewidth=1, linestyle="--", zorder=1)
    axes.axhline(1, color="0.3", linewidth=1)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set(ylim=(floor / 3, 300), ylabel="variance inside / that of SGD")
    axes.set_xlabel("directions on which the noise is changed")


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, figure.add_subplot()


def _shade(axes: Any, bands: Mapping[str, tuple[float, float]]) -> None:
    left, right = axes.get_xlim()
    labelled: set[str] = set()
    for name, (low, high) in bands.items():
        low, high = max(low, left), min(high, right)
        if low >= high:
            continue
        regime = name.split()[0]
        axes.axvspan(
            low, high, color=REGIME_COLORS[regime], alpha=0.13, linewidth=0, zorder=0,
            label=None if regime in labelled else regime,
        )  # fmt: skip
        labelled.add(regime)


def _thin_symlog_ticks(axes: Any, linear_below: float) -> None:
    """Zero and decades outside the linear range, few enough that numbers do not touch."""
    left, right = axes.get_xlim()
    decades = [t for t in axes.get_xticks() if left <= t <= right and abs(t) > linear_below]
    stride = max(1, -(-len(decades) // 8))
    kept = [t for t in decades if t > 0][::-1][::stride]
    axes.set_xticks([0.0, *(t for t in decades if abs(t) in kept)])


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def _save(figure: Any, axes: Any, out_path: str | os.PathLike[str]) -> Path:
    _finish(axes)
    return save_figure(figure, out_path)


def _row(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1:
        raise ValueError(f"{name}: got shape {array.shape}, expected one axis")
    return array


def _same_length(size: int, **arrays: np.ndarray) -> None:
    for name, array in arrays.items():
        if len(array) != size:
            raise ValueError(f"{name}: {len(array)} values, expected {size}")
