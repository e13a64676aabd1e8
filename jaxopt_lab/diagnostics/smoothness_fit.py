r"""Least-squares fits of local smoothness as a polynomial of the gap to a target loss.

$$ r \approx K_0 + K_1 \Delta + K_\rho \Delta^\rho $$

The coefficients are not constrained: where they come out negative, or many points lie above the
curve, the data contradict the assumption that adaptive warm-up is derived from.

Source: Riabinin et al., arXiv 2602.05813, released code. Differs from it in what a constant ratio
gives (no R^2 instead of 0) and in scaling the gap before the powers are taken, without which large
exponents lose the other two terms to rounding.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from jaxopt_lab.diagnostics.norms import SMALLEST_DENOMINATOR

FEWEST_POINTS = 10
_EXPONENTS = np.linspace(1.05, 50.0, 100)
_PERCENTILES = (1.0, 99.0)


class SmoothnessPoints(NamedTuple):
    """What a fit is made of."""

    step: Int[np.ndarray, " n"]
    gap: Float[np.ndarray, " n"]  # nats per token
    ratio: Float[np.ndarray, " n"]


class SmoothnessFit(NamedTuple):
    """A fitted polynomial and how well it describes its points."""

    k0: float
    k1: float
    k_rho: float
    rho: float
    r2: float  # 1 - residual over total sum of squares; NaN where all ratios are equal
    share_above: float  # of the points that lie above the curve
    points: int

    def curve(self, gap: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The polynomial."""
        return self.k0 + self.k1 * gap + self.k_rho * gap**self.rho


def smoothness_points(
    step: ArrayLike,
    gap: ArrayLike,
    gradient_difference: ArrayLike,
    step_norm: ArrayLike,
    *,
    start: int = 0,
    end: int | None = None,
    drop_outliers: bool = False,
) -> SmoothnessPoints:
    """The records of a run that a fit can use.

    Kept are steps in `[start, end)` with a positive gradient difference, a step norm above 1e-12
    and a gap of at least 0. The published figures also drop outliers: of what is left, ratios
    outside the 1st to the 99th percentile.

    Args:
      step: Step numbers, shape (n,).
      gap: Loss after each step less the target, nats per token, shape (n,).
      gradient_difference: Dual norms, shape (n,).
      step_norm: Norms, shape (n,).
      start: First step to keep.
      end: First step not to keep any more; None keeps all.
      drop_outliers: Whether to drop outliers.

    Raises:
      ValueError: The arrays differ in shape.
    """
    steps = np.asarray(step)
    gaps, differences, norms = _vectors(
        steps.shape, gap=gap, gradient_difference=gradient_difference, step_norm=step_norm
    )
    kept = (steps >= start) & (steps < (np.inf if end is None else end))
    kept &= (differences > 0) & (norms > SMALLEST_DENOMINATOR) & (gaps >= 0)
    kept &= np.isfinite(differences) & np.isfinite(norms) & np.isfinite(gaps)
    points = SmoothnessPoints(steps[kept], gaps[kept], differences[kept] / norms[kept])
    if drop_outliers and len(points.ratio):
        low, high = np.percentile(points.ratio, _PERCENTILES)
        inside = (points.ratio >= low) & (points.ratio <= high)
        points = SmoothnessPoints(*(x[inside] for x in points))
    return points


def fit_smoothness(gap: ArrayLike, ratio: ArrayLike, rho: float | None = 2.0) -> SmoothnessFit:
    """Least squares of the ratio on 1, the gap and a power of the gap, in float64.

    >>> gap = np.linspace(0.5, 3.0, 12)
    >>> fit = fit_smoothness(gap, 4.0 - gap + 2.0 * gap**2)
    >>> [round(float(k), 6) for k in fit[:4]]
    [4.0, -1.0, 2.0, 2.0]

    Args:
      gap: Gaps of at least 0, shape (n,).
      ratio: Ratios, shape (n,).
      rho: The power, above 1; None takes the best of 100 values from 1.05 to 50.

    Raises:
      ValueError: There are fewer than 10 points, a value is not finite, a gap is negative, the
        arrays differ in shape, or `rho` is not above 1.
    """
    x = np.asarray(gap, np.float64)
    (y,) = _vectors(x.shape, ratio=ratio)
    if x.size < FEWEST_POINTS:
        raise ValueError(f"gap: got {x.size} points, expected at least {FEWEST_POINTS}")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and x.min() >= 0):
        raise ValueError("gap, ratio: expected finite values and gaps of at least 0")
    if rho is not None and not rho > 1:
        raise ValueError(f"rho: got {rho}, expected a power above 1, or None")
    scale = x.max() or 1.0
    candidates = _EXPONENTS if rho is None else [rho]
    # The smallest residual is the largest R^2, also where the latter is undefined.
    fits = [_least_squares(x / scale, y, power) for power in candidates]
    best = int(np.argmin([residual @ residual for _, residual in fits]))
    (k0, k1, k_rho), residual = fits[best]
    power, spread = float(candidates[best]), y - y.mean()
    total = spread @ spread
    return SmoothnessFit(
        k0=float(k0),
        k1=float(k1 / scale),
        k_rho=float(k_rho / scale**power),
        rho=power,
        r2=float(1 - residual @ residual / total) if total > 0 else np.nan,
        share_above=float(np.mean(residual > 0)),
        points=x.size,
    )


def _least_squares(x: np.ndarray, y: np.ndarray, power: float) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients and residuals."""
    design = np.stack([np.ones_like(x), x, x**power], axis=1)
    coefficients, *_ = np.linalg.lstsq(design, y, rcond=None)
    return coefficients, y - design @ coefficients


def _vectors(shape: tuple[int, ...], **named: ArrayLike) -> list[np.ndarray]:
    arrays = {name: np.asarray(values, np.float64) for name, values in named.items()}
    for name, values in arrays.items():
        if values.shape != shape or values.ndim != 1:
            raise ValueError(f"{name}: got shape {values.shape}, expected one axis, like {shape}")
    return list(arrays.values())
