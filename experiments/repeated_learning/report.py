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
# Loops whose six views are drawn, with the last step shown.
SHOWN = {
    "window-linear-sgd50": 1400,
    "sampling-linear-sgd50": 10_000,
    "window-friedman-ridge0": 1400,
    "sampling-friedman-ridge0": 20_000,
    "sampling-linear-ridge0.1": 30_000,
}


def main() -> None:
    """Writes figures, and the tables as results/tables.md."""
    results = {
        path.stem: json.loads(path.read_text()) for path in (HERE / "results").glob("*.json")
    }
    loops, surfaces, laws = (
        {k.removeprefix(kind): v for k, v in sorted(results.items()) if k.startswith(kind)}
        for kind in ("loops-", "surface-", "critical-")
    )
    for name, last in SHOWN.items():
        series = [series_of(loops[name], case, last) for case in loops[name]["cases"]]
        for number, one in enumerate(series):
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
    """Growth against adherence around s*."""
    panels = []
    for law in laws.values():
        growth, theory = {}, {}
        for p, seeds, mean_field in zip(law["usage"], law["growth"], law["theory"], strict=True):
            band = rl.band_over_seeds(np.array(seeds).T)
            growth[f"{p:g}"], theory[f"{p:g}"] = np.array(band), np.array(mean_field)
        title = f"{law['setup']}, rule {law['rule']}, {law['steps']} steps"
        panels.append(
            CriticalLaw(title, np.array(law["adherence"]), growth, theory, law["critical"])
        )
    critical_law_figure(panels, FIGURES / "critical-adherence.png")


def checks_table(checks: list[Any]) -> str:
    """Published against ours."""
    rows = [
        [c.loop, c.what, c.published, f"{c.ours:.3g}", "yes" if c.agrees else "**no**"]
        for c in checks
    ]
    agreeing = sum(c.agrees for c in checks)
    table = format_table(["loop", "statistic", "published", "ours", "within"], rows, markdown=True)
    return f"{table}\n\n{agreeing} of {len(checks)} agree."


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
        adherence = np.array(law["adherence"])
        for p, seeds in zip(law["usage"], law["growth"], strict=True):
            # A line through the points of every seed.
            slopes, intercepts = np.polyfit(adherence, np.array(seeds), 1)
            # Ratio of means, not mean of ratios: single slopes may be close to zero.
            crossing = -intercepts.mean() / slopes.mean()
            rest = intercepts + slopes * crossing
            error = rest.std(ddof=1) / np.sqrt(rest.size) / slopes.mean()
            half = stdtrit(rest.size - 1, 0.975) * error
            rows.append(
                [
                    law["setup"], law["rule"], f"{p:g}", f"{law['critical']:.4f}",
                    f"{crossing:.4f}", f"{crossing - half:.4f} to {crossing + half:.4f}",
                    f"{100 * (crossing / law['critical'] - 1):+.1f} %",
                ]
            )  # fmt: skip
    headers = ["set-up", "rule", "p", "s* of theory", "measured", "95 % interval", "difference"]
    return format_table(headers, rows, markdown=True)


def cost_table(results: dict[str, Any]) -> str:
    """Seconds of CPU of every result file."""
    rows = [[name, result["cpu_seconds"]] for name, result in sorted(results.items())]
    return format_table(["result", "CPU seconds"], rows, markdown=True)


if __name__ == "__main__":
    main()
