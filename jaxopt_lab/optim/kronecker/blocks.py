"""How Shampoo cuts a leaf into blocks, with one factor a mode, and where their arrays lie."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr
from jaxtyping import Array

from jaxopt_lab.core.matrices import MatrixAxes
from jaxopt_lab.core.precision import ProductPrecision, gram, matmul
from jaxopt_lab.core.stacks import Member, Slot
from jaxopt_lab.optim.kronecker.grafting import with_norm_of
from jaxopt_lab.optim.matrix_leaves import LeafLayout, MatrixLeaves
from jaxopt_lab.optim.routing import MatrixAxesSpec, broadcast_prefix, route

# Small eigenvalues of a factor, which its root makes large, need more than bfloat16; a direction
# does not.
FACTOR_PRECISION: ProductPrecision = "bf16_x3"
DIRECTION_PRECISION: ProductPrecision = "default"
# Modes for which the state has a place; more are an error.
MAX_ORDER = 4


class Blocks(NamedTuple):
    """Geometry of one matrix (or tensor): its dimensions and the blocks along each of them.

    A dimension longer than the limit is cut into equal blocks of that length, the last one padded
    with zeros. Padding is exact: the factors of the padded rows are zero, so the inverse roots are
    block diagonal, and what they multiply there is zero as well.
    """

    dims: tuple[int, ...]
    edges: tuple[int, ...]  # of a block
    counts: tuple[int, ...]  # of blocks along each dimension
    order: int  # modes of a block: 1 for a vector, 2 for a matrix; 0 for an empty leaf
    number: int  # of blocks; 0 for an empty leaf

    @classmethod
    def of(cls, shape: Sequence[int], limit: int, *, merge_matrices: bool = False) -> "Blocks":
        """Drop dimensions of size 1, merge small neighbours in tensors, cut what is too long.

        Args:
          shape: Shape of the matrix or tensor.
          limit: The longest block edge, and the longest product of merged dimensions.
          merge_matrices: Merge where there are two dimensions only, as the released code does: a
            small matrix then is one vector with a full factor.
        """
        dims = tuple(d for d in shape if d != 1) or (1,)
        if math.prod(shape) == 0:
            return cls(tuple(shape), (), (), 0, 0)
        if merge_matrices or len(dims) > 2:
            dims = _merged(dims, limit)
        edges = tuple(min(d, limit) for d in dims)
        counts = tuple(-(-d // e) for d, e in zip(dims, edges, strict=True))
        return cls(dims, edges, counts, len(dims), math.prod(counts))

    def split(self, x: Array) -> Array:
        """(b, *dims) to (b * number, *edges), the first dimension outermost."""
        b, order = x.shape[0], self.order
        sides = list(zip(self.dims, self.counts, self.edges, strict=True))
        x = jnp.pad(x, [(0, 0), *((0, c * e - d) for d, c, e in sides)])
        pairs = [side for _, *pair in sides for side in pair]
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


def gram_matrices(blocks: Blocks, gradient: Array) -> tuple[Array, ...]:
    """Gram matrices (b, blocks, d, d) of a stack (b, *dims), one for each mode."""
    if not blocks.order:
        return ()
    pieces, shape = blocks.split(gradient), (gradient.shape[0], blocks.number)
    grams = [block_gram(pieces, mode, FACTOR_PRECISION) for mode in range(blocks.order)]
    return tuple(x.reshape((*shape, *x.shape[1:])) for x in grams)


def precondition(blocks: Blocks, average: Array, graft: Array | None, *roots: Array) -> Array:
    """A stack times the inverse roots along every mode, with the norm of the graft in each block.

    Args:
      blocks: How its matrices are cut.
      average: The stack, (b, *dims).
      graft: Directions whose norms the blocks take; None: every block keeps its own.
      *roots: Inverse roots (b, blocks, d, d), one for each mode.
    """
    if not blocks.order:
        return average
    x = blocks.split(average)
    for mode, root in enumerate(roots[: blocks.order]):
        x = block_product(x, root.reshape((-1, *root.shape[2:])), mode, DIRECTION_PRECISION)
    return blocks.join(x if graft is None else with_norm_of(x, blocks.split(graft)))


def block_gram(x: Array, mode: int, precision: ProductPrecision) -> Array:
    """Gram matrices (b, d, d) of (b, *edges) along a mode: all other modes are contracted."""
    return gram(_unfold(jnp.moveaxis(x, mode + 1, 1)), precision)


def block_product(x: Array, matrix: Array, mode: int, precision: ProductPrecision) -> Array:
    """Multiply (b, *edges) by symmetric matrices (b, d, d) along a mode."""
    if mode == 1 and x.ndim == 3:  # a matrix, without transposing it
        return matmul(x, matrix, precision)
    moved = jnp.moveaxis(x, mode + 1, 1)
    product = matmul(matrix, _unfold(moved), precision)
    return jnp.moveaxis(product.reshape(moved.shape), 1, mode + 1)


def _unfold(x: Array) -> Array:
    """(b, d, ...) to (b, d, product of the others)."""
    return x.reshape((*x.shape[:2], math.prod(x.shape[2:])))


def blocked_leaves(
    tree: optax.Params,
    matrix_axes: MatrixAxesSpec,
    limit: int,
    *,
    merge_matrices: bool = False,
    param_shardings: Any = None,
) -> MatrixLeaves:
    """The layouts of the leaves; the kind of a member is the `Blocks` of its matrices.

    Args:
      tree: Parameters or gradients.
      matrix_axes: Layouts; a leaf without one is a single tensor with all its axes as modes.
      limit: As in `Blocks.of`.
      merge_matrices: As in `Blocks.of`.
      param_shardings: Tree of `NamedSharding`, for meshes with Auto axes.

    Raises:
      ValueError: A layout does not fit its leaf, or a leaf keeps more than `MAX_ORDER` modes.
    """
    found, treedef = jax.tree_util.tree_flatten_with_path(tree)
    axes: Sequence[MatrixAxes | None] = [None] * len(found)
    if matrix_axes is not None:
        axes = [r.axes for r in route(tree, matrix_axes)]
    given: Sequence[NamedSharding | None] = [None] * len(found)
    if param_shardings is not None:
        given = broadcast_prefix("param_shardings", param_shardings, tree)
    layouts, members = [], []
    for (path, x), own, sharding in zip(found, axes, given, strict=True):
        dims = x.shape if own is None else own.matrix_shape(x.shape)[1:]
        blocks = Blocks.of(dims, limit, merge_matrices=merge_matrices)
        if blocks.order > MAX_ORDER:
            raise ValueError(
                f"leaf {keystr(path)} of shape {tuple(x.shape)} has {blocks.order} modes of sizes "
                f"{blocks.dims}; at most {MAX_ORDER} are supported: give it a layout in "
                "matrix_axes, or let small axes merge"
            )
        own = own or MatrixAxes((), tuple(range(len(x.shape))), ())
        layout = LeafLayout(x, own, sharding, path, blocks.dims)
        layouts.append(layout)
        members.append(Member(_slots(layout, blocks), layout.mesh, kind=blocks))
    return MatrixLeaves(layouts, members, treedef)


def _slots(layout: LeafLayout, blocks: Blocks) -> dict[str, Slot]:
    """How the arrays of a leaf lie: of its shape, and a factor and a root a mode."""
    slots: dict[str, Slot] = dict.fromkeys(
        ("gradient", "average", "graft", "direction"), layout.matrix
    )
    for k, edge in enumerate(blocks.edges):
        square = layout.block(edge, edge)
        shape, (leading, *sides) = (blocks.number, edge, edge), square.spec or (None,)
        spec = PartitionSpec(leading, None, *sides)
        slots |= dict.fromkeys((f"factor.{k}", f"root.{k}"), Slot(shape, shape, spec))
    return slots
