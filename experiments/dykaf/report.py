"""Draws the figures and writes the tables of the DyKAF comparison from results/*.json.

python experiments/dykaf/report.py --scale gpu
"""

import argparse
import json
import math
import pathlib
from dataclasses import dataclass

import numpy as np
from methods import METHODS

from jaxopt_lab.report import format_table
from jaxopt_lab.report.points_figure import Method, points_figure
from jaxopt_lab.sweep import (
    PAIRED_RULE,
    RULE,
    Difference,
    StepCost,
    Tuned,
    difference,
    paired_differences,
    seed_noise,
)

HERE = pathlib.Path(__file__).parent
REFERENCE = "SOAP"
# What the experiment was made to decide, in this order.
QUESTIONS = (
    ("DyKAF", "SOAP"),
    ("DyKAF parallel", "SOAP"),
    ("DyKAF", "DyKAF parallel"),
    ("DyKAF rank-1", "DyKAF"),
    ("DyKAF", "Shampoo"),
    ("DyKAF", "AdamW"),
    ("SOAP", "AdamW 0.95"),
    ("DyKAF", "Muon"),
    ("DyKAF", "LionMuon P=2"),
    # Asked afterwards.
    ("Muon", "SOAP"),
    ("Shampoo", "SOAP"),
)


@dataclass(frozen=True)
class Result:
    """One result file."""

    name: str
    tuned: Tuned
    cost: StepCost
    file: dict

    @property
    def finals(self) -> tuple[float, ...]:
        """Final held-out losses."""
        return self.tuned.final_losses

    @property
    def finite(self) -> bool:
        """Whether every seed ended with a loss."""
        return self.tuned.finite


def load(scale: str, directory: pathlib.Path) -> list[Result]:
    """Results of one scale, in the order of the table."""
    results = []
    for method in METHODS:
        path = directory / f"{scale}-{method.slug}.json"
        if path.exists():
            file = json.loads(path.read_text())
            cost = StepCost(**file["cost"])
            results.append(Result(file["name"], Tuned.from_json(file), cost, file))
    return results


def table(results: list[Result], noise: float) -> str:
    """Loss and cost of every method as Markdown."""
    reference = next((r for r in results if r.name == REFERENCE), results[0])
    cheapest = min(r.cost.step_seconds for r in results)
    rows = []
    for result in results:
        tuned, cost = result.tuned, result.cost
        rim = f" ({tuned.rim})" if tuned.rim else ""
        rate = "diverged" if tuned.best_rate is None else f"{tuned.best_rate:.2g}{rim}"
        loss = f"{np.mean(result.finals):.3f}" if result.finite else "diverged"
        against = ""
        if result is not reference and result.finite and reference.finite:
            found = difference(result.finals, reference.finals, noise)
            against = f"{found.value:+.3f} ({found.standard_errors:+.1f})"
        bits = np.mean(result.finals) / math.log(2) / result.file["bytes_per_token"]
        rows.append(
            [
                result.name,
                rate,
                loss,
                f"{np.std(result.finals, ddof=1):.3f}" if result.finite else "-",
                f"{bits:.3f}" if result.finite else "-",
                against,
                f"{1e3 * cost.step_seconds:.2f}",
                f"{1e3 * cost.optimizer_seconds:.2f}",
                f"{100 * cost.optimizer_share:.0f} %",
                f"{cost.step_seconds / cheapest:.2f}",
            ]
        )
    headers = [
        "optimizer",
        "best rate",
        "held-out nats/token",
        "std of seeds",
        "bits/byte",
        f"minus {reference.name} (in standard errors)",
        "ms/step",
        "of it optimizer",
        "share",
        "x cheapest",
    ]
    return format_table(headers, rows, markdown=True)


def answers(results: list[Result], noise: float) -> str:
    """The differences that the experiment was made for.

    By the rule of the protocol, by the one that pairs seeds and corrects for all pairs, and of the
    training losses at equal seeds.
    """
    by_name = {result.name: result for result in results if result.finite}
    held_out = paired_differences({name: r.finals for name, r in by_name.items()})
    training = paired_differences({name: r.tuned.train_losses for name, r in by_name.items()})
    rows = []
    for first, second in QUESTIONS:
        if first not in by_name or second not in by_name:
            continue
        a, b = by_name[first], by_name[second]
        found = difference(a.finals, b.finals, noise)
        ratio = a.cost.step_seconds / b.cost.step_seconds
        rows.append(
            [
                f"{first} - {second}", f"{found.value:+.3f}", f"{found.standard_errors:+.1f}",
                *(_paired(table[first, second]) for table in (held_out, training)),
                f"{ratio:.2f}",
            ]
        )  # fmt: skip
    headers = [
        "", "held out, nats/token", "standard errors, protocol", "held out, seeds paired",
        "training, last tenth, seeds paired", "ratio of ms/step",
    ]  # fmt: skip
    return format_table(headers, rows, markdown=True)


def _paired(found: Difference) -> str:
    counts = "counts" if found.counts else "direction only"
    return f"{found.value:+.3f} ± {found.standard_error:.3f}, {counts}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", default="gpu")
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--figures", type=pathlib.Path, default=HERE / "figures")
    args = parser.parse_args()
    results = load(args.scale, args.results)
    if not results:
        raise SystemExit(f"no result of scale {args.scale} in {args.results}")
    noise = seed_noise([result.finals for result in results])
    text = (
        f"{table(results, noise)}\n\n{answers(results, noise)}\n\n"
        f"Protocol: {RULE} Here s = {noise:.4f} nats/token. Seeds paired: {PAIRED_RULE}\n"
    )
    (args.results / f"{args.scale}-table.md").write_text(text)
    print(text)
    file = results[0].file
    steps = file["scale"]["steps"]
    methods = [Method(r.name, steps * r.cost.step_seconds, r.finals) for r in results if r.finite]
    points_figure(
        methods, args.figures / f"{args.scale}-final.png",
        x_label=f"time of {steps} steps of one run alone [s]", y_label="held-out loss [nats/token]",
        title=f"{file['parameters'] / 1e6:.1f}M parameters, {file['device']}, mean of "
        f"{len(file['seeds'])} seeds ± 2 standard errors; lower is better",
    )  # fmt: skip


if __name__ == "__main__":
    main()
