"""Where methods ended and what that cost: one point a method."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxopt_lab.report.figures import PALETTE, save_figure


class Method(NamedTuple):
    """What became of one method.

    Args:
      label: Written beside the point.
      cost: Of a whole run.
      losses: Final losses of its seeds; their mean is drawn with two standard errors.
    """

    label: str
    cost: float
    losses: ArrayLike


def points_figure(
    methods: Sequence[Method],
    out_path: str | os.PathLike[str],
    *,
    x_label: str,
    y_label: str,
    title: str | None = None,
    log_x: bool = False,
) -> Path:
    """Draws final losses over costs; the best methods are at the lower left.

    Args:
      methods: At least one; labels of points that lie at the same height are moved apart.
      out_path: File to write; the suffix (png, svg, pdf) decides the format.
      x_label: What the cost is, with its unit.
      y_label: What the loss is, with its unit.
      title: Text above the axes.
      log_x: Logarithmic axis of costs.

    Returns:
      The path written.

    Raises:
      ValueError: No method, or one without two seeds.
    """
    from matplotlib.figure import Figure

    if not methods:
        raise ValueError("methods: empty, there is nothing to draw")
    figure = Figure(figsize=(7, 4.2), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    axes.set_xscale("log" if log_x else "linear")
    ends = []
    for index, method in enumerate(methods):
        losses = np.asarray(method.losses, np.float64)
        if len(losses) < 2:
            raise ValueError(f"{method.label}: got {len(losses)} losses, wanted two seeds or more")
        mean, error = losses.mean(), losses.std(ddof=1) / np.sqrt(len(losses))
        color = PALETTE[index % len(PALETTE)]
        axes.errorbar(method.cost, mean, yerr=2 * error, marker="o", capsize=3, color=color)
        ends.append((mean, method, color))
    axes.set(xlabel=x_label, ylabel=y_label)
    if title is not None:
        axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.margins(x=0.2)
    low, high = axes.get_ylim()
    beside: list[tuple[float, float]] = []
    for mean, method, color in sorted(ends, key=lambda end: end[0]):
        place = axes.transData.transform((method.cost, mean))
        # A neighbour's label within reach pushes this one up by a line.
        lift = max((y + 0.042 for x, y in beside if abs(x - place[0]) < 150), default=-np.inf)
        height = max((mean - low) / (high - low), lift)
        beside.append((place[0], height))
        axes.annotate(
            method.label, (method.cost, low + height * (high - low)), (8, 0), color=color,
            textcoords="offset points", va="center", fontsize=9,
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5},
        )  # fmt: skip
    return save_figure(figure, out_path)
