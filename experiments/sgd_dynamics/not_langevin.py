"""SGD on a network against its recursion and against Langevin's equation; see README.md.

nice -n 10 python experiments/sgd_dynamics/not_langevin.py
python experiments/sgd_dynamics/not_langevin.py --report
"""

import argparse
import functools
import json
import pathlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from measure import Point, Run, Training, ensemble, exact_point, rounded, train
from scipy.stats import chi2

from jaxopt_lab.dynamics import sgd
from jaxopt_lab.report import format_table
from jaxopt_lab.report.files import appearing_whole
from jaxopt_lab.report.ratio_figure import RatioPanel, ratio_figure

HERE = pathlib.Path(__file__).parent
SAMPLES, SEEDS, SHARPEST, FLATTEST = 2048, (3, 4, 5), 8, 100
# Gradient descent at half the rate of run.py: there it is at the edge of stability where λ₁ > 4.
TRAINING = Training(sgd_steps=10_000, sgd_rate=0.1, gd_steps=20_000, gd_rate=0.25)
PRODUCTS = (0.2, 0.5, 1.0, 1.5, 1.8)  # ηλ₁
STEPS = 500
FLAT = Run(learning_rate=0.05, steps=20_000, replicas=256, record_every=500)
# A prediction falls beyond this quantile.
LEVEL = 0.999


@dataclass(frozen=True)
class Batches:
    """A size of batch, and as many replicas as it can have for a similar price."""

    size: int
    replicas: int


