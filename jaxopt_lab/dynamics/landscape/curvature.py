r"""The mean Hessian at a reference point, exactly, and its eigenbasis.

Hessian-vector products are the derivative of the gradient along a vector (forward over reverse
mode); D of them, with the unit vectors, make the Hessian. Everything runs in float64.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from jaxopt_lab.dynamics.landscape import flat
from jaxopt_lab.dynamics.landscape.flat import Loss

MOST_PARAMETERS = 10_000  # 800 MB of Hessian


class Eigenbasis(NamedTuple):
    """Eigenvalues in ascending order, eigenvectors as columns."""

    eigenvalues: Float[np.ndarray, "D"]
    directions: Float[np.ndarray, "D D"]


def mean_hessian(
    loss: Loss,
    params: PyTree,
    data: PyTree,
    *,
    batches: Int[ArrayLike, "batches B"] | None = None,
    vectors_at_once: int = 32,
) -> Float[np.ndarray, "D D"]:
    """The Hessian of the mean loss, in the order of `jax.flatten_util.ravel_pytree`.

    >>> mean_hessian(lambda w, x: jnp.mean(x * w[0] ** 2 * w[1]), np.ones(2), np.ones(3)).tolist()
    [[2.0, 2.0], [2.0, 0.0]]

    Args:
      loss: (params, batch) -> mean loss of the batch, twice differentiable.
      params: Where.
      data: Tree of arrays with a leading sample axis.
      batches: Average the Hessians of these batches of sample indices, one after the other; None
        takes the data as one batch. For a mean over samples `arange(N).reshape(-1, B)` gives the
        same in less memory; with batch statistics it is another Hessian.
      vectors_at_once: Hessian-vector products computed together; memory grows with it.

    Raises:
      ValueError: More than 10 000 parameters (use `lanczos`), or a loss that is not twice
        differentiable here.
    """
    parameters = flat.parameter_count(params)
    if parameters > MOST_PARAMETERS:
        raise ValueError(
            f"params: got {parameters} parameters, the exact Hessian takes at most "
            f"{MOST_PARAMETERS}; `lanczos` finds the largest eigenvalues of any number, and "
            "`flat_proxies` directions without curvature"
        )
    with jax.enable_x64(True):
        params, data = flat.in_double((params, data))
        check_twice_differentiable(loss, params, data)
        indices = None if batches is None else jnp.asarray(batches)
        return np.asarray(_hessian(loss, params, data, indices, min(vectors_at_once, parameters)))


def mini_batch_hessians(
    loss: Loss,
    params: PyTree,
    data: PyTree,
    batches: Int[ArrayLike, "batches B"],
    *,
    directions: Float[ArrayLike, "D k"] | None = None,
) -> Float[np.ndarray, "batches k k"]:
    r"""The Hessians of single batches, rotated: $O^\top H O$.

    Args:
      loss: (params, batch) -> mean loss of the batch, twice differentiable.
      params: Where.
      data: Tree of arrays with a leading sample axis.
      batches: Sample indices of each batch.
      directions: Orthonormal columns O; None leaves the axes as they are.

    Raises:
      ValueError: As for `mean_hessian`.
    """
    parameters = flat.parameter_count(params)
    if directions is None and parameters > MOST_PARAMETERS:
        raise ValueError(f"directions: got none for {parameters} parameters, expected some columns")
    with jax.enable_x64(True):
        params, data = flat.in_double((params, data))
        check_twice_differentiable(loss, params, data)
        basis = jnp.eye(parameters) if directions is None else jnp.asarray(directions, float)
        return np.asarray(_rotated(loss, params, data, jnp.asarray(batches), basis))


def eigenbasis(hessian: Float[ArrayLike, "D D"]) -> Eigenbasis:
    """Eigenvalues and eigenvectors of a symmetric matrix, in float64.

    >>> eigenbasis(np.diag([3.0, -1.0])).eigenvalues.tolist()
    [-1.0, 3.0]

    Raises:
      ValueError: Not a finite square matrix.
    """
    hessian = np.asarray(hessian, np.float64)
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1] or not np.isfinite(hessian).all():
        raise ValueError(f"hessian: got shape {hessian.shape}, expected a finite square matrix")
    return Eigenbasis(*np.linalg.eigh(hessian))


def flattest(eigenvalues: Float[ArrayLike, "D"], count: int) -> Int[np.ndarray, "count"]:
    """Indices of the directions of smallest absolute curvature, the flattest first.

    >>> flattest([-2.0, 0.1, -0.01, 5.0], 2).tolist()
    [2, 1]
    """
    return np.argsort(np.abs(np.asarray(eigenvalues)), kind="stable")[:count]


def sharpest(eigenvalues: Float[ArrayLike, "D"], count: int) -> Int[np.ndarray, "count"]:
    """Indices of the directions of largest positive curvature, the sharpest first.

    >>> sharpest([-2.0, 0.1, -0.01, 5.0], 3).tolist()
    [3, 1]
    """
    eigenvalues = np.asarray(eigenvalues)
    order = np.argsort(-eigenvalues, kind="stable")[:count]
    return order[eigenvalues[order] > 0]


def hessian_products(
    loss: Loss, params: PyTree, data: PyTree, batches: Int[Array, "batches B"] | None
) -> Callable[[Float[Array, "v D"]], Float[Array, "v D"]]:
    """Products of the mean Hessian with rows of vectors, for use inside jit.

    Without batches the gradient is linearised here, once for all products.
    """
    gradient = jax.grad(flat.displaced(loss, params))
    zero = jnp.zeros(flat.parameter_count(params))

    def of(batch: PyTree) -> Callable[[Array], Array]:
        _, product = jax.linearize(lambda theta: gradient(theta, batch), zero)
        return jax.vmap(product)

    if batches is None:
        return of(data)

    def mean(vectors: Array) -> Array:
        def add(total: Array, indices: Array) -> tuple[Array, None]:
            return total + of(flat.take(data, indices))(vectors), None

        total, _ = jax.lax.scan(add, jnp.zeros_like(vectors), batches)
        return total / len(batches)

    return mean


def check_twice_differentiable(loss: Loss, params: PyTree, data: PyTree) -> None:
    """Raises ValueError unless the loss has second derivatives that say something.

    A loss that is piecewise linear in the parameters, or one that passes its gradient around a
    rounding, has a Hessian of exact zeros: its curvature sits in kinks no derivative sees. Kinks of
    single units (ReLU) are not found; a smooth activation is the safe choice.
    """
    flat.check_loss(loss, params, data)
    try:
        gradient, turned = _probe(loss, params, data)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"loss: expected a twice differentiable one, its gradient has no derivative: {error}"
        ) from error
    if not bool(jnp.isfinite(turned).all()):
        raise ValueError("loss: its second derivatives are not finite at params")
    if not bool(jnp.any(turned)) and bool(jnp.any(gradient)):
        raise ValueError(
            "loss: its gradient does not vanish but all its second derivatives do, as for a "
            "piecewise linear loss (absolute errors or hinges of a linear or ReLU model); expected "
            "a twice differentiable loss"
        )


@functools.partial(jax.jit, static_argnums=0)
def _probe(loss: Loss, params: PyTree, data: PyTree) -> tuple[Array, Array]:
    """The gradient, and its derivative along a fixed generic vector."""
    gradient = jax.grad(flat.displaced(loss, params))
    parameters = flat.parameter_count(params)
    vector = jax.random.normal(jax.random.key(0), (parameters,))
    return jax.jvp(lambda theta: gradient(theta, data), (jnp.zeros(parameters),), (vector,))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _hessian(
    loss: Loss, params: PyTree, data: PyTree, batches: Array | None, vectors_at_once: int
) -> Float[Array, "D D"]:
    products = hessian_products(loss, params, data, batches)
    unit = jnp.eye(flat.parameter_count(params))
    hessian = jax.lax.map(lambda v: products(v[None])[0], unit, batch_size=vectors_at_once)
    return (hessian + hessian.T) / 2


@functools.partial(jax.jit, static_argnums=0)
def _rotated(
    loss: Loss, params: PyTree, data: PyTree, batches: Array, directions: Array
) -> Float[Array, "batches k k"]:
    def one(indices: Array) -> Array:
        products = hessian_products(loss, params, flat.take(data, indices), None)
        return products(directions.T) @ directions

    return jax.lax.map(one, batches)
