"""The problems: classification on two data sets and quadratics, on three sets; their optima."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab import zeroth_order as zo
from jaxopt_lab.data import fetch, tables

ROWS = 1000

# Radii are fixed in the protocol.
SETS: dict[str, Callable[[], zo.ConstraintSet]] = {
    "simplex": lambda: zo.simplex(5.0),
    "l1": lambda: zo.l1_ball(5.0),
    "l2": lambda: zo.l2_ball(2.0),
}
UNIT_SETS: dict[str, Callable[[], zo.ConstraintSet]] = {
    "simplex": zo.simplex,
    "l1": zo.l1_ball,
    "l2": zo.l2_ball,
}
LOSSES = {
    "logistic": lambda margin: jax.nn.softplus(-margin),
    "svm": lambda margin: jnp.square(jnp.maximum(1 - margin, 0)),  # squared hinge
    "tanh": lambda margin: 1 - jnp.tanh(margin),  # not convex
}


class Problem(NamedTuple):
    """A function on a set, its start and its gradient's Lipschitz constant."""

    f: Callable[[jax.Array], jax.Array]
    constraint: zo.ConstraintSet | None
    x0: np.ndarray
    smoothness: float
    sampled: Callable[[jax.Array, jax.Array], jax.Array] | None = None  # one minibatch


def classification(data: str, loss: str, name: str, batch: int = 32) -> Problem:
    """Mean loss of a linear classifier on the rows of a data set."""
    features, labels = rows_of(data)
    signed = jnp.asarray(labels[:, None] * features)
    curvature = {"logistic": 0.25, "svm": 2.0, "tanh": 4 / 27**0.5}[loss]
    largest = float(np.linalg.norm(features, 2)) ** 2 / len(features)

    def sampled(x: jax.Array, key: jax.Array) -> jax.Array:
        chosen = jax.random.randint(key, (batch,), 0, len(features))
        return jnp.mean(LOSSES[loss](signed[chosen] @ x))

    constraint, d = SETS[name](), features.shape[1]
    x0 = np.full(d, 5.0 / d) if name == "simplex" else np.zeros(d)
    f = lambda x: jnp.mean(LOSSES[loss](signed @ x))  # noqa: E731
    return Problem(f, constraint, x0, curvature * largest, sampled)


def quadratic(name: str | None, d: int = 50, mu: float = 0.1, smoothness: float = 5.0) -> Problem:
    """(x - t) A (x - t) / 2, eigenvalues of A from mu to L in a random basis, t far outside."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(d, d)))
    values = np.concatenate([[mu, smoothness], rng.uniform(mu, smoothness, d - 2)])
    matrix = jnp.asarray(basis * values @ basis.T)
    target = rng.normal(size=d)
    target = jnp.asarray(3 * target / np.linalg.norm(target))
    x0 = np.full(d, 1 / d) if name == "simplex" else np.zeros(d)
    constraint = UNIT_SETS[name]() if name else None
    return Problem(lambda x: 0.5 * (x - target) @ matrix @ (x - target), constraint, x0, smoothness)


def gap_of(problem: Problem, x: jax.Array) -> jax.Array:
    """The Frank-Wolfe gap <grad f(x), x - s>, from the true gradient."""
    gradient = jax.grad(problem.f)(x)
    return jnp.vdot(gradient, x - problem.constraint.lmo(gradient, x))


def optimum(problem: Problem, steps: int = 20_000) -> tuple[float, float]:
    """f* by accelerated projected gradients with restarts, and its Frank-Wolfe gap."""
    gradient = jax.grad(problem.f)

    def step(carry: Any, _: None):
        x, y, t = carry
        g = gradient(y)
        new = problem.constraint.project(y - g / problem.smoothness)
        # Momentum that points uphill starts again.
        t = jnp.where(jnp.vdot(y - new, new - x) > 0, 1.0, t)
        faster = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
        return (new, new + (t - 1) / faster * (new - x), faster), None

    x0 = jnp.asarray(problem.x0)
    x = jax.jit(lambda c: jax.lax.scan(step, c, length=steps)[0][0])((x0, x0, jnp.ones(())))
    return float(problem.f(x)), float(gap_of(problem, x))


@functools.cache
def rows_of(data: str) -> tuple[np.ndarray, np.ndarray]:
    """1 000 random rows as indicators, columns that occur in them, and labels +1 and -1."""
    fetch(data)
    features, labels = {"a9a": tables.a9a, "mushroom": tables.mushroom}[data]()
    chosen = np.random.default_rng(0).choice(len(labels), ROWS, replace=False)
    features = features[chosen]
    return features[:, features.any(0)].astype(np.float64), labels[chosen].astype(np.float64)
