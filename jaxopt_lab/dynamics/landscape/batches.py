r"""Batches of sample indices, each a function of (key, replica, step).

The theory assumes batches that are independent of each other, each drawn with replacement. Without
replacement inside a batch only the size of the noise changes; without replacement inside an epoch
successive batches are correlated, and their noise nearly cancels over whole epochs.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

Sampling = Literal["with_replacement", "without_replacement", "epochs"]


def batch_indices(
    key: Key[Array, ""],
    step: Int[Array, ""] | int,
    *,
    num_samples: int,
    batch_size: int,
    sampling: Sampling = "with_replacement",
) -> Int[Array, "B"]:
    r"""The samples of one step.

    >>> sizes = {"num_samples": 6, "batch_size": 3, "sampling": "epochs"}
    >>> epoch = [batch_indices(jax.random.key(0), step, **sizes) for step in range(2)]
    >>> sorted(jnp.concatenate(epoch).tolist())
    [0, 1, 2, 3, 4, 5]

    Args:
      key: Of one replica: `jax.random.fold_in(key, replica)`.
      step: $n$, counted from 0.
      num_samples: $N$.
      batch_size: $B$.
      sampling: "with_replacement"; "without_replacement" inside each batch; or "epochs", which
        shuffles all samples anew every $\lfloor N/B \rfloor$ steps and leaves the rest out.
    """
    check_sampling(num_samples, batch_size, sampling)
    if sampling == "with_replacement":
        return jax.random.randint(jax.random.fold_in(key, step), (batch_size,), 0, num_samples)
    if sampling == "without_replacement":
        shuffled = jax.random.permutation(jax.random.fold_in(key, step), num_samples)
        return shuffled[:batch_size]
    epoch, position = jnp.divmod(jnp.asarray(step), num_samples // batch_size)
    shuffled = jax.random.permutation(jax.random.fold_in(key, epoch), num_samples)
    return jax.lax.dynamic_slice(shuffled, (position * batch_size,), (batch_size,))


def check_sampling(num_samples: int, batch_size: int, sampling: str) -> None:
    """Raise ValueError unless such batches exist."""
    if sampling not in get_args(Sampling):
        raise ValueError(f"sampling: got {sampling!r}, expected one of {get_args(Sampling)}")
    check_batch_size(num_samples, batch_size, replace=sampling == "with_replacement")


def check_batch_size(num_samples: int, batch_size: int, *, replace: bool) -> None:
    """Raise ValueError unless a batch of that size can be drawn."""
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    if not replace and batch_size > num_samples:
        raise ValueError(
            f"batch_size: got {batch_size} of {num_samples} samples without replacement, expected "
            f"at most {num_samples}"
        )
