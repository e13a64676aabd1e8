r"""Euclidean projections, $\operatorname{argmin}_{s \in Q} \lVert s - x \rVert_2$.

Balls are centred at zero and closed; a point inside is returned as it is.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxopt_lab.core.numerics import Scalar, frobenius_unit

# A bisection halves an interval to the last bit of float64.
_HALVINGS = 64


def simplex(x: Float[Array, "n"], radius: Scalar = 1.0) -> Float[Array, "n"]:
    r"""Onto $\{s \ge 0, \sum_i s_i = r\}$: $\max(x - \theta, 0)$, the threshold found by sorting.

    >>> simplex(jnp.array([0.5, 1.5, -1.0])).tolist()
    [0.0, 1.0, 0.0]

    Args:
      x: Any point.
      radius: $r$.

    Source: Duchi, Shalev-Shwartz, Singer and Chandra, "Efficient Projections onto the l1-Ball for
    Learning in High Dimensions", ICML 2008.
    """
    # Sums of differences to the largest entry: a common offset costs no digits.
    gaps = x - jnp.max(x)
    sorted_gaps = jnp.sort(gaps, descending=True)
    number = jnp.arange(1, x.size + 1)
    thresholds = (jnp.cumsum(sorted_gaps) - radius) / number
    # The first entry is always kept, whatever rounding says.
    kept = jnp.maximum(jnp.sum(sorted_gaps > thresholds), 1)
    return jnp.maximum(gaps - thresholds[kept - 1], 0).astype(x.dtype)


def l1_ball(x: Float[Array, "n"], radius: Scalar = 1.0) -> Float[Array, "n"]:
    r"""A soft threshold: the simplex of the sizes, with the signs put back.

    >>> l1_ball(jnp.array([-2.0, 1.0, 0.0]), 1.0).tolist()
    [-1.0, 0.0, 0.0]

    Args:
      x: Any point.
      radius: $r$.

    Source: as for `simplex`.
    """
    size = jnp.abs(x)
    inside = jnp.sum(size) <= radius
    return jnp.where(inside, x, jnp.sign(x) * simplex(size, radius))


def l2_ball(x: Float[Array, "n"], radius: Scalar = 1.0) -> Float[Array, "n"]:
    """Rescaling to the radius, at any scale of `x`.

    >>> [round(float(s), 3) for s in l2_ball(jnp.array([3.0, -4.0]))]
    [0.6, -0.8]

    Args:
      x: Any point.
      radius: Of the ball.
    """
    unit = frobenius_unit(x, 0)
    # <x, x / |x|> is the norm, without a square that overflows.
    return jnp.where(jnp.vdot(x, unit) <= radius, x, radius * unit)


def linf_ball(x: Float[Array, "n"], radius: Scalar = 1.0) -> Float[Array, "n"]:
    """Clipping.

    Args:
      x: Any point.
      radius: Of the ball.
    """
    return jnp.clip(x, -radius, radius)


def box(
    x: Float[Array, "n"],
    low: Scalar | Float[Array, "n"],
    high: Scalar | Float[Array, "n"],
) -> Float[Array, "n"]:
    """Clipping.

    Args:
      x: Any point.
      low: Smallest entries.
      high: Largest entries.
    """
    return jnp.clip(x, low, high)


def lp_ball(x: Float[Array, "n"], p: float, radius: Scalar = 1.0) -> Float[Array, "n"]:
    r"""Onto $\lVert s \rVert_p \le r$, by two nested bisections.

    Of radius 1, the sizes solve $s_i + \lambda s_i^{p-1} = \lvert x_i \rvert$ with $\lVert s
    \rVert_p = 1$. The outer loop looks for the largest of them, $t$ between $n^{-1/p}$ and 1, which
    fixes $\lambda$; the inner one finds the others.

    Args:
      x: Any point.
      p: Above 1 and finite; the ends are `l1_ball` and `linf_ball`.
      radius: $r$.
    """
    size = jnp.abs(x) / radius
    largest = jnp.max(size)

    def sizes(t: Array) -> Array:
        weight = (largest - t) / t ** (p - 1)
        return _bisect(lambda s: s + weight * s ** (p - 1) < size, jnp.zeros_like(size), t)

    start = jnp.full_like(largest, x.size ** (-1 / p))
    top = _bisect(lambda t: jnp.sum(sizes(t) ** p) < 1, start, jnp.ones_like(largest))
    # Powers of a ratio to the largest entry neither overflow nor vanish all together.
    ratio = size / jnp.where(largest > 0, largest, 1)
    inside = largest * jnp.sum(ratio**p) ** (1 / p) <= 1
    return jnp.where(inside, x, radius * jnp.sign(x) * sizes(top))


def nuclear_ball(x: Float[Array, "m n"], radius: Scalar = 1.0) -> Float[Array, "m n"]:
    """Singular values projected onto the l1 ball.

    Args:
      x: Any matrix.
      radius: Largest sum of singular values.
    """
    u, values, v = jnp.linalg.svd(x, full_matrices=False)
    return jnp.where(jnp.sum(values) <= radius, x, (u * l1_ball(values, radius)) @ v)


def spectral_ball(x: Float[Array, "m n"], radius: Scalar = 1.0) -> Float[Array, "m n"]:
    """Singular values clipped.

    Args:
      x: Any matrix.
      radius: Largest singular value.
    """
    u, values, v = jnp.linalg.svd(x, full_matrices=False)
    return jnp.where(values[0] <= radius, x, (u * jnp.minimum(values, radius)) @ v)


def _bisect(below: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """Where `below` turns from true to false, between `low` and `high`; entry by entry."""

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        up = below(middle)
        return jnp.where(up, middle, low), jnp.where(up, high, middle)

    ends = low, jnp.broadcast_to(high, low.shape)
    low, high = lax.fori_loop(0, _HALVINGS, halve, ends)
    return (low + high) / 2
