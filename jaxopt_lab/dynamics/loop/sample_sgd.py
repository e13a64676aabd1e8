"""Stochastic gradient descent on a linear least-squares problem, one item a step, by blocks.

The steps w ← w + η_k e_k z_k, e_k = y_k − z_k·w, are sequential, but linear: in a block of B items
the errors solve the unit triangular system e_i + Σ_{j<i} η_j (z_i·z_j) e_j = y_i − z_i·w with the
weights w that enter the block. All blocks of an epoch are solved at once, and only the weights go
from block to block: the same steps up to rounding, B times fewer of them in sequence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

# Short ones: the triangular systems of a batch are slow on a CPU.
BLOCK = 8
# Of the step size, η/k^¼.
DECAY = 0.25


class _State(NamedTuple):
    weights: Array
    epoch: Array
    best: Array
    stalled: Array


def fit_by_samples(
    key: PRNGKeyArray, features: Float[Array, "n d"], targets: Float[Array, " n"], *,
    max_epochs: int, learning_rate: float, tolerance: float, patience: int,
) -> Float[Array, " d+1"]:  # fmt: skip
    """Weights, then intercept; see `learners.sgd` for the rule.

    Args:
      key: Of the shuffles: epoch i, counted from 0, visits the items in the order of
        `shuffled(jax.random.fold_in(key, i), n)`.
      features: As the steps see them.
      targets: y.
      max_epochs: Bound on the passes.
      learning_rate: η.
      tolerance: Of the mean loss.
      patience: Epochs without improvement that end the fit.
    """
    count = targets.shape[0]
    rows = jnp.concatenate([features, jnp.ones((count, 1), features.dtype)], axis=1)

    def unfinished(state: _State) -> Array:
        return (state.epoch < max_epochs) & (state.stalled < patience)

    def epoch(state: _State) -> _State:
        order = shuffled(jax.random.fold_in(key, state.epoch), count)
        seen = state.epoch * count + jnp.arange(1, count + 1)
        rates = learning_rate / seen.astype(rows.dtype) ** DECAY
        weights, loss = _epoch(state.weights, rows[order], targets[order], rates)
        stalled = jnp.where(loss > state.best - tolerance, state.stalled + 1, 0)
        return _State(weights, state.epoch + 1, jnp.minimum(state.best, loss), stalled)

    zero = jnp.zeros((), jnp.int32)
    start = _State(jnp.zeros_like(rows[0]), zero, jnp.full((), jnp.inf, rows.dtype), zero)
    return jax.lax.while_loop(unfinished, epoch, start).weights


def shuffled(key: PRNGKeyArray, count: int) -> Int[Array, " n"]:
    """A random order of so many items.

    In 64-bit mode one sort of random words that carry their place in their lowest bits, a third of
    the time of `jax.random.permutation` on a CPU. Words that tie keep their order: a chance below
    n² 2^(b-64) with b the bits of a place.
    """
    if not jax.config.read("jax_enable_x64"):
        return jax.random.permutation(key, count)
    places = jnp.uint64((1 << (count - 1).bit_length()) - 1)
    words = jax.random.bits(key, (count,), jnp.uint64) & ~places
    return (jnp.sort(words | jnp.arange(count, dtype=jnp.uint64)) & places).astype(jnp.int32)


def _epoch(weights: Array, rows: Array, targets: Array, rates: Array) -> tuple[Array, Array]:
    """(weights after one pass in this order, mean of ½e² before each item's step)."""
    count, size = rows.shape
    blocks = -(-count // BLOCK)
    # Padding has rate 0 and moves nothing; its errors are 0.
    pad = [(0, blocks * BLOCK - count)]
    z = jnp.pad(rows, [*pad, (0, 0)]).reshape(blocks, BLOCK, size)
    y, eta = (jnp.pad(x, pad).reshape(blocks, BLOCK) for x in (targets, rates))
    coupling = jnp.tril(z @ z.swapaxes(1, 2), -1) * eta[:, None, :]
    solved = jax.lax.linalg.triangular_solve(
        coupling + jnp.eye(BLOCK, dtype=z.dtype), jnp.concatenate([z, y[..., None]], axis=2),
        left_side=True, lower=True, unit_diagonal=True,
    )  # fmt: skip

    def block(weights: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        z, eta, from_weights, from_targets = inputs
        errors = from_targets - from_weights @ weights
        return weights + (eta * errors) @ z, jnp.sum(errors**2)

    weights, squares = jax.lax.scan(block, weights, (z, eta, solved[..., :-1], solved[..., -1]))
    return weights, jnp.sum(squares) / (2 * count)
