"""Table and figure of accuracy over rates, from results/METHOD/*.json.

python experiments/lorsum/rate/report.py
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np
from rates import COMPARED, FOLDS

from jaxopt_lab.report import format_table
from jaxopt_lab.report.figures import PALETTE, save_figure

HERE = pathlib.Path(__file__).parent
MARGIN = 1.5  # points


def main() -> None:
    """Writes rates.png and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--figure", type=pathlib.Path, default=HERE / "rates.png")
    args = parser.parse_args()
    rows, drawn = [], {}
    for method in COMPARED:
        rates, points = read(args.results / method.slug)
        if not points.size or np.isnan(points).any():
            raise SystemExit(f"{method.name}: runs are missing: run.py")
        mean = points.mean(0)
        good = mean >= mean.max() - MARGIN
        low, high = flat(good, int(mean.argmax()))
        shown = [f"{m:.1f}{'' if g else '*'}" for m, g in zip(mean, good, strict=True)]
        decades = np.log10(rates[high] / rates[low])
        span = f"{rates[low]:g} to {rates[high]:g}, {decades:.1f} decades"
        rows.append((method.name, " ".join(f"{r:g}" for r in rates), " ".join(shown), span))
        drawn[method.name] = rates, points
    print(f"folds {tuple(FOLDS)}; * more than {MARGIN:g} points below the best")
    print(format_table(("method", "rates", "mean test accuracy, %", "flat over"), rows))
    figure(drawn, args.figure)


def read(directory: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Rates, and points of accuracy (folds, rates)."""
    runs = [json.loads(path.read_text()) for path in directory.glob("*.json")]
    rates = sorted({run["rate"] for run in runs})
    points = np.full((len(FOLDS), len(rates)), np.nan)
    for run in runs:
        points[list(FOLDS).index(run["fold"]), rates.index(run["rate"])] = accuracy(run)
    return np.array(rates), points


def accuracy(run: dict[str, Any]) -> float:
    """In points; of a run without any finite checkpoint that of the most frequent label."""
    if not run["best_step"]:
        return 100 * run["majority"]
    return 100 * run["correct"].count("1") / len(run["correct"])


def flat(good: np.ndarray, best: int) -> tuple[int, int]:
    """The ends of the stretch of good rates around the best."""
    low = high = best
    while low > 0 and good[low - 1]:
        low -= 1
    while high < len(good) - 1 and good[high + 1]:
        high += 1
    return low, high


def figure(drawn: dict[str, tuple[np.ndarray, np.ndarray]], path: pathlib.Path) -> None:
    """Accuracy over the rate in decades from the lowest; thin lines are single folds."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(7.5, 4.6), dpi=150, layout="constrained")
    axes = made.subplots()
    for number, (name, (rates, points)) in enumerate(drawn.items()):
        place, color = np.log10(rates / rates[0]), PALETTE[number]
        label = f"{name}: from {rates[0]:g} to {rates[-1]:g}"
        axes.plot(place, points.mean(0), "o-", color=color, label=label)
        axes.plot(place, points.T, color=color, linewidth=0.6, alpha=0.5)
    axes.set(xlabel="rate over the lowest one, log10", ylabel="test accuracy, %")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(made, path)


if __name__ == "__main__":
    main()
