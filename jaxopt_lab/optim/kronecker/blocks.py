"""How Shampoo cuts a leaf into blocks, with one factor a mode, and where their arrays lie."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxopt_lab.core.matrices import MatrixAxes, MatrixLayout, batch_first_spec, resolve_layout
from jaxopt_lab.core.precision import ProductPrecision, gram, matmul
from jaxopt_lab.core.stacks import Slot
from jaxopt_lab.core.whole_matrices import known_sharding
from jaxopt_lab.optim.routing import MatrixAxesSpec, broadcast_prefix

# Modes for which the state has a place; more are an error.
MAX_ORDER = 4


class Blocks(NamedTuple):
    """Geometry of one matrix (or tensor): its dimensions and the blocks along each of them.

    A dimension longer than the limit is cut into equal blocks of that length, the last one padded
    with zeros. Padding is exact: the factors of the padded rows are zero, so the inverse roots are
    block diagonal, and what they multiply there is zero as well.
    """

    dims: tuple[int, ...]
    edges: tuple[int, ...]
    counts: tuple[int, ...]

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
            return cls(tuple(shape), (), ())
        if merge_matrices or len(dims) > 2:
            dims = _merged(dims, limit)
        edges = tuple(min(d, limit) for d in dims)
        return cls(dims, edges, tuple(-(-d // e) for d, e in zip(dims, edges, strict=True)))

    @property
    def number(self) -> int:
        """How many blocks there are; 0 for an empty leaf."""
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


class BlockedLeaf(NamedTuple):
    """What is known of one leaf while tracing: its matrices, their blocks, its layout on a mesh."""

    shape: tuple[int, ...]
    axes: MatrixAxes  # batch axes, and those that span a matrix
    blocks: Blocks  # of each of its matrices
    sharding: NamedSharding | None  # where it is known and not trivial

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return tuple(self.shape[a] for a in self.axes.batch)

    @property
    def batch(self) -> int:
        """How many matrices the leaf holds."""
        return math.prod(self.batch_shape)

    @property
    def inner_axes(self) -> tuple[int, ...]:
        """The axes that span one matrix."""
        return self.axes.reduction + self.axes.output

    def per_matrix(self, x: Array) -> Array:
        """(*batch) from an array with 1 for the axes that span a matrix."""
        return jnp.squeeze(x, self.inner_axes)

    def factor_shape(self, mode: int) -> tuple[int, ...]:
        """(*batch, blocks, d, d)."""
        edge = self.blocks.edges[mode]
        return (*self.batch_shape, self.blocks.number, edge, edge)

    @property
    def mesh(self) -> Any:
        """The mesh that the leaf is laid out on, where that is known."""
        return None if self.sharding is None else self.sharding.mesh

    @property
    def leaf_slot(self) -> Slot:
        """The leaf as (b, *inner axes)."""
        spec = PartitionSpec(None)
        if self.sharding is not None:
            spec = batch_first_spec(self.sharding.spec, self.axes)
        # Unsharded inner axes are merged at once, so that leaves of one geometry share a stack.
        dims = self.blocks.dims
        inner = tuple(self.shape[a] for a in self.inner_axes) if any(spec) else dims
        return Slot(inner, dims, spec)

    def factor_slot(self, mode: int) -> Slot:
        """A factor as (b, blocks, d, d).

        The mesh axes of the leaf's first sharded axis go to the rows, those of the second to the
        columns, where they divide the side.
        """
        batch, *inner = self.leaf_slot.spec
        entries = [entry for entry in inner if entry is not None]
        edge = self.blocks.edges[mode]
        sides = [entry if edge % self._devices(entry) == 0 else None for entry in entries[:2]]
        shape = (self.blocks.number, edge, edge)
        return Slot(shape, shape, PartitionSpec(batch, None, *sides))

    def new_factors(self, dtype: DTypeLike, *, identity: bool = False) -> list[Array]:
        """A zero matrix, or the identity, for every mode of every block, where it is stored."""
        out = []
        for mode, edge in enumerate(self.blocks.edges):
            one = jnp.eye(edge, dtype=dtype) if identity else jnp.zeros((edge, edge), dtype)
            batch, *others = self.factor_slot(mode).spec
            spec = PartitionSpec(*self._batch_entries(batch), *others)
            out.append(self._placed(jnp.broadcast_to(one, self.factor_shape(mode)), spec))
        return out

    def new_counter(self) -> Array:
        """(*batch,) int32 zeros."""
        spec = PartitionSpec(*self._batch_entries(self.leaf_slot.spec[0]))
        return self._placed(jnp.zeros(self.batch_shape, jnp.int32), spec)

    def _batch_entries(self, leading: Any) -> list[Any]:
        """Of the batch axes of a leaf only the first may be sharded."""
        return [leading if k == 0 else None for k in range(len(self.axes.batch))]

    def _placed(self, x: Array, spec: PartitionSpec) -> Array:
        if self.sharding is None or not any(spec):
            return x
        return jax.sharding.reshard(x, NamedSharding(self.sharding.mesh, spec))

    def _devices(self, entry: str | tuple[str, ...]) -> int:
        assert self.sharding is not None
        names = (entry,) if isinstance(entry, str) else entry
        return math.prod(self.sharding.mesh.shape[name] for name in names)


def blocked_leaves(
    tree: optax.Params,
    matrix_axes: MatrixAxesSpec,
    limit: int,
    *,
    merge_matrices: bool = False,
    param_shardings: Any = None,
) -> list[BlockedLeaf]:
    """One `BlockedLeaf` a leaf.

    Args:
      tree: Parameters or gradients.
      matrix_axes: Layouts; a leaf without one is a single tensor with all its axes as modes.
      limit: As in `Blocks.of`.
      merge_matrices: As in `Blocks.of`.
      param_shardings: Tree of `NamedSharding`, for meshes with Auto axes.

    Raises:
      ValueError: A layout does not fit its leaf, or a leaf keeps more than `MAX_ORDER` modes.
    """
    found = jax.tree_util.tree_leaves_with_path(tree)
    layouts: Sequence[Any] = [None] * len(found)
    if matrix_axes is not None:
        layouts = broadcast_prefix("matrix_axes", matrix_axes, tree, _is_layout)
    given: Sequence[NamedSharding | None] = [None] * len(found)
    if param_shardings is not None:
        given = broadcast_prefix("param_shardings", param_shardings, tree)
    out = []
    for (path, x), layout, sharding in zip(found, layouts, given, strict=True):
        if layout is None:
            axes, dims = MatrixAxes((), tuple(range(len(x.shape))), ()), tuple(x.shape)
        else:
            try:
                axes = resolve_layout(x.shape, layout)
            except ValueError as error:
                raise ValueError(f"matrix_axes of leaf {keystr(path)}: {error}") from None
            dims = axes.matrix_shape(x.shape)[1:]
        blocks = Blocks.of(dims, limit, merge_matrices=merge_matrices)
        if blocks.order > MAX_ORDER:
            raise ValueError(
                f"leaf {keystr(path)} of shape {tuple(x.shape)} has {blocks.order} modes of sizes "
                f"{blocks.dims}; at most {MAX_ORDER} are supported: give it a layout in "
                "matrix_axes, or let small axes merge"
            )
        if isinstance(x, jax.Array):
            sharding = known_sharding(x, sharding)
        out.append(BlockedLeaf(tuple(x.shape), axes, blocks, sharding))
    return out


def _is_layout(node: Any) -> bool:
    return node is None or isinstance(node, MatrixLayout)
