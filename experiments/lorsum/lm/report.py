"""Tables and figure of the language-model runs, from results/*.json.

python experiments/lorsum/lm/report.py
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np
from run import METHODS, numbers

from jaxopt_lab.report import format_table
from jaxopt_lab.report.figures import PALETTE, save_figure
from jaxopt_lab.sweep import difference, rim_of, seed_noise

HERE = pathlib.Path(__file__).parent


def main() -> None:
    """Writes curves.png and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--figure", type=pathlib.Path, default=HERE / "curves.png")
    args = parser.parse_args()
    found = {name: read(name, args.results) for name in METHODS}
    found = {name: runs for name, runs in found.items() if runs["seed"]}
    if not found:
        raise SystemExit("no results: run.py")
    for name, runs in found.items():
        losses = [min(numbers(run["validation"])) for run in runs["rate"]]
        shown = " ".join(
            f"{run['rate']:g}: {loss:.4f}" for run, loss in zip(runs["rate"], losses, strict=True)
        )
        print(f"{name}: {shown}")
    finals = {name: [best(run) for run in runs["seed"]] for name, runs in found.items()}
    noise = seed_noise(list(finals.values()))
    rows = []
    for name, runs in found.items():
        against = "-"
        if name != "LoRA" and "LoRA" in finals:
            between = difference(finals[name], finals["LoRA"], noise)
            against = f"{between.value:+.4f} ({between.standard_errors:+.1f})"
            against += "" if between.counts else ", no difference"
        step = 1e3 * milliseconds(runs["seed"])
        values = " ".join(f"{loss:.4f}" for loss in finals[name])
        mean = f"{np.mean(finals[name]):.4f}"
        rates = [run["rate"] for run in runs["rate"]]
        rim = rim_of(rates.index(runs["seed"][0]["rate"]), len(rates))
        rate = f"{runs['seed'][0]['rate']:g}" + (f" ({rim})" if rim else "")
        rows.append((name, rate, mean, values, against, f"{step:.1f}"))
    header = ("row", "rate", "held-out nats/token", "seeds", "minus LoRA (s.e.)", "ms/step")
    print(format_table(header, rows))
    first = next(iter(found.values()))["seed"][0]
    print(f"before any step {first['test_before'][0]:.4f}; s = {noise:.4f}; {first['device']}")
    figure(found, args.figure)


def read(name: str, directory: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """Runs of a method by kind."""
    slug = name.replace(" ", "-").lower()
    runs = {}
    for kind in ("rate", "seed"):
        paths = directory.glob(f"{slug}-{kind}-*.json")
        found = [json.loads(path.read_text()) for path in paths]
        runs[kind] = sorted(found, key=lambda run, kind=kind: run[kind])
    return runs


def best(run: dict[str, Any]) -> float:
    """The held-out loss of the checkpoint with the lowest validation loss."""
    return run["test"][int(np.argmin(numbers(run["validation"])))]


def milliseconds(runs: list[dict[str, Any]]) -> float:
    """Seconds of a step, the median over stretches but the first of a run."""
    stretches = [seconds for run in runs for seconds in run["seconds"][1:]]
    steps = runs[0]["steps"] // len(runs[0]["seconds"])
    return float(np.median(stretches)) / steps


def figure(found: dict[str, dict[str, list[dict[str, Any]]]], path: pathlib.Path) -> None:
    """Held-out loss against steps and against seconds of training."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11, 4.6), dpi=150, layout="constrained")
    panels = drawn.subplots(1, 2, sharey=True)
    for number, (name, runs) in enumerate(found.items()):
        losses = np.array([run["test_before"] + run["test"] for run in runs["seed"]], float)
        steps = np.linspace(0, runs["seed"][0]["steps"], losses.shape[1])
        for axes, x in zip(panels, (steps, steps * milliseconds(runs["seed"])), strict=True):
            axes.plot(x, losses.mean(0), "o-", color=PALETTE[number], label=name, markersize=3)
            axes.fill_between(x, losses.min(0), losses.max(0), color=PALETTE[number], alpha=0.2)
    # One seed of RPLoRA rises far above the start for a while, which would flatten the rest.
    before = float(next(iter(found.values()))["seed"][0]["test_before"][0])
    lowest = min(min(numbers(run["test"])) for runs in found.values() for run in runs["seed"])
    reach = before - lowest
    panels[0].set(ylim=(lowest - 0.05 * reach, before + 0.1 * reach))
    panels[0].set(xlabel="step", ylabel="held-out loss, nats per token")
    panels[1].set(xlabel="seconds of training")
    panels[0].legend(frameon=False, fontsize=8)
    for axes in panels:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(drawn, path)


if __name__ == "__main__":
    main()
