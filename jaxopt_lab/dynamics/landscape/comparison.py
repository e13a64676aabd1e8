"""Measured against predicted variances: agreement, growth of flat directions, regimes, a table."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import ArrayLike, Bool, Float, Int

from jaxopt_lab.dynamics.landscape.curvature import flattest
from jaxopt_lab.dynamics.landscape.ensemble import Ensemble
from jaxopt_lab.dynamics.landscape.noise import NoiseStatistics
from jaxopt_lab.dynamics.landscape.predictors import finite_time_variance, stationary_proxy
from jaxopt_lab.dynamics.landscape.regimes import REGIMES, regime_codes
from jaxopt_lab.report.tables import format_table

# Of the largest d. A softmax does not see a shift of all logits, so a network that ends in one has
# directions without noise or curvature. Float64 leaves about 1e-24 there, and two lists of rounding
# errors would only feign a correlation over many decades.
_NOISE_FLOOR = 1e-12


class Comparison(NamedTuple):
    """Agreement of two lists of variances."""

    directions: int  # compared: both variances positive
    excluded: int  # left out
    log_correlation: float  # Pearson's, of the logarithms
    relative_error: float  # |m - p| / |m|
    best_scalar: float  # a of the least |m - a p|
    median_ratio: float  # of m / p
    p_value: float  # of the log-correlation among permuted predictions
    held_out_log_correlation: float  # on a random half of the directions
    held_out_relative_error: float  # there, with the best scalar of the other half
    log_scatter: float  # standard deviation of ln(m / p); of sampling alone it is √(2 / (R - 1))


class Summary(NamedTuple):
    """One ensemble against its predictions, at the last record."""

    steps: int
    learning_rate: float
    eigenvalues: Float[np.ndarray, "k"]
    gradient_variance: Float[np.ndarray, "k"]
    measured: Float[np.ndarray, "k"]
    finite_time: Float[np.ndarray, "k"]  # P2
    stationary: Float[np.ndarray, "k"]  # P1
    regimes: Int[np.ndarray, "k"]  # index into `REGIMES`
    noisy: Bool[np.ndarray, "k"]  # whether d is more than rounding; only these are compared
    flat_growth: Float[np.ndarray, "flat"]  # of the flattest directions
    comparisons: Mapping[str, Comparison]  # by predictor and set of directions


def compare(
    measured: Float[ArrayLike, "k"],
    predicted: Float[ArrayLike, "k"],
    *,
    permutations: int = 200,
    seed: int = 0,
    offset: float = 0.0,
) -> Comparison:
    """How well predictions of variances hold.

    Directions without noise (dead units, pixels that are always black) have both variances 0 and
    no logarithm: they are left out and counted.

    >>> m = np.asarray([1.0, 2.0, 4.0, 8.0, 0.0])
    >>> found = compare(m, 2 * m)
    >>> found.directions, round(found.log_correlation, 6), found.best_scalar, found.median_ratio
    (4, 1.0, 0.5, 0.5)

    Args:
      measured: Variances m.
      predicted: Variances p.
      permutations: Number of random permutations of the predictions.
      seed: Of the permutations and the halves.
      offset: Added to both before the logarithm; the released code adds 1e-12.

    Raises:
      ValueError: Shapes that differ, or fewer than four directions with two positive variances.
    """
    m, p = np.asarray(measured, np.float64), np.asarray(predicted, np.float64)
    if m.ndim != 1 or m.shape != p.shape:
        raise ValueError(f"predicted: got shape {p.shape} for measured {m.shape}, expected vectors")
    valid = np.isfinite(m) & np.isfinite(p) & (m > 0) & (p > 0)
    excluded = int(np.sum(~valid))
    m, p = m[valid], p[valid]
    if len(m) < 4:
        raise ValueError(f"measured: got {len(m)} directions with positive variances, expected 4")
    draws = np.random.default_rng(seed)
    log_m, log_p = np.log(m + offset), np.log(p + offset)
    found = _correlation(log_m, log_p)
    permuted = [_correlation(log_m, draws.permutation(log_p)) for _ in range(permutations)]
    fitted, held_out = np.array_split(draws.permutation(len(m)), 2)
    return Comparison(
        directions=len(m),
        excluded=excluded,
        log_correlation=found,
        relative_error=_relative_error(m, p),
        best_scalar=_best_scalar(m, p),
        median_ratio=float(np.median(m / p)),
        p_value=(1 + sum(r >= found for r in permuted)) / (1 + permutations),
        held_out_log_correlation=_correlation(log_m[held_out], log_p[held_out]),
        held_out_relative_error=_relative_error(
            m[held_out], _best_scalar(m[fitted], p[fitted]) * p[held_out]
        ),
        log_scatter=float(np.std(log_m - log_p)),
    )


def summarise(
    ensemble: Ensemble,
    eigenvalues: Float[ArrayLike, "k"],
    noise: NoiseStatistics,
    *,
    learning_rate: float,
    sharp: int = 48,
    flat: int = 100,
    with_curvature_noise: bool = False,
    with_drift: bool = False,
) -> Summary:
    """Compares the last record of an ensemble with both predictors.

    Directions whose d is below 1e-12 of the largest have none but rounding and are not compared.

    Args:
      ensemble: Projected on eigendirections.
      eigenvalues: Their curvatures λ.
      noise: Statistics along the same directions, for the ensemble's batch size.
      learning_rate: η of the ensemble.
      sharp: Size of the set of largest |λ|.
      flat: Size of the set of smallest |λ|; each set has at most half of the directions.
      with_curvature_noise: Put Γ into the finite-time prediction.
      with_drift: Put the mean gradient into it.

    Raises:
      ValueError: Shapes that do not fit, or statistics without Γ where it is asked for.
    """
    eigenvalues = np.asarray(eigenvalues, np.float64)
    measured, steps = ensemble.variance[-1], int(ensemble.steps[-1])
    d = noise.gradient_variance
    if not measured.shape == eigenvalues.shape == d.shape:
        raise ValueError(
            f"eigenvalues, noise: got shapes {eigenvalues.shape}, {d.shape} for an ensemble along "
            f"{measured.shape} directions"
        )
    if with_curvature_noise and noise.curvature_variance is None:
        raise ValueError("noise: holds no curvature_variance, which with_curvature_noise needs")
    law = {"learning_rate": learning_rate, "curvature": eigenvalues, "gradient_variance": d}
    finite_time = finite_time_variance(
        steps,
        curvature_variance=noise.curvature_variance if with_curvature_noise else None,
        drift=noise.drift if with_drift else None,
        **law,
    )
    stationary = stationary_proxy(**law)
    gamma = 0.0 if noise.diagonal_variance is None else noise.diagonal_variance
    with jax.enable_x64(True):
        regimes = np.asarray(
            regime_codes(
                steps, learning_rate=learning_rate, curvature=eigenvalues, curvature_variance=gamma
            )
        )
    noisy = has_noise(d)
    order = flattest(eigenvalues, len(eigenvalues))
    order = order[noisy[order]]
    half = len(order) // 2
    sets = {"all": order, "sharp": order[-min(sharp, half) :], "flat": order[: min(flat, half)]}
    comparisons = {
        f"{name}, {which}": compare(measured[chosen], predicted[chosen])
        for name, predicted in (("P2", finite_time), ("P1", stationary))
        for which, chosen in sets.items()
    }
    growth = flat_growth(
        measured[sets["flat"]], d[sets["flat"]], learning_rate=learning_rate, steps=steps
    )
    return Summary(
        steps, learning_rate, eigenvalues, d, measured, finite_time, stationary, regimes, noisy,
        growth, comparisons,
    )  # fmt: skip


def summary_table(summary: Summary, *, markdown: bool = False) -> str:
    """The comparisons as a table, then the number of directions in each regime."""
    rows = [
        [name, c.directions, c.log_scatter, c.median_ratio, c.log_correlation, c.relative_error]
        for name, c in summary.comparisons.items()
    ]
    headers = [
        "prediction", "directions", "s.d. of ln m/p", "median m/p", "log-correlation", "|m-p|/|m|",
    ]  # fmt: skip
    counts = np.bincount(summary.regimes, minlength=len(REGIMES))
    listed = ", ".join(f"{count} {name}" for name, count in zip(REGIMES, counts, strict=True))
    table = format_table(headers, rows, markdown=markdown)
    silent = int(np.sum(~summary.noisy))
    return (
        f"{table}\n\n{silent} directions without noise are left out. "
        f"η = {summary.learning_rate:g}, {summary.steps} steps: {listed}; "
        f"flat directions Π/(η²dn) = {np.nanmedian(summary.flat_growth):.3f} (median)"
    )


def has_noise(gradient_variance: Float[ArrayLike, "k"]) -> Bool[np.ndarray, "k"]:
    """Whether d is more than rounding: above 1e-12 of the largest.

    >>> has_noise([1.0, 1e-3, 1e-15]).tolist()
    [True, True, False]
    """
    d = np.asarray(gradient_variance)
    return d > _NOISE_FLOOR * np.max(d)


def flat_growth(
    variance: Float[ArrayLike, "k"],
    gradient_variance: Float[ArrayLike, "k"],
    *,
    learning_rate: float,
    steps: int,
) -> Float[np.ndarray, "k"]:
    """Π / (η² d n): 1 where the variance grows as if there were no curvature; nan without noise.

    >>> flat_growth([2.0, 0.0], [1.0, 0.0], learning_rate=0.5, steps=8)
    array([ 1., nan])
    """
    d = np.asarray(gradient_variance, np.float64)
    law = learning_rate**2 * steps * d
    return np.divide(variance, law, out=np.full_like(d, np.nan), where=law > 0)


def late_slope(
    steps: Int[ArrayLike, "records"], variance: Float[ArrayLike, "records *k"]
) -> Float[np.ndarray, "*k"]:
    """Slope per step of a least-squares line through the last third of the records.

    >>> late_slope([1, 2, 3, 4, 5, 6], [9.0, 9.0, 9.0, 9.0, 1.0, 4.0]).tolist()
    3.0

    Raises:
      ValueError: Fewer than six records: a third would not hold a line.
    """
    steps, variance = np.asarray(steps, np.float64), np.asarray(variance, np.float64)
    if len(steps) < 6 or len(variance) != len(steps):
        raise ValueError(
            f"steps, variance: got {len(steps)} and {len(variance)} records, expected the same "
            "number, at least 6"
        )
    late = len(steps) // 3
    centred = steps[-late:] - steps[-late:].mean()
    return np.tensordot(centred, variance[-late:], axes=1) / np.sum(np.square(centred))


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt(np.sum(x * x) * np.sum(y * y))
    return float(np.sum(x * y) / scale) if scale > 0 else float("nan")


def _relative_error(measured: np.ndarray, predicted: np.ndarray) -> float:
    return float(np.linalg.norm(measured - predicted) / np.linalg.norm(measured))


def _best_scalar(measured: np.ndarray, predicted: np.ndarray) -> float:
    return float(np.dot(predicted, measured) / np.dot(predicted, predicted))
