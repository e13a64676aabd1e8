r"""The discrete Fokker-Planck equation in weak form, term by term.

The master equation of SGD is $\mathrm E \varphi(w') = \mathrm E_w \mathrm E_k \varphi(w - \eta
\nabla L_k(w))$, exactly. To second order in $\eta$, with $\bar g$ the mean and $C$ the covariance
of the gradient at $w$:

$$
\mathrm E \varphi(w') - \mathrm E \varphi(w) =
  \mathrm E_w\left[-\eta \, \bar g_i \partial_i \varphi
  + \tfrac{\eta^2}{2} (C_{ij} + \bar g_i \bar g_j) \, \partial_i \partial_j \varphi\right]
  + O(\eta^3)
$$

The raw second moment $C + \bar g \bar g^\top$ stands there; the standard Langevin equation has the
centred $C$ alone, an error of order $\eta^2$. On quadratic losses the raw form is exact for every
quadratic $\varphi$, at any $\eta$.

Source: Ignashin et al., "Why SGD is not Brownian Motion: A New Perspective on Stochastic Dynamics",
arXiv 2605.22644.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxopt_lab.dynamics.landscape.quadratics import FiniteSum, batch_factor


class WeakStep(NamedTuple):
    r"""$\mathrm E \varphi$ after one step, three ways."""

    exact: Float[Array, ""]  # over every sample
    raw: Float[Array, ""]  # second order, with the raw second moment of the gradient
    centred: Float[Array, ""]  # second order, with its covariance


class IncrementTraces(NamedTuple):
    """Traces of second moments of one step's increment."""

    centred: Float[Array, ""]  # of its covariance
    raw: Float[Array, ""]  # of its second moment


def weak_step(
    test_function: Callable[[Float[Array, "D"]], Float[Array, ""]],
    points: Float[Array, "M D"],
    probabilities: Float[Array, "M"],
    problem: FiniteSum,
    *,
    learning_rate: float | Array,
) -> WeakStep:
    r"""One step on one sample at a time, from a law on finitely many points.

    Larger batches are samples of `quadratics.all_batches`.

    >>> problem = FiniteSum(jnp.array([[[1.0]], [[3.0]]]), jnp.array([[0.0], [1.0]]))
    >>> law = jnp.array([[1.0], [-1.0]]), jnp.array([0.5, 0.5])
    >>> step = weak_step(lambda w: w[0] ** 2, *law, problem, learning_rate=0.5)
    >>> [float(x) for x in step]
    [0.375, 0.375, -0.6875]

    Args:
      test_function: $\varphi$, twice differentiable.
      points: Where the law of $w$ has its mass.
      probabilities: Of the points; they add up to 1.
      problem: Losses of equally likely samples.
      learning_rate: $\eta$.
    """

    def at(w):
        slopes = jnp.einsum("kij,j->ki", problem.hessians, w, precision="highest")
        slopes = slopes + problem.gradients
        mean = slopes.mean(0)
        centred = slopes - mean
        covariance = jnp.einsum("ki,kj->ij", centred, centred, precision="highest") / len(slopes)
        value, slope = test_function(w), jax.grad(test_function)(w)
        bend = jax.hessian(test_function)(w)
        drifted = value - learning_rate * jnp.vdot(mean, slope)
        with_noise = drifted + learning_rate**2 / 2 * jnp.vdot(covariance, bend)
        straight = learning_rate**2 / 2 * jnp.einsum("i,ij,j->", mean, bend, mean)
        exact = jax.vmap(test_function)(w - learning_rate * slopes).mean()
        return WeakStep(exact, with_noise + straight, with_noise)

    steps = jax.vmap(at)(points)
    return jax.tree.map(lambda x: jnp.vdot(probabilities, x), steps)


def increment_traces(
    gradients: Float[Array, "N D"],
    *,
    learning_rate: float | Array,
    batch_size: int = 1,
    replace: bool = True,
) -> IncrementTraces:
    r"""Second moments of one increment, by the gradients of all samples at one point.

    $$
    \operatorname{tr} \mathrm{Cov} = \eta^2 f \operatorname{tr} C, \qquad
    \mathrm E \lVert w' - w \rVert^2
      = \eta^2 (f \operatorname{tr} C + \lVert \bar g \rVert^2)
    $$

    Both are $\eta^2$ exactly. With the batch the first falls as $1/B$, while the second has the
    floor $\eta^2 \lVert \bar g \rVert^2$.

    >>> [float(x) for x in increment_traces(jnp.array([[1.0], [3.0]]), learning_rate=0.5)]
    [0.25, 1.25]

    Args:
      gradients: Of every sample.
      learning_rate: $\eta$.
      batch_size: $B$.
      replace: Whether a batch may hold a sample twice.
    """
    mean = gradients.mean(0)
    factor = batch_factor(len(gradients), batch_size, replace)
    spread = factor * jnp.sum((gradients - mean) ** 2) / len(gradients)
    return IncrementTraces(
        learning_rate**2 * spread, learning_rate**2 * (spread + jnp.sum(mean**2))
    )
