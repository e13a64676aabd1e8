"""Writes the table of results/*.json and draws its figure.

python experiments/default_rates/report.py
"""

import json
import pathlib
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from run import FRESH_SEEDS, RESULTS, SCALES

from jaxopt_lab.report import format_table
from jaxopt_lab.sweep import rim_of
from jaxopt_lab.train.config.optimizers import OPTIMIZERS

HERE = pathlib.Path(__file__).parent
HEADER = [
    "preset", "optimizer", "rates", "best", "its loss", "default before", "its loss", "default now"
]  # fmt: skip

CHOSEN = "sign rate 1/60"
CELL_HEADER = ["setting", "held out, three seeds", "mean", "largest rise", "largest jump"]


def main() -> None:
    results = [
        json.loads(path.read_text())
        for preset in SCALES
        for name in OPTIMIZERS
        if (path := RESULTS / f"{preset}-{name}.json").exists()
    ]
    table = format_table(HEADER, [row(result) for result in results], markdown=True)
    (RESULTS / "table.md").write_text(table + "\n")
    print(table)
    figure(results)
    cells = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("smooth-*.json"))]
    print(format_table(CELL_HEADER, [cell_row(cell) for cell in cells], markdown=True))
    figure_of_jump({cell["cell"]: cell for cell in cells})


def fresh(result: dict[str, Any], rate: float) -> list[float]:
    """Held-out losses of a rate on the fresh seeds; infinite for a run that diverged."""
    runs = [run for run in result["fresh"] if run["rate"] == rate]
    return [np.inf if run["held_out"] is None else run["held_out"] for run in runs]


def chosen(result: dict[str, Any]) -> float:
    """The rate that the rule of README.md makes the default."""
    before, best = result["default_rate"], result["best_rate"]
    if best is None or best == before:
        return before
    old, new = fresh(result, before), fresh(result, best)
    spread = max(0.02, abs(old[0] - old[1]), abs(new[0] - new[1]))
    return best if np.mean(old) - np.mean(new) > spread else before


def row(result: dict[str, Any]) -> list[str]:
    """One line of the table; rates that the sweep calls rough stand in brackets."""
    rates = (f"{r['rate']:g}" if r["rise"] < 1 else f"({r['rate']:g})" for r in result["sweep"])
    before, best = result["default_rate"], result["best_rate"]
    tried = sorted(run["rate"] for run in result["sweep"])
    rim = rim_of(tried.index(best), len(tried))
    return [
        result["preset"],
        result["optimizer"],
        " ".join(rates),
        f"{best:g}" + (f" ({rim})" if rim else ""),
        _losses(fresh(result, best)),
        f"{before:g}",
        _losses(fresh(result, before)),
        f"{chosen(result):g}",
    ]


def figure(results: list[dict[str, Any]]) -> None:
    """Held-out loss against the rate, one panel a preset; rough runs are hollow."""
    presets = [name for name in SCALES if any(r["preset"] == name for r in results)]
    fig, axes = plt.subplots(1, len(presets), figsize=(5.5 * len(presets), 4.2), squeeze=False)
    for axis, preset in zip(axes[0], presets, strict=True):
        for result in (r for r in results if r["preset"] == preset):
            runs = [run for run in result["sweep"] if run["held_out"] is not None]
            rates, losses = [r["rate"] for r in runs], [r["held_out"] for r in runs]
            color = f"C{list(OPTIMIZERS).index(result['optimizer'])}"
            axis.plot(rates, losses, label=result["optimizer"], color=color, linewidth=1.2)
            for run in runs:
                fill = color if run["rise"] < 1 else "white"
                axis.plot(run["rate"], run["held_out"], "o", color=color, mfc=fill)
        axis.set(xscale="log", xlabel="learning rate", title=preset)
    axes[0][0].set_ylabel("final held-out loss, nats/token")
    axes[0][0].legend(fontsize=8, ncols=2)
    fig.tight_layout()
    fig.savefig(HERE / "figures" / "rates.png", dpi=150)


def cell_row(cell: dict[str, Any]) -> list[str]:
    """One line of the table of LionMuon's settings."""
    losses = [run["held_out"] for run in cell["runs"]]
    return [
        cell["cell"],
        " ".join(f"{loss:.3f}" for loss in losses),
        f"{np.mean(losses):.3f}",
        *(" ".join(f"{run[name]:.2f}" for run in cell["runs"]) for name in ("rise", "jump")),
    ]


def figure_of_jump(cells: dict[str, dict[str, Any]]) -> None:
    """The first steps of LionMuon at the default of before and at the chosen setting."""
    fig, axis = plt.subplots(figsize=(6.5, 3.8))
    for color, (name, cell) in enumerate((name, cells[name]) for name in ("default", CHOSEN)):
        for run in cell["runs"]:
            label = name if run is cell["runs"][0] else None
            axis.plot(range(1, 61), run["train"][:60], f"C{color}", label=label, linewidth=1.2)
    axis.set(
        xlabel="step", ylabel="training loss, nats/token", title="gpt2-124m, LionMuon, 3 seeds"
    )
    axis.legend()
    fig.tight_layout()
    fig.savefig(HERE / "figures" / "jump.png", dpi=150)


def _losses(losses: list[float]) -> str:
    assert len(losses) == len(FRESH_SEEDS)
    return " ".join(f"{loss:.3f}" for loss in losses)


if __name__ == "__main__":
    main()
