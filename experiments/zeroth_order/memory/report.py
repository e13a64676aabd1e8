"""Figure and tables of the memory study, from results/*.json."""

import json
import pathlib
from typing import Any

from matplotlib.figure import Figure

from jaxopt_lab.report import format_table
from jaxopt_lab.report.figures import PALETTE, save_figure

HERE = pathlib.Path(__file__).parent
MODELS = ("1b", "124m")


def main() -> None:
    """Writes figures/*.png, and the tables as results/tables.md."""
    results = {p.stem: json.loads(p.read_text()) for p in (HERE / "results").glob("*.json")}
    tables = []
    for device in sorted({name.rsplit("-", 2)[0] for name in results}):
        columns = {
            (model, dtype): results[name]
            for model in MODELS
            for dtype in ("float32", "bfloat16")
            if (name := f"{device}-{model}-{dtype}") in results
        }
        tables.append(f"### {device}\n\n{table(columns)}\n\n{verdicts(columns)}")
        draw(device, columns)
    (HERE / "results" / "tables.md").write_text("\n\n".join(tables) + "\n")
    print("\n\n".join(tables))


def ratio(result: dict[str, Any], row: str) -> float | None:
    """Arguments and temporaries over the parameters."""
    found = result["rows"].get(row)
    if found is None:
        return None
    return (found["arguments"] + found["temporaries"]) / result["parameter_bytes"]


def rows_of(columns: dict[Any, dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row for result in columns.values() for row in result["rows"]))


def table(columns: dict[Any, dict[str, Any]]) -> str:
    """(Arguments + temporaries) / parameters of every row."""
    headers = ["program", *(f"{model}, {dtype}" for model, dtype in columns)]
    cells = [
        [row, *(None if (r := ratio(c, row)) is None else f"{r:.3f}" for c in columns.values())]
        for row in rows_of(columns)
    ]
    sizes = [f"{c['parameter_bytes'] / 1e9:.2f} GB" for c in columns.values()]
    return format_table(headers, [*cells, ["parameters", *sizes]], markdown=True)


def verdicts(columns: dict[Any, dict[str, Any]]) -> str:
    """The quotient of a perturbed loss and inference."""
    lines = []
    for (model, dtype), result in columns.items():
        plain = ratio(result, "inference")
        for row in ("one loss, layer by layer", "one loss, layer by layer, signs"):
            if plain and (found := ratio(result, row)):
                lines.append(f"- {model}, {dtype}: {row} / inference = {found / plain:.3f}")
    return "\n".join(lines)


def draw(device: str, columns: dict[Any, dict[str, Any]]) -> None:
    """Bars of the 1B model (or what there is): the parameters, and what comes beside them."""
    (model, dtype), result = next(iter(columns.items()))
    rows = [row for row in result["rows"] if not row.startswith("one loss")][::-1]
    figure = Figure(figsize=(7.5, 0.42 * len(rows) + 1.1), dpi=150, layout="constrained")
    axes = figure.subplots()
    found = result["rows"]
    arguments = [found[row]["arguments"] / 1e9 for row in rows]
    temporaries = [found[row]["temporaries"] / 1e9 for row in rows]
    axes.barh(rows, arguments, color=PALETTE[0], label="parameters and state")
    axes.barh(rows, temporaries, left=arguments, color=PALETTE[1], label="temporaries")
    for i, (a, t) in enumerate(zip(arguments, temporaries, strict=True)):
        times = (a + t) * 1e9 / result["parameter_bytes"]
        axes.text(a + t, i, f" {times:.2f} ×", va="center", fontsize=8)
    axes.axvline(result["parameter_bytes"] / 1e9, color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel("GB (dashed: the parameters)")
    axes.set_xlim(0, 1.12 * max(a + t for a, t in zip(arguments, temporaries, strict=True)))
    axes.set_title(f"{model}, 1 × 512 tokens, {dtype} compute, compiler for {device}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    save_figure(figure, HERE / "figures" / f"{device}-{model}.png")


if __name__ == "__main__":
    main()
