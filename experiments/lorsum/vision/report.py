"""Table and figure of the LeNet-5 runs, from results/*.json.

python experiments/lorsum/vision/report.py
"""

import argparse
import json
import pathlib

import numpy as np
from run import METHODS
from scipy import stats

from jaxopt_lab.report import format_table
from jaxopt_lab.report.figures import Curve, curves_figure

HERE = pathlib.Path(__file__).parent
REFERENCE = "LoRSum x1"


def main() -> None:
    """Writes accuracy.png and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--figure", type=pathlib.Path, default=HERE / "accuracy.png")
    args = parser.parse_args()
    paths = {name: args.results / f"{name.replace(' ', '-').lower()}.json" for name in METHODS}
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    found = {name: run for name, run in found.items() if "test" in run}
    if REFERENCE not in found:
        raise SystemExit(f"{REFERENCE}: no result: run.py")
    rows, curves = [], []
    for name, run in found.items():
        test, reference = (100 * np.array(found[n]["test"]) for n in (name, REFERENCE))
        tuned = [f"{100 * max(curve):.1f}" for curve in run["tuning"]["validation"]]
        best = run["rates"].index(run["rate"])
        rim = " rim" if best in (0, len(tuned) - 1) else ""
        against = "-" if name == REFERENCE else interval(test - reference)
        values = f"{test.mean():.2f} ± {test.std(ddof=1):.2f}"
        rows.append((name, " ".join(tuned), f"{run['rate']:g}{rim}", values, against))
        curve = 100 * np.array(run["validation"]).mean(0)
        curves.append(Curve(name, np.arange(len(curve)) + 1, curve, final_value=False))
    header = ("row", "tuning, validation %", "rate", "test, %", f"minus {REFERENCE}")
    print(format_table(header, rows))
    seconds = sum(run["seconds"] for run in found.values())
    print(f"{seconds / 60:.1f} min, {next(iter(found.values()))['device']}")
    curves_figure(
        curves, args.figure, x_label="epoch", y_label="validation accuracy, %",
        title="LeNet-5 on Fashion-MNIST, mean over five seeds",
    )  # fmt: skip


def interval(values: np.ndarray) -> str:
    """Mean and 95 % interval, and what it says."""
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    verdict = "no difference" if abs(values.mean()) <= half else ""
    return f"{values.mean():+.2f} ± {half:.2f} {verdict}".strip()


if __name__ == "__main__":
    main()
