"""Tables and figures of the comparison, from results/*.json.

python experiments/zeroth_order/fine_tuning/report.py
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np
from methods import METHODS
from run import HERE, slug

from jaxopt_lab.report import format_table
from jaxopt_lab.report.figures import Curve, curves_figure
from jaxopt_lab.sweep import accuracy_interval, paired_accuracy

GIB = 2**30


def main() -> None:
    """Writes tables.md and figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--figures", type=pathlib.Path, default=HERE / "figures")
    given = parser.parse_args()
    found = {
        name: result
        for name in METHODS
        if (path := given.results / f"{slug(name)}.json").exists()
        and "final" in (result := json.loads(path.read_text()))
    }
    zero_shot = json.loads((given.results / "zero-shot.json").read_text())
    given.figures.mkdir(exist_ok=True, parents=True)
    parts = [table(found, zero_shot), tuning_table(found), verdicts(found)]
    if missing := [name for name in METHODS if name not in found]:
        parts.append(f"Not run: {', '.join(missing)}.")
    (given.results / "tables.md").write_text("\n\n".join(parts) + "\n")
    print("\n\n".join(parts))
    for moves, title in (("full", "all parameters"), ("lora", "LoRA")):
        shown = {n: r for n, r in found.items() if METHODS[n].moves == moves}
        if shown:
            draw(shown, title, given.figures / f"{moves}.png")


def correct(result: dict[str, Any]) -> np.ndarray:
    """(seeds, rows) of the final runs."""
    return np.array([[digit == "1" for digit in one["correct"]] for one in result["final"]["test"]])


def table(found: dict[str, Any], zero_shot: dict[str, Any]) -> str:
    """A line a method."""
    right = np.array([digit == "1" for digit in zero_shot["correct"]])
    _, low, high = accuracy_interval(right)
    start = f"{100 * right.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})"
    rows = [["zero-shot", "", "0", start, f"{zero_shot['nats']:.3f}", "", "", "", ""]]
    for name, result in found.items():
        final, tuning, answers = result["final"], result["tuning"], correct(result)
        rim = " rim" if tuning["rim"] else ""
        seeds = ", ".join(f"{100 * x:.1f}" for x in answers.mean(1))
        first_order = "AdamW, LoRA" if METHODS[name].moves == "lora" else "AdamW"
        rows.append(
            [
                name,
                f"{tuning['rate']:.0e}{rim}",
                f"{final['passes'][-1]:,}",
                f"{100 * answers.mean():.1f} ({seeds})",
                f"{np.mean([one['nats'] for one in final['test']]):.3f}",
                against(found, name, "MeZO, LoRA" if METHODS[name].moves == "lora" else "MeZO"),
                against(found, name, first_order),
                f"{final['lane_bytes'] / GIB:.2f}",
                f"{final['seconds'] / final['lanes']:.0f}",
            ]
        )
    header = [
        "method", "rate", "forward passes", "test accuracy, % (seeds)", "test loss",
        "against MeZO", "against AdamW", "GiB a lane", "seconds a lane",
    ]  # fmt: skip
    return format_table(header, rows, markdown=True)


def interval(found: dict[str, Any], first: str, second: str) -> tuple[float, float, float, bool]:
    """Difference of accuracies in percent, its interval, and whether it counts by the rule."""
    a, b = correct(found[first]), correct(found[second])
    value, low, high = (100 * x for x in paired_accuracy(a.ravel(), b.ravel()))
    signs = np.sign(a.mean(1) - b.mean(1))
    counts = (low > 0 or high < 0) and bool((signs == signs[0]).all())
    return value, low, high, counts


def against(found: dict[str, Any], name: str, other: str) -> str:
    """The paired difference, with a mark where it counts."""
    if other not in found or name == other:
        return ""
    value, low, high, counts = interval(found, name, other)
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f}){' *' if counts else ''}"


def verdicts(found: dict[str, Any]) -> str:
    """The claims by the rule of README.md."""
    pairs = [
        (f"{jaguar}{suffix}", f"AdamW{suffix}")
        for suffix in ("", ", LoRA")
        for jaguar in ("JAGUAR Muon", "JAGUAR SignSGD")
    ]
    pairs += [("LDSD over SGD", "MeZO"), ("LDSD over SGD", "MeZO, 5 probes")]
    pairs += [("LDSD over SGD, LoRA", "MeZO, LoRA")]
    lines = []
    for first, second in pairs:
        if first in found and second in found:
            value, low, high, counts = interval(found, first, second)
            word = ("better" if value > 0 else "worse") if counts else "no difference"
            lines.append(
                f"- {first} against {second}: {value:+.1f} ({low:+.1f} to {high:+.1f}), {word}"
            )
    return "\n".join(lines)


def tuning_table(found: dict[str, Any]) -> str:
    """Lowest validation losses of the three rates."""
    rows = [
        [name, *(f"{rate:.0e}: {shown(x)}" for rate, x in zip(t["rates"], t["best"], strict=True))]
        for name, result in found.items()
        if (t := result["tuning"])
    ]
    return format_table(["lowest validation loss", "low", "middle", "high"], rows, markdown=True)


def shown(loss: float | None) -> str:
    """A loss, or that there is none."""
    return "diverged" if loss is None else f"{loss:.3f}"


def draw(found: dict[str, Any], title: str, path: pathlib.Path) -> None:
    """Validation loss over forward passes, mean and range of two seeds."""
    curves = []
    for name, result in found.items():
        final = result["final"]
        losses = np.array(final["validation"], float)
        shown = np.array(final["passes"]) <= 5_000
        curves.append(
            Curve(
                name, np.array(final["passes"])[shown], losses.mean(0)[shown],
                low=losses.min(0)[shown], high=losses.max(0)[shown], final_value=False,
            )
        )  # fmt: skip
    curves_figure(
        curves, path, x_label="forward passes (a backward pass counts as two)",
        y_label="validation loss, nats per row",
        title=f"SmolLM2-135M on movie sentences, {title}; range of two seeds",
    )  # fmt: skip


if __name__ == "__main__":
    main()
