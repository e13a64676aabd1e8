r"""Langevin counterparts of SGD, and the noise-free flow that one step approximates.

For the mean gradient $\bar g(w)$ and the covariance $C(w)$ of the gradient of a batch:

$$
dw = -\bar g \, dt + \sqrt\eta \, C^{1/2} dW \quad\text{(standard)}, \qquad
dw = -\left(\bar g + \tfrac\eta2 H \bar g\right) dt + \sqrt\eta \, C^{1/2} dW
\quad\text{(drift-corrected)}
$$

with $H$ the mean Hessian: descent on $\bar L + \frac\eta4 \lVert \nabla \bar L \rVert^2$, which
follows the steps of size $\eta$ to one order more. The raw second moment $C + \bar g \bar g^\top$
as the covariance is a wrong control: given $w$ the covariance of a step is $\eta^2 C$ exactly.

Source: Ignashin et al., "Why SGD is not Brownian Motion: A New Perspective on Stochastic Dynamics",
arXiv 2605.22644.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Key

from jaxopt_lab.dynamics.landscape.quadratics import follow

LangevinKind = Literal["standard", "drift-corrected", "wrong-control"]
# The mean gradient at w, of the shape of w.
Gradient = Callable[[Float[Array, "D"]], Float[Array, "D"]]
# A root R of the covariance at w: C = R R^T.
NoiseRoot = Callable[[Float[Array, "D"]], Float[Array, "D K"]]


def simulate_langevin(
    key: Key[Array, ""],
    gradient: Gradient,
    noise_root: NoiseRoot,
    start: Float[Array, "R D"],
    *,
    learning_rate: float,
    steps: int,
    kind: LangevinKind = "standard",
    substeps: int = 1,
    sharding: jax.sharding.Sharding | None = None,
) -> Float[Array, "R steps+1 D"]:
    r"""Euler-Maruyama paths, observed once per SGD step.

    A step is $M$ substeps of the time $\eta / M$ with noise of covariance $\eta C \, dt$. With
    `substeps=1` the standard kind is the surrogate that matches one step of SGD in mean and
    covariance: $w - \eta \bar g + \eta C^{1/2} \xi$.

    >>> runs = simulate_langevin(
    ...     jax.random.key(0),
    ...     lambda w: w,
    ...     lambda w: jnp.zeros((1, 1)),
    ...     jnp.ones((2, 1)),
    ...     learning_rate=0.5,
    ...     steps=2,
    ... )
    >>> runs[0, :, 0].tolist()
    [1.0, 0.5, 0.25]

    Args:
      key: Typed; replica r draws from `fold_in(key, r)`, whatever runs beside it.
      gradient: $\bar g(w)$; the correction differentiates it.
      noise_root: A root of the covariance of a batch's gradient; `covariance_root` makes one.
      start: Weights of each replica.
      learning_rate: $\eta$.
      steps: $n$.
      kind: Which equation.
      substeps: $M$; some tens come close to the continuous path.
      sharding: Of the axis of replicas.

    Raises:
      ValueError: An unknown kind, no substep, or a start without an axis of replicas.
    """
    if kind not in get_args(LangevinKind):
        raise ValueError(f"kind: got {kind!r}, expected one of {get_args(LangevinKind)}")
    if substeps < 1:
        raise ValueError(f"substeps: got {substeps}, expected at least 1")
    if start.ndim != 2:
        raise ValueError(f"start: got shape {start.shape}, expected (replicas, dimension)")
    numbers = jnp.arange(len(start))
    if sharding is not None:
        numbers, start = jax.device_put((numbers, start), sharding)
    return _paths(
        key,
        numbers,
        start,
        learning_rate,
        gradient=gradient,
        noise_root=noise_root,
        steps=steps,
        kind=kind,
        substeps=substeps,
    )


def corrected_gradient(gradient: Gradient, learning_rate: ArrayLike) -> Gradient:
    r"""$\bar g + \frac\eta2 H \bar g$, the Hessian product by forward differentiation.

    >>> float(corrected_gradient(lambda w: 3 * w, 0.5)(jnp.float32(1.0)))
    5.25

    Args:
      gradient: $\bar g$.
      learning_rate: $\eta$.
    """

    def corrected(w):
        g = gradient(w)
        _, product = jax.jvp(gradient, (w,), (g,))
        return g + learning_rate / 2 * product

    return corrected


def flow(
    gradient: Gradient, w: Float[Array, "*shape"], time: ArrayLike, *, substeps: int = 64
) -> Float[Array, "*shape"]:
    r"""The solution of $\dot w = -\bar g(w)$ after some time, by the classical Runge-Kutta rule.

    >>> round(float(flow(lambda w: w, jnp.float32(1.0), 1.0)), 5)
    0.36788

    Args:
      gradient: $\bar g$, or `corrected_gradient` of it.
      w: The start.
      time: $\eta$ for the flow that one step of SGD approximates.
      substeps: Of the rule.
    """
    h = time / substeps

    def step(_, w):
        k1 = gradient(w)
        k2 = gradient(w - h / 2 * k1)
        k3 = gradient(w - h / 2 * k2)
        k4 = gradient(w - h * k3)
        return w - h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    return jax.lax.fori_loop(0, substeps, step, w)


def covariance_root(covariance: Float[Array, "D D"]) -> Float[Array, "D D"]:
    """A root R of a symmetric matrix, R R^T, with negative eigenvalues taken for rounding errors.

    >>> covariance_root(jnp.diag(jnp.array([4.0, 0.0]))) @ jnp.array([0.0, 1.0])
    Array([2., 0.], dtype=float32)
    """
    values, vectors = jnp.linalg.eigh(covariance)
    return vectors * jnp.sqrt(jnp.maximum(values, 0))


@partial(jax.jit, static_argnames=("gradient", "noise_root", "steps", "kind", "substeps"))
def _paths(
    key, numbers, starts, learning_rate, *, gradient, noise_root, steps, kind, substeps
) -> Float[Array, "R steps+1 D"]:
    time = learning_rate / substeps
    drift = corrected_gradient(gradient, learning_rate) if kind == "drift-corrected" else gradient
    # Variance of the increment per unit of the covariance.
    size = jnp.sqrt(learning_rate * time)

    def run(number, start):
        own = jax.random.fold_in(key, number)

        def substep(i, w):
            root = noise_root(w)
            if kind == "wrong-control":
                root = jnp.concatenate([root, gradient(w)[:, None]], axis=1)
            draw = jax.random.normal(jax.random.fold_in(own, i), root.shape[1:], w.dtype)
            return w - time * drift(w) + size * jnp.matmul(root, draw, precision="highest")

        def step(w, n):
            return jax.lax.fori_loop(n * substeps, (n + 1) * substeps, substep, w)

        return follow(step, start, jnp.arange(steps))

    return jax.vmap(run)(numbers, starts)
