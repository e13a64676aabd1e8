"""Figures from run directories.

Figures are built through matplotlib's object interface: no global state, no display needed, and
several can be drawn in one process.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jaxopt_lab.report.files import appearing_whole
from jaxopt_lab.report.storage import is_remote, path_of
from jaxopt_lab.report.tracker import read_metrics

# Okabe and Ito's palette, told apart with any colour vision; its yellow is too faint on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINE_STYLES = ("-", "--", ":", "-.")

X_LABELS = {
    "step": "optimizer step",
    "tokens": "training tokens",
    "time": "time [min]",
    "forward_passes": "forward passes",
    "optimizer_flops": "optimizer FLOPs",
}


@dataclass(frozen=True)
class Curve:
    """One line of a figure.

    Args:
      label: Name in the legend.
      x: Positions, shape (n,).
      y: Values, shape (n,); non-finite ones leave a gap.
      low: Lower edge of a band around the line (spread over seeds, say), shape (n,).
      high: Upper edge of the band, shape (n,).
      markers: Mark the points (for few, separately measured ones).
      faint: Draw thin and pale, without a legend entry or final value: raw data behind a line.
      final_value: Write the last value at the right edge of the figure.
      color: Index into the palette; None takes the next.
    """

    label: str
    x: ArrayLike
    y: ArrayLike
    low: ArrayLike | None = None
    high: ArrayLike | None = None
    markers: bool = False
    faint: bool = False
    final_value: bool = True
    color: int | None = None


def curves_figure(
    curves: Sequence[Curve],
    out_path: str | os.PathLike[str],
    *,
    x_label: str,
    y_label: str,
    title: str | None = None,
    log_x: bool = False,
    log_y: bool = False,
    levels: Mapping[str, float] | None = None,
) -> Path:
    """Draws curves into one pair of axes and saves the figure.

    Args:
      curves: What to draw, in the order of the legend.
      out_path: File to write; the suffix (png, svg, pdf) decides the format.
      x_label: What the horizontal axis counts, with its unit.
      y_label: What the vertical axis measures, with its unit.
      title: Text above the axes.
      log_x: Logarithmic horizontal axis.
      log_y: Logarithmic vertical axis.
      levels: Named horizontal lines to compare with.

    Returns:
      The path written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(7.5, 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    ends = []
    for index, curve in enumerate(curves):
        color_index = index if curve.color is None else curve.color
        end = _draw(axes, curve, color_index)
        if curve.final_value and not curve.faint and end is not None:
            ends.append((end, PALETTE[color_index % len(PALETTE)]))
    for name, value in (levels or {}).items():
        axes.axhline(
            value, color="0.45", linewidth=1, linestyle=(0, (6, 3)), zorder=1,
            label=f"{name} {value:.3f}",
        )  # fmt: skip
    axes.set_xscale("log" if log_x else "linear")
    axes.set_yscale("log" if log_y else "linear")
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    if not log_x and axes.get_xlim()[1] >= 1e5:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 250k, 1.5M
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8)
    _write_final_values(axes, ends)
    return save_figure(figure, out_path)


