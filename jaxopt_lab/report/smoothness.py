"""The figure of local smoothness against the gap to a target loss."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jaxopt_lab.report.figures import save_figure

# Both stand out from the colours of the points.
_CURVES = ("#D55E00", "#000000")
_MARKERS = ("o", "^")
# Ratios that span more than this are drawn on a logarithmic axis, and labels at 1, 2 and 5 are too
# many above the other.
_LARGEST_LINEAR_SPAN, _LARGEST_LABELLED_SPAN = 10.0, 100.0


@dataclass(frozen=True)
class SmoothnessSeries:
    """Points of one kind of steps in one pair of norms.

    Args:
      label: Name in the legend; empty for none.
      step: Steps at which the points were taken, shape (n,); they give the colours.
      gap: Gaps to the target, shape (n,).
      ratio: Gradient difference over step norm, shape (n,), positive.
      curve: From gaps to fitted ratios; None draws no curve.
    """

    label: str
    step: ArrayLike
    gap: ArrayLike
    ratio: ArrayLike
    curve: Callable[[np.ndarray], np.ndarray] | None = None


def smoothness_figure(
    panels: Mapping[str, Sequence[SmoothnessSeries]],
    out_path: str | os.PathLike[str],
    *,
    target_loss: float | Mapping[str, float],
    title: str | None = None,
) -> Path:
    """Draws ratios against gaps, one panel a pair of norms, and saves the figure.

    Points are coloured by training step, on a scale that the panels share. A panel whose ratios
    span more than a factor of ten has a logarithmic vertical axis. Curves are drawn over the range
    of their gaps and cut off where they leave that of the ratios.

    Args:
      panels: Title and series of every panel, at most two series in each.
      out_path: File to write; the suffix (png, svg, pdf) decides the format.
      target_loss: What gaps are measured from, nats per token; one, or one for each panel.
      title: Text above the panels.

    Returns:
      The path written.

    Raises:
      ValueError: If there is no point at all.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    every_step = [np.asarray(s.step, np.float64) for series in panels.values() for s in series]
    steps = np.concatenate([np.zeros(0), *every_step])
    if not steps.size:
        raise ValueError("panels: none of them has a point")
    figure = Figure(figsize=(3.6 * len(panels) + 0.9, 3.8), dpi=150, layout="constrained")
    colors = ScalarMappable(Normalize(steps.min(), steps.max()), cmap="viridis")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (name, series) in zip(all_axes, panels.items(), strict=True):
        _draw(axes, series, colors)
        axes.set_title(name, fontsize=10)
        target = target_loss[name] if isinstance(target_loss, Mapping) else target_loss
        axes.set_xlabel(f"loss after the step \N{MINUS SIGN} {target:.3g} [nats/token]")
    all_axes[0].set_ylabel("gradient difference / step norm")
    figure.colorbar(colors, ax=all_axes, label="optimizer step", pad=0.01, aspect=30)
    if title is not None:
        figure.suptitle(title, fontsize=11)
    return save_figure(figure, out_path)


def _draw(axes: Any, series: Sequence[SmoothnessSeries], colors: Any) -> None:
    from matplotlib.lines import Line2D

    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    ratios = np.concatenate([np.zeros(0), *(np.asarray(s.ratio, np.float64) for s in series)])
    if not ratios.size:
        axes.text(0.5, 0.5, "no points", transform=axes.transAxes, ha="center", color="0.45")
        return
    legend = []
    for one, marker, color in zip(series, _MARKERS, _CURVES, strict=False):
        gap = np.asarray(one.gap, np.float64)
        axes.scatter(
            gap, one.ratio, c=one.step, cmap=colors.cmap, norm=colors.norm, marker=marker, s=16,
            alpha=0.8, linewidth=0, zorder=2,
        )  # fmt: skip
        style: dict[str, Any] = {"color": color, "linestyle": "none"}
        if one.curve is not None:
            style["linestyle"] = "-"
            at = np.linspace(gap.min(), gap.max(), 200)
            axes.plot(at, one.curve(at), color=color, linewidth=1.8, zorder=3)
        legend.append(Line2D([], [], marker=marker, markersize=4, label=one.label, **style))
    _scale(axes, ratios)
    if any(one.label for one in series):
        # Below the axes, where it covers no point.
        axes.legend(
            handles=legend, frameon=False, fontsize=8, loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
        )  # fmt: skip


def _scale(axes: Any, ratios: np.ndarray) -> None:
    """The range of the ratios, whatever the curves do, and readable numbers."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    low, high = float(ratios.min()), float(ratios.max())
    if high <= _LARGEST_LINEAR_SPAN * low:
        margin = 0.05 * (high - low) or 0.05 * high
        axes.set_ylim(low - margin, high + margin)
        axes.ticklabel_format(axis="y", scilimits=(-2, 4), useMathText=True)
        return
    axes.set_yscale("log")
    margin = (high / low) ** 0.05
    axes.set_ylim(low / margin, high * margin)
    axes.yaxis.set_minor_formatter(NullFormatter())
    if high <= _LARGEST_LABELLED_SPAN * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
