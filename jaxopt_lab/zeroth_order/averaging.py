r"""Momentum over the estimates of another estimator."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxopt_lab.core.checks import check_number
from jaxopt_lab.zeroth_order.coordinate_memory import CoordinateMemory
from jaxopt_lab.zeroth_order.differences import PROBABILITY, Estimator, Found

# A number, or a function of the number of the iteration, as Optax's schedules are.
Schedule = float | Callable[[Array], Any]


class AverageState(NamedTuple):
    """State of an averaged estimator."""

    inner: Any  # memory of the estimator below
    average: Float[Array, " d"]  # the estimate $g$
    started: Bool[Array, ""]  # whether it holds an estimate
    previous: Any  # (d,): the last point where that is used, () otherwise


def averaged(
    estimator: Estimator, weight: Schedule | None = None, *, corrected: bool = False
) -> Estimator:
    r"""Exponential average of estimates $\rho$.

    $$g_k = (1 - \eta) g_{k-1} + \eta \rho_k(x_k), \qquad \text{corrected: }
    g_k = (1 - \eta) (g_{k-1} - \rho_k(x_{k-1})) + \rho_k(x_k)$$

    It starts from the memory of the estimator, or from the first estimate if that has none. The
    correction, of momentum-based Frank-Wolfe, asks for the same probes with the same samples at the
    point before: twice as many values.

    Args:
      estimator: Where estimates come from.
      weight: $\eta$, from 0 to 1, a number or a schedule. None: $4 / (k + 8 d^{3/2})^{2/3}$.
      corrected: Correct for the move of the point; for estimators without memory.

    Raises:
      ValueError: A number is outside of its range, or the estimator has a memory.

    Source: Mokhtari, Hassani and Karbasi, "Stochastic Conditional Gradient Methods", arXiv
    1804.09554; the correction: Cutkosky and Orabona, "Momentum-Based Variance Reduction in
    Non-Convex SGD", arXiv 1905.10018; the weight: arXiv 2409.10442.
    """
    if weight is not None and not callable(weight):
        check_number("averaging", weight, PROBABILITY)
    if corrected and estimator.fill is not None:
        raise ValueError("averaged: corrected=True is for estimators without memory")

    def init(d: int, dtype: Any) -> AverageState:
        zeros = jnp.zeros(d, dtype)
        return AverageState(
            estimator.init(d, dtype), zeros, jnp.zeros((), bool), zeros if corrected else ()
        )

    def estimate(state: AverageState, probes: Any, found: Found) -> tuple[Array, AverageState]:
        new, inner = estimator.estimate(state.inner, probes, found)
        start = state.inner.h if isinstance(state.inner, CoordinateMemory) else new
        old = jnp.where(state.started, state.average, start)
        paper = 4 / (found.count + 8 * found.x.size**1.5) ** (2 / 3)
        eta = weight(found.count) if callable(weight) else paper if weight is None else weight
        if corrected:
            again = found._replace(differences=found.before)
            before, _ = estimator.estimate(state.inner, probes, again)
            # Before the first move both points are one.
            average = new + (1 - eta) * jnp.where(state.started, old - before, 0)
        else:
            average = (1 - eta) * old + eta * new
        started = jnp.ones((), bool)
        return average, AverageState(inner, average, started, found.x if corrected else ())

    def other(state: AverageState, x: Array) -> Array:
        return jnp.where(state.started, state.previous, x)

    inner_fill = estimator.fill
    fill = inner_fill and (
        lambda state, *given: state._replace(inner=inner_fill(state.inner, *given))
    )
    return estimator._replace(
        init=init, estimate=estimate, fill=fill, other=other if corrected else None
    )
