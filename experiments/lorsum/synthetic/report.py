"""Tables, acceptance lines and figure of the linear map, from results/*.json.

python experiments/lorsum/synthetic/report.py
"""

import json
import pathlib
from typing import Any

import numpy as np
from run import RESULTS, methods

from jaxopt_lab.report import format_table
from jaxopt_lab.report.figures import PALETTE, save_figure

HERE = pathlib.Path(__file__).parent
EPOCHS = (1, 5, 20, 50, 100)


def main() -> None:
    """Writes curves.png and prints tables and acceptance lines."""
    settings = {setting: read(setting) for setting in ("full", "mini")}
    power = json.loads((RESULTS / "power-iteration.json").read_text())
    expected = np.array(power["excess"])
    for setting, found in settings.items():
        rows = [(name, *map(spread, excess[:, EPOCHS].T)) for name, excess in found.items()]
        print(setting)
        print(format_table(("method", *(f"epoch {epoch}" for epoch in EPOCHS)), rows))
    print("gap by seed:", " ".join(f"{gap:.4f}" for gap in power["gap"]))
    for line in acceptance(settings, expected):
        print(line)
    print(seed_table(settings["full"], expected, power["gap"]))
    figure(settings)
    spent = [json.loads(path.read_text())["cpu_seconds"] for path in RESULTS.glob("*.json")]
    print(f"{sum(spent):.0f} s of CPU")


def read(setting: str) -> dict[str, np.ndarray]:
    """Excess loss (seeds, epochs + 1) by method."""
    found = {}
    for name in methods(setting):
        path = RESULTS / f"{setting}-{name.replace(' ', '-').replace(',', '')}.json"
        if path.exists():
            found[name] = np.array(json.loads(path.read_text())["excess"], float)
    return found


def spread(values: np.ndarray) -> str:
    """Median, lowest and highest of the seeds."""
    low, middle, high = np.min(values), np.median(values), np.max(values)
    return " ".join(f"{max(x, 0):.2g}" for x in (middle, low, high))


def acceptance(settings: dict[str, Any], expected: np.ndarray) -> list[str]:
    """The lines (a) to (d) of the protocol."""
    lines = []
    for setting, found in settings.items():
        ours, rest = found["LoRSum x1"][:, 5:], ("LoRA SGD", "LoRA AdamW")
        for name in rest:
            wins = (ours < found[name][:, 5:]).all(1).sum()
            lines.append(f"(a) {setting}: x1 below {name} from epoch 5 on: {wins} of {len(ours)}")
    eight = settings["full"]["LoRSum x8"]
    for epoch, bound in ((50, 1.0), (100, 0.05)):
        due = expected[:, 8 * epoch - 1] < bound
        met = eight[due, epoch] < bound
        lines.append(
            f"(b) x8 below {bound:g} at epoch {epoch}: {met.sum()} of the {due.sum()} seeds where "
            f"power iteration is; {(eight[~due, epoch] < bound).sum()} of the others"
        )
    for sweeps in (1, 2, 8, 32):
        ours = settings["full"][f"LoRSum x{sweeps}"][:, 1:]
        theirs = expected[:, sweeps - 1 :: sweeps][:, : ours.shape[1]]
        resolved = theirs > 0.01
        error = np.abs(ours[resolved] / theirs[resolved] - 1)
        lines.append(
            f"(c) x{sweeps} over power iteration: off by {100 * error.max():.2g} % at most, "
            f"{100 * np.median(error):.2g} % in the median"
        )
    ends = {k: np.median(settings["mini"][f"LoRSum x{k}"][:, -1]) for k in (1, 2, 8)}
    lines.append(
        "(d) mini, epoch 100, medians: " + ", ".join(f"x{k} {v:.3g}" for k, v in ends.items())
    )
    return lines


def seed_table(found: dict[str, np.ndarray], expected: np.ndarray, gaps: list[float]) -> str:
    """Eight sweeps and power iteration, seed by seed."""
    eight, rows = found["LoRSum x8"], []
    for seed, gap in enumerate(gaps):
        cells = []
        for epoch in (50, 100):
            cells += [f"{eight[seed, epoch]:.3g}", f"{expected[seed, 8 * epoch - 1]:.3g}"]
        rows.append((str(seed), f"{gap:.4f}", *cells))
    header = ("seed", "gap", "x8, epoch 50", "power, 400", "x8, epoch 100", "power, 800")
    return format_table(header, rows)


def figure(settings: dict[str, dict[str, np.ndarray]]) -> None:
    """Median excess loss over epochs, both settings."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(12, 5), dpi=150, layout="constrained")
    titles = {"full": "full batch", "mini": "batches of 64, momentum 0.75"}
    for axes, (setting, found) in zip(drawn.subplots(1, 2), settings.items(), strict=True):
        for number, (name, excess) in enumerate(found.items()):
            style = ("-", "--", ":")[number // len(PALETTE)]
            median = np.maximum(np.median(excess, 0), 1e-6)
            color = PALETTE[number % len(PALETTE)]
            axes.plot(np.arange(len(median)), median, style, color=color, label=name)
        axes.set_yscale("log")
        axes.set_ylim(bottom=1e-6 if setting == "full" else 3)
        axes.set(xlabel="epoch", ylabel="loss beyond the best rank 8", title=titles[setting])
        axes.legend(frameon=False, fontsize=7, ncols=2)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(drawn, HERE / "curves.png")


if __name__ == "__main__":
    main()