def save_figure(figure: Any, out_path: str | os.PathLike[str]) -> Path:
    """Writes a figure of matplotlib; a killed process leaves the one that was there before."""
    path = path_of(out_path)
    if not is_remote(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with appearing_whole(path) as partial:
        figure.savefig(partial)
    return path


def loss_figure(
    run_dirs: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    out_path: str | os.PathLike[str],
    *,
    x: str = "step",
    labels: Sequence[str] | None = None,
    train_key: str = "loss",
    held_out_key: str = "validation_loss",
    levels: Mapping[str, float] | None = None,
    title: str | None = None,
) -> Path:
    """Draws the losses of one or several runs: training as lines, held-out as markers.

    The training loss of single batches is drawn faintly, with a centred moving average over a
    fiftieth of the run above it.

    Args:
      run_dirs: One run directory, or several to compare.
      out_path: File to write; the suffix (png, svg, pdf) decides the format.
      x: Horizontal axis: "step", "tokens", "time", "forward_passes" or "optimizer_flops". All
        but "step" are read from the metric of that name.
      labels: Names of the runs; the directories' names by default.
      train_key: Metric of the training loss, in nats/token.
      held_out_key: Metric of the held-out loss, in nats/token.
      levels: Named losses to compare with, drawn as horizontal lines.
      title: Text above the axes.

    Returns:
      The path written.

    Raises:
      ValueError: If a run has no metrics, or none with both the loss and the horizontal axis.
    """
    if x not in X_LABELS:
        raise ValueError(f"x: {x!r} is not one of {', '.join(X_LABELS)}")
    if isinstance(run_dirs, str | os.PathLike):
        run_dirs = [run_dirs]
    labels = _run_names(run_dirs) if labels is None else labels
    curves = []
    for color, (run_dir, label) in enumerate(zip(run_dirs, labels, strict=True)):
        rows = read_metrics(run_dir)
        steps, losses = _column(rows, x, train_key, run_dir)
        window = max(1, len(losses) // 50)
        alone = len(run_dirs) == 1
        prefix = "" if alone else f"{label}: "
        evaluated = any(held_out_key in row for row in rows)
        curves += [
            Curve("", steps, losses, faint=True, color=color),
            # In a comparison the held-out losses are the result; more numbers would crowd them.
            Curve(
                f"{prefix}training", steps, moving_average(losses, window), color=color,
                final_value=alone or not evaluated,
            ),
        ]  # fmt: skip
        if evaluated:
            at, held_out = _column(rows, x, held_out_key, run_dir)
            # One run has the colours to itself; in a comparison a run keeps its colour.
            own = color + 1 if alone else color
            curves.append(Curve(f"{prefix}held-out", at, held_out, markers=True, color=own))
    return curves_figure(
        curves, out_path, x_label=X_LABELS[x], y_label="loss [nats/token]", title=title,
        levels=levels,
    )  # fmt: skip


def moving_average(values: ArrayLike, window: int) -> np.ndarray:
    """Centred moving average; shorter windows at the ends, non-finite values left out.

    >>> moving_average([1.0, 2.0, 6.0], 3).tolist()
    [1.5, 3.0, 4.0]
    """
    values = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(values)
    before, after = (window - 1) // 2, window // 2
    start = np.maximum(np.arange(len(values)) - before, 0)
    stop = np.minimum(np.arange(len(values)) + after + 1, len(values))
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite)])
    with np.errstate(invalid="ignore"):
        return (total[stop] - total[start]) / (count[stop] - count[start])


def _draw(axes: Any, curve: Curve, color_index: int) -> float | None:
    """Draws one curve; returns its last finite value."""
    x, y = np.asarray(curve.x, dtype=np.float64), np.asarray(curve.y, dtype=np.float64)
    color = PALETTE[color_index % len(PALETTE)]
    style = _LINE_STYLES[color_index // len(PALETTE) % len(_LINE_STYLES)]
    if curve.faint:
        axes.plot(x, y, color=color, linewidth=0.6, alpha=0.25, zorder=1)
    elif curve.markers:
        axes.plot(
            x, y, color=color, linestyle=style, linewidth=0.8, marker="o", markersize=4.5,
            markerfacecolor="white", label=curve.label, zorder=3,
        )  # fmt: skip
    else:
        axes.plot(x, y, color=color, linestyle=style, linewidth=1.6, label=curve.label, zorder=2)
    if curve.low is not None and curve.high is not None:
        axes.fill_between(x, curve.low, curve.high, color=color, alpha=0.15, linewidth=0, zorder=1)
    finite = y[np.isfinite(y)]
    return float(finite[-1]) if len(finite) else None


def _write_final_values(axes: Any, ends: Sequence[tuple[float, str]]) -> None:
    """Writes the last values at the right edge, moved apart where they would overlap."""
    line_height = 0.038
    scale = axes.yaxis.get_transform().transform
    bottom, top = scale(np.asarray(axes.get_ylim()))
    placed = -np.inf
    for value, color in sorted(ends):
        height = max((float(scale(value)) - bottom) / (top - bottom), placed + line_height)
        axes.text(
            1.01, height, f"{value:.3f}", color=color, fontsize=8, va="center",
            transform=axes.transAxes,
        )  # fmt: skip
        placed = height


def _column(
    rows: Sequence[Mapping[str, Any]], x: str, y: str, run_dir: str | os.PathLike[str]
) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(row[x], row[y]) for row in rows if x in row and y in row]
    if not pairs:
        known = sorted({name for row in rows for name in row})
        raise ValueError(f"{run_dir}: no row has both {x!r} and {y!r}; metrics found: {known}")
    at, values = np.asarray(pairs, dtype=np.float64).T
    return (at / 60 if x == "time" else at), values


def _run_names(run_dirs: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The directories' own names, or the whole paths where those are not distinct."""
    paths = [path_of(run_dir) for run_dir in run_dirs]
    names = [path.name if is_remote(path) else path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(run_dir) for run_dir in run_dirs]
