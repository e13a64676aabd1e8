"""The batches of `batch_indices`; the order of an epoch is carried, not drawn at every step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from jaxopt_lab.dynamics.landscape.batches import Sampling, batch_indices

# (key of the run, step, order of the running epoch) -> (order, samples of the batch)
Draw = Callable[
    [Key[Array, ""], Int[Array, ""], Int[Array, "order"]],
    tuple[Int[Array, "order"], Int[Array, "B"]],
]


def carried_batches(
    sampling: Sampling, num_samples: int, batch_size: int
) -> tuple[Int[Array, "order"], Draw]:
    """An order to begin with, and how each step draws from it; the batches are `batch_indices`.

    Shuffling thousands of samples for every batch of 64 would cost more than the step. The step is
    the same for all replicas, so the branch stays one under vmap over (key, order).
    """
    per_epoch = num_samples // batch_size

    def independent(key: Array, step: Array, order: Array) -> tuple[Array, Array]:
        return order, batch_indices(
            key, step, num_samples=num_samples, batch_size=batch_size, sampling=sampling
        )

    def in_turn(key: Array, step: Array, order: Array) -> tuple[Array, Array]:
        epoch, position = jnp.divmod(step, per_epoch)

        def shuffle() -> Array:
            shuffled = jax.random.permutation(jax.random.fold_in(key, epoch), num_samples)
            return shuffled.astype(order.dtype)

        order = jax.lax.cond(position == 0, shuffle, lambda: order)
        return order, jax.lax.dynamic_slice(order, (position * batch_size,), (batch_size,))

    if sampling == "epochs":
        return jnp.zeros(num_samples, jnp.int32), in_turn
    return jnp.zeros(0, jnp.int32), independent
