"""Arrays of any order taken along one axis at a time: Gram matrices, products, merged axes."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float


def mode_gram(x: Float[Array, "..."], axis: int) -> Float[Array, "d d"]:
    r"""$X_{(k)} X_{(k)}^\top$ of the unfolding along axis $k$: all other axes are contracted.

    Args:
      x: An array with at least one axis.
      axis: $k$.
    """
    unfolded = jnp.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
    return jnp.matmul(unfolded, unfolded.T, precision=Precision.HIGHEST)


def mode_product(x: Float[Array, "..."], matrix: Float[Array, "e d"], axis: int) -> Array:
    """A matrix times every fibre of `x` along an axis.

    Args:
      x: An array whose `axis` has d entries.
      matrix: (e, d).
      axis: The axis that gets e entries.
    """
    return jnp.moveaxis(jnp.tensordot(matrix, x, (1, axis), precision=Precision.HIGHEST), 0, axis)


def merged_shape(shape: Sequence[int], limit: int) -> tuple[int, ...]:
    """Multiply axes together from the left while the product is at most `limit`; 1 is left out.

    Args:
      shape: Of an array in C order.
      limit: Largest product; an axis that is longer stays alone.

    Example:
      >>> merged_shape((2, 3, 2, 2), 15), merged_shape((6, 40), 15), merged_shape((40, 1), 15)
      ((12, 2), (6, 40), (40,))
    """
    merged: list[int] = []
    for d in shape:
        if merged and merged[-1] * d <= limit:
            merged[-1] *= d
        elif d != 1:
            merged.append(d)
    return tuple(merged or shape[:1])
