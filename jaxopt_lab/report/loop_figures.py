"""Figures of repeated learning: statistics of the residuals with theory drawn over simulation."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxopt_lab.report.figures import PALETTE, save_figure

_THEORY = dict(color="0.25", linewidth=1.2, linestyle=(0, (5, 2)), zorder=3)
# Below this a logarithmic axis shows rounding errors.
_SMALLEST = 1e-12
# As a default, the same place brings a warning wherever finding it takes more than a second.
_LEGEND = dict(loc="best", frameon=False, fontsize=8)

Bands = Float[np.ndarray, "3 records"]


@dataclass(frozen=True)
class LoopSeries:
    """What one loop did over its records; bands are rows of means, lower and upper ends.

    Args:
      label: Title of its own figure.
      name: In the legend of a figure of several loops.
      step: Steps of the records, shape (n,).
      deviation: Standard deviation of the residuals, shape (3, n).
      density: f_t(0), shape (3, n).
      mass: For each κ (as text) the mass in [-κ, κ], shape (3, n).
      normality: p-value of the normality test, a middle and the ends of a range, shape (3, n).
      moments: For each name a curve of ln(1 + |moment|), shape (n,).
      fits: For each name a fitted ln f_t(0), shape (n,).
      theory_deviation: Mean-field deviation, shape (n,); None draws none.
      theory_density: Mean-field f_t(0), shape (n,); None draws none.
      theory_mass: For each κ of `mass` the mean-field mass, shape (n,); may be empty.
    """

    label: str
    name: str
    step: np.ndarray
    deviation: Bands
    density: Bands
    mass: Mapping[str, Bands]
    normality: Bands
    moments: Mapping[str, np.ndarray]
    fits: Mapping[str, np.ndarray]
    theory_deviation: np.ndarray | None = None
    theory_density: np.ndarray | None = None
    theory_mass: Mapping[str, np.ndarray] = field(default_factory=dict)


def loop_figure(series: LoopSeries, out_path: str | os.PathLike[str]) -> Path:
    """The six views of one loop: deviation, f_t(0), masses, moments, normality, autonomy.

    Args:
      series: The loop.
      out_path: File to write; the suffix (png, svg, pdf) decides the format.

    Returns:
      The path written.
    """
    figure, panels = _figure(2, 3, (12.0, 6.6))
    views = (_deviation, _density, _mass, _moments, _normality, _autonomy)
    for axes, view in zip(panels.flat, views, strict=True):
        view(axes, series)
        axes.set_xlabel("step")
    figure.suptitle(series.label, fontsize=11)
    return save_figure(figure, out_path)


def comparison_figure(
    loops: Sequence[LoopSeries], out_path: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """Deviations of several loops, relative to their starts, with theory over simulation.

    Args:
      loops: At most seven.
      out_path: File to write.
      title: Text above the axes.

    Returns:
      The path written.
    """
    figure, panels = _figure(1, 1, (7.5, 4.6))
    axes = panels[0, 0]
    for number, series in enumerate(loops):
        start = series.deviation[0, 0]
        _band(axes, series.step, series.deviation / start, number, series.name)
        if series.theory_deviation is not None:
            label = "mean-field theory" if number == 0 else None
            theory = _positive(series.theory_deviation / series.theory_deviation[0])
            axes.plot(series.step, theory, label=label, **_THEORY)
    _limit_decades(axes, [s.deviation / s.deviation[0, 0] for s in loops])
    axes.set(xlabel="step", ylabel="std of residuals / its start", title=title)
    axes.legend(**_LEGEND)
    return save_figure(figure, out_path)


def surface_figure(
    surfaces: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    out_path: str | os.PathLike[str],
    *,
    critical: Mapping[str, float],
    title: str | None = None,
    columns: int = 2,
) -> Path:
    """Heat maps of the deviation at the end over usage and adherence, with the critical line.

    The colours are those of the logarithm of the deviation over its start, white where nothing
    changed; the level line of no change is drawn, and the critical adherence of theory over it.

    Args:
      surfaces: For each title usages (P,), adherences (S,) and end over start (S, P).
      out_path: File to write.
      critical: For each title the adherence at which theory sees no change.
      title: Text above the figure.
      columns: Panels side by side.

    Returns:
      The path written.
    """
    columns = min(columns, len(surfaces))
    rows = -(-len(surfaces) // columns)
    figure, panels = _figure(rows, columns, (5.2 * columns, 4.2 * rows))
    for axes, (name, (usage, adherence, ratio)) in zip(panels.flat, surfaces.items(), strict=False):
        logarithm = np.log(ratio)
        largest = float(np.max(np.abs(logarithm)))
        image = axes.pcolormesh(
            usage, adherence, logarithm, cmap="RdBu_r", vmin=-largest, vmax=largest,
            shading="nearest",
        )  # fmt: skip
        if logarithm.min() < 0 < logarithm.max():
            axes.contour(usage, adherence, logarithm, levels=[0.0], colors="0.1", linewidths=1.2)
        axes.axhline(critical[name], **_THEORY)
        axes.annotate(
            f"theory: s* = {critical[name]:.3f}", (usage[len(usage) // 2], critical[name]),
            xytext=(0, 4), textcoords="offset points", ha="center", fontsize=8,
        )  # fmt: skip
        axes.set(xlabel="usage p", ylabel="adherence s")
        axes.set_title(name, fontsize=10)
        axes.grid(visible=False)
        figure.colorbar(image, ax=axes, label="ln(std at the end / at the start)")
    figure.suptitle(title)
    return save_figure(figure, out_path)


@dataclass(frozen=True)
class CriticalLaw:
    """Growth of the residual scale around the critical adherence.

    Args:
      title: Of the panel.
      adherence: s, shape (n,).
      growth: ln(end / start) for each usage (as text), shape (3, n): mean, low, high.
      theory: The same from mean-field theory, shape (n,).
      critical: s* of theory.
    """

    title: str
    adherence: np.ndarray
    growth: Mapping[str, Bands]
    theory: Mapping[str, np.ndarray]
    critical: float


def critical_law_figure(
    laws: Sequence[CriticalLaw],
    out_path: str | os.PathLike[str],
    *,
    y_label: str = "ln(scale at the end / start)",
    columns: int = 2,
) -> Path:
    """Measured growth against adherence with theory: the sign changes at s*, whatever the usage.

    Args:
      laws: One panel each.
      out_path: File to write.
      y_label: What the growth is.
      columns: Panels side by side.

    Returns:
      The path written.
    """
    rows = -(-len(laws) // columns)
    figure, panels = _figure(rows, columns, (5.2 * columns, 3.7 * rows))
    for axes, law in zip(panels.flat, laws, strict=False):
        for number, (name, growth) in enumerate(law.growth.items()):
            mean, low, high = growth
            color = PALETTE[number % len(PALETTE)]
            axes.errorbar(
                law.adherence, mean, yerr=[mean - low, high - mean], fmt="o", markersize=3.5,
                linewidth=1, color=color, label=f"p = {name}",
            )  # fmt: skip
            axes.plot(
                law.adherence, law.theory[name], color=color, linewidth=1, linestyle="--",
                label=f"mean field, p = {name}",
            )  # fmt: skip
        axes.axhline(0.0, color="0.6", linewidth=0.8)
        axes.axvline(law.critical, label=f"s* = {law.critical:.4f}", **_THEORY)
        axes.set(xlabel="adherence s", ylabel=y_label)
        axes.set_title(law.title, fontsize=10)
        axes.legend(**_LEGEND)
    # The same axis in all panels, so that slopes can be compared.
    limits = np.array([axes.get_ylim() for axes in panels.flat[: len(laws)]])
    for axes in panels.flat:
        axes.set_ylim(limits[:, 0].min(), limits[:, 1].max())
    return save_figure(figure, out_path)


def _deviation(axes: Any, series: LoopSeries) -> None:
    _band(axes, series.step, series.deviation, 0, "simulation")
    if series.theory_deviation is not None:
        axes.plot(series.step, _positive(series.theory_deviation), label="mean field", **_THEORY)
    _limit_decades(axes, [series.deviation])
    axes.set(ylabel="std of residuals")
    axes.legend(**_LEGEND)


def _density(axes: Any, series: LoopSeries) -> None:
    _band(axes, series.step, series.density, 0, "simulation")
    if series.theory_density is not None:
        axes.plot(series.step, _positive(series.theory_density), label="mean field", **_THEORY)
    _limit_decades(axes, [series.density[:1]])
    axes.set(ylabel="$f_t(0)$")
    axes.legend(**_LEGEND)


def _mass(axes: Any, series: LoopSeries) -> None:
    for number, (kappa, mass) in enumerate(series.mass.items()):
        _band(axes, series.step, mass, number, rf"$\kappa$ = {kappa}")
        if kappa in series.theory_mass:
            label = "mean field" if number == 0 else None
            axes.plot(series.step, series.theory_mass[kappa], label=label, **_THEORY)
    axes.set(ylabel=r"mass in $[-\kappa, \kappa]$", ylim=(-0.02, 1.02))
    axes.legend(**_LEGEND)


def _moments(axes: Any, series: LoopSeries) -> None:
    for number, (name, values) in enumerate(series.moments.items()):
        color = PALETTE[number % len(PALETTE)]
        axes.plot(series.step, values, color=color, linewidth=1.2, label=name)
    axes.set(ylabel="ln(1 + |moment|)")
    axes.legend(**_LEGEND)


def _normality(axes: Any, series: LoopSeries) -> None:
    _band(axes, series.step, series.normality, 0, "median, middle half of the seeds")
    axes.axhline(0.05, color="0.45", linewidth=1, linestyle=":", label="0.05")
    axes.set(ylabel="normality p-value", ylim=(-0.02, 1.02))
    axes.legend(**_LEGEND)


def _autonomy(axes: Any, series: LoopSeries) -> None:
    density = series.density[0]
    value = np.log(np.where(density > 0, density, np.nan))
    axes.plot(series.step, value, color=PALETTE[0], linewidth=0.8, label="ln of the mean $f_t(0)$")
    for number, (name, fitted) in enumerate(series.fits.items(), start=1):
        axes.plot(series.step, fitted, color=PALETTE[number], linewidth=1.4, label=name)
    axes.set(ylabel="$\\ln f_t(0)$")
    axes.legend(**_LEGEND)


def _band(axes: Any, step: np.ndarray, band: np.ndarray, number: int, label: str) -> None:
    color = PALETTE[number % len(PALETTE)]
    mean, low, high = band
    axes.plot(step, mean, color=color, linewidth=1.3, label=label)
    axes.fill_between(step, low, high, color=color, alpha=0.2, linewidth=0)


def _limit_decades(axes: Any, bands: Sequence[np.ndarray]) -> None:
    """A logarithmic axis over the data; theory may go to zero, which has no place on it."""
    values = np.concatenate([np.ravel(band) for band in bands])
    values = values[np.isfinite(values) & (values > _SMALLEST)]
    if values.size:
        axes.set_yscale("log")
        axes.set_ylim(values.min() / 1.5, values.max() * 1.5)


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(values > _SMALLEST, values, np.nan)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=130, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels
