"""Statistics of the residuals in a repeated-learning loop."""

import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Density = Literal["left", "centre", "kernel"]
BINS = 200
# Moments of the sampling figures, and how many the window figures add up.
MOMENTS = 6
SUMMED_MOMENTS = 300


class Statistics(NamedTuple):
    """Of one set of residuals, or with leading axes of many."""

    dev: Float[Array, "*runs"]
    """Population standard deviation."""

    mae: Float[Array, "*runs"]
    """Mean absolute residual."""

    density_at_zero: Float[Array, "*runs"]
    """f_t(0)."""

    mass: Float[Array, "*runs kappas"]
    """F̂(κ) − F̂(−κ) for every κ."""

    normality: Float[Array, "*runs"]
    """p-value of the D'Agostino–Pearson test."""

    moments: Float[Array, "*runs 6"]
    """ν_k = mean(e^k), k = 1..6."""

    log_moment_sum: Float[Array, "*runs"]
    """ln Σ_{k≤300} |ν_k|; draw `jnp.logaddexp(0, ·)`."""


def statistics(
    residuals: Float[Array, " n"], *, kappas: tuple[float, ...] = (0.4, 0.5, 0.6),
    density: Density = "left",
) -> Statistics:  # fmt: skip
    """All statistics of the residuals.

    Args:
      residuals: e = y − h(x); floating, float64 where the loop contracts.
      kappas: Half-widths of the masses, in units of the residuals.
      density: How f_t(0) is estimated, see `density_at_zero`.

    >>> round(float(statistics(jnp.array([-1.0, 1.0, -1.0, 1.0])).dev), 3)
    1.0
    """
    return Statistics(
        dev=jnp.std(residuals),
        mae=jnp.mean(jnp.abs(residuals)),
        density_at_zero=density_at_zero(residuals, method=density),
        mass=mass(residuals, jnp.asarray(kappas, residuals.dtype)),
        normality=normality(residuals),
        moments=jnp.stack([jnp.mean(residuals**k) for k in range(1, MOMENTS + 1)]),
        log_moment_sum=log_moment_sum(residuals),
    )


def mass(residuals: Float[Array, " n"], kappas: Float[Array, " kappas"]) -> Float[Array, " kappas"]:
    """F̂(κ) − F̂(−κ) with the empirical distribution function: the share in (−κ, κ]."""
    inside = (residuals > -kappas[:, None]) & (residuals <= kappas[:, None])
    return jnp.mean(inside.astype(residuals.dtype), axis=1)


def density_at_zero(
    residuals: Float[Array, " n"], *, method: Density = "left", bins: int = BINS
) -> Float[Array, ""]:
    """The density of the residuals at 0.

    `left` and `centre`: a density histogram over [min, max], interpolated linearly through the
    left edges or the centres of its bins; 0 outside of them. `left` repeats the published figures
    and is biased by half a bin. Only the two bins around 0 are counted, with the rounding of
    `numpy.histogram`. `kernel`: Gaussian kernels of Scott's width, σ n^(−1/5).

    Args:
      residuals: e.
      method: See above.
      bins: Number of bins.

    Raises:
      ValueError: Unknown method.

    >>> round(float(density_at_zero(jnp.linspace(-1.0, 1.0, 5), bins=2)), 3)
    0.6
    """
    if method not in get_args(Density):
        raise ValueError(f"method is {method!r}; one of {', '.join(get_args(Density))}")
    count = residuals.shape[0]
    if method == "kernel":
        width = jnp.std(residuals, ddof=1) * count**-0.2
        kernels = jnp.exp(-0.5 * (residuals / width) ** 2)
        return jnp.sum(kernels) / (count * width * (2 * jnp.pi) ** 0.5)
    low, high = jnp.min(residuals), jnp.max(residuals)
    single = low == high
    low, high = jnp.where(single, low - 0.5, low), jnp.where(single, high + 0.5, high)
    edges = jnp.linspace(low, high, bins + 1)
    points = edges[:-1] if method == "left" else (edges[:-1] + edges[1:]) / 2
    below = jnp.clip(jnp.sum(points <= 0) - 1, 0, bins - 2)
    heights = [_bin_count(residuals, edges, below + i) for i in (0, 1)]
    share = jnp.clip((0 - points[below]) / (points[below + 1] - points[below]), 0, 1)
    density = (heights[0] + share * (heights[1] - heights[0])) / (count * (high - low) / bins)
    return jnp.where((points[0] <= 0) & (points[-1] >= 0), density, 0.0)


def _bin_count(residuals: Array, edges: Array, number: Array) -> Array:
    """Residuals in [edge, next edge), the last bin closed."""
    last: Bool[Array, ""] = number == edges.shape[0] - 2
    above = residuals >= edges[number]
    under = (residuals < edges[number + 1]) | (last & (residuals == edges[-1]))
    return jnp.sum(above & under).astype(residuals.dtype)


