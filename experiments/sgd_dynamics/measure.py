"""From a trained point to measured and predicted variances, as plain data for a result file."""

import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxopt_lab.dynamics import sgd


@dataclass(frozen=True)
class Training:
    """The way to the reference point."""

    sgd_steps: int
    sgd_rate: float
    gd_steps: int = 0
    gd_rate: float | None = None
    batch_size: int = 64


@dataclass(frozen=True)
class Run:
    """One ensemble."""

    learning_rate: float
    steps: int
    replicas: int
    record_every: int
    batch_size: int = 64


@dataclass(frozen=True)
class Point:
    """A reference point with its eigendirections and the noise along them."""

    system: sgd.System
    reference: sgd.ReferencePoint
    eigenvalues: np.ndarray
    directions: np.ndarray
    noise: sgd.NoiseStatistics
    extra: dict[str, Any]


def train(system: sgd.System, training: Training, seed: int) -> sgd.ReferencePoint:
    """The reference point of a seed."""
    return sgd.reference_point(
        jax.random.key(seed), system, sgd_steps=training.sgd_steps, sgd_rate=training.sgd_rate,
        batch_size=training.batch_size, gd_steps=training.gd_steps, gd_rate=training.gd_rate,
    )  # fmt: skip


def exact_point(
    system: sgd.System,
    reference: sgd.ReferencePoint,
    *,
    batch_size: int = 64,
    curvature: sgd.CurvatureEntries = "diagonal",
    drawn_batches: int | None = None,
    seed: int = 0,
) -> Point:
    """Eigendirections of the exact Hessian; with batch statistics that of the drawn batches."""
    at = (system.loss, reference.params, system.data)
    keys = jax.random.split(jax.random.key(seed + 1000))
    batches = noise_key = None
    if drawn_batches is not None:
        batches = jax.random.randint(keys[0], (drawn_batches, batch_size), 0, system.samples)
        noise_key = keys[1]
    basis = sgd.eigenbasis(sgd.mean_hessian(*at, batches=batches))
    noise = sgd.noise_statistics(
        *at, directions=basis.directions, batch_size=batch_size, curvature=curvature,
        batches=drawn_batches, key=noise_key,
    )  # fmt: skip
    extra = {
        "gamma_diagonal_mass": noise.diagonal_mass,
        "hessian_diagonal_mass": noise.hessian_diagonal_mass,
    }
    return Point(system, reference, basis.eigenvalues, basis.directions, noise, extra)


def lanczos_point(
    system: sgd.System,
    reference: sgd.ReferencePoint,
    *,
    count: int,
    proxies: int,
    batch_size: int = 64,
    seed: int = 0,
) -> Point:
    """The sharpest directions by Lanczos, and random ones orthogonal to them."""
    sharp, flat = lanczos_directions(system, reference, count=count, proxies=proxies, seed=seed)
    directions = np.concatenate([sharp.directions, flat.directions], axis=1)
    at = (system.loss, reference.params, system.data)
    noise = sgd.noise_statistics(*at, directions=directions, batch_size=batch_size)
    extra = {
        "lanczos_directions": count,
        "lanczos_residuals": rounded(sharp.residuals),
        "proxy_residuals": rounded(flat.residuals),
    }
    eigenvalues = np.concatenate([sharp.eigenvalues, flat.curvatures])
    return Point(system, reference, eigenvalues, directions, noise, extra)


def lanczos_directions(
    system: sgd.System, reference: sgd.ReferencePoint, *, count: int, proxies: int, seed: int = 0
) -> tuple[Any, Any]:
    """The sharpest directions, and random ones orthogonal to them."""
    at = (system.loss, reference.params, system.data)
    keys = jax.random.split(jax.random.key(seed + 1000))
    # In parts: the activations of all data for many vectors at once would not fit.
    parts = np.arange(system.samples).reshape(-1, 256)
    sharp = sgd.lanczos(keys[0], *at, count=count, batches=parts)
    flat = sgd.flat_proxies(keys[1], *at, excluded=sharp.directions, count=proxies, batches=parts)
    return sharp, flat


