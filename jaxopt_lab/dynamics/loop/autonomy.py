r"""Is the loop autonomous? Robust lines through ln f_t(0), with and without a knot.

A scaling system is autonomous when ln f_t(0) is linear in t. The fit is Huber's: quadratic for
residuals within ε scales, linear beyond, solved by iteratively reweighted least squares with the
median absolute residual as scale. Values that are not finite (f_t(0) = 0) have no weight.

Source: Veprikov, Afanasiev, Khritankov, "A Mathematical Model of the Hidden Feedback Loop Effect in
Machine Learning Systems", arXiv 2405.02726, who judge autonomy by r² of such a line, and by the
Breusch-Pagan p-value of its residuals. **How to read that p-value**: the null hypothesis *is*
homoscedasticity, so that a small p means residuals whose variance depends on t. (The authors read
p < 0.05 the other way round.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaincc
from jaxtyping import Array, ArrayLike, Float

EPSILON = 1.35
"""Residuals beyond so many scales count linearly."""

# From a median absolute value to the standard deviation of a normal variable.
_NORMAL_SCALE = 1.4826
_ITERATIONS = 50


class AutonomyFit(NamedTuple):
    """A line through ln f_t(0), in one piece or two that meet at a knot."""

    intercept: Float[Array, ""]  # value at t = 0
    slope: Float[Array, ""]  # per step, before the knot
    slope_after: Float[Array, ""]  # per step, after the knot; `slope` for one piece
    knot: Float[Array, ""]  # t of the knot; nan for one piece
    r2: Float[Array, ""]  # share of the variance that the fit explains
    breusch_pagan_p: Float[Array, ""]  # small: the variance of the residuals depends on t
    fitted: Float[Array, "times"]  # the fit at the given times


def fit_line(step: ArrayLike, value: ArrayLike, *, epsilon: float = EPSILON) -> AutonomyFit:
    """Robust line through a series.

    Args:
      step: Times t, shape (times,).
      value: ln f_t(0), shape (times,); values that are not finite are left out.
      epsilon: Where Huber's loss turns linear, in scales.

    Raises:
      ValueError: If the shapes differ or there are fewer than three times.

    >>> t = jnp.arange(21.0)
    >>> fit = fit_line(t, jnp.where(t == 12.0, 900.0, 1.0 + 2.0 * t))
    >>> round(float(fit.slope), 2)
    2.0
    """
    step, value = _checked(step, value)
    return _fit(step, value, jnp.asarray(jnp.nan, step.dtype), epsilon)


def fit_pieces(
    step: ArrayLike,
    value: ArrayLike,
    *,
    knot: float | None = None,
    candidates: int = 64,
    epsilon: float = EPSILON,
) -> AutonomyFit:
    """Two robust lines that meet at a knot.

    Args:
      step: Times t, shape (times,).
      value: ln f_t(0), shape (times,); values that are not finite are left out.
      knot: Where the lines meet; by default the best of `candidates` in the inner nine tenths of
        the times, by Huber's loss at a common scale, that of the best line without a knot.
      candidates: Number of knots tried.
      epsilon: Where Huber's loss turns linear, in scales.

    Raises:
      ValueError: If the shapes differ, there are fewer than three times, or the knot lies outside.

    >>> t = jnp.arange(20.0)
    >>> fit = fit_pieces(t, jnp.minimum(t, 8.0), knot=8.0)
    >>> round(float(fit.slope), 3), abs(round(float(fit.slope_after), 3)), round(float(fit.r2), 5)
    (1.0, 0.0, 1.0)
    """
    step, value = _checked(step, value)
    low, high = float(step.min()), float(step.max())
    if knot is not None:
        if not low < knot < high:
            raise ValueError(f"knot: got {knot}, expected a time between {low:g} and {high:g}")
        return _fit(step, value, jnp.asarray(knot, step.dtype), epsilon)
    margin = 0.05 * (high - low)
    knots = jnp.linspace(low + margin, high - margin, candidates, dtype=step.dtype)
    return _search(step, value, knots, epsilon)


def _checked(step: ArrayLike, value: ArrayLike) -> tuple[Array, Array]:
    step, value = jnp.asarray(step) * 1.0, jnp.asarray(value) * 1.0
    if step.ndim != 1 or step.shape != value.shape or step.size < 3:
        raise ValueError(
            f"step, value: got shapes {step.shape} and {value.shape}, expected the same (times,) "
            "with at least 3 times"
        )
    return step, value


@jax.jit
def _search(step, value, knots, epsilon):
    line = _fit(step, value, jnp.asarray(jnp.nan, step.dtype), epsilon)
    finite = jnp.isfinite(value)
    scale = _scale(jnp.where(finite, value - line.fitted, 0.0), finite)

    def loss(knot):
        z = jnp.abs(value - _fit(step, value, knot, epsilon).fitted) / scale
        huber = jnp.where(z < epsilon, jnp.square(z), 2.0 * epsilon * z - epsilon**2)
        return jnp.sum(jnp.where(finite, huber, 0.0))

    return _fit(step, value, knots[jnp.argmin(jax.lax.map(loss, knots))], epsilon)


@jax.jit
def _fit(step, value, knot, epsilon):
    finite = jnp.isfinite(value)
    value = jnp.where(finite, value, 0.0)
    start = jnp.min(step)
    span = jnp.max(step) - start
    time = (step - start) / span
    bend = jnp.where(jnp.isnan(knot), 0.0, jnp.maximum(step - knot, 0.0) / span)
    design = jnp.stack([jnp.ones_like(time), time, bend], -1)

    def reweight(_, weights):
        rest = value - design @ _solve(design, value, weights)
        z = jnp.abs(rest) / _scale(rest, finite)
        return jnp.where(finite, jnp.minimum(1.0, epsilon / jnp.maximum(z, epsilon)), 0.0)

    weights = jax.lax.fori_loop(0, _ITERATIONS, reweight, finite.astype(value.dtype))
    coefficients = _solve(design, value, weights)
    fitted = design @ coefficients
    rest = value - fitted
    slope = coefficients[1] / span
    return AutonomyFit(
        intercept=coefficients[0] - slope * start,
        slope=slope,
        slope_after=slope + coefficients[2] / span,
        knot=knot,
        r2=_explained(value, rest, finite),
        breusch_pagan_p=_breusch_pagan(design, rest, finite, jnp.where(jnp.isnan(knot), 1, 2)),
        fitted=fitted,
    )


def _solve(design, value, weights):
    """Weighted least squares; a column of zeros (no knot) has coefficient zero."""
    gram = design.T @ (weights[:, None] * design)
    empty = jnp.diag(gram) == 0.0
    gram = gram + jnp.diag(jnp.where(empty, 1.0, 0.0))
    return jnp.linalg.solve(gram, design.T @ (weights * value))


def _scale(rest, finite):
    """Median absolute residual as a standard deviation, kept away from zero for exact lines."""
    median = jnp.nanmedian(jnp.where(finite, jnp.abs(rest), jnp.nan))
    return jnp.maximum(_NORMAL_SCALE * median, jnp.finfo(rest.dtype).tiny ** 0.5)


def _explained(value, rest, finite):
    count = jnp.sum(finite)
    mean = jnp.sum(jnp.where(finite, value, 0.0)) / count
    spread = jnp.sum(jnp.where(finite, jnp.square(value - mean), 0.0))
    left = jnp.sum(jnp.where(finite, jnp.square(rest), 0.0))
    return jnp.where(spread > 0.0, 1.0 - left / jnp.where(spread > 0.0, spread, 1.0), 1.0)


def _breusch_pagan(design, rest, finite, freedom):
    """The p-value of n R² of the squared residuals regressed on the design (Koenker's form)."""
    squares = jnp.where(finite, jnp.square(rest), 0.0)
    fitted = design @ _solve(design, squares, finite.astype(rest.dtype))
    share = jnp.clip(_explained(squares, squares - fitted, finite), 0.0, 1.0)
    return gammaincc(freedom / 2.0, jnp.sum(finite) * share / 2.0)