def normality(residuals: Float[Array, " n"]) -> Float[Array, ""]:
    """p-value of D'Agostino and Pearson's omnibus test K² = Z²(skewness) + Z²(kurtosis).

    Args:
      residuals: At least 8 of them, else NaN; NaN also where they are all equal.

    Source: R. D'Agostino, E. Pearson, "Tests for departure from normality", Biometrika 1973, with
    the transformations of D'Agostino (1970) and Anscombe & Glynn (1983), as
    `scipy.stats.normaltest`, which however scores a skewness of exactly zero as if it were not.

    >>> float(normality(jnp.arange(3.0)))
    nan
    """
    count = residuals.shape[0]
    if count < 8:
        return jnp.full((), jnp.nan, residuals.dtype)
    mean = jnp.mean(residuals)
    centred = residuals - mean
    variance = jnp.mean(centred**2)
    skewness = jnp.mean(centred**3) / variance**1.5
    kurtosis = jnp.mean(centred**4) / variance**2
    statistic = _skewness_score(skewness, count) ** 2 + _kurtosis_score(kurtosis, count) ** 2
    # The survival function of chi-squared with two degrees of freedom.
    constant = variance <= (jnp.finfo(residuals.dtype).eps * mean) ** 2
    return jnp.where(constant, jnp.nan, jnp.exp(-statistic / 2))


def _skewness_score(skewness: Array, n: int) -> Array:
    scaled = skewness * ((n + 1) * (n + 3) / (6 * (n - 2))) ** 0.5
    kurtosis = (
        3 * (n**2 + 27 * n - 70) * (n + 1) * (n + 3) / ((n - 2) * (n + 5) * (n + 7) * (n + 9))
    )
    squared = (2 * (kurtosis - 1)) ** 0.5 - 1
    alpha = (2 / (squared - 1)) ** 0.5
    return jnp.arcsinh(scaled / alpha) / (0.5 * math.log(squared)) ** 0.5


def _kurtosis_score(kurtosis: Array, n: int) -> Array:
    variance = 24 * n * (n - 2) * (n - 3) / ((n + 1) ** 2 * (n + 3) * (n + 5))
    scaled = (kurtosis - 3 * (n - 1) / (n + 1)) / variance**0.5
    root = 6 * (n * n - 5 * n + 2) / ((n + 7) * (n + 9))
    root *= (6 * (n + 3) * (n + 5) / (n * (n - 2) * (n - 3))) ** 0.5
    a = 6 + 8 / root * (2 / root + (1 + 4 / root**2) ** 0.5)
    denominator = 1 + scaled * (2 / (a - 4)) ** 0.5
    cube_root = jnp.sign(denominator) * jnp.cbrt((1 - 2 / a) / jnp.abs(denominator))
    return (1 - 2 / (9 * a) - cube_root) / (2 / (9 * a)) ** 0.5


def log_moment_sum(
    residuals: Float[Array, " n"], *, highest: int = SUMMED_MOMENTS
) -> Float[Array, ""]:
    """Logarithm of Σ_{k=1}^{highest} |ν_k|, where a single term may exceed the floating range.

    With M = max|e|, ν_k = M^k mean((e/M)^k): the powers underflow at worst, and the terms are added
    as logarithms. All residuals zero: −∞.

    Args:
      residuals: e.
      highest: Last k.

    >>> round(float(log_moment_sum(jnp.array([2.0, 2.0]), highest=3)), 4)  # ln(2 + 4 + 8)
    2.6391
    """
    largest = jnp.max(jnp.abs(residuals))
    scaled = residuals / jnp.where(largest > 0, largest, 1)
    # e^(iw + k) = e^(iw) e^k: all means are one product of two tables of some √highest powers.
    width = math.isqrt(highest - 1) + 1
    low = _powers(scaled, jnp.arange(1, width + 1))
    high = _powers(scaled, width * jnp.arange(1, width))
    high = jnp.concatenate([jnp.ones_like(low[:1]), high])
    means = jnp.abs(high @ low.T).ravel()[:highest] / scaled.shape[0]
    return jax.nn.logsumexp(jnp.arange(1, highest + 1) * jnp.log(largest) + jnp.log(means))


def _powers(base: Float[Array, " n"], exponents: Int[Array, " m"]) -> Float[Array, "m n"]:
    """One row an exponent, all positive; by logarithms, faster than products in sequence."""
    exponents = exponents[:, None]
    size = jnp.exp(exponents * jnp.log(jnp.abs(base)))
    return jnp.where((base < 0) & (exponents % 2 == 1), -size, size)