def ensemble(point: Point, run: Run, seed: int, sampling: sgd.Sampling = "with_replacement") -> Any:
    """The ensemble, over all devices there are."""
    count = len(jax.devices())
    mesh = jax.make_mesh((count,), ("replicas",), axis_types=(AxisType.Auto,))
    return sgd.run_ensemble(
        jax.random.key(seed + 2000), point.system.loss, point.reference.params, point.system.data,
        directions=point.directions, learning_rate=run.learning_rate, batch_size=run.batch_size,
        steps=run.steps, replicas=run.replicas, record_every=run.record_every, sampling=sampling,
        sharding=NamedSharding(mesh, PartitionSpec("replicas")),
    )  # fmt: skip


def measured(point: Point, run: Run, seed: int) -> dict[str, Any]:
    """One ensemble against its predictions: agreement, and the arrays of the figures."""
    begun = time.perf_counter()
    found = ensemble(point, run, seed)
    seconds = time.perf_counter() - begun
    summary = sgd.summarise(found, point.eigenvalues, point.noise, learning_rate=run.learning_rate)
    print(f"seed {seed}, {seconds:.0f} s\n{sgd.summary_table(summary)}\n", flush=True)
    # Rounding-level directions included: what a list over all directions gives.
    everything = sgd.compare(summary.measured, summary.finite_time)
    shown = np.unique(np.geomspace(1, len(found.steps), 24).round().astype(int)) - 1
    late = sgd.late_slope(found.steps, found.variance) if len(found.steps) >= 6 else None
    return {
        "seed": seed,
        "learning_rate": run.learning_rate,
        "steps": run.steps,
        "replicas": run.replicas,
        "ensemble_seconds": round(seconds, 1),
        "comparisons": {name: c._asdict() for name, c in summary.comparisons.items()},
        "log_correlation_with_noiseless": everything.log_correlation,
        "directions_without_noise": int(np.sum(~summary.noisy)),
        "flat_growth_median": float(np.nanmedian(summary.flat_growth)),
        "regimes": np.bincount(summary.regimes, minlength=len(sgd.REGIMES)).tolist(),
        "curvature": rounded(summary.eigenvalues),
        "gradient_variance": rounded(summary.gradient_variance),
        "curvature_variance": rounded(point.noise.diagonal_variance),
        "measured": rounded(summary.measured),
        "finite_time": rounded(summary.finite_time),
        "stationary": rounded(summary.stationary),
        "regime_of_direction": summary.regimes.tolist(),
        "late_slope": rounded(late),
        "growth": growth(found.steps[shown], found.variance[shown], summary),
    }


def growth(steps: np.ndarray, variance: np.ndarray, summary: sgd.Summary) -> dict[str, Any]:
    """Curves of a few directions from flat to sharp."""
    order = np.argsort(summary.eigenvalues)
    order = order[summary.noisy[order] & (summary.eigenvalues[order] > 0)]
    chosen = order[np.linspace(len(order) // 10, len(order) - 1, 5).round().astype(int)]
    return {
        "steps": steps.tolist(),
        "directions": chosen.tolist(),
        "variance": [rounded(row) for row in variance[:, chosen]],
    }


def described(point: Point) -> dict[str, Any]:
    """The reference point of a result file."""
    return {
        "parameters": point.system.parameters,
        "samples": point.system.samples,
        "loss": float(point.reference.loss[-1]),
        "gradient_norm": float(point.reference.gradient_norm[-1]),
        "loss_on_the_way": rounded(point.reference.loss),
        "gradient_norm_on_the_way": rounded(point.reference.gradient_norm),
        "steps_on_the_way": point.reference.steps.tolist(),
        **point.extra,
    }


def rounded(values: Any) -> list[float] | None:
    """Six digits, enough for figures."""
    return None if values is None else [float(f"{x:.6g}") for x in np.ravel(values)]
