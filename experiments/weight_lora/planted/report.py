"""Figure and tables of the planted-kernels experiment, from results.json."""

import json
import pathlib
from typing import Any

import numpy as np
from scipy import stats

from jaxopt_lab.report import format_table
from jaxopt_lab.report.figures import Curve, curves_figure

HERE = pathlib.Path(__file__).parent
FLOOR = 1e-8


def main() -> None:
    """Writes figure.png and prints the table and the verdicts."""
    result = json.loads((HERE / "results.json").read_text())
    methods = result["methods"]
    curves = []
    for name, run in methods.items():
        losses = np.maximum(np.array(run["loss"]), FLOOR)
        mean = np.exp(np.log(losses).mean(0))
        band = {"low": losses.min(0), "high": losses.max(0)} if "4 random" in name else {}
        curves.append(Curve(name, result["steps"], mean, final_value=False, **band))
    curves_figure(
        curves, HERE / "figure.png", x_label="step", y_label="held-out loss / loss of the base",
        title="4 of 16 kernels planted; geometric mean over 10 seeds", log_y=True,
    )  # fmt: skip
    rows = [row(name, run, methods["4 random"]) for name, run in methods.items()]
    header = ("method", "rate", "found all 4", "found", "final loss", "log10 against 4 random")
    print(format_table(header, rows))
    print(f"{result['cpu_seconds']:.0f} s of CPU")


def row(name: str, run: dict[str, Any], control: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    planted, kept = np.array(run["planted"]), np.array(run["weights"]) != 0
    right = (planted & kept).sum(1)
    final = logs(run)
    searched = name.startswith("WeightLoRA")
    every = f"{(right == planted.sum(1)).sum()} of {len(right)}" if searched else "-"
    found = " ".join(map(str, right)) if searched or "random" in name else "-"
    rim = " rim" if run["rate"] in (1e-3, 1e-1) else ""
    return (
        name,
        f"{run['rate']:g}{rim}",
        every,
        found,
        f"{10 ** final.mean():.1e}",
        against(final - logs(control)),
    )


def logs(run: dict[str, Any]) -> np.ndarray:
    """log10 of the final loss for every seed."""
    return np.log10(np.maximum(np.array(run["loss"])[:, -1], FLOOR))


def against(difference: np.ndarray) -> str:
    """Mean and 95 % interval of a paired difference."""
    if not difference.any():
        return "-"
    error = stats.sem(difference) * stats.t.ppf(0.975, len(difference) - 1)
    return f"{difference.mean():+.2f} ± {error:.2f}"


if __name__ == "__main__":
    main()
