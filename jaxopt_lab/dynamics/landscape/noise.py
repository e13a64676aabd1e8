r"""How the gradient and the Hessian of a batch fluctuate at a point, along chosen directions.

With $G = O^\top \nabla L_n$ and $\tilde H = O^\top (H_n - \bar H) O$ of random batches:
$d_i = \mathrm{Var}(G_i)$ and $\Gamma_{ij} = \mathrm{Var}(\tilde H_{ij})$.

For a loss that is a mean over samples both follow exactly from single samples: the variance of a
batch is the population variance over the samples times the factor f of `batch_factor`. A loss that
couples the samples of a batch (batch norm) needs statistics over drawn batches.

Source: Ignashin et al., "Why SGD is not Brownian Motion: A New Perspective on Stochastic Dynamics",
arXiv 2605.22644, whose code draws batches.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Key, PyTree

from jaxopt_lab.dynamics.landscape import flat
from jaxopt_lab.dynamics.landscape.batches import batch_indices, check_sampling
from jaxopt_lab.dynamics.landscape.curvature import check_twice_differentiable
from jaxopt_lab.dynamics.landscape.ensemble import check_directions
from jaxopt_lab.dynamics.landscape.flat import Loss
from jaxopt_lab.dynamics.landscape.quadratics import batch_factor

CurvatureEntries = Literal["diagonal", "all", "none"]
# Hessian-vector products taken together: as many as keep their results in 128 MB, and no more than
# the activations of a network allow, of which the number of parameters says nothing.
_MOST_PRODUCTS, _SCALARS_AT_ONCE = 256, 2**24


class NoiseStatistics(NamedTuple):
    """Fluctuations of a batch along the directions."""

    drift: Float[np.ndarray, "k"]  # mean gradient
    gradient_variance: Float[np.ndarray, "k"]  # d
    curvature: Float[np.ndarray, "k"] | None  # diagonal of the rotated mean Hessian
    curvature_variance: Float[np.ndarray, "k *k"] | None  # Γ, its diagonal or all of it
    correlation: Float[np.ndarray, "k"] | None  # of G_i and H_ii over batches; nan without noise

    @property
    def diagonal_variance(self) -> Float[np.ndarray, "k"] | None:
        """Γ_ii."""
        gamma = self.curvature_variance
        return gamma if gamma is None or gamma.ndim == 1 else np.diagonal(gamma)

    @property
    def diagonal_mass(self) -> float | None:
        """Share of the diagonal in the sum of all Γ_ij; 1 if no direction feeds another."""
        gamma = self.curvature_variance
        return None if gamma is None or gamma.ndim == 1 else float(np.trace(gamma) / np.sum(gamma))

    @property
    def hessian_diagonal_mass(self) -> float | None:
        """Share of the diagonal in the mean square of the entries of whole batch Hessians.

        In an eigenbasis the mean Hessian, diagonal by construction, is in it: near 1 it says that
        the fluctuations are small, not that they are diagonal. The released code reports it.
        """
        gamma = self.curvature_variance
        if gamma is None or gamma.ndim == 1 or self.curvature is None:
            return None
        own = np.sum(np.square(self.curvature))
        return float((own + np.trace(gamma)) / (own + np.sum(gamma)))


def noise_statistics(
    loss: Loss,
    params: PyTree,
    data: PyTree,
    *,
    directions: Float[ArrayLike, "D k"],
    batch_size: int,
    replace: bool = True,
    curvature: CurvatureEntries = "diagonal",
    batches: int | None = None,
    key: Key[Array, ""] | None = None,
) -> NoiseStatistics:
    """Variances of the projected gradient and Hessian of a batch at one point.

    >>> from jaxopt_lab.dynamics.landscape.quadratics import finite_sum
    >>> from jaxopt_lab.dynamics.landscape.systems import quadratic
    >>> well = quadratic(finite_sum([1.0, 3.0], [0.5, -0.5]))
    >>> noise = noise_statistics(
    ...     well.loss, np.zeros(1), well.data, directions=np.eye(1), batch_size=2
    ... )
    >>> float(noise.gradient_variance[0]), float(noise.curvature_variance[0])
    (0.125, 0.5)

    Args:
      loss: (params, batch) -> mean loss of the batch.
      params: Where.
      data: Tree of arrays with a leading sample axis.
      directions: Orthonormal columns.
      batch_size: Samples of a batch.
      replace: Whether a batch may hold a sample twice.
      curvature: "diagonal": Γ_ii; "all": every Γ_ij, k² numbers; "none": gradients alone, which
        also works for losses without second derivatives.
      batches: Number of batches to draw; None computes from all single samples, exactly.
      key: Typed key of the drawn batches.

    Raises:
      ValueError: An argument out of range, or None for `batches` and a loss that is no mean over
        samples.
    """
    if curvature not in get_args(CurvatureEntries):
        raise ValueError(f"curvature: got {curvature!r}, expected one of diagonal, all, none")
    if (batches is None) != (key is None) or (batches is not None and batches < 2):
        raise ValueError(
            f"batches, key: got {batches}, {key}, expected both, with at least 2 batches, or none"
        )
    with jax.enable_x64(True):
        params, data = flat.in_double((params, data))
        directions = jnp.asarray(directions, jnp.float64)
        check_directions(directions, flat.parameter_count(params))
        samples = flat.check_loss(loss, params, data)
        sampling = "with_replacement" if replace else "without_replacement"
        check_sampling(samples, batch_size, sampling)
        if curvature != "none":
            check_twice_differentiable(loss, params, data)
        if key is None or batches is None:
            indices, factor = (
                jnp.arange(samples)[:, None],
                batch_factor(samples, batch_size, replace),
            )
        else:
            draw = functools.partial(
                batch_indices, num_samples=samples, batch_size=batch_size, sampling=sampling
            )
            indices, factor = jax.vmap(lambda i: draw(key, i))(jnp.arange(batches)), None
        moments = _moments(loss, curvature, params, data, directions, indices)
        if factor is None:
            assert batches is not None
            factor = batches / (batches - 1)
        else:
            _check_mean_over_samples(moments)
    return _statistics(moments, factor)


class _Moments(NamedTuple):
    """Means over batches of deviations from the whole data, and of their squares and products."""

    gradient: Array  # (k,) of the whole data
    gradient_shift: Array  # (k,)
    gradient_square: Array  # (k,)
    curvature: Array | None  # (k,) or (k, k), of the whole data
    curvature_shift: Array | None
    curvature_square: Array | None
    product: Array | None  # (k,)


def _statistics(moments: _Moments, factor: float) -> NoiseStatistics:
    m = jax.device_get(moments)
    d = _variance(m.gradient_square, m.gradient_shift)
    drift = m.gradient + m.gradient_shift
    if m.curvature is None:
        return NoiseStatistics(drift, factor * d, None, None, None)
    gamma = _variance(m.curvature_square, m.curvature_shift)
    mean = m.curvature + m.curvature_shift
    shift = m.curvature_shift
    if gamma.ndim == 2:
        mean, shift = np.diagonal(mean), np.diagonal(shift)
    own = gamma if gamma.ndim == 1 else np.diagonal(gamma)
    covariance = m.product - m.gradient_shift * shift
    scale = np.sqrt(d * own)
    correlation = np.divide(covariance, scale, out=np.full_like(d, np.nan), where=scale > 0)
    return NoiseStatistics(drift, factor * d, mean, factor * gamma, correlation)


def _variance(square: np.ndarray, shift: np.ndarray) -> np.ndarray:
    return np.maximum(square - np.square(shift), 0)


def _check_mean_over_samples(moments: _Moments) -> None:
    """The mean over samples must be the whole data's: that is what the factor f stands on."""
    pairs = [(moments.gradient_shift, moments.gradient_square)]
    if moments.curvature_shift is not None and moments.curvature_square is not None:
        pairs.append((moments.curvature_shift, moments.curvature_square))
    for shift, square in pairs:
        if float(jnp.linalg.norm(shift)) > 1e-8 * float(jnp.sqrt(jnp.sum(square))):
            raise ValueError(
                "loss: its mean over single samples is not its value on the whole data, as with "
                "batch statistics; give `batches` and `key` to draw batches instead"
            )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _moments(
    loss: Loss,
    entries: CurvatureEntries,
    params: PyTree,
    data: PyTree,
    directions: Float[Array, "D k"],
    indices: Int[Array, "batches B"],
) -> _Moments:
    observe = _observation(loss, entries, params, directions)
    gradient, curvature = observe(data)

    def deviations(indices: Int[Array, "B"]) -> tuple[Array | None, ...]:
        # From the whole data's, near the mean, so that squares keep their digits.
        g, h = observe(flat.take(data, indices))
        g = g - gradient
        if h is None or curvature is None:
            return g, jnp.square(g), None, None, None
        h = h - curvature
        own = h if h.ndim == 1 else jnp.diagonal(h)
        return g, jnp.square(g), h, jnp.square(h), g * own

    samples_at_once = max(1, _products_at_once(directions) // directions.shape[1])
    g, gg, h, hh, gh = _mean_over(deviations, indices, samples_at_once)
    return _Moments(gradient, g, gg, curvature, h, hh, gh)


def _observation(
    loss: Loss, entries: CurvatureEntries, params: PyTree, directions: Float[Array, "D k"]
) -> Callable[[PyTree], tuple[Array, Array | None]]:
    """Projected gradient and Hessian of a batch."""
    gradient = jax.grad(flat.displaced(loss, params))
    zero = jnp.zeros(len(directions))
    count = directions.shape[1]
    # Equal parts, the last one not much smaller.
    vectors_at_once = -(-count // -(-count // _products_at_once(directions)))

    def observe(batch: PyTree) -> tuple[Array, Array | None]:
        if entries == "none":
            return gradient(zero, batch) @ directions, None
        slope, product = jax.linearize(lambda theta: gradient(theta, batch), zero)
        images_DxK = jax.lax.map(product, directions.T, batch_size=vectors_at_once).T
        if entries == "all":
            return slope @ directions, directions.T @ images_DxK
        return slope @ directions, jnp.sum(directions * images_DxK, axis=0)

    return observe


def _products_at_once(directions: Float[Array, "D k"]) -> int:
    return max(1, min(_MOST_PRODUCTS, _SCALARS_AT_ONCE // directions.shape[0]))


def _mean_over(
    function: Callable[[Array], PyTree], inputs: Int[Array, "n B"], at_once: int
) -> PyTree:
    """Mean of a tree-valued function, some inputs at a time."""
    whole = len(inputs) // at_once * at_once

    def total(chunk: Array) -> PyTree:
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.vmap(function)(chunk))

    def add(sums: PyTree, chunk: Array) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, sums, total(chunk)), None

    shapes = jax.eval_shape(function, inputs[0])
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    chunks = inputs[:whole].reshape(-1, at_once, inputs.shape[1])
    sums, _ = jax.lax.scan(add, sums, chunks)
    if whole < len(inputs):
        sums, _ = add(sums, inputs[whole:])
    return jax.tree.map(lambda x: x / len(inputs), sums)
