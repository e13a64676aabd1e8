"""The independent problems of a tree: which axes span them, their blocks, where they are stored."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import KeyPath, keystr
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxopt_lab.core.matrices import (
    MatrixAxes,
    MatrixLayout,
    batch_first_spec,
    resolve_layout,
)
from jaxopt_lab.core.stacks import Slot
from jaxopt_lab.core.whole_matrices import known_sharding
from jaxopt_lab.optim.kronecker.blocks import Blocks
from jaxopt_lab.optim.routing import MatrixAxesSpec, broadcast_prefix

# Modes for which the state has a place; more are an error.
MAX_ORDER = 4


def _is_layout(node: Any) -> bool:
    return node is None or isinstance(node, MatrixLayout)


class Problem(NamedTuple):
    """What is known of one leaf while tracing."""

    path: KeyPath
    shape: tuple[int, ...]
    axes: MatrixAxes  # batch axes, and those that span the problem
    blocks: Blocks
    sharding: NamedSharding | None

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the batch axes."""
        return tuple(self.shape[a] for a in self.axes.batch)

    @property
    def batch(self) -> int:
        """How many problems the leaf holds."""
        return math.prod(self.batch_shape)

    @property
    def inner_axes(self) -> tuple[int, ...]:
        """The axes that span one problem."""
        return self.axes.reduction + self.axes.output

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

    def stored_factor_spec(self, mode: int) -> PartitionSpec:
        """Partition of a factor as it is stored, (*batch, blocks, d, d)."""
        batch, *others = self.factor_slot(mode).spec
        return PartitionSpec(*self._batch_entries(batch), *others)

    def factors(self, dtype: DTypeLike, *, identity: bool = False) -> list[Array]:
        """A zero matrix, or the identity, for every mode of every block, where it is stored."""
        out = []
        for mode, edge in enumerate(self.blocks.edges):
            one = jnp.eye(edge, dtype=dtype) if identity else jnp.zeros((edge, edge), dtype)
            out.append(
                self._placed(
                    jnp.broadcast_to(one, self.factor_shape(mode)), self.stored_factor_spec(mode)
                )
            )
        return out

    def zero_counter(self) -> Array:
        """(*batch,) int32."""
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


def problems_of(
    tree: optax.Params,
    matrix_axes: MatrixAxesSpec,
    limit: int,
    merge: str,
    param_shardings: Any = None,
) -> list[Problem]:
    """One `Problem` a leaf.

    Args:
      tree: Parameters or gradients.
      matrix_axes: Layouts; a leaf without one is a single problem with all its axes as modes.
      limit: Longest block edge.
      merge: As in `Blocks.of`.
      param_shardings: Tree of `NamedSharding`, for meshes with Auto axes.

    Raises:
      ValueError: A layout does not fit its leaf, or a leaf keeps more than `MAX_ORDER` modes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    layouts: Sequence[Any] = [None] * len(leaves)
    if matrix_axes is not None:
        layouts = broadcast_prefix("matrix_axes", matrix_axes, tree, _is_layout)
    given: Sequence[NamedSharding | None] = [None] * len(leaves)
    if param_shardings is not None:
        given = broadcast_prefix("param_shardings", param_shardings, tree)
    problems = []
    for (path, x), layout, sharding in zip(leaves, layouts, given, strict=True):
        if layout is None:
            axes, dims = MatrixAxes((), tuple(range(len(x.shape))), ()), tuple(x.shape)
        else:
            try:
                axes = resolve_layout(x.shape, layout)
            except ValueError as error:
                raise ValueError(f"matrix_axes of leaf {keystr(path)}: {error}") from None
            dims = axes.matrix_shape(x.shape)[1:]
        blocks = Blocks.of(dims, limit, merge)
        if blocks.order > MAX_ORDER:
            raise ValueError(
                f"leaf {keystr(path)} of shape {tuple(x.shape)} has {blocks.order} modes of sizes "
                f"{blocks.dims}; at most {MAX_ORDER} are supported: give it a layout in "
                "matrix_axes, or let small axes merge"
            )
        if isinstance(x, jax.Array):
            sharding = known_sharding(x, sharding)
        problems.append(Problem(path, tuple(x.shape), axes, blocks, sharding))
    return problems
