"""The two figures of all optimizers side by side."""

import math
import pathlib
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from jaxopt_lab.report.figures import PALETTE, save_figure

# Below it a difference is drawn on a linear scale, above on a logarithmic one.
LINEAR = 0.2
ADAPTIVE = ("exact", "official", "auto")


def finals_figure(differences: dict[str, dict[str, np.ndarray]], path: pathlib.Path) -> None:
    """Final loss of every row minus the best by hand, by seed: mean and two standard errors.

    Args:
      differences: By optimizer, by schedule: one difference a seed.
      path: File to write.
    """
    figure, panels = _panels(differences)
    names = list(dict.fromkeys(name for rows in differences.values() for name in rows))
    for axes, (title, rows) in zip(panels, differences.items(), strict=True):
        for name, values in rows.items():
            color = PALETTE[1] if name.startswith(ADAPTIVE) else PALETTE[0]
            error = 2 * values.std(ddof=1) / math.sqrt(len(values))
            place = names.index(name)
            axes.errorbar(place, values.mean(), yerr=error, marker="o", capsize=3, color=color)
        axes.axhline(0, color="black", linewidth=1)
        axes.set_yscale("symlog", linthresh=LINEAR)
        axes.set_yticks([-0.2, -0.1, 0, 0.1, 0.2, 0.5, 1, 2])
        axes.set_yticklabels(["-0.2", "-0.1", "0", "0.1", "0.2", "0.5", "1", "2"])
        axes.minorticks_off()
        axes.set_ylim(-0.2, 3)
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25, linewidth=0.6)
    figure.supylabel("held-out loss minus that of the best by hand [nats/token]", fontsize=10)
    save_figure(figure, path)


def rates_figure(shares: dict[str, dict[str, np.ndarray]], path: pathlib.Path) -> None:
    """Learning rate over its peak along the run: mean over seeds with its range.

    Args:
      shares: By optimizer, by label: (seeds, steps).
      path: File to write.
    """
    figure, panels = _panels(shares)
    for axes, (title, rows) in zip(panels, shares.items(), strict=True):
        for color, (label, share) in zip(PALETTE, rows.items(), strict=False):
            at = np.arange(share.shape[1])
            axes.plot(at, share.mean(axis=0), color=color, linewidth=1.3, label=label)
            axes.fill_between(
                at, share.min(axis=0), share.max(axis=0), color=color, alpha=0.15, linewidth=0
            )
        axes.set_title(title, fontsize=10)
        axes.set_ylim(0, 1.45)
        axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
        axes.grid(alpha=0.25, linewidth=0.6)
    figure.supxlabel("steps", fontsize=10)
    figure.supylabel("learning rate / its peak", fontsize=10)
    save_figure(figure, path)


def _panels(rows: dict[str, Any]) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(10, 3.4 * math.ceil(len(rows) / 2)), dpi=150, layout="constrained")
    grid = figure.subplots(math.ceil(len(rows) / 2), 2, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(grid.flat)[: len(rows)]
