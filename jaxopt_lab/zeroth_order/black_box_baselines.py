r"""Estimators that JAGUAR is compared with, for `frank_wolfe` and `gradient_descent`.

All but `sega` are without memory. `averaged` puts momentum on any of them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxopt_lab.core.numerics import frobenius_unit
from jaxopt_lab.zeroth_order.coordinate_memory import (
    Coordinates,
    check_coordinates,
    coordinate_memory,
    coordinate_probes,
)
from jaxopt_lab.zeroth_order.differences import Estimator, Feedback, Found, check_probing
from jaxopt_lab.zeroth_order.probes import check_integer


def full_coordinates(*, eps: float = 1e-3, feedback: Feedback = "deterministic") -> Estimator:
    r"""Differences of all coordinates: $2 d$ values an iteration, $d$ with single feedback.

    Args:
      eps: $\tau$.
      feedback: See `jaguar_frank_wolfe`.

    Raises:
      ValueError: An argument is out of its range.
    """
    return _coordinates(None, eps, feedback)


def random_coordinates(
    *, eps: float = 1e-3, num_coordinates: int = 1, feedback: Feedback = "deterministic"
) -> Estimator:
    r"""$\frac{d}{B} \sum_b D_{i_b} e_{i_b}$: randomised coordinate descent, nothing remembered.

    Args:
      eps: $\tau$.
      num_coordinates: $B$, distinct coordinates an iteration.
      feedback: See `jaguar_frank_wolfe`.

    Raises:
      ValueError: An argument is out of its range.
    """
    return _coordinates(num_coordinates, eps, feedback)


def random_directions(
    *, eps: float = 1e-3, num_directions: int = 1, feedback: Feedback = "deterministic"
) -> Estimator:
    r"""$l_2$ smoothing: $\frac{d}{B} \sum_b D_b v_b$ with $v_b$ uniform on the unit sphere.

    Args:
      eps: $\tau$.
      num_directions: $B$.
      feedback: See `jaguar_frank_wolfe`. "single" is the classical one-point estimate
        $\frac{d}{\tau} f(x + \tau v) v$.

    Raises:
      ValueError: An argument is out of its range.

    Source: Flaxman, Kalai and McMahan, "Online convex optimization in the bandit setting", SODA
    2005; with two values: Shamir, "An Optimal Algorithm for Bandit and Zero-Order Convex
    Optimization with Two-Point Feedback", JMLR 2017.

    Differs from the released code in: directions are uniform on the sphere (there: a cube,
    normalised) and both estimates have the factor $d$ (there it is part of the step).
    """
    check_probing(feedback, eps)
    check_integer("num_directions", num_directions)

    def draw(key: Array, d: int) -> Array:
        return frobenius_unit(jax.random.normal(key, (num_directions, d)), 1)

    def estimate(memory: Any, probes: Array, found: Found) -> tuple[Array, Any]:
        total = jnp.sum(found.differences[:, None] * probes, axis=0)
        return found.x.size / num_directions * total, memory

    return Estimator(
        feedback=feedback,
        eps=eps,
        num_probes=lambda d: num_directions,
        init=lambda d, dtype: (),
        draw=draw,
        point=lambda x, probes, b, offset: x + (offset * probes[b]).astype(x.dtype),
        estimate=estimate,
    )


def sega(
    *, eps: float = 1e-3, num_coordinates: int = 1, feedback: Feedback = "deterministic"
) -> Estimator:
    r"""JAGUAR's memory with the direction $h^{old} + d (D_i - h^{old}_i) e_i$.

    Args:
      eps: $\tau$.
      num_coordinates: Coordinates an iteration, distinct.
      feedback: See `jaguar_frank_wolfe`.

    Raises:
      ValueError: An argument is out of its range.

    Source: Hanzely, Mishchenko and Richtárik, "SEGA: Variance Reduction via Gradient Sketching",
    arXiv 1809.03054.
    """
    return coordinate_memory(eps=eps, num_coordinates=num_coordinates, feedback=feedback, sega=True)


def _coordinates(number: int | None, eps: float, feedback: Feedback) -> Estimator:
    check_probing(feedback, eps)

    def estimate(memory: Any, probes: Coordinates, found: Found) -> tuple[Array, Any]:
        fresh = found.differences * probes.sign
        scale = found.x.size / fresh.size
        return jnp.zeros_like(found.x).at[probes.index].set(scale * fresh), memory

    draw, point = coordinate_probes(number, feedback)
    return Estimator(
        feedback=feedback,
        eps=eps,
        num_probes=lambda d: d if number is None else check_coordinates(number, d),
        init=lambda d, dtype: (),
        draw=draw,
        point=point,
        estimate=estimate,
    )
