"""How Shampoo cuts a leaf into blocks, each a problem of its own with one factor a mode."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jaxopt_lab.core.precision import ProductPrecision, gram, matmul

DEFAULT_MAX_DIM = 1024
MERGE_RULES = ("tensors", "always", "never")


class Blocks(NamedTuple):
    """Geometry of one problem: its dimensions and the blocks along each of them.

    A dimension longer than the limit is cut into equal blocks of that length, the last one padded
    with zeros. Padding is exact: the factors of the padded rows are zero, so the inverse roots are
    block diagonal, and what they multiply there is zero as well.
    """

    dims: tuple[int, ...]
    edges: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, shape: Sequence[int], limit: int, merge: str = "tensors") -> "Blocks":
        """Drop dimensions of size 1, merge small neighbours if asked, cut what is too long.

        Args:
          shape: Shape of one problem.
          limit: The longest block edge.
          merge: "always": multiply adjacent dimensions, from the right, while the product is at
            most `limit`, as the released code does (a small matrix becomes one vector with a full
            factor). "tensors": only in problems of more than two dimensions. "never".
        """
        dims = tuple(d for d in shape if d != 1) or (1,)
        if math.prod(shape) == 0:
            return cls(tuple(shape), (), ())
        if merge == "always" or (merge == "tensors" and len(dims) > 2):
            dims = _merged(dims, limit)
        edges = tuple(min(d, limit) for d in dims)
        return cls(dims, edges, tuple(-(-d // e) for d, e in zip(dims, edges, strict=True)))

    @property
    def number(self) -> int:
        """Blocks of one problem; 0 for an empty leaf."""
        return math.prod(self.counts) if self.counts else 0

    @property
    def order(self) -> int:
        """Modes of a block: 1 for a vector, 2 for a matrix; 0 for an empty leaf."""
        return len(self.edges)

    def split(self, x: Array) -> Array:
        """(b, *dims) to (b * number, *edges), the first dimension outermost."""
        b, order = x.shape[0], self.order
        padding = [(0, c * e - d) for d, e, c in zip(*self, strict=True)]
        x = jnp.pad(x, [(0, 0), *padding])
        pairs = [side for pair in zip(self.counts, self.edges, strict=True) for side in pair]
        x = x.reshape((b, *pairs))
        outer, inner = range(1, 2 * order, 2), range(2, 2 * order + 1, 2)
        return x.transpose((0, *outer, *inner)).reshape((b * self.number, *self.edges))

    def join(self, blocks: Array) -> Array:
        """Inverse of `split`."""
        b, order = blocks.shape[0] // self.number, self.order
        x = blocks.reshape((b, *self.counts, *self.edges))
        interleaved = [axis for k in range(order) for axis in (1 + k, 1 + order + k)]
        x = x.transpose((0, *interleaved))
        x = x.reshape((b, *(c * e for e, c in zip(self.edges, self.counts, strict=True))))
        return x[(slice(None), *(slice(d) for d in self.dims))]


def _merged(dims: Sequence[int], limit: int) -> tuple[int, ...]:
    merged = [dims[-1]]
    for d in reversed(dims[:-1]):
        if merged[-1] * d <= limit:
            merged[-1] *= d
        else:
            merged.append(d)
    return tuple(reversed(merged))


def block_gram(x: Array, mode: int, precision: ProductPrecision = "highest") -> Array:
    """Gram matrices (b, d, d) of (b, *edges) along a mode: all other modes are contracted."""
    unfolded = _unfold(jnp.moveaxis(x, mode + 1, 1))
    return gram(unfolded, precision)


def block_product(
    x: Array, matrix: Array, mode: int, precision: ProductPrecision = "highest"
) -> Array:
    """Multiply (b, *edges) by symmetric matrices (b, d, d) along a mode."""
    if mode == 1 and x.ndim == 3:  # a matrix, without transposing it
        return matmul(x, matrix, precision)
    moved = jnp.moveaxis(x, mode + 1, 1)
    product = matmul(matrix, _unfold(moved), precision)
    return jnp.moveaxis(product.reshape(moved.shape), 1, mode + 1)


def _unfold(x: Array) -> Array:
    """(b, d, ...) to (b, d, product of the others)."""
    return x.reshape((*x.shape[:2], math.prod(x.shape[2:])))
