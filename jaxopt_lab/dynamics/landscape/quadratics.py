r"""Exact mean and covariance of SGD on a finite sum of quadratics, and its simulation.

The loss of sample $k$ is $L_k(w) = g_k \cdot w + \frac12 w^\top H_k w$; a step follows the mean of
the losses of a batch. With $A = 1 - \eta \bar H$ and the deviations $\tilde H_k = H_k - \bar H$,
$\tilde g_k = g_k - \bar g$, the mean $\mu$ and the covariance $\Pi$ of $w$ over batches obey

$$
\mu' = A \mu - \eta \bar g, \qquad
\Pi' = A \Pi A^\top + \eta^2 f \, \mathrm E_k\left[\tilde H_k \Pi \tilde H_k
  + (\tilde H_k \mu + \tilde g_k)(\tilde H_k \mu + \tilde g_k)^\top\right]
$$

with the factor $f$ of `batch_factor`. Nothing is assumed about the joint law of $H$ and $g$; the
batches of different steps must be independent.

Source: the fluctuating landscape is that of Ignashin et al., "Why SGD is not Brownian Motion: A New
Perspective on Stochastic Dynamics", arXiv 2605.22644; this recursion was derived here.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Key

from jaxopt_lab.dynamics.landscape.batches import (
    Sampling,
    batch_indices,
    check_batch_size,
    check_sampling,
)
from jaxopt_lab.dynamics.landscape.closed_forms import as_floats

State = TypeVar("State")


class FiniteSum(NamedTuple):
    """Quadratic losses of N samples in D dimensions."""

    hessians: Float[Array, "N D D"]  # symmetric
    gradients: Float[Array, "N D"]  # at the origin


class Moments(NamedTuple):
    """Mean and covariance before the first step and after each."""

    mean: Float[Array, "n+1 D"]
    covariance: Float[Array, "n+1 D D"]


def finite_sum(hessians: ArrayLike, gradients: ArrayLike) -> FiniteSum:
    """The quadratic losses of N samples, checked.

    >>> finite_sum([1.0, 3.0], [0.5, -0.5]).hessians.shape
    (2, 1, 1)

    Args:
      hessians: (N, D, D), symmetric; (N,) in one dimension.
      gradients: (N, D), at the origin; (N,) in one dimension.

    Raises:
      ValueError: The shapes do not fit or a Hessian is not symmetric.
    """
    h, g = as_floats(hessians, gradients)
    if h.ndim == g.ndim == 1:
        h, g = h[:, None, None], g[:, None]
    if g.ndim != 2 or h.shape != (*g.shape, g.shape[-1]) or not g.shape[0]:
        raise ValueError(
            f"hessians, gradients: got shapes {h.shape} and {g.shape}, "
            "expected (N, D, D) and (N, D), or (N,) and (N,)"
        )
    asymmetry = float(jnp.max(jnp.abs(h - h.mT)))
    if asymmetry > 1e-4 * float(jnp.max(jnp.abs(h))):
        raise ValueError(f"hessians: differ from their transposes by {asymmetry:.2g}")
    return FiniteSum(h, g)


def batch_factor(num_samples: int, batch_size: int, replace: bool = True) -> float:
    r"""Variance of the mean over a batch relative to the population variance, $f$.

    $1/B$ with replacement; $(N - B) / (B (N - 1))$ without replacement inside the batch.

    >>> batch_factor(24, 4), batch_factor(24, 24, replace=False)
    (0.25, 0.0)

    Raises:
      ValueError: No such batch exists.
    """
    check_batch_size(num_samples, batch_size, replace=replace)
    if replace or batch_size == 1:
        return 1 / batch_size
    return (num_samples - batch_size) / (batch_size * (num_samples - 1))


def moments(
    problem: FiniteSum,
    *,
    learning_rate: float | Array,
    steps: int,
    batch_size: int = 1,
    replace: bool = True,
    mean: ArrayLike | None = None,
    covariance: ArrayLike | None = None,
) -> Moments:
    r"""The exact recursion of the module, all correlations of curvature and slope included.

    >>> problem = finite_sum([1.0, 3.0], [0.5, -0.5])
    >>> result = moments(problem, learning_rate=0.1, steps=1, mean=jnp.ones(1))
    >>> [round(float(x[-1].squeeze()), 6) for x in result]
    [0.8, 0.0025]

    Args:
      problem: The losses.
      learning_rate: $\eta$.
      steps: $n$.
      batch_size: $B$.
      replace: Whether a batch may hold a sample twice.
      mean: $\mu_0$, of shape (D,); zero if None.
      covariance: $\Pi_0$, of shape (D, D); zero if None.

    Raises:
      ValueError: The batch size or a shape does not fit.
    """
    num_samples, dimension = problem.gradients.shape
    factor = batch_factor(num_samples, batch_size, replace)
    start = Moments(
        _start("mean", mean, (dimension,), problem.gradients.dtype),
        _start("covariance", covariance, (dimension, dimension), problem.gradients.dtype),
    )
    return _moments(problem, learning_rate, factor, start, steps=steps)


def second_moment_radius(
    problem: FiniteSum,
    *,
    learning_rate: float | Array,
    batch_size: int = 1,
    replace: bool = True,
) -> Array:
    r"""Growth of the second moment per step, as a spectral radius.

    It is that of $A \otimes A + \eta^2 f \, \mathrm E_k[\tilde H_k \otimes \tilde H_k]$. The
    covariance converges if it is below 1. A null direction of the mean Hessian with any curvature
    noise makes it exceed 1 by a little.

    >>> float(second_moment_radius(finite_sum([1.0, 3.0], [0.0, 0.0]), learning_rate=0.5))
    0.25

    Args:
      problem: The losses; the matrix is of size D², so D is at most some tens.
      learning_rate: $\eta$.
      batch_size: $B$.
      replace: Whether a batch may hold a sample twice.
    """
    num_samples, dimension = problem.gradients.shape
    factor = batch_factor(num_samples, batch_size, replace)
    a, h, _ = _deviations(problem, learning_rate)
    noise = jnp.einsum("kab,kcd->acbd", h, h, precision="highest") / num_samples
    matrix = jnp.kron(a, a) + learning_rate**2 * factor * noise.reshape((dimension**2,) * 2)
    # Symmetric, because every Hessian is.
    return jnp.max(jnp.abs(jnp.linalg.eigvalsh(matrix)))


@jax.jit
def simulate(
    problem: FiniteSum,
    start: Float[Array, "D"],
    indices: Int[Array, "steps B"],
    learning_rate: float | Array,
) -> Float[Array, "steps+1 D"]:
    r"""SGD over given batches: weights at the start and after each step.

    >>> problem = finite_sum([1.0, 3.0], [0.0, 0.0])
    >>> simulate(problem, jnp.ones(1), jnp.array([[0], [1]]), 0.5)[:, 0].tolist()
    [1.0, 0.5, -0.25]

    Args:
      problem: The losses.
      start: Weights before the first step.
      indices: Samples of each step, averaged.
      learning_rate: $\eta$.
    """
    return follow(lambda w, batch: sgd_step(problem, w, batch, learning_rate), start, indices)


def sgd_step(
    problem: FiniteSum, w: Float[Array, "D"], batch: Int[Array, "B"], learning_rate: float | Array
) -> Float[Array, "D"]:
    """One step on the mean loss of a batch."""
    slopes = jnp.einsum("kij,j->ki", problem.hessians[batch], w, precision="highest")
    return w - learning_rate * jnp.mean(slopes + problem.gradients[batch], 0)


def sample_ensemble(
    key: Key[Array, ""],
    problem: FiniteSum,
    *,
    learning_rate: float | Array,
    steps: int,
    replicas: int,
    batch_size: int = 1,
    sampling: Sampling = "with_replacement",
    start: ArrayLike | None = None,
    record_every: int = 1,
    sharding: jax.sharding.Sharding | None = None,
) -> Float[Array, "R records+1 D"]:
    r"""Independent runs of SGD, one vmapped program.

    >>> runs = sample_ensemble(
    ...     jax.random.key(0),
    ...     finite_sum([1.0], [0.0]),
    ...     learning_rate=0.5,
    ...     steps=2,
    ...     replicas=3,
    ...     start=jnp.ones(1),
    ... )
    >>> runs[:, -1, 0].tolist()
    [0.25, 0.25, 0.25]

    Args:
      key: Typed; replica r draws from `fold_in(key, r)`, whatever runs beside it.
      problem: The losses.
      learning_rate: $\eta$.
      steps: $n$.
      replicas: $R$.
      batch_size: $B$.
      sampling: As in `batch_indices`.
      start: Weights of shape (D,) or (R, D); zero if None.
      record_every: Steps between two records; it divides `steps`.
      sharding: Of the axis of replicas.

    Returns:
      Weights at the start and after every `record_every` steps.

    Raises:
      ValueError: Batches cannot be drawn so, a shape does not fit, or the records do not.
    """
    num_samples, dimension = problem.gradients.shape
    check_sampling(num_samples, batch_size, sampling)
    if record_every < 1 or steps % record_every:
        raise ValueError(f"record_every: got {record_every}, expected a divisor of {steps} steps")
    shape = (dimension,) if start is None or np.ndim(start) == 1 else (replicas, dimension)
    start = _start("start", start, shape, problem.gradients.dtype)
    numbers = jnp.arange(replicas)
    starts = jnp.broadcast_to(start, (replicas, dimension))
    if sharding is not None:
        numbers, starts = jax.device_put((numbers, starts), sharding)
    return _ensemble(
        key,
        problem,
        learning_rate,
        numbers,
        starts,
        records=steps // record_every,
        record_every=record_every,
        batch_size=batch_size,
        sampling=sampling,
    )


def all_batches(problem: FiniteSum, batch_size: int, replace: bool = True) -> FiniteSum:
    """The losses of all batches, equally likely: N^B, or N over B, of them.

    >>> all_batches(finite_sum([1.0, 3.0, 5.0], [0.0, 0.0, 0.0]), 2).gradients.shape
    (9, 1)

    Args:
      problem: The losses of the samples.
      batch_size: B.
      replace: Whether a batch may hold a sample twice.
    """
    num_samples = len(problem.gradients)
    check_batch_size(num_samples, batch_size, replace=replace)
    if replace:
        batches = itertools.product(range(num_samples), repeat=batch_size)
    else:
        batches = itertools.combinations(range(num_samples), batch_size)
    indices = np.array(list(batches))
    return FiniteSum(problem.hessians[indices].mean(1), problem.gradients[indices].mean(1))


def follow(
    step: Callable[[State, Any], State], start: State, inputs: Any = None, length: int | None = None
) -> State:
    """The start and all later states of a recursion, along a new leading axis.

    >>> follow(lambda x, _: 2 * x, jnp.float32(1), length=3).tolist()
    [1.0, 2.0, 4.0, 8.0]

    Args:
      step: The next state from a state and an input.
      start: The first state, a tree of arrays.
      inputs: One for each step, along the leading axis.
      length: Number of steps where there are no inputs.
    """

    def both(state, x):
        state = step(state, x)
        return state, state

    _, path = jax.lax.scan(both, start, inputs, length=length)
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, path)


def _start(name: str, value: ArrayLike | None, shape: tuple[int, ...], dtype) -> Array:
    if value is None:
        return jnp.zeros(shape, dtype)
    value = jnp.asarray(value, dtype)
    if value.shape != shape:
        raise ValueError(f"{name}: got shape {value.shape}, expected {shape}")
    return value


def _deviations(problem: FiniteSum, learning_rate) -> tuple[Array, Array, Array]:
    mean_hessian = problem.hessians.mean(0)
    a = jnp.eye(len(mean_hessian), dtype=mean_hessian.dtype) - learning_rate * mean_hessian
    return a, problem.hessians - mean_hessian, problem.gradients - problem.gradients.mean(0)


@partial(jax.jit, static_argnames="steps")
def _moments(problem: FiniteSum, learning_rate, factor, start: Moments, *, steps: int) -> Moments:
    a, h, g = _deviations(problem, learning_rate)
    drift = problem.gradients.mean(0)
    product = partial(jnp.einsum, precision="highest")

    def step(state: Moments, _):
        mean, covariance = state
        slopes = product("kab,b->ka", h, mean) + g
        noise = product("kab,bc,kdc->ad", h, covariance, h) + product("ka,kb->ab", slopes, slopes)
        return Moments(
            product("ab,b->a", a, mean) - learning_rate * drift,
            product("ab,bc,dc->ad", a, covariance, a) + learning_rate**2 * factor * noise / len(g),
        )

    return follow(step, start, length=steps)


@partial(jax.jit, static_argnames=("records", "record_every", "batch_size", "sampling"))
def _ensemble(
    key,
    problem: FiniteSum,
    learning_rate,
    numbers: Int[Array, "R"],
    starts: Float[Array, "R D"],
    *,
    records: int,
    record_every: int,
    batch_size: int,
    sampling: Sampling,
) -> Float[Array, "R records+1 D"]:
    draw = partial(
        batch_indices,
        num_samples=len(problem.gradients),
        batch_size=batch_size,
        sampling=sampling,
    )

    def run(number, start):
        own = jax.random.fold_in(key, number)

        def record(w, first):
            def step(i, w):
                return sgd_step(problem, w, draw(own, first + i), learning_rate)

            return jax.lax.fori_loop(0, record_every, step, w)

        return follow(record, start, jnp.arange(records) * record_every)

    return jax.vmap(run)(numbers, starts)
