"""Stacks of matrices that some leaves have and some have not, and one number a matrix of them."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array

Side = Array | None  # of a stack of matrices; None: that side has no factor
Pair = tuple[Side, Side]  # rows, columns


def spread(per_matrix: Array, stack: Array) -> Array:
    """One number a matrix, with axes to broadcast against a stack."""
    return per_matrix.reshape(per_matrix.shape + (1,) * (stack.ndim - 1))


def select(condition: Array, new: Sequence[Side], old: Sequence[Side]) -> tuple[Side, ...]:
    """`new` for the matrices for which the condition holds, in the dtypes of `old`."""

    def chosen(a: Side, b: Side) -> Side:
        if a is None or b is None:
            return None
        return jnp.where(spread(condition, a), a.astype(b.dtype), b)

    return tuple(map(chosen, new, old))


def permuted(x: Side, order: Side, axis: int) -> Side:
    """Entries along an axis in the given order, one order a matrix."""
    if x is None or order is None:
        return x
    others = tuple(a for a in range(1, x.ndim) if a != axis % x.ndim)
    taken = jnp.take_along_axis(x, jnp.expand_dims(order, others), axis=axis)
    # Left alone, compilers transpose at every step what is permuted at a few.
    return with_layout_constraint(taken, Layout(major_to_minor=tuple(range(x.ndim))))
