"""Draws the figures and writes the tables of the experiment from results/*.json.

python experiments/sgd_dynamics/report.py [--scale cpu|gpu]
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np

from jaxopt_lab.dynamics import sgd
from jaxopt_lab.report.landscape_figures import growth_figure, stability_figure
from jaxopt_lab.report.ratio_figure import RatioPanel, ratio_figure
from jaxopt_lab.report.tables import format_table

HERE = pathlib.Path(__file__).parent
TITLES = {
    "mlp": "MLP-386, low loss",
    "half_trained": "MLP-386, half trained",
    "nanogpt": "NanoGPT-960, text",
    "cnn": "CNN, batch norm",
    "wide": "101 770 parameters",
}
NOISE_FLOOR = 1e-12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", choices=("cpu", "gpu"), default="cpu")
    scale = parser.parse_args().scale
    files = {
        path.stem.removeprefix(f"{scale}-"): json.loads(path.read_text())
        for path in sorted((HERE / "results").glob(f"{scale}-*.json"))
    }
    if not files:
        raise SystemExit(f"no results of scale {scale}; run.py --scale {scale} writes them")
    figures = HERE / "figures"
    networks = {name: file for name, file in files.items() if "runs" in file}
    print(agreement(networks) + "\n")
    runs = {name: networks[name]["runs"][0] for name in TITLES if name in networks}
    if runs:
        ratio_figure(
            [panel(run, TITLES[name]) for name, run in runs.items()],
            figures / f"{scale}-ratios.png",
        )
    if "mlp" in networks:
        draw_growth(networks["mlp"]["runs"][0], figures / f"{scale}-growth.png")
    if "sweep" in networks:
        print(sweep(networks["sweep"]) + "\n")
    if "wide_drift" in files:
        print(drift(files["wide_drift"]) + "\n")
    if "langevin" in files:
        draw_stability(files["langevin"], figures / f"{scale}-langevin.png")
        print(mismatch(files["langevin"]))


def drift(file: dict[str, Any]) -> str:
    """Loss and noise along one run from the point of the large network."""
    rows = np.array(file["steps_loss_sharp_random"])
    rows[:, 2:] /= rows[0, 2:]
    headers = ["step", "loss", "noise of the sharp directions / at the start", "of the random ones"]
    lines = [[f"{s:.0f}", f"{loss:.4f}", f"{a:.2f}", f"{b:.2f}"] for s, loss, a, b in rows]
    return format_table(headers, lines, markdown=True)


def agreement(files: dict[str, Any]) -> str:
    """One row a run: both predictors over all directions with noise."""
    headers = [
        "run", "loss", "gradient norm", "replicas x steps", "η", "directions", "P2 log-corr.",
        "P2 median m/p", "P2 sharp log-corr.", "P1 log-corr.", "P1 median m/p", "flat Π/(η²dn)",
        "all, noiseless too", "s.d. of ln m/p: P2", "η²dn alone", "of sampling", "η²dn log-corr.",
    ]  # fmt: skip
    rows = []
    for name, file in files.items():
        many = len(file["references"]) > 1
        for index, run in enumerate(file["runs"]):
            reference = file["references"][index if many else 0]
            p2, p1 = (run["comparisons"][f"{p}, all"] for p in ("P2", "P1"))
            label = f"{name}, seed {run['seed']}" if many else name
            rows.append(
                [
                    label, f"{reference['loss']:.3f}", f"{reference['gradient_norm']:.1e}",
                    f"{run['replicas']} x {run['steps']}", f"{run['learning_rate']:g}",
                    p2["directions"], p2["log_correlation"], p2["median_ratio"],
                    run["comparisons"]["P2, sharp"]["log_correlation"],
                    p1["log_correlation"], p1["median_ratio"], run["flat_growth_median"],
                    run["log_correlation_with_noiseless"], *scatter(run),
                ]
            )  # fmt: skip
    return format_table(headers, rows, markdown=True)


def scatter(run: dict[str, Any]) -> list[Any]:
    """How far ln(measured / predicted) scatters over the directions with noise.

    Of the finite-time prediction, and of a walk without curvature, η² d n. A variance over R
    replicas has a sampling error of √(2/(R − 1)) of its own.
    """
    noisy = noise_of(run)
    measured, predicted, noise = (
        np.asarray(run[name])[noisy] for name in ("measured", "finite_time", "gradient_variance")
    )
    logs = np.log([measured / predicted, measured / noise])  # η² n is the same for all of them
    sampling = np.sqrt(2 / (run["replicas"] - 1))
    correlation = np.corrcoef(np.log(measured), np.log(noise))[0, 1]
    return [f"{x:.3f}" for x in (*logs.std(axis=1), sampling)] + [f"{correlation:.4f}"]


def sweep(file: dict[str, Any]) -> str:
    """Regimes and flat growth by learning rate, and the traces by sampling."""
    headers = ["η", *sgd.REGIMES, "flat Π/(η²dn)", "variance, flat median", "P2 log-corr."]
    rows = []
    for run in file["runs"]:
        order = np.argsort(np.abs(run["curvature"]))
        noisy = order[noise_of(run)[order]][:100]
        flat = np.median(np.asarray(run["measured"])[noisy])
        comparison = run["comparisons"]["P2, all"]
        rows.append(
            [
                f"{run['learning_rate']:g}", *run["regimes"], run["flat_growth_median"],
                f"{flat:.2e}", comparison["log_correlation"],
            ]
        )  # fmt: skip
    traces = file["traces_after_three_epochs"]
    base = traces["with_replacement"]
    ratios = ", ".join(f"{name} {value / base:.2e}" for name, value in traces.items())
    table = format_table(headers, rows, markdown=True)
    return f"{table}\n\nTrace of the covariance after three epochs, relative: {ratios}"


def mismatch(file: dict[str, Any]) -> str:
    """The cells that the two bounds judge differently."""
    rows = []
    for i, rate in enumerate(file["rates"]):
        for j, variance in enumerate(file["curvature_variances"]):
            if file["langevin_stable"][i][j] and not file["stable"][i][j]:
                after = file["variance_after"][i][j]
                rows.append([rate, variance, file["growth"][i][j], f"{after:.2e}"])
    headers = ["η", "Γ", "ρ", f"variance after {file['steps']} steps"]
    return format_table(headers, rows, markdown=True)


def panel(run: dict[str, Any], title: str) -> RatioPanel:
    """Measured over predicted variance of every direction with noise, with and without λ."""
    shown = noise_of(run)
    measured, finite_time, d, curvature = (
        np.asarray(run[name])[shown]
        for name in ("measured", "finite_time", "gradient_variance", "curvature")
    )
    walk = run["learning_rate"] ** 2 * run["steps"] * d
    ratios = {"the recursion": measured / finite_time, "η²dn, no curvature": measured / walk}
    error = (2 / (run["replicas"] - 1)) ** 0.5
    title = f"{title}\n{run['replicas']} × {run['steps']} steps, η = {run['learning_rate']:g}"
    return RatioPanel(title, curvature, ratios, error)


def draw_growth(run: dict[str, Any], path: pathlib.Path) -> None:
    chosen = run["growth"]["directions"]
    curvature, d = (np.asarray(run[k])[chosen] for k in ("curvature", "gradient_variance"))
    steps = np.unique(np.geomspace(1, run["steps"], 100).round().astype(int))
    theory = sgd.finite_time_variance(
        steps, learning_rate=run["learning_rate"], curvature=curvature, gradient_variance=d
    )
    growth_figure(
        run["growth"]["steps"], run["growth"]["variance"], path, theory_steps=steps, theory=theory,
        labels=[f"λ = {value:.2g}" for value in curvature],
        regimes=[sgd.REGIMES[run["regime_of_direction"][i]] for i in chosen],
        relative_error=(2 / (run["replicas"] - 1)) ** 0.5,
        title="MLP-386: one initialisation, five eigendirections",
    )  # fmt: skip


def draw_stability(file: dict[str, Any], path: pathlib.Path) -> None:
    rates = np.linspace(0.1, 1.0, 200)
    grid = np.meshgrid(file["rates"], file["curvature_variances"], indexing="ij")
    bounds = [
        np.asarray(sgd.stability_bound(rates, file["curvature"], truncated=truncated))
        for truncated in (False, True)
    ]
    grows = ~np.asarray(file["stable"])
    stability_figure(
        rates, *bounds, path, points=(grid[0].ravel(), grid[1].ravel(), grows.ravel()),
        title="one direction, λ = 1",
    )  # fmt: skip


def noise_of(run: dict[str, Any]) -> np.ndarray:
    """Which directions have more noise than rounding."""
    d = np.asarray(run["gradient_variance"])
    return d > NOISE_FLOOR * d.max()


if __name__ == "__main__":
    main()
