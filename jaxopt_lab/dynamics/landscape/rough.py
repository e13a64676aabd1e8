r"""A rough landscape on a line: non-quadratic mean, noise that depends on the place.

The mean gradient is $4 w^3 - 0.6 w + 0.15$. A batch adds

$$
(1 + 0.1 w^2) \sum_{k=1}^{20} a_k A_k \cos(2 \pi k w / \ell + \pi \phi_k), \qquad
a_k = \frac{1}{2 k^2}, \quad A_k, \phi_k \sim U(-1, 1), \quad \ell = 2
$$

whose variance is $(1 + 0.1 w^2)^2 \sum_k a_k^2 / 6$.

Source: Ignashin et al., "Why SGD is not Brownian Motion: A New Perspective on Stochastic Dynamics",
arXiv 2605.22644; experiment 44 of the released code.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Key

from jaxopt_lab.dynamics.landscape.langevin import simulate_langevin
from jaxopt_lab.dynamics.landscape.quadratics import follow

NUM_WAVES = 20
PERIOD = 2.0
START_SCALE = 0.18


class RoughComparison(NamedTuple):
    """SGD and two Langevin equations over the replicas: standard and drift-corrected."""

    mean: Float[Array, "3 steps+1"]  # SGD, standard, drift-corrected
    variance: Float[Array, "3 steps+1"]
    mean_errors: Float[Array, "2"]  # mean distance of each equation to SGD over the steps
    variance_errors: Float[Array, "2"]


def rough_mean_gradient(w: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Of the average landscape."""
    return 4 * w**3 - 0.6 * w + 0.15


def rough_noise(key: Key[Array, ""], w: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """What one landscape adds to the mean gradient, at all of the points.

    Args:
      key: Draws the landscape.
      w: Points.
    """
    waves = jnp.arange(1, NUM_WAVES + 1, dtype=w.dtype)
    amplitude, phase = jax.random.uniform(key, (2, NUM_WAVES), w.dtype, -1, 1)
    angles = 2 * jnp.pi / PERIOD * w[..., None] * waves + jnp.pi * phase
    return _envelope(w) * jnp.sum(amplitude * jnp.cos(angles) / (2 * waves**2), -1)


def rough_noise_variance(w: ArrayLike) -> Array:
    """Variance of `rough_noise` over landscapes.

    >>> round(float(rough_noise_variance(0.0)), 6)
    0.045095
    """
    w = jnp.asarray(w, dtype=float)
    waves = jnp.arange(1, NUM_WAVES + 1, dtype=w.dtype)
    return _envelope(w) ** 2 * jnp.sum(1 / (2 * waves**2) ** 2) / 6


@partial(jax.jit, static_argnames="steps")
def simulate_rough(
    key: Key[Array, ""], start: Float[Array, "R"], *, learning_rate: ArrayLike, steps: int
) -> Float[Array, "R steps+1"]:
    r"""SGD with a new landscape for every replica and step.

    Args:
      key: Typed; replica r draws from `fold_in(key, r)`.
      start: Weight of each replica.
      learning_rate: $\eta$.
      steps: $n$.
    """

    def run(number, w):
        own = jax.random.fold_in(key, number)

        def step(w, n):
            gradient = rough_mean_gradient(w) + rough_noise(jax.random.fold_in(own, n), w)
            return w - learning_rate * gradient

        return follow(step, w, jnp.arange(steps))

    return jax.vmap(run)(jnp.arange(len(start)), start)


def compare_rough(
    key: Key[Array, ""],
    *,
    learning_rate: float = 0.1,
    steps: int = 50,
    replicas: int = 10_000,
    substeps: int = 100,
) -> RoughComparison:
    r"""SGD against the standard and the drift-corrected Langevin equation, from the same starts.

    Both equations see the same noise, so that their difference is not lost in it. In float64.

    Args:
      key: Typed.
      learning_rate: $\eta$.
      steps: $n$.
      replicas: $R$; the starts are normal with standard deviation 0.18.
      substeps: Of the Langevin equations, in each step.
    """
    with jax.enable_x64(True):
        start = START_SCALE * jax.random.normal(jax.random.fold_in(key, 0), (replicas,), float)
        runs = [
            simulate_rough(
                jax.random.fold_in(key, 1), start, learning_rate=learning_rate, steps=steps
            )
        ]
        for kind in ("standard", "drift-corrected"):
            paths = simulate_langevin(
                jax.random.fold_in(key, 2),
                rough_mean_gradient,
                _rough_noise_root,
                start[:, None],
                learning_rate=learning_rate,
                steps=steps,
                kind=kind,
                substeps=substeps,
            )
            runs.append(paths[..., 0])
        paths = jnp.stack(runs)
        curves = paths.mean(1), paths.var(1, ddof=1)
        return RoughComparison(*curves, *(jnp.abs(x[1:] - x[0]).mean(1) for x in curves))


def _envelope(w: Array) -> Array:
    return 1 + 0.1 * w**2


def _rough_noise_root(w: Float[Array, "1"]) -> Float[Array, "1 1"]:
    return jnp.sqrt(rough_noise_variance(w))[:, None]