BATCHES = (Batches(64, 4000), Batches(256, 1000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--figures", type=pathlib.Path, default=HERE / "figures")
    parser.add_argument("--digits", default="mnist5k", help="mnist5k or a directory of IDX files")
    parser.add_argument("--report", action="store_true", help="tables and figure, no runs")
    parser.add_argument("--trial", action="store_true", help="tiny runs, which decide nothing")
    options = parser.parse_args()
    if options.report:
        print(report(options.out, options.figures))
        return
    if options.trial and options.out == HERE / "results":
        raise SystemExit("--trial: give it a directory of its own with --out")
    options.out.mkdir(parents=True, exist_ok=True)
    system = sgd.mlp(*sgd.read_digits(options.digits, limit=SAMPLES))

    @functools.cache
    def point_of(seed: int) -> Point:
        training = replace(TRAINING, sgd_steps=50, gd_steps=50) if options.trial else TRAINING
        begun = time.perf_counter()
        point = exact_point(system, train(system, training, seed))
        print(f"seed {seed}: reference point, {time.perf_counter() - begun:.0f} s", flush=True)
        return point

    for path, seed, product, batches in _missing(options.out):
        result = measure(point_of(seed), seed, product, batches, trial=options.trial)
        with appearing_whole(path) as partial:  # a file that is there is whole
            partial.write_text(json.dumps({**result, "training": vars(TRAINING)}) + "\n")
        print(f"{path.name}: {result['seconds']} s", flush=True)


def _missing(out: pathlib.Path) -> Iterator[tuple[pathlib.Path, int, float | None, Batches]]:
    """Runs that have no result file; ηλ₁ is None for the growth of flat directions."""
    runs: list[tuple[str, int, float | None, Batches]] = [
        (f"discrete-batch{each.size}-{product:g}-seed{seed}.json", seed, product, each)
        for each in BATCHES
        for seed in SEEDS
        for product in PRODUCTS
    ]
    runs.append((f"discrete-flat-seed{SEEDS[0]}.json", SEEDS[0], None, BATCHES[0]))
    for name, *what in runs:
        if not (out / name).exists():
            yield out / name, *what


def measure(
    point: Point, seed: int, product: float | None, batches: Batches, *, trial: bool
) -> dict[str, Any]:
    """One ensemble, along the sharpest or the flattest directions with noise."""
    begun = time.perf_counter()
    run = FLAT
    if product is not None:
        rate = product / point.eigenvalues.max()
        run = Run(rate, STEPS, batches.replicas, STEPS, batches.size)
    if trial:
        run = replace(run, replicas=8, steps=2 * run.record_every if product is None else STEPS)
    noise = sgd.noise_statistics(
        point.system.loss, point.reference.params, point.system.data,
        directions=point.directions, batch_size=run.batch_size,
    )  # fmt: skip
    d, gamma = noise.gradient_variance, noise.diagonal_variance
    assert gamma is not None
    # Of largest curvature, or of smallest among those that are more than rounding.
    order = np.argsort(-point.eigenvalues)[:SHARPEST]
    if product is None:
        flat = np.argsort(np.abs(point.eigenvalues))
        order = flat[d[flat] > 1e-12 * d.max()][:FLATTEST]
    found = ensemble(point, run, seed)
    return {
        "seed": seed, "product": product, **vars(run),
        "loss": float(point.reference.loss[-1]),
        "gradient_norm": float(point.reference.gradient_norm[-1]),
        "curvature": rounded(point.eigenvalues[order]),
        "gradient_variance": rounded(d[order]),
        "curvature_variance": rounded(gamma[order]),
        "at": found.steps.tolist(),
        "mean": rounded(found.mean[-1][order]),
        "measured": [rounded(row[order]) for row in found.variance],
        "device": jax.devices()[0].device_kind, "jax": jax.__version__,
        "seconds": round(time.perf_counter() - begun, 1),
    }  # fmt: skip


def predictions(run: dict[str, Any], steps: Any) -> dict[str, np.ndarray]:
    """Variances after some steps, (steps, directions): the recursion, with Γ, and Langevin's."""
    rate = run["learning_rate"]
    curvature, d, gamma = (
        np.asarray(run[name]) for name in ("curvature", "gradient_variance", "curvature_variance")
    )
    law = {"learning_rate": rate, "curvature": curvature, "gradient_variance": d}
    n = np.asarray(steps)
    with jax.enable_x64(True):
        # Of the Ornstein-Uhlenbeck process at the time ηn; its recursion step by step would
        # diverge beyond ηλ = 1, which the process does not.
        stationary = np.asarray(sgd.stationary_variance(truncated=True, **law))
    return {
        "recursion": sgd.finite_time_variance(n, **law),
        "recursion with Γ": sgd.finite_time_variance(n, curvature_variance=gamma, **law),
        "Langevin": -np.expm1(-2 * rate * curvature * n[:, None]) * stationary,
    }


def sampling_error(run: dict[str, Any]) -> float:
    """Of the logarithm of a variance over the replicas, for Gaussian ones."""
    return (2 / (run["replicas"] - 1)) ** 0.5


def report(out: pathlib.Path, figures: pathlib.Path) -> str:
    """Tables and figures of all runs that are there; says what is missing."""
    missing = len(list(_missing(out)))
    parts = [f"**{missing} runs are missing; no verdict.**"] if missing else []
    groups = {
        (batches, product): [json.loads(path.read_text()) for path in paths]
        for batches in BATCHES
        for product in PRODUCTS
        if (paths := sorted(out.glob(f"discrete-batch{batches.size}-{product:g}-seed*.json")))
    }
    parts.append(_table(groups))
    _draw(groups, figures)
    for path in sorted(out.glob("discrete-flat-seed*.json")):
        parts.append(_growth(json.loads(path.read_text())))
    return "\n\n".join(parts)


def _table(groups: dict[tuple[Batches, float], list[dict[str, Any]]]) -> str:
    rows = []
    for (batches, product), runs in groups.items():
        cells: list[Any] = [f"{batches.size}, {batches.replicas}", f"{product:g}", len(runs)]
        sharpest: list[str] = []
        for name in ("recursion", "recursion with Γ", "Langevin"):
            logs = np.array([_logs(run, name) for run in runs])
            errors = np.array([[sampling_error(run)] for run in runs])
            value, freedom = float(np.sum((logs / errors) ** 2)), logs.size
            falls = value > chi2.ppf(LEVEL, freedom)
            cells.append(f"{value / freedom:.2f}{' falls' if falls else ''}")
            sharpest.append(f"{np.exp(logs[:, 0].mean()):.3f}")
        rows.append([*cells, *sharpest])
    what = ("recursion", "with Γ", "Langevin")
    headers = [
        "batch, replicas", "ηλ₁", "seeds", *(f"χ²/d.o.f., {name}" for name in what),
        *(f"sharpest: measured / {name}" for name in what),
    ]  # fmt: skip
    return format_table(headers, rows, markdown=True)


def _logs(run: dict[str, Any], name: str) -> np.ndarray:
    """ln(measured / predicted) of every direction after the last step."""
    return np.log(np.asarray(run["measured"])[-1] / predictions(run, [run["steps"]])[name][-1])


def _draw(groups: dict[tuple[Batches, float], list[dict[str, Any]]], figures: pathlib.Path) -> None:
    for batches in BATCHES:
        panels = []
        for (each, product), runs in groups.items():
            if each != batches:
                continue
            names = ("recursion", "Langevin")
            curvature = np.concatenate([run["curvature"] for run in runs])
            ratios = {
                f"measured / {name}": np.exp(np.concatenate([_logs(run, name) for run in runs]))
                for name in names
            }
            title = f"ηλ₁ = {product:g}"
            panels.append(RatioPanel(title, curvature, ratios, sampling_error(runs[0])))
        if panels:
            ratio_figure(
                panels, figures / f"discrete-batch{batches.size}.png",
                title=f"MLP-386, batches of {batches.size}, {batches.replicas} replicas, three "
                "seeds, eight sharpest directions",
            )  # fmt: skip


def _growth(run: dict[str, Any]) -> str:
    """Of the flattest directions: measured over η² d n and over the recursion, by step."""
    at, measured = np.asarray(run["at"]), np.asarray(run["measured"])
    law = predictions(run, at)["recursion"]
    walk = run["learning_rate"] ** 2 * np.asarray(run["gradient_variance"]) * at[:, None]
    rows = []
    for steps in (500, 2000, 5000, 10_000, 20_000):
        if steps in at:
            k = int(np.flatnonzero(at == steps)[0])
            medians = [np.median(measured[k] / x[k]) for x in (walk, law)]
            rows.append([f"{steps:,}", *(f"{x:.3f}" for x in medians)])
    headers = ["steps", "median of Π/(η²dn)", "median of Π/recursion"]
    table = format_table(headers, rows, markdown=True)
    late = at >= at[-1] // 2
    slopes = [
        float(np.median(np.polyfit(np.log(at[late]), np.log(x[late]), 1)[0]))
        for x in (measured, law)
    ]
    return (
        f"{table}\n\nSlope of ln Π over ln n, second half, median: {slopes[0]:.3f} measured, "
        f"{slopes[1]:.3f} of the recursion."
    )


if __name__ == "__main__":
    main()
