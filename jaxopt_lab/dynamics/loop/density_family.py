r"""The canonical family of densities of repeated learning.

The density of the residuals moves under scaling operators,

$$
D_{1..t} f(x) = \psi_t^n f(\psi_t x), \qquad \psi_t > 0,
$$

which says that a residual e becomes e/ψ_t. The theorems about it are in `density_checks`.

A density is a callable: from points of shape (m,) in one dimension, or (m, n) in n dimensions, to
values of shape (m,). It may be written with NumPy or jax.numpy.

Source: Veprikov, Afanasiev, Khritankov, "A Mathematical Model of the Hidden Feedback Loop Effect in
Machine Learning Systems", arXiv 2405.02726.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import ArrayLike

Density = Callable[[np.ndarray], ArrayLike]

_PANELS, _ORDER = 64, 16


class Quadrature(NamedTuple):
    """Points and weights of an integration rule."""

    points: np.ndarray  # (m,) in one dimension, (m, n) in n
    weights: np.ndarray  # (m,)


class FamilyStatistics(NamedTuple):
    """What the canonical family does to the numbers that one looks at."""

    center: float  # f(0)
    mass: float  # integral of f over [-kappa, kappa]
    moments: np.ndarray  # (orders,) integral of x^k f


def quadrature(
    low: float, high: float, *, dimension: int = 1, panels: int = _PANELS, order: int = _ORDER
) -> Quadrature:
    """Composite Gauss-Legendre rule on [low, high]^n.

    Args:
      low: Lower end; choose the ends where a density jumps, so that no panel holds a jump.
      high: Upper end.
      dimension: n; the rule has (panels order)^n points.
      panels: Panels of each axis.
      order: Points of each panel.

    Raises:
      ValueError: If the ends are not finite and increasing.

    >>> rule = quadrature(0.0, 1.0, panels=1, order=2)
    >>> bool(np.isclose(np.sum(rule.weights * rule.points**3), 0.25))
    True
    """
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ValueError(f"low, high: got {low}, {high}, expected finite, increasing ends")
    nodes, node_weights = np.polynomial.legendre.leggauss(order)
    edges = np.linspace(low, high, panels + 1)
    half = np.diff(edges)[:, None] / 2.0
    points = ((edges[:-1, None] + half) + half * nodes).ravel()
    weights = (half * node_weights).ravel()
    if dimension == 1:
        return Quadrature(points, weights)
    axes = np.meshgrid(*[points] * dimension, indexing="ij")
    products = np.meshgrid(*[weights] * dimension, indexing="ij")
    return Quadrature(
        np.stack([axis.ravel() for axis in axes], -1),
        np.prod([product.ravel() for product in products], 0),
    )


def integrate(function: Density, rule: Quadrature) -> float:
    """Integral of a function by a rule.

    >>> round(integrate(np.cos, quadrature(0.0, np.pi / 2)), 12)
    1.0
    """
    return float(np.sum(rule.weights * values_at(function, rule.points)))


def values_at(function: Density, points: np.ndarray) -> np.ndarray:
    """A function at points, in float64 even if it is written with jax.numpy."""
    with jax.enable_x64(True):
        return np.asarray(function(points), np.float64)


def scale_density(density: Density, psi: float, *, dimension: int = 1) -> Density:
    r"""The operator: $D f(x) = \psi^n f(\psi x)$. Its inverse is the same with 1/ψ.

    Args:
      density: f.
      psi: ψ, positive.
      dimension: n.

    Raises:
      ValueError: If ψ is not positive and finite.

    >>> scaled = scale_density(uniform_density(2.0), 4.0)
    >>> scaled(np.array([0.0, 0.4, 0.6])).tolist()
    [1.0, 1.0, 0.0]
    """
    if not 0.0 < psi < np.inf:
        raise ValueError(f"psi: got {psi}, expected a positive, finite number")
    return lambda x: psi**dimension * density(psi * x)


def psi_from_center(center: ArrayLike, initial: ArrayLike, *, dimension: int = 1) -> np.ndarray:
    r"""ψ_t from densities at zero, $(f_t(0)/f_0(0))^{1/n}$.

    >>> float(psi_from_center(8.0, 2.0, dimension=2))
    2.0
    """
    return (np.asarray(center) / np.asarray(initial)) ** (1.0 / dimension)


def scaled_mass(distribution: Density, psi: float, kappa: float) -> float:
    r"""Mass in [-κ, κ] after scaling: $F_0(\kappa\psi) - F_0(-\kappa\psi)$.

    Args:
      distribution: F_0, the cumulative distribution function of the start.
      psi: ψ_t.
      kappa: κ.

    >>> uniform = lambda x: np.clip(x / 4.0 + 0.5, 0.0, 1.0)  # of half-width 2
    >>> scaled_mass(uniform, 2.0, 0.5)
    0.5
    """
    upper, lower = values_at(distribution, np.array([kappa * psi, -kappa * psi]))
    return float(upper - lower)


def scaled_moment(moment: ArrayLike, psi: ArrayLike, order: ArrayLike) -> np.ndarray:
    r"""Moment of order k after scaling, $\psi^{-k}\nu_k$, odd orders too.

    >>> float(scaled_moment(1.0, 2.0, 3))
    0.125
    """
    return np.asarray(moment) * np.asarray(psi, np.float64) ** -np.asarray(order)


def scaled_norm(norm: ArrayLike, psi: ArrayLike, q: ArrayLike, *, dimension: int = 1) -> np.ndarray:
    r"""L_q norm after scaling, $\psi^{n(1-1/q)}\lVert f\rVert_q$; q may be infinite.

    >>> float(scaled_norm(1.0, 4.0, 2.0))
    2.0
    """
    return np.asarray(norm) * np.asarray(psi) ** (dimension * (1.0 - 1.0 / np.asarray(q)))


def normal_density(deviation: float) -> Density:
    """Normal density of mean zero in one dimension.

    >>> round(float(normal_density(5.0)(np.array(0.0))), 6)
    0.079788
    """
    factor = 1.0 / (deviation * np.sqrt(2.0 * np.pi))
    return lambda x: factor * np.exp(-0.5 * np.square(x / deviation))


def uniform_density(half_width: float) -> Density:
    """Uniform density on [-half_width, half_width].

    >>> uniform_density(2.5)(np.array([0.0, 3.0])).tolist()
    [0.2, 0.0]
    """
    return lambda x: np.where(np.abs(x) <= half_width, 0.5 / half_width, 0.0)


def family_statistics(
    density: Density,
    psi: float,
    *,
    support: tuple[float, float],
    kappa: float = 0.5,
    orders: Sequence[int] = (2, 4),
) -> FamilyStatistics:
    """f_t(0), mass and moments of the scaled density by quadrature, in one dimension.

    Args:
      density: f_0.
      psi: ψ_t.
      support: Where f_0 is not negligible; exactly the support if f_0 jumps at its ends.
      kappa: κ of the mass.
      orders: Orders of the moments.

    >>> at_4 = family_statistics(uniform_density(2.0), 4.0, support=(-2.0, 2.0))
    >>> at_4.center, round(at_4.mass, 12), np.round(at_4.moments, 6).tolist()
    (1.0, 1.0, [0.083333, 0.0125])
    """
    scaled = scale_density(density, psi)
    low, high = support[0] / psi, support[1] / psi
    rule = quadrature(low, high)
    values = values_at(scaled, rule.points)
    inside = max(low, -kappa), min(high, kappa)
    return FamilyStatistics(
        center=float(values_at(scaled, np.zeros(1))[0]),
        mass=integrate(scaled, quadrature(*inside)) if inside[0] < inside[1] else 0.0,
        moments=np.array([np.sum(rule.weights * rule.points**k * values) for k in orders]),
    )
