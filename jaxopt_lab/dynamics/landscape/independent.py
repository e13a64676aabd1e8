r"""Variances along eigendirections when the fluctuations of slope and curvature are independent.

In the eigenbasis of the mean Hessian, with independent entries of the fluctuating slope (variances
$d_i$) and Hessian (variances $\Gamma_{ij}$), a diagonal covariance stays diagonal:

$$
\Pi_i' = (1 - \eta \lambda_i)^2 \Pi_i + \eta^2 \sum_j \Gamma_{ij} (\Pi_j + \mu_j^2) + \eta^2 d_i
$$

With a diagonal $\Gamma$ every direction is alone: `direction_moments`, and `closed_forms`. The
Langevin equation of the same noise, read off at the times $n \eta$ and cut off after second order,
lacks $\eta^2 \lambda_i^2$ in the first factor: `truncated=True`.

Source: Ignashin et al., "Why SGD is not Brownian Motion: A New Perspective on Stochastic Dynamics",
arXiv 2605.22644.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from jaxopt_lab.dynamics.landscape.closed_forms import as_floats, growth_excess
from jaxopt_lab.dynamics.landscape.quadratics import Moments, follow


class DirectionMoments(NamedTuple):
    """Mean and variance along each direction, before the first step and after each."""

    mean: Float[Array, "n+1 *directions"]
    variance: Float[Array, "n+1 *directions"]


def direction_moments(
    *,
    learning_rate: ArrayLike,
    steps: int,
    curvature: ArrayLike,
    gradient_variance: ArrayLike,
    curvature_variance: ArrayLike = 0.0,
    correlation: ArrayLike = 0.0,
    drift: ArrayLike = 0.0,
    mean: ArrayLike = 0.0,
    variance: ArrayLike = 0.0,
    truncated: bool = False,
) -> DirectionMoments:
    r"""Each direction alone, with the mean as a source of noise.

    $$
    \mu' = (1 - \eta \lambda) \mu - \eta \bar g, \qquad
    \Pi' = \rho \Pi + \eta^2 (\Gamma \mu^2 + 2 c \mu + d), \qquad
    \rho = (1 - \eta \lambda)^2 + \eta^2 \Gamma
    $$

    All arguments but `steps` and `truncated` broadcast against each other.

    >>> numbers = {"learning_rate": 0.5, "curvature": 1.0, "gradient_variance": 4.0}
    >>> direction_moments(steps=2, **numbers).variance.tolist()
    [0.0, 1.0, 1.25]

    Args:
      learning_rate: $\eta$.
      steps: $n$.
      curvature: $\lambda$.
      gradient_variance: $d$, variance of the slope of a batch.
      curvature_variance: $\Gamma$, variance of the curvature of a batch.
      correlation: $c$, the covariance of curvature and slope.
      drift: $\bar g$, the mean slope at the origin.
      mean: $\mu_0$.
      variance: $\Pi_0$.
      truncated: Leave $\eta^2 \lambda^2$ out of $\rho$, as the Langevin equation does.
    """
    numbers = (learning_rate, curvature, gradient_variance, curvature_variance)
    numbers = jnp.broadcast_arrays(*as_floats(*numbers, correlation, drift, mean, variance))
    return _direction_moments(*numbers, steps=steps, truncated=truncated)


@partial(jax.jit, static_argnames=("steps", "truncated"))
def coupled_variances(
    *,
    learning_rate: float | Array,
    steps: int,
    curvature: Float[Array, "D"],
    gradient_variance: Float[Array, "D"],
    curvature_variance: Float[Array, "D D"],
    drift: Float[Array, "D"] | None = None,
    mean: Float[Array, "D"] | None = None,
    variance: Float[Array, "D"] | None = None,
    truncated: bool = False,
) -> DirectionMoments:
    r"""The recursion of the module, where each direction feeds the others through $\Gamma$.

    Args:
      learning_rate: $\eta$.
      steps: $n$.
      curvature: $\lambda$, eigenvalues of the mean Hessian.
      gradient_variance: $d$.
      curvature_variance: $\Gamma$, symmetric, of the Hessian's entries in the eigenbasis.
      drift: $\bar g$; zero if None, a critical point.
      mean: $\mu_0$; zero if None.
      variance: $\Pi_0$; zero if None.
      truncated: Leave $\eta^2 \lambda^2$ out, as the Langevin equation does.

    Raises:
      ValueError: `curvature_variance` is not a matrix over the directions.
    """
    curvature, gamma = _checked(curvature, curvature_variance)
    zeros = jnp.zeros_like(curvature)
    start = DirectionMoments(*(zeros if x is None else jnp.asarray(x) for x in (mean, variance)))
    kept = 1 + growth_excess(learning_rate, curvature, truncated=truncated)
    drift = zeros if drift is None else drift

    def step(state: DirectionMoments, _):
        mean, variance = state
        spread = jnp.matmul(gamma, variance + mean**2, precision="highest")
        return DirectionMoments(
            (1 - learning_rate * curvature) * mean - learning_rate * drift,
            kept * variance + learning_rate**2 * (spread + gradient_variance),
        )

    return follow(step, start, length=steps)


@partial(jax.jit, static_argnames="steps")
def coupled_covariance(
    *,
    learning_rate: float | Array,
    steps: int,
    curvature: Float[Array, "D"],
    gradient_covariance: Float[Array, "D D"],
    curvature_variance: Float[Array, "D D"],
    drift: Float[Array, "D"] | None = None,
    mean: Float[Array, "D"] | None = None,
    covariance: Float[Array, "D D"] | None = None,
) -> Moments:
    r"""`coupled_variances` with the entries off the diagonal.

    For $i \ne j$ they obey

    $$
    \Pi_{ij}' = (1 - \eta \lambda_i)(1 - \eta \lambda_j) \Pi_{ij}
      + \eta^2 \Gamma_{ij} (\Pi_{ij} + \mu_i \mu_j) + \eta^2 C_{ij}.
    $$

    Args:
      learning_rate: $\eta$.
      steps: $n$.
      curvature: $\lambda$, eigenvalues of the mean Hessian.
      gradient_covariance: $C$ in the eigenbasis; independent slopes have a diagonal one.
      curvature_variance: $\Gamma$, symmetric.
      drift: $\bar g$; zero if None, a critical point.
      mean: $\mu_0$; zero if None.
      covariance: $\Pi_0$; zero if None.

    Raises:
      ValueError: `curvature_variance` is not a matrix over the directions.
    """
    curvature, gamma = _checked(curvature, curvature_variance)
    zeros = jnp.zeros_like(curvature)
    start = Moments(
        zeros if mean is None else jnp.asarray(mean),
        jnp.zeros_like(gamma) if covariance is None else jnp.asarray(covariance),
    )
    factors = 1 - learning_rate * curvature
    off_diagonal = gamma * (1 - jnp.eye(len(gamma), dtype=gamma.dtype))
    drift = zeros if drift is None else drift

    def step(state: Moments, _):
        mean, covariance = state
        second = covariance + jnp.outer(mean, mean)
        fed = off_diagonal * second + jnp.diag(
            jnp.matmul(gamma, jnp.diag(second), precision="highest")
        )
        return Moments(
            factors * mean - learning_rate * drift,
            jnp.outer(factors, factors) * covariance
            + learning_rate**2 * (fed + gradient_covariance),
        )

    return follow(step, start, length=steps)


@partial(jax.jit, static_argnames="truncated")
def coupled_radius(
    *,
    learning_rate: float | Array,
    curvature: Float[Array, "D"],
    curvature_variance: Float[Array, "D D"],
    truncated: bool = False,
) -> Array:
    r"""Growth per step, the spectral radius of $\mathrm{diag}((1-\eta\lambda)^2)+\eta^2\Gamma$.

    >>> curvature, gamma = jnp.array([1.0, 0.0]), jnp.diag(jnp.array([0.0, 4.0]))
    >>> float(coupled_radius(learning_rate=0.5, curvature=curvature, curvature_variance=gamma))
    2.0

    Args:
      learning_rate: $\eta$.
      curvature: $\lambda$.
      curvature_variance: $\Gamma$, symmetric.
      truncated: Leave $\eta^2 \lambda^2$ out, as the Langevin equation does.
    """
    curvature, gamma = _checked(curvature, curvature_variance)
    kept = 1 + growth_excess(learning_rate, curvature, truncated=truncated)
    return jnp.max(jnp.abs(jnp.linalg.eigvalsh(jnp.diag(kept) + learning_rate**2 * gamma)))


def _checked(curvature: ArrayLike, gamma: ArrayLike) -> tuple[Array, Array]:
    curvature, gamma = jnp.asarray(curvature), jnp.asarray(gamma)
    if curvature.ndim != 1 or gamma.shape != (len(curvature),) * 2:
        raise ValueError(
            f"curvature_variance: got shape {gamma.shape} for curvatures of shape "
            f"{curvature.shape}, expected (D, D) for (D,)"
        )
    return curvature, gamma


@partial(jax.jit, static_argnames=("steps", "truncated"))
def _direction_moments(
    learning_rate, curvature, d, gamma, correlation, drift, mean, variance, *, steps, truncated
) -> DirectionMoments:
    growth = 1 + growth_excess(learning_rate, curvature, gamma, truncated=truncated)

    def step(state: DirectionMoments, _):
        mean, variance = state
        source = gamma * mean**2 + 2 * correlation * mean + d
        return DirectionMoments(
            (1 - learning_rate * curvature) * mean - learning_rate * drift,
            growth * variance + learning_rate**2 * source,
        )
        return state, state

    start = DirectionMoments(mean, variance)
    return follow(step, start, length=steps)
