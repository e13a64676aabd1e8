"""Figures and tables of the black-box study, from results/*.json."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxopt_lab.report import format_table
from jaxopt_lab.report.figures import Curve, curves_figure
from jaxopt_lab.sweep.significance import difference, seed_noise

HERE = pathlib.Path(__file__).parent
FIGURES = HERE / "figures"
METHODS = (
    *("JAGUAR", "full", "coordinate", "sphere", "SEGA", "coordinate, momentum"),
    *("sphere, corrected momentum", "JAGUAR, memory alone", "full, momentum", "sphere, momentum"),
)
# What is left below this is the rounding of f*.
FLOOR = 1e-9


def main() -> None:
    """Writes figures, and the tables as results/tables.md."""
    results = {
        path.stem: json.loads(path.read_text()) for path in (HERE / "results").glob("*.json")
    }
    compared = {name: r for name, r in sorted(results.items()) if "methods" in r}
    for name, result in compared.items():
        draw(name, result)
    tables = []
    for kind in ("fw", "point", "descent"):
        chosen = {name: r for name, r in compared.items() if kind in name.split("-")[0]}
        tables += [verdict_table(chosen), cells_table(chosen)]
    tables.append(budget_table(compared))
    if "noise" in results:
        tables.append(noise(results["noise"]))
    cost = sum(result["cpu_seconds"] for result in results.values())
    tables.append(f"{len(results)} results, {cost / 60:.0f} minutes of CPU.")
    (HERE / "results" / "tables.md").write_text("\n\n".join(tables) + "\n")
    print("\n\n".join(tables))


def measure(name: str) -> tuple[str, str]:
    """Which record of a run is compared, and its name."""
    return ("gaps", "Frank-Wolfe gap") if "tanh" in name else ("excess", "f - f*")


def draw(name: str, result: dict[str, Any]) -> None:
    """Mean over seeds with their range, over the number of values asked for."""
    key, label = measure(name)
    curves = []
    for color, (method, run) in enumerate(in_order(result)):
        values = np.maximum(np.array(run[key], float), FLOOR)
        mean, low, high = np.exp(np.log(values).mean(0)), values.min(0), values.max(0)
        curves.append(
            Curve(
                method, run["calls"], mean, low=low, high=high, final_value=False,
                color=color,
            )
        )  # fmt: skip
    curves_figure(
        curves, FIGURES / f"{name}.png", x_label="values of f asked for", y_label=label,
        title=f"{name}, d = {result['d']}", log_y=True, log_x=True,
    )  # fmt: skip


def in_order(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for method in METHODS:
        if method in result["methods"]:
            yield method, result["methods"][method]


def finals(name: str, run: dict[str, Any]) -> np.ndarray:
    """log10 of the mean over the last tenth of a run, for every seed."""
    values = np.array(run[measure(name)[0]], float)
    last = np.array(run["calls"]) > 0.9 * run["calls"][-1]
    return np.log10(np.maximum(values[:, last].mean(1), FLOOR))


def verdict_table(compared: dict[str, Any]) -> str:
    """Final measure of every method, and what the rule says of JAGUAR."""
    rows = []
    for name, result in compared.items():
        final = {method: finals(name, run) for method, run in in_order(result)}
        ours = final["JAGUAR"]
        verdicts = {
            method: difference(ours, other, seed_noise([ours, other])).verdict("JAGUAR")
            for method, other in final.items()
            if method != "JAGUAR"
        }
        better = [method for method, said in verdicts.items() if said == "JAGUAR is worse"]
        wins = all(said == "JAGUAR is better" for said in verdicts.values())
        cells = [
            f"{10 ** final[m].mean():.2g}{' rim' if result['methods'][m]['rim'] else ''}"
            if m in final
            else None
            for m in METHODS
        ]
        verdict = "wins" if wins else "ties" if not better else f"loses to {', '.join(better)}"
        rows.append([name, *cells, verdict])
    used = [k for k in range(len(rows[0])) if any(row[k] is not None for row in rows)]
    headers = ["problem", *METHODS, "by the rule JAGUAR"]
    table = [[row[k] for k in used] for row in rows]
    return format_table([headers[k] for k in used], table, markdown=True)


def cells_table(compared: dict[str, Any]) -> str:
    """The cells that tuning chose."""
    used = [m for m in METHODS if any(m in r["methods"] for r in compared.values())]
    rows = [
        [name, *(f"{r['methods'][m]['cell']:.3g}" if m in r["methods"] else None for m in used)]
        for name, r in compared.items()
    ]
    return format_table(["chosen K or rate", *used], rows, markdown=True)


def budget_table(compared: dict[str, Any]) -> str:
    """Values after parts of the budget."""
    rows = []
    for name, result in compared.items():
        for method in ("JAGUAR", "full"):
            if method not in result["methods"]:
                continue
            run = result["methods"][method]
            values = np.maximum(np.array(run[measure(name)[0]], float), FLOOR)
            mean, calls = 10 ** np.log10(values).mean(0), np.array(run["calls"])
            at = [np.interp(c, calls, mean) for c in (500, 1000, 2500, 5000, 10_000)]
            rows.append([name, method, *(f"{x:.2g}" for x in at)])
    return format_table(
        ["problem", "method", "500", "1000", "2500", "5000", "10000"], rows, markdown=True
    )


def noise(result: dict[str, Any]) -> str:
    """The sweep over distances: figure and table."""
    excess = np.maximum(np.array(result["excess"], float), FLOOR)
    distances, curves, rows = np.array(result["distances"]), [], []
    for level, values in zip(result["noises"], excess, strict=True):
        logs = np.log10(values)
        mean = logs.mean(1)
        best = int(np.argmin(mean))
        predicted = (2 * level / result["coordinate_smoothness"]) ** 0.5
        smallest = difference(logs[0], logs[best], seed_noise([logs[0], logs[best]]))
        curves.append(
            Curve(
                f"noise {level:g}, √(2Δ/L) = {predicted:.2g}", distances, 10**mean,
                low=values.min(1), high=values.max(1), markers=True, final_value=False,
            )
        )  # fmt: skip
        ratio = distances[best] / predicted
        confirmed = smallest.counts and smallest.value > 0 and 0.25 <= ratio <= 4
        rows.append(
            [f"{level:g}", f"{distances[best]:.2g}", f"{predicted:.2g}", f"{ratio:.2g}",
             f"{10 ** mean[best]:.2g}", f"{10 ** mean[0]:.2g}", "yes" if confirmed else "**no**"]
        )  # fmt: skip
    curves_figure(
        curves, FIGURES / "noise.png", x_label="τ", y_label="final f - f*", log_x=True, log_y=True,
        title="JAGUAR, logistic loss, mushroom, l2 ball",
    )  # fmt: skip
    headers = ["Δ", "best τ", "√(2Δ/L)", "ratio", "f - f* there", "at τ = 1e-4", "confirmed"]
    return format_table(headers, rows, markdown=True)


if __name__ == "__main__":
    main()
