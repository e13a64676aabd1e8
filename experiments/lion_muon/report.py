"""Draws the figure and writes the table of the LionMuon comparison from results/*.json.

python experiments/lion_muon/report.py --scale gpu
"""

import argparse
import json
import math
import pathlib
from typing import Any

import numpy as np

from jaxopt_lab.report import format_table
from jaxopt_lab.report.points_figure import Method, points_figure

HERE = pathlib.Path(__file__).parent
ORDER = (
    "Muon",
    "SignMuon P=2",
    "SignMuon P=5",
    "LionMuon P=1",
    "LionMuon P=2",
    "LionMuon P=5",
    "LionMuon P=20",
    "AdamW",
    "Lion",
    "Signum",
)
REFERENCE = "LionMuon P=2"


def load(scale: str) -> list[dict[str, Any]]:
    """Results of one scale, in the order of the table."""
    found = {}
    for path in (HERE / "results").glob(f"{scale}-*.json"):
        result = json.loads(path.read_text())
        found[result["name"]] = result
    return [found[name] for name in ORDER if name in found]


def finals(result: dict[str, Any]) -> np.ndarray:
    """Final held-out loss of every seed."""
    return np.array([curve[-1] for curve in result["held_out"]])


def seed_noise(results: list[dict[str, Any]]) -> float:
    """Standard deviation between seeds, pooled over the methods."""
    return math.sqrt(np.mean([finals(r).var(ddof=1) for r in results]))


def best_cell(result: dict[str, Any]) -> str:
    """The rates of the best cell, with a mark where it lies on the rim of its grid."""
    cells, index = result["cells"], result["best_cell"]
    if result["name"] == "AdamW":
        cells = [[0.0, 0.0, rate] for rate in result["adam_rates"]]
    names = ("spectral", "sign", "AdamW")
    parts = []
    for axis, name in zip(range(len(cells[0])), names, strict=False):
        values = sorted({cell[axis] for cell in cells})
        if values != [0.0]:
            value = cells[index][axis]
            rim = " (rim)" if value in (values[0], values[-1]) else ""
            parts.append(f"{name} {value:.2g}{rim}")
    return ", ".join(parts)


def paired(result: dict[str, Any], reference: dict[str, Any]) -> str:
    """Difference of the training losses at equal seeds, with the standard error of its mean."""
    assert result["seeds"] == reference["seeds"]
    by_seed = np.subtract(result["train_last_100"], reference["train_last_100"])
    return f"{by_seed.mean():+.3f} ± {by_seed.std(ddof=1) / math.sqrt(len(by_seed)):.3f}"


def table(results: list[dict[str, Any]]) -> str:
    """The comparison as Markdown."""
    noise = seed_noise(results)
    reference = next(r for r in results if r["name"] == REFERENCE)
    rows = []
    for result in results:
        loss = finals(result)
        steps = result["scale"]["steps"]
        difference = loss.mean() - finals(reference).mean()
        error = noise * math.sqrt(1 / len(loss) + 1 / len(finals(reference)))
        share = result["optimizer_flops_per_step"] / result["model_flops_per_step"]
        bits = loss.mean() / math.log(2) / result["bytes_per_token"]
        rows.append(
            [
                result["name"],
                best_cell(result),
                f"{loss.mean():.3f}",
                f"{loss.std(ddof=1):.3f}",
                f"{bits:.3f}",
                "" if result is reference else f"{difference:+.3f} ({difference / error:+.1f})",
                f"{np.mean(result['train_last_100']):.3f}",
                "" if result is reference else paired(result, reference),
                f"{result['optimizer_flops_per_step'] * steps:.2e}",
                f"{100 * share:.1f} %",
            ]
        )
    headers = [
        "optimizer",
        "best cell",
        "held-out nats/token",
        "std of seeds",
        "bits/byte",
        f"minus {REFERENCE} (in standard errors)",
        "training, last 100 steps",
        "minus, by seed ± s.e.",
        "optimizer FLOPs",
        "of the model's",
    ]
    return format_table(headers, rows, markdown=True)


def draw(results: list[dict[str, Any]], path: pathlib.Path) -> None:
    """One point a method: its training loss over the work of its optimizer."""
    first = results[0]
    methods = [
        Method(r["name"], r["optimizer_flops_per_step"] * r["scale"]["steps"], r["train_last_100"])
        for r in results
    ]
    points_figure(
        methods, path, x_label="FLOPs of the optimizer in the whole run", log_x=True,
        y_label="training loss, last 100 steps [nats/token]",
        title=f"{first['parameters'] / 1e6:.1f}M parameters, {first['scale']['steps']} steps, mean "
        f"of {len(first['seeds'])} seeds ± 2 standard errors; lower is better",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="gpu")
    scale = parser.parse_args().scale
    results = load(scale)
    text = table(results)
    (HERE / "results" / f"{scale}-table.md").write_text(text + "\n")
    print(text)
    print(f"\npooled standard deviation between seeds: {seed_noise(results):.4f}")
    draw(results, HERE / "figures" / f"{scale}-final.png")


if __name__ == "__main__":
    main()
