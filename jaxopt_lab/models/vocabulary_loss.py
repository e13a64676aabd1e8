"""Next-token cross-entropy in pieces of the vocabulary, forward only.

Pieces of positions need the whole head, pieces of the vocabulary a piece of it at a time: a head
that is perturbed where it is used is never whole, and neither are the logits.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Directions draw 32 signs from one word, so pieces begin at multiples of 32.
PIECES = 32


def check_chunk(chunk: int) -> None:
    """Checks the size of the pieces.

    Raises:
        ValueError: it is no multiple of 32.
    """
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1 or chunk % PIECES:
        raise ValueError(f"vocabulary_chunk: got {chunk!r}, wanted a multiple of {PIECES}")


def vocabulary_nats(
    x_BxTxD: jax.Array,
    kernel_of: Callable[[Any, int], jax.Array],
    targets_BxT: jax.Array,
    *,
    vocab_size: int,
    chunk: int,
) -> jax.Array:
    """The loss log sum exp s - s_y at every position, for logits s = x @ kernel.

    With the largest logit m so far and the sum S of exp(s - m), a piece with largest logit m'
    gives S exp(m - max(m, m')) + sum exp(s - max(m, m')). There is no backward pass worth having:
    it would keep every piece.

    Args:
        x_BxTxD: hidden states.
        kernel_of: (start, size) -> columns (D, size) of the output matrix, in the compute dtype.
        targets_BxT: tokens y.
        vocab_size: columns of the whole.
        chunk: columns of a piece; the last one may have fewer.

    Returns:
        Nats (B, T), float32 or wider.

    >>> x, kernel = jnp.ones((1, 2, 4)), jnp.arange(280.0).reshape(4, 70) / 100
    >>> pieces = lambda start, size: jax.lax.dynamic_slice_in_dim(kernel, start, size, 1)
    >>> found = vocabulary_nats(x, pieces, jnp.array([[3, 69]]), vocab_size=70, chunk=32)
    >>> wanted = -jax.nn.log_softmax(x @ kernel)[0, jnp.arange(2), jnp.array([3, 69])]
    >>> bool(jnp.allclose(found, wanted, rtol=1e-6))
    True

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867.
    """
    dtype = jnp.promote_types(x_BxTxD.dtype, jnp.float32)

    def add(sums: tuple[jax.Array, ...], start: Any, size: int) -> tuple[jax.Array, ...]:
        largest_BxT, total_BxT, target_BxT = sums
        logits_BxTxC = (x_BxTxD @ kernel_of(start, size)).astype(dtype)
        new_BxT = jnp.maximum(largest_BxT, jnp.max(logits_BxTxC, axis=-1))
        exps_BxTxC = jnp.exp(logits_BxTxC - new_BxT[..., None])
        total_BxT = total_BxT * jnp.exp(largest_BxT - new_BxT) + jnp.sum(exps_BxTxC, axis=-1)
        is_target_BxTxC = start + jnp.arange(size) == targets_BxT[..., None]
        target_BxT += jnp.sum(jnp.where(is_target_BxTxC, logits_BxTxC, 0), axis=-1)
        return new_BxT, total_BxT, target_BxT

    zeros_BxT = jnp.zeros(targets_BxT.shape, dtype)
    sums = (jnp.full(targets_BxT.shape, -jnp.inf, dtype), zeros_BxT, zeros_BxT)
    full, rest = divmod(vocab_size, chunk)
    if full:
        # A loop even of one round: what is drawn inside of it stays there.
        sums = jax.lax.fori_loop(0, full, lambda i, sums: add(sums, i * chunk, chunk), sums)
    if rest:
        sums = add(sums, full * chunk, rest)
    largest_BxT, total_BxT, target_BxT = sums
    return largest_BxT + jnp.log(total_BxT) - target_BxT
