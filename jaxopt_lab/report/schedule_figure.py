"""Figure of a schedule that reads the loss: its rate, and the gap that decides it."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxopt_lab.report.figures import PALETTE, moving_average, save_figure
from jaxopt_lab.report.tracker import read_metrics


def schedule_figure(
    run_dir: str | os.PathLike[str], out_path: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """Draws rate and gap of an adaptive warm-up against the steps.

    Above the learning rate; below the gap of the training loss to the target, single losses pale
    and a moving average over a fiftieth of the run, with the gap at which the peak is due. A
    vertical line marks where the warm-up ended.

    Args:
      run_dir: The run directory; its metrics hold `rate`, `gap`, `peak_gap` and `switch_step`.
      out_path: File to write; the suffix (png, svg, pdf) decides the format.
      title: Text above the figure.

    Returns:
      The path written.

    Raises:
      ValueError: If the run has no adaptive warm-up.
    """
    from matplotlib.figure import Figure

    rows = [row for row in read_metrics(run_dir) if "peak_gap" in row]
    if not rows:
        raise ValueError(f"{run_dir} has no metric 'peak_gap': its schedule is not adaptive")
    columns = {
        name: np.array([row[name] for row in rows], np.float64)
        for name in ("step", "rate", "gap", "peak_gap", "switch_step")
    }
    figure = Figure(figsize=(7.5, 5.6), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot(columns["step"], columns["rate"], color=PALETTE[0], linewidth=1.4)
    upper.set(ylabel="learning rate", title=title)
    _draw_gap(lower, columns)
    switch = int(columns["switch_step"][-1])
    for axes in (upper, lower):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if switch >= 0:
            axes.axvline(
                switch, color=PALETTE[1], linewidth=1, linestyle="--",
                label=f"warm-up ends at step {switch}",
            )  # fmt: skip
    lower.legend(frameon=False, fontsize=8)
    return save_figure(figure, out_path)


def _draw_gap(axes: Any, columns: dict[str, np.ndarray]) -> None:
    step, gap, peak_gap = columns["step"], columns["gap"], columns["peak_gap"][-1]
    # Unknown before the first loss; at its floor where the target was passed.
    gap = np.where(np.isfinite(gap) & (gap > 1e-6), gap, np.nan)
    smooth = moving_average(gap, max(1, len(gap) // 50))
    axes.plot(step, gap, color=PALETTE[0], linewidth=0.6, alpha=0.3)
    axes.plot(step, smooth, color=PALETTE[0], linewidth=1.4, label="gap to the target")
    axes.axhline(
        peak_gap, color="0.45", linewidth=1, linestyle=(0, (6, 3)),
        label=f"gap at the peak {peak_gap:.3f}",
    )  # fmt: skip
    axes.set(xlabel="optimizer step", ylabel="gap [nats/token]", yscale="log")
