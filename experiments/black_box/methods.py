"""The methods and their grids: the same number of cells for each."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_lab import zeroth_order as zo

EPS = 1e-3  # of deterministic values
EPS_NOISY = 0.1  # of minibatches

Estimators = dict[str, Callable[[], Any]]

# All baselines of the specification. Momentum has the weights of the paper.
DETERMINISTIC: Estimators = {
    "JAGUAR": lambda: zo.coordinate_memory(eps=EPS),
    "full": lambda: zo.full_coordinates(eps=EPS),
    "coordinate": lambda: zo.random_coordinates(eps=EPS),
    "sphere": lambda: zo.random_directions(eps=EPS),
    "SEGA": lambda: zo.sega(eps=EPS),
    "coordinate, momentum": lambda: zo.averaged(zo.random_coordinates(eps=EPS)),
    "sphere, corrected momentum": lambda: zo.averaged(
        zo.random_directions(eps=EPS), corrected=True
    ),
}


def stochastic(feedback: Any) -> Estimators:
    """Methods on minibatches, one (two_point) or two (one_point) of them for a difference."""
    options: Any = {"eps": EPS_NOISY, "feedback": feedback}
    return {
        "JAGUAR": lambda: zo.averaged(zo.coordinate_memory(sega=True, **options)),
        "JAGUAR, memory alone": lambda: zo.coordinate_memory(**options),
        "full": lambda: zo.full_coordinates(**options),
        "full, momentum": lambda: zo.averaged(zo.full_coordinates(**options)),
        "coordinate, momentum": lambda: zo.averaged(zo.random_coordinates(**options)),
        "sphere, momentum": lambda: zo.averaged(zo.random_directions(**options)),
    }


DESCENT = ("JAGUAR", "full", "coordinate", "sphere", "SEGA")


def frank_wolfe_cells(d: int) -> list[float]:
    """K of the step 4 / (k + K): from that of the full gradient to a smaller one than JAGUAR's."""
    return [4.0, d / 2, 2.0 * d, 8.0 * d, 32.0 * d]


def descent_cells(d: int, smoothness: float) -> list[float]:
    """Eight rates from 1 / (4 d L), which is safe, to 1 / L, that of the full gradient."""
    return [float(r / smoothness) for r in jnp.geomspace(1 / (4 * d), 1.0, 8)]


def build(estimator: Any, problem: Any, cell: Any, seed: Any) -> zo.BlackBox:
    """Frank-Wolfe on a set, gradient descent without one."""
    key = jax.random.key(seed)
    if problem.constraint is None:
        return zo.gradient_descent(cell, estimator, key=key)
    step_size = lambda k: jnp.minimum(1.0, 4 / (k + cell))  # noqa: E731
    return zo.frank_wolfe(estimator, problem.constraint, key=key, step_size=step_size)
