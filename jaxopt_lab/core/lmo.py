r"""Linear minimisation oracles: $\operatorname{argmin}_{s \in Q} \langle s, g \rangle$.

Balls are centred at zero and closed. Where a minimiser is not unique, the first index wins; for a
zero vector the balls return their centre, sets with independent entries leave these where they are.
None of them overflows or loses a tiny `g`: only its direction matters.

Source: Jaggi, "Revisiting Frank-Wolfe: Projection-Free Sparse Convex Optimization", ICML 2013.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxopt_lab.core.newton_schulz import newton_schulz
from jaxopt_lab.core.numerics import Scalar, frobenius_unit, safe_divide, scale_to_unit
from jaxopt_lab.core.spectral import leading_singular_triple

# Singular values below about 1e-7 of the largest come out smaller than 1.
_POLAR_STEPS = 24


def simplex(g: Float[Array, "n"], radius: Scalar = 1.0) -> Float[Array, "n"]:
    r"""A vertex of the simplex $\{s \ge 0, \sum_i s_i = r\}$.

    >>> simplex(jnp.array([2.0, -1.0, 0.5])).tolist()
    [0.0, 1.0, 0.0]

    Args:
      g: Objective.
      radius: $r$.
    """
    return jax.nn.one_hot(jnp.argmin(g), g.size, dtype=g.dtype) * radius


def l1_ball(g: Float[Array, "n"], radius: Scalar = 1.0) -> Float[Array, "n"]:
    r"""$-r \operatorname{sign}(g_j) e_j$ with $j$ the entry of largest size.

    >>> l1_ball(jnp.array([1.0, -3.0, 2.0])).tolist()
    [0.0, 1.0, 0.0]

    Args:
      g: Objective.
      radius: $r$.
    """
    vertex = jax.nn.one_hot(jnp.argmax(jnp.abs(g)), g.size, dtype=g.dtype)
    return jnp.where(vertex > 0, -radius * jnp.sign(g), 0).astype(g.dtype)


def l2_ball(g: Float[Array, "n"], radius: Scalar = 1.0) -> Float[Array, "n"]:
    r"""$-r g / \lVert g \rVert_2$.

    >>> [round(float(s), 3) for s in l2_ball(jnp.array([3.0, -4.0]))]
    [-0.6, 0.8]

    Args:
      g: Objective.
      radius: $r$.
    """
    return -radius * frobenius_unit(g, 0)


def linf_ball(
    g: Float[Array, "n"], x: Float[Array, "n"], radius: Scalar = 1.0
) -> Float[Array, "n"]:
    r"""$-r \operatorname{sign}(g)$; entries of `x` where `g` is zero.

    Args:
      g: Objective.
      x: A point of the ball.
      radius: $r$.
    """
    return box(g, x, -radius, radius)


def box(
    g: Float[Array, "n"],
    x: Float[Array, "n"],
    low: Scalar | Float[Array, "n"],
    high: Scalar | Float[Array, "n"],
) -> Float[Array, "n"]:
    r"""`low` where `g` is positive, `high` where it is negative, `x` where it is zero.

    >>> box(jnp.array([1.0, -1.0, 0.0]), jnp.array([0.5, 0.5, 0.5]), 0.0, 2.0).tolist()
    [0.0, 2.0, 0.5]

    Args:
      g: Objective.
      x: A point of the box.
      low: Smallest entries.
      high: Largest entries.
    """
    return jnp.where(g > 0, low, jnp.where(g < 0, high, x)).astype(g.dtype)


def lp_ball(g: Float[Array, "n"], p: float, radius: Scalar = 1.0) -> Float[Array, "n"]:
    r"""$-r \operatorname{sign}(g) \lvert g \rvert^{q-1} / \lVert g \rVert_q^{q-1}$.

    Args:
      g: Objective.
      p: Above 1 and finite, $1/p + 1/q = 1$; the ends are `l1_ball` and `linf_ball`.
      radius: $r$.
    """
    size = jnp.abs(g)
    # By the largest entry first: q is large for p near 1.
    ratio = safe_divide(size, jnp.max(size))
    q = p / (p - 1)
    norm = jnp.sum(ratio**q) ** (1 / q)
    return -radius * jnp.sign(g) * safe_divide(ratio, norm) ** (q - 1)


def nuclear_ball(g: Float[Array, "m n"], radius: Scalar = 1.0) -> Float[Array, "m n"]:
    r"""$-r u_1 v_1^\top$ with the leading singular pair of the matrix.

    Two values whose ratio is above 0.999 are not told apart; the result is then optimal up to that
    ratio.

    Args:
      g: Objective, float32 or wider.
      radius: $r$.
    """
    # At any scale: the pair comes from squares.
    _, u, v = leading_singular_triple(scale_to_unit(g, (-2, -1)))
    return -radius * u[:, None] * v


def spectral_ball(g: Float[Array, "m n"], radius: Scalar = 1.0) -> Float[Array, "m n"]:
    r"""$-r U V^\top$, the negative polar factor: Muon's direction, here to working precision.

    Args:
      g: Objective, float32 or wider.
      radius: $r$.
    """
    return -radius * newton_schulz(g, steps=_POLAR_STEPS, coefficients="polar_express")
