r"""The largest eigenvalues of a mean Hessian too large to form, and directions without curvature.

Lanczos's recursion builds an orthonormal basis Q of the Krylov space of a random vector, in which
the Hessian is tridiagonal: $Q^\top H Q = T$. In finite precision Q loses its orthogonality as soon
as an eigenvalue converges, so every new vector is orthogonalised against all of Q, twice.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Key, PyTree

from jaxopt_lab.dynamics.landscape import flat
from jaxopt_lab.dynamics.landscape.curvature import check_twice_differentiable, hessian_products
from jaxopt_lab.dynamics.landscape.flat import Loss

_BREAKDOWN = 1e-10  # of the largest entry of T so far


class Lanczos(NamedTuple):
    """The k eigenpairs of largest absolute value, in order of decreasing absolute value."""

    eigenvalues: Float[np.ndarray, "k"]
    directions: Float[np.ndarray, "D k"]  # orthonormal columns
    residuals: Float[np.ndarray, "k"]  # |H v - λ v|, from a product of its own


class FlatProxies(NamedTuple):
    """Random directions orthogonal to the ones that were found."""

    directions: Float[np.ndarray, "D count"]  # orthonormal columns
    curvatures: Float[np.ndarray, "count"]  # Rayleigh quotients v^T H v
    residuals: Float[np.ndarray, "count"]  # |H v - (v^T H v) v|


def lanczos(
    key: Key[Array, ""],
    loss: Loss,
    params: PyTree,
    data: PyTree,
    *,
    count: int,
    iterations: int | None = None,
    batches: Int[ArrayLike, "batches B"] | None = None,
) -> Lanczos:
    """Eigenpairs of the mean Hessian through Hessian-vector products.

    >>> from jaxopt_lab.dynamics.landscape.quadratics import finite_sum
    >>> from jaxopt_lab.dynamics.landscape.systems import quadratic
    >>> well = quadratic(finite_sum(np.diag([1.0, -5.0, 3.0])[None], np.zeros((1, 3))))
    >>> found = lanczos(jax.random.key(0), well.loss, np.zeros(3), well.data, count=2)
    >>> found.eigenvalues.round(6).tolist()
    [-5.0, 3.0]

    Args:
      key: Typed key of the first vector.
      loss: (params, batch) -> mean loss of the batch, twice differentiable.
      params: Where.
      data: Tree of arrays with a leading sample axis.
      count: Eigenpairs wanted, k.
      iterations: Hessian-vector products; None takes 4 k + 40, or as many as there are parameters.
        Look at the residuals: the inner part of the spectrum converges last.
      batches: As for `mean_hessian`.

    Raises:
      ValueError: A count out of range, or a loss that is not twice differentiable.
    """
    parameters = flat.parameter_count(params)
    iterations = min(4 * count + 40, parameters) if iterations is None else iterations
    if not 1 <= count <= iterations <= parameters:
        raise ValueError(
            f"count, iterations: got {count}, {iterations}, expected 1 <= count <= iterations <= "
            f"{parameters} parameters"
        )
    with jax.enable_x64(True):
        params, data = flat.in_double((params, data))
        check_twice_differentiable(loss, params, data)
        indices = None if batches is None else jnp.asarray(batches)
        found = _lanczos(loss, count, iterations, key, params, data, indices)
        return Lanczos(*jax.device_get(found))


def flat_proxies(
    key: Key[Array, ""],
    loss: Loss,
    params: PyTree,
    data: PyTree,
    *,
    excluded: Float[ArrayLike, "D k"],
    count: int,
    batches: Int[ArrayLike, "batches B"] | None = None,
) -> FlatProxies:
    """Random orthonormal directions orthogonal to those with curvature.

    They stand for the flat directions, which are too many to find. A random direction mixes the
    whole rest of the spectrum: the Rayleigh quotient is its curvature to first order, and the
    residual says how far from an eigenvector it is.

    Args:
      key: Typed key of the directions.
      loss: (params, batch) -> mean loss of the batch, twice differentiable.
      params: Where.
      data: Tree of arrays with a leading sample axis.
      excluded: Orthonormal columns, `Lanczos.directions`.
      count: Number of directions.
      batches: As for `mean_hessian`.

    Raises:
      ValueError: Shapes that do not fit, or more directions than there is room for.
    """
    parameters = flat.parameter_count(params)
    excluded = np.asarray(excluded, np.float64)
    if excluded.ndim != 2 or len(excluded) != parameters:
        raise ValueError(f"excluded: got shape {excluded.shape}, expected ({parameters}, k)")
    if not 1 <= count <= parameters - excluded.shape[1]:
        raise ValueError(
            f"count: got {count}, expected 1 to {parameters - excluded.shape[1]}, the dimensions "
            "that are left"
        )
    with jax.enable_x64(True):
        params, data = flat.in_double((params, data))
        indices = None if batches is None else jnp.asarray(batches)
        found = _flat_proxies(loss, count, key, params, data, indices, jnp.asarray(excluded))
        return FlatProxies(*jax.device_get(found))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _lanczos(
    loss: Loss,
    count: int,
    iterations: int,
    key: Key[Array, ""],
    params: PyTree,
    data: PyTree,
    batches: Array | None,
) -> tuple[Array, Array, Array]:
    products = hessian_products(loss, params, data, batches)
    parameters = flat.parameter_count(params)
    # Rows: a product with the filled part of the basis then needs no transposed copy.
    basis = jnp.zeros((iterations + 1, parameters))
    basis = basis.at[0].set(_unit(jax.random.normal(key, (parameters,))))

    def extend(carry: tuple[Array, Array], step: Array) -> tuple[tuple[Array, Array], Array]:
        basis, scale = carry
        image = products(basis[step][None])[0]
        diagonal = basis[step] @ image
        rest = _orthogonal(image, basis)
        size = jnp.linalg.norm(rest)
        scale = jnp.maximum(scale, jnp.maximum(jnp.abs(diagonal), size))
        # An invariant subspace is exhausted: go on in its complement, not coupled to it.
        stuck = size <= _BREAKDOWN * scale
        fresh = jax.random.normal(jax.random.fold_in(key, step), (parameters,))
        rest = jax.lax.cond(stuck, lambda: _orthogonal(_unit(fresh), basis), lambda: rest)
        basis = basis.at[step + 1].set(_unit(rest))
        return (basis, scale), jnp.stack([diagonal, jnp.where(stuck, 0.0, size)])

    (basis, _), entries = jax.lax.scan(extend, (basis, jnp.float64(0)), jnp.arange(iterations))
    diagonal, beside = entries[:, 0], entries[:-1, 1]
    tridiagonal = jnp.diag(diagonal) + jnp.diag(beside, 1) + jnp.diag(beside, -1)
    values, vectors = jnp.linalg.eigh(tridiagonal)
    order = jnp.argsort(-jnp.abs(values))[:count]
    ritz = vectors[:, order].T @ basis[:iterations]
    errors = products(ritz) - values[order][:, None] * ritz
    return values[order], ritz.T, jnp.linalg.norm(errors, axis=1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _flat_proxies(
    loss: Loss,
    count: int,
    key: Key[Array, ""],
    params: PyTree,
    data: PyTree,
    batches: Array | None,
    excluded: Float[Array, "D k"],
) -> tuple[Array, Array, Array]:
    drawn = jax.random.normal(key, (flat.parameter_count(params), count))
    for _ in range(2):
        drawn, _ = jnp.linalg.qr(drawn - excluded @ (excluded.T @ drawn))
    images = hessian_products(loss, params, data, batches)(drawn.T)
    curvatures = jnp.sum(images * drawn.T, axis=1)
    errors = images - curvatures[:, None] * drawn.T
    return drawn, curvatures, jnp.linalg.norm(errors, axis=1)


def _orthogonal(vector: Float[Array, "D"], basis: Float[Array, "rows D"]) -> Float[Array, "D"]:
    """The part of a vector orthogonal to orthonormal or empty rows."""
    for _ in range(2):
        vector = vector - (basis @ vector) @ basis
    return vector


def _unit(vector: Float[Array, "D"]) -> Float[Array, "D"]:
    size = jnp.linalg.norm(vector)
    return vector / jnp.where(size > 0, size, 1)
