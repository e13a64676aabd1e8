"""Figures and tables of the repeated-learning experiment, from results/*.json."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from checks import all_checks, log_density
from scipy.special import stdtrit

from jaxopt_lab.dynamics import repeated_learning as rl
from jaxopt_lab.report import format_table
from jaxopt_lab.report.loop_figures import (
    CriticalLaw,
    LoopSeries,
    comparison_figure,
    critical_law_figure,
    loop_figure,
    surface_figure,
)

HERE = pathlib.Path(__file__).parent
FIGURES = HERE / "figures"
ITEMS = 2000
# Loops whose six views are drawn: the last step shown, and which of the pairs.
SHOWN = {
    "window-linear-sgd50": (1400, (0, 1, 2)),
    "sampling-linear-sgd50": (10_000, (0, 1, 2)),
    "window-friedman-ridge0": (1400, (0,)),
    "sampling-friedman-ridge0": (20_000, (0,)),
    "sampling-linear-ridge0.1": (30_000, (0,)),
}


def main() -> None:
    """Writes figures, and the tables as results/tables.md."""
    results = {
        path.stem: json.loads(path.read_text()) for path in (HERE / "results").glob("*.json")
    }
    loops, surfaces, laws, controls = (
        {k.removeprefix(kind): v for k, v in sorted(results.items()) if k.startswith(kind)}
        for kind in ("loops-", "surface-", "critical-", "control-")
    )
    for name, law in laws.items():
        # The same seeds without adoption: what the loop alone did.
        drift = np.subtract(controls[name]["end"], controls[name]["start"])
        law["effect"] = np.array(law["growth"]) - drift
    for name, (last, pairs) in SHOWN.items():
        for number in pairs:
            one = series_of(loops[name], loops[name]["cases"][number], last)
            loop_figure(one, FIGURES / f"{name}-{number + 1}.png")
    for setup, last in (("window", 1400), ("sampling", 10_000)):
        loop = loops[f"{setup}-linear-ridge0"]
        series = [series_of(loop, case, last) for case in loop["cases"]]
        comparison_figure(
            series, FIGURES / f"deviation-{setup}.png", title=f"{setup}, linear, ridge0"
        )
    draw_surfaces(surfaces)
    draw_laws(laws)
    checks = all_checks(loops, surfaces)
    tables = [checks_table(checks), verdicts_table(loops), laws_table(laws), cost_table(results)]
    tables.insert(1, single_runs_table(results))
    (HERE / "results" / "tables.md").write_text("\n\n".join(tables) + "\n")
    print("\n\n".join(tables))


def series_of(loop: dict[str, Any], case: dict[str, Any], last: int) -> LoopSeries:
    """Curves of one pair up to a step, with theory."""
    step = np.array(case["step"])
    kept = step <= last
    step = step[kept]
    setup, pair = loop["setup"], dict(usage=case["usage"], adherence=case["adherence"])
    size = rl.LoopConfig(setup=setup).num_active(ITEMS)
    deviation, density, normality = (
        np.array(case[name], float)[:, kept]
        for name in ("deviation", "density_at_zero", "normality")
    )
    mass = {kappa: np.tile(np.array(v)[kept], (3, 1)) for kappa, v in case["mass"].items()}
    moments = {f"k = {k}": np.log1p(np.abs(np.array(v)[kept])) for k, v in case["moments"].items()}
    if setup == "window":
        moments = {"sum of 300": np.array(case["log_moment_sum"])[kept]}
    with jax.enable_x64(True):
        common = dict(setup=setup, size=size, rule="mae", **pair)
        theory = np.asarray(rl.relative_deviation(int(step[-1]), **common))[step]
        scale = np.asarray(rl.relative_scale(int(step[-1]), **common))[step]
        obedient = {
            kappa: np.asarray(rl.obedient_mass(step, setup=setup, size=size, initial=band[0, 0]))
            for kappa, band in mass.items()
            if case["adherence"] == 0.0
        }
        time, value = log_density(case, last)
        fits = {"line": rl.fit_line(time, value)}
        knot = 600.0 if setup == "window" else None
        fits["two pieces"] = rl.fit_pieces(time, value, knot=knot)
    name = f"p = {case['usage']:g}, s = {case['adherence']:g}"
    return LoopSeries(
        label=f"{setup}, {loop['data']}, {loop['learner']}, {name}, {loop['seeds']} seeds",
        name=name,
        step=step,
        deviation=deviation,
        density=density,
        mass=mass,
        normality=normality,
        moments=moments,
        fits={
            f"{key}, r² = {float(fit.r2):.3f}": np.asarray(fit.fitted) for key, fit in fits.items()
        },
        theory_deviation=deviation[0, 0] * theory,
        theory_density=density[0, 0] / scale if case["adherence"] > 0 else None,
        theory_mass=obedient,
    )


def draw_surfaces(surfaces: dict[str, Any]) -> None:
    """Heat maps of both set-ups and noises."""
    panels = {
        f"{s['setup']}, noise {s['noise']:g}": tuple(
            np.array(x) for x in (s["usage"], s["adherence"], np.divide(s["end"], s["start"]))
        )
        for s in surfaces.values()
    }
    critical = rl.critical_adherence("mae", setup="sampling")
    surface_figure(
        panels, FIGURES / "surfaces.png", critical=dict.fromkeys(panels, critical),
        title="std of residuals after 1400 steps, 6 seeds; black: no change",
    )  # fmt: skip


def draw_laws(laws: dict[str, Any]) -> None:
    """Growth against adherence around s*; where there are many seeds, of those."""
    panels = []
    for name, law in sorted(laws.items(), key=lambda item: (item[1]["rule"], item[1]["setup"])):
        if f"many-{name}" in laws:
            continue
        growth, theory = {}, {}
        for p, seeds, mean_field in zip(law["usage"], law["effect"], law["theory"], strict=True):
            band = rl.band_over_seeds(np.array(seeds).T)
            growth[f"{p:g}"], theory[f"{p:g}"] = np.array(band), np.array(mean_field)
        seeds = np.shape(law["growth"])[-1]
        title = f"{law['setup']}, rule {law['rule']}, {law['steps']} steps, {seeds} seeds"
        panels.append(
            CriticalLaw(title, np.array(law["adherence"]), growth, theory, law["critical"])
        )
    critical_law_figure(
        panels, FIGURES / "critical-adherence.png", y_label="ln(scale / scale without adoption)"
    )


def checks_table(checks: list[Any]) -> str:
    """Published against ours."""
    rows = [
        [c.loop, c.what, c.published, f"{c.ours:.3g}", "yes" if c.agrees else "**no**"]
        for c in checks
    ]
    agreeing = sum(c.agrees for c in checks)
    table = format_table(["loop", "statistic", "published", "ours", "within"], rows, markdown=True)
    return f"{table}\n\n{agreeing} of {len(checks)} agree."


def single_runs_table(results: dict[str, Any]) -> str:
    """R² of lines through single runs, beside those through the mean over seeds."""
    rows = []
    for data, published in (("linear", "0.78"), ("friedman", "0.893")):
        r2 = np.array(results[f"single-window-{data}-ridge0.1"]["r2"])
        rows.append([data, published, f"{r2.mean():.3f}", f"{r2.min():.3f} to {r2.max():.3f}"])
    headers = ["window, ridge0.1, (1, 0)", "published r2", "mean of single runs", "range"]
    return format_table(headers, rows, markdown=True)


def verdicts_table(loops: dict[str, Any]) -> str:
    """Verdict of every loop at the published number of steps."""
    rows = []
    for name, loop in loops.items():
        for case in loop["cases"]:
            mean, low, high = (f"{np.exp(g):.3g}" for g in case["growth"])
            theory = case["expected_growth"]
            rows.append(
                [
                    name.replace("-", " "), f"{case['usage']:g}", f"{case['adherence']:g}",
                    loop["seeds"], case["verdict"] + ("" if case["resolved"] else " (?)"), mean,
                    f"{low} to {high}", "0" if theory is None else f"{np.exp(theory):.3g}",
                ]
            )  # fmt: skip
    headers = ["loop", "p", "s", "seeds", "verdict", "end / start", "95 % interval", "mean field"]
    return format_table(headers, rows, markdown=True)


def laws_table(laws: dict[str, Any]) -> str:
    """Where the measured growth changes its sign, against s* of theory."""
    rows = []
    for law in laws.values():
        for number, p in enumerate(law["usage"]):
            cells = [law["setup"], law["rule"], f"{p:g}", np.shape(law["growth"])[-1]]
            cells.append(f"{law['critical']:.4f}")
            for kind in ("growth", "effect"):
                crossing, half = zero_crossing(law["adherence"], law[kind][number])
                cells += [
                    f"{crossing:.4f} ± {half:.4f}",
                    f"{100 * (crossing / law['critical'] - 1):+.1f} %",
                ]
            rows.append(cells)
    headers = [
        "set-up", "rule", "p", "seeds", "s* of theory", "against the first fit", "difference",
        "against no adoption", "difference",
    ]  # fmt: skip
    return format_table(headers, rows, markdown=True)


def zero_crossing(adherence: list[float], growth: Any) -> tuple[float, float]:
    """Where the mean line over seeds crosses zero, and half its 95 % interval."""
    slopes, intercepts = np.polyfit(np.array(adherence), np.array(growth), 1)
    # Ratio of means, not mean of ratios: single slopes may be close to zero.
    crossing = -intercepts.mean() / slopes.mean()
    rest = intercepts + slopes * crossing
    error = rest.std(ddof=1) / np.sqrt(rest.size) / slopes.mean()
    return float(crossing), float(stdtrit(rest.size - 1, 0.975) * error)


def cost_table(results: dict[str, Any]) -> str:
    """Seconds of CPU of every result file."""
    rows = [[name, result["cpu_seconds"]] for name, result in sorted(results.items())]
    return format_table(["result", "CPU seconds"], rows, markdown=True)


if __name__ == "__main__":
    main()
