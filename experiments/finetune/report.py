"""Tables and figure of the fine-tuning runs, from results/METHOD/*.json.

python experiments/finetune/report.py
"""

import argparse
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np
from methods import METHODS, Method
from run import lowest
from scipy import stats

from jaxopt_lab.report import format_table
from jaxopt_lab.report.figures import PALETTE, save_figure
from jaxopt_lab.sweep import accuracy_interval, paired_accuracy

HERE = pathlib.Path(__file__).parent
MARGIN, EQUAL = 1.5, 1.0  # points


class Runs(NamedTuple):
    """What is there of one method."""

    method: Method
    rates: list[dict[str, Any]]
    folds: list[dict[str, Any]]

    @property
    def correct(self) -> list[np.ndarray]:
        """Of every fold, whether each row was right."""
        return [np.array([c == "1" for c in run["correct"]]) for run in self.folds]


def main() -> None:
    """Writes the figure and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--figures", type=pathlib.Path, default=HERE / "figures")
    args = parser.parse_args()
    found = {m.name: read(m, args.results / m.slug) for m in METHODS}
    most = max(len(runs.folds) for runs in found.values())
    found = {name: runs for name, runs in found.items() if len(runs.folds) == most}
    print(format_table(TUNING, [tuning_row(runs) for runs in found.values()]))
    print(format_table(TABLE, [row(runs, found) for runs in found.values()]))
    print(format_table(("A - B", "points", "by rows", "by folds", "verdict"), comparisons(found)))
    for name in ("WeightLoRA", "WeightLoRA, every 125", "WeightLoRA+"):
        if name in found:
            print(f"{name} keeps:", kept(found[name]))
    all_runs = [run for runs in found.values() for run in runs.rates + runs.folds]
    seconds = sum(run["seconds_of_group"] / run["lanes"] for run in all_runs)
    print(f"{len(all_runs)} runs, about {seconds / 60:.1f} min, {all_runs[0]['device']}")
    figure(found, args.figures / "accuracy.png")


def read(method: Method, directory: pathlib.Path) -> Runs:
    """All runs of a method, folds and rates in order."""
    of_kind = []
    for kind, by in (("rate", "rate"), ("fold", "fold")):
        runs = [json.loads(path.read_text()) for path in directory.glob(f"{kind}-*.json")]
        of_kind.append(sorted(runs, key=lambda run, by=by: run[by]))
    return Runs(method, *of_kind)


TUNING = ("method", "rates", "validation loss of the best checkpoint", "best", "rim")


def tuning_row(runs: Runs) -> tuple[str, ...]:
    """Of every rate, the lowest validation loss."""
    losses = [lowest(run) for run in runs.rates]
    best = int(np.argmin(losses))
    rim = {0: "lowest", len(losses) - 1: "highest"}.get(best, "")
    rates = [f"{run['rate']:g}" for run in runs.rates]
    shown = " ".join(f"{loss:.4f}" for loss in losses)
    return runs.method.name, " ".join(rates), shown, rates[best], rim


TABLE = ("method", "adapter parameters", "rate", "test accuracy, %", "95 % of rows", "minus full",
         "std of folds", "best step, median")  # fmt: skip


def row(runs: Runs, found: dict[str, Runs]) -> tuple[str, ...]:
    """One line of the main table."""
    value, low, high = (100 * x for x in accuracy_interval(np.concatenate(runs.correct)))
    of_folds = [100 * fold.mean() for fold in runs.correct]
    against = "-"
    if "full" in found and runs.method.name != "full":
        against = "{:+.2f} ± {:.2f}".format(*difference(runs, found["full"])[:2])
    parameters = runs.method.final_parameters
    size = "-" if parameters is None else f"{parameters:,}"
    steps = np.median([run["best_step"] for run in runs.folds])
    return (
        *(runs.method.name, size, f"{runs.folds[0]['rate']:g}", f"{value:.2f}"),
        *(f"{low:.2f} to {high:.2f}", against, f"{np.std(of_folds, ddof=1):.2f}", f"{steps:g}"),
    )


def difference(first: Runs, second: Runs) -> tuple[float, float, float, float]:
    """Points between two methods: difference, half of the wider interval, of rows, of folds."""
    pairs = list(zip(first.correct, second.correct, strict=True))
    rows = paired_accuracy(*(np.concatenate(x) for x in zip(*pairs, strict=True)))
    of_folds = [100 * (a.mean() - b.mean()) for a, b in pairs]
    by_folds = stats.sem(of_folds) * stats.t.ppf(0.975, len(pairs) - 1)
    by_rows = 50 * (rows.high - rows.low)
    return 100 * rows.value, max(by_rows, by_folds), by_rows, by_folds


def comparisons(found: dict[str, Runs]) -> list[tuple[str, ...]]:
    """The comparisons that the protocol names."""
    names = [name for name in found if name not in ("head", "full")]
    pairs = [(name, "full") for name in names]
    controls = ("LoRA", "LoRA, 6 random", "LoRA, rank 3")
    chosen = ("WeightLoRA", "WeightLoRA, every 125", "WeightLoRA+")
    pairs += [(name, control) for name in chosen for control in controls]
    pairs += [("scaled LoRSum", "LoRA"), ("LoRA, 6 random", "LoRA"), ("LoRA, rank 3", "LoRA")]
    lines = []
    for first, second in pairs:
        if first in found and second in found:
            value, half, by_rows, by_folds = difference(found[first], found[second])
            lines.append((f"{first} - {second}", f"{value:+.2f}", f"± {by_rows:.2f}",
                          f"± {by_folds:.2f}", verdict(value - half, value + half)))  # fmt: skip
    return lines


def verdict(low: float, high: float) -> str:
    """In words, of the wider interval, by the rule of the protocol."""
    said = []
    if low > 0 or high < 0:
        said.append("better" if low > 0 else "worse")
    if low > -EQUAL and high < EQUAL:
        said.append("equal")
    if low > -MARGIN:
        said.append(f"within {MARGIN:g}")
    if high < -MARGIN:
        said.append(f"more than {MARGIN:g} behind")
    return ", ".join(said) or "cannot be said"


def kept(runs: Runs) -> str:
    """How often each kernel stays, by layer from the bottom: q k v."""
    stays = sum((np.array(run["weights"]) != 0).astype(int) for run in runs.folds)
    layers = np.array(stays).reshape(6, 3)
    return " | ".join(" ".join(map(str, layer)) for layer in layers)


def figure(found: dict[str, Runs], path: pathlib.Path) -> None:
    """Accuracy against full fine-tuning, or LoRA without it, and validation loss over steps."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    left, right = drawn.subplots(1, 2)
    reference = "full" if "full" in found else "LoRA"
    names = [name for name in found if name not in (reference, "head")]
    for place, name in enumerate(names):
        value, half, *_ = difference(found[name], found[reference])
        left.errorbar(value, -place, xerr=half, fmt="o", color=PALETTE[0], capsize=3)
    left.set_yticks([-place for place in range(len(names))], names)
    left.set_ylim(0.5 - len(names), 0.5)
    left.axvline(0, color="0.3", linewidth=1)
    if reference == "full":
        left.axvline(-MARGIN, color="0.6", linewidth=1, linestyle="--")
    left.set(xlabel=f"test accuracy minus that of {reference}, points, 95 %", title="ten folds")
    for number, (name, runs) in enumerate(found.items()):
        losses = np.array([run["validation_loss"] for run in runs.folds], float).mean(0)
        steps = (np.arange(len(losses)) + 1) * (runs.folds[0]["steps"] // len(losses))
        style = "-" if number < len(PALETTE) else "--"
        right.plot(steps, losses, style, color=PALETTE[number % len(PALETTE)], label=name)
    right.set(xlabel="step", ylabel="validation loss, nats", title="mean over folds")
    drawn.legend(
        *right.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8
    )
    for axes in (left, right):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(drawn, path)


if __name__ == "__main__":
    main()
