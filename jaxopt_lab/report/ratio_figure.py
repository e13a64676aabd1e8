"""Measured over predicted variances against curvature, beside the error of sampling."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from jaxopt_lab.report.figures import PALETTE, save_figure


@dataclass(frozen=True)
class RatioPanel:
    """One ensemble.

    Args:
      title: Text above the panel.
      curvature: Of every direction, shape (D,); its size is drawn.
      ratios: Measured over predicted by name of the prediction, each of shape (D,). Values that are
        not positive have no place on a logarithmic axis and are left out.
      relative_error: Standard error of a measured variance over the variance; with R Gaussian
        replicas the root of 2 / (R - 1).
    """

    title: str
    curvature: ArrayLike
    ratios: Mapping[str, ArrayLike] = field(default_factory=dict)
    relative_error: float = 0.0


def ratio_figure(
    panels: Sequence[RatioPanel], out_path: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """Draws one panel an ensemble, all with the same axes; two standard errors around 1 are shaded.

    Where a prediction holds, 19 of 20 points lie in the band. A diagram of measured against
    predicted variance shows that badly: they span decades, and a factor of two is a hair there.

    Args:
      panels: The ensembles, at least one.
      out_path: File to write; the suffix (png, svg, pdf) decides the format.
      title: Text above all panels.

    Returns:
      The path written.

    Raises:
      ValueError: No panel, or ratios of another length than the curvatures.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    if not panels:
        raise ValueError("panels: empty, there is nothing to draw")
    figure = Figure(figsize=(3.0 + 2.4 * len(panels), 4.0), dpi=150, layout="constrained")
    row = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axes, panel in zip(row, panels, strict=True):
        size = np.abs(np.asarray(panel.curvature, np.float64))
        band = np.exp([-2 * panel.relative_error, 2 * panel.relative_error])
        axes.axhspan(*band, color="0.8", linewidth=0, zorder=1, label="2 errors of sampling")
        axes.axhline(1, color="black", linewidth=1, zorder=2)
        for index, (name, values) in enumerate(panel.ratios.items()):
            ratio = np.asarray(values, np.float64)
            if ratio.shape != size.shape:
                raise ValueError(f"ratios[{name!r}]: got shape {ratio.shape}, wanted {size.shape}")
            seen = (ratio > 0) & (size > 0)
            axes.scatter(
                size[seen], ratio[seen], s=9, color=PALETTE[index], alpha=0.7, linewidth=0,
                zorder=4 - index / 10, label=name,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="curvature, absolute value")
        axes.set_title(panel.title, fontsize=10)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    low, high = row[0].get_ylim()
    subs = (1, 2, 5) if high / low < 1e3 else (1,)
    row[0].yaxis.set_major_locator(LogLocator(subs=subs))
    row[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    row[0].minorticks_off()
    row[0].set_ylabel("variance, measured / predicted")
    row[0].legend(frameon=False, fontsize=8)
    if title is not None:
        figure.suptitle(title, fontsize=11)
    return save_figure(figure, out_path)
