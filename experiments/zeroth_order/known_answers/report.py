"""Tables and figures of both checks, from results/*.json.

python experiments/zeroth_order/known_answers/report.py
"""

import json
import pathlib
from typing import Any

import numpy as np
from run import METHODS, RESULTS, RUNS, VARIANTS, reached

from jaxopt_lab.report import format_table
from jaxopt_lab.report.figures import Curve, curves_figure

FIGURES = pathlib.Path(__file__).parent / "figures"
WIDENED, ZERO, LAW = 1.25, 5e-4, 0.03


def main() -> None:
    """Writes results/tables.md and the figures."""
    quadratic, alignment = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("quadratic", "alignment")
    )
    tables = [quadratic_table(quadratic, variant) for variant in VARIANTS]
    tables.append(alignment_table(alignment))
    cost = quadratic["cpu_seconds"] + alignment["cpu_seconds"]
    tables.append(f"jax {quadratic['jax']}, {cost:.0f} s of CPU.")
    (RESULTS / "tables.md").write_text("\n\n".join(tables) + "\n")
    print("\n\n".join(tables))
    FIGURES.mkdir(exist_ok=True)
    for variant in VARIANTS:
        draw_quadratic(quadratic, variant)
    draw_alignment(alignment)


def curves_of(result: dict[str, Any], variant: str, name: str, cell: Any) -> np.ndarray:
    """(runs, records) of f."""
    wanted = {"variant": variant, "method": name}
    wanted |= dict(zip(("rate", "kept", "noise"), cell, strict=True))
    found = [r["f"] for r in result["runs"] if all(r[k] == v for k, v in wanted.items())]
    assert len(found) == RUNS
    return np.asarray(found)


def agrees(ours: np.ndarray, stated: float) -> bool:
    """The rule of README.md."""
    if stated == 0:
        return bool(ours.mean() < ZERO)
    return bool(ours.min() / WIDENED <= stated <= ours.max() * WIDENED)


def quadratic_table(result: dict[str, Any], variant: str) -> str:
    rows, good, total = [], 0, 0
    for name, cells in METHODS.items():
        for cell, stated in cells.items():
            ours = np.array([reached(f) for f in curves_of(result, variant, name, cell)])
            row: list[Any] = [name, f"{cell[0]:g}", f"{cell[1]:g}", f"{cell[2]:g}"]
            for column, value in zip(ours.T, stated, strict=True):
                mean = f"{column.mean():.2g} ({column.min():.2g} to {column.max():.2g})"
                if value is None:
                    row.append(mean)
                    continue
                total, good = total + 1, good + agrees(column, value)
                row.append(f"{mean} / {value:g}{'' if agrees(column, value) else ' **no**'}")
            rows.append(row)
    header = ["method", "rate", "β", "noise", *(f"{n} steps" for n in ("1 000", "5 000", "20 000"))]
    title = f"{variant}: mean (range of {RUNS}) / reference; {good} of {total} cells agree"
    return f"{title}\n\n{format_table(header, rows, markdown=True)}"


def law(d: int, candidates: int, times: Any) -> np.ndarray:
    return (1 + d / ((candidates - 1) * np.asarray(times))) ** -0.5


def alignment_table(result: dict[str, Any]) -> str:
    rows = []
    for case in result["cases"]:
        cosines, expected = (
            np.array(case["cosines"]),
            law(case["d"], case["candidates"], result["times"]),
        )
        means = cosines.mean(0)
        errors = cosines.std(0, ddof=1) / np.sqrt(len(cosines))
        if case["released"]:
            holds = bool(np.all(np.abs(means) < 3 * errors))
            shown = [f"{m:.3f} ± {e:.3f}" for m, e in zip(means, errors, strict=True)]
        else:
            holds = bool(np.all(np.abs(means - expected) < LAW))
            shown = [f"{m:.3f} / {e:.3f}" for m, e in zip(means, expected, strict=True)]
        stream = "released" if case["released"] else "evaluated"
        rows.append([case["d"], case["candidates"], stream, *shown, "yes" if holds else "**no**"])
    header = ["d", "K", "directions", *(f"T = {t}" for t in result["times"]), "holds"]
    table = format_table(header, rows, markdown=True)
    return f"cosine, mean / law (released: ± standard error)\n\n{table}"


def draw_quadratic(result: dict[str, Any], variant: str) -> None:
    curves = []
    for name, cell in (
        ("MeZO", (1e-2, 0, 0)),
        ("ZO-SignSGD, elementwise", (1e-2, 0, 0)),
        ("ZO-SignSGD, scalar", (1e-2, 0, 0)),
        *(("JAGUAR SignSGD", (1e-2, kept, 0)) for kept in (0.9, 0.5, 0.0)),
        ("JAGUAR SignSGD", (1e-3, 0.0, 0)),
    ):  # fmt: skip
        f = np.maximum(curves_of(result, variant, name, cell), 1e-8)
        x = result["every"] * np.arange(1, f.shape[1] + 1)
        label = f"{name}, {cell[0]:g}" + (f", β = {cell[1]:g}" if "JAGUAR" in name else "")
        curves.append(
            Curve(
                label, x, np.exp(np.log(f).mean(0)), low=f.min(0), high=f.max(0), final_value=False
            )
        )
    curves_figure(
        curves, FIGURES / f"quadratic-{variant}.png", x_label="step", log_y=True,
        y_label="f (geometric mean, 1e-8 where below)",
        title=f"quadratic, d = 50, {variant}; bands: range of {RUNS} runs",
    )  # fmt: skip


def draw_alignment(result: dict[str, Any]) -> None:
    curves, times = [], result["times"]
    for color, case in enumerate(result["cases"]):
        cosines = np.array(case["cosines"])
        stream = ", released directions" if case["released"] else ""
        label = f"d = {case['d']}, K = {case['candidates']}{stream}"
        spread = {"low": cosines.min(0), "high": cosines.max(0)}
        curves.append(Curve(label, times, cosines.mean(0), **spread, markers=True, color=color))
        if not case["released"]:
            expected = law(case["d"], case["candidates"], times)
            curves.append(Curve(f"law {label}", times, expected, faint=True, color=color))
    curves_figure(
        curves, FIGURES / "alignment.png", x_label="steps T", log_x=True,
        y_label="cosine of the mean and minus the gradient",
        title="alignment of LDSD's policy; thin: the law; bands: range of 20 seeds",
    )  # fmt: skip


if __name__ == "__main__":
    main()
