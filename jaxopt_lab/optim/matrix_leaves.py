"""The matrix leaves of one update: layouts, shardings, and the way to their stacks and back."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import KeyPath, keystr
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Shaped

from jaxopt_lab.core.keys import leaf_keys
from jaxopt_lab.core.matrices import MatrixAxes
from jaxopt_lab.core.stacks import map_matrices
from jaxopt_lab.core.whole_matrices import known_sharding, nan_matrices
from jaxopt_lab.optim.routing import MatrixAxesSpec, broadcast_prefix, require_matrices


class MatrixLeaves(NamedTuple):
    """What is known of each leaf while tracing; lists in the order of the leaves."""

    paths: list[KeyPath]
    axes: list[MatrixAxes]
    shardings: list[NamedSharding | None]
    treedef: Any  # jax.tree_util.PyTreeDef

    @classmethod
    def of(
        cls, updates: optax.Updates, matrix_axes: MatrixAxesSpec, param_shardings: Any
    ) -> "MatrixLeaves":
        """Resolve layouts and shardings of a tree of matrices.

        Raises:
          ValueError: A leaf has no layout, or a prefix does not match the tree.
        """
        routes = require_matrices(updates, matrix_axes)
        leaves, treedef = jax.tree.flatten(updates)
        given: Sequence[NamedSharding | None] = [None] * len(leaves)
        if param_shardings is not None:
            given = broadcast_prefix("param_shardings", param_shardings, updates)
        shardings = [known_sharding(x, s) for x, s in zip(leaves, given, strict=True)]
        axes = [r.axes for r in routes if r.axes is not None]
        return cls([r.path for r in routes], axes, shardings, treedef)

    def inner_axes(self, index: int) -> tuple[int, ...]:
        """The axes of a leaf that span its matrices."""
        return self.axes[index].reduction + self.axes[index].output

    def matrix_shape(self, index: int, leaf: Array) -> tuple[int, int, int]:
        """(matrices, rows, columns) of a leaf."""
        return self.axes[index].matrix_shape(leaf.shape)

    def map_whole(
        self,
        fn: Callable[..., tuple[Array, ...]],
        matrices: Sequence[Sequence[Array]],
        **options: Any,
    ) -> tuple[list[Array], ...]:
        """`map_matrices` with the layouts and shardings of these leaves."""
        return map_matrices(fn, matrices, self.axes, self.shardings, **options)

    def per_matrix(self, index: int, values: Shaped[Array, " batch"], leaf: Array) -> Array:
        """Shape one number a matrix so that it broadcasts against the leaf."""
        axes = self.axes[index]
        order = axes.batch + axes.reduction + axes.output
        shape = [leaf.shape[a] if a in axes.batch else 1 for a in order]
        return values.reshape(shape).transpose([order.index(a) for a in range(len(order))])

    def whole_axes(self) -> list[tuple[int, ...]]:
        """The axes that span the matrices of each leaf, none where one of them is sharded."""
        out = []
        for index, sharding in enumerate(self.shardings):
            inner, spec = self.inner_axes(index), () if sharding is None else sharding.spec
            split = any(a < len(spec) and spec[a] is not None for a in inner)
            out.append(() if split else inner)
        return out

    def refused(self, directions: Sequence[Array]) -> list[Bool[Array, "..."]]:
        """Which matrices (*batch) of each leaf are NaN as a whole."""
        leaves = zip(directions, self.axes, self.shardings, strict=True)
        return [nan_matrices(*leaf) for leaf in leaves]

    def start_vectors(
        self, gradients: Sequence[Array], key: Array, draws: optax.Updates | None = None
    ) -> list[Array]:
        """Start vectors (batch, m) of a power iteration, one array a leaf.

        Args:
          gradients: One a leaf.
          key: Key of this step; each leaf draws by its path.
          draws: Vectors to take instead of drawing: a tree like the leaves.

        Raises:
          ValueError: `draws` has another number of leaves, or one of another size.
        """
        shapes = [self.matrix_shape(i, g)[:2] for i, g in enumerate(gradients)]
        if draws is None:
            return [
                jax.random.normal(own_key, s, jnp.promote_types(g.dtype, jnp.float32))
                for own_key, s, g in zip(leaf_keys(key, self.paths), shapes, gradients, strict=True)
            ]
        supplied = jax.tree.leaves(draws)
        if len(supplied) != len(shapes):
            raise ValueError(
                f"draws has {len(supplied)} leaves; the tree has {len(shapes)} matrix leaves"
            )
        for path, v, (b, m) in zip(self.paths, supplied, shapes, strict=True):
            if v.size != b * m:
                raise ValueError(
                    f"draws of leaf {keystr(path)} has shape {v.shape}; it must be ({b}, {m}), "
                    "one start vector for each matrix"
                )
        return [v.reshape(s) for v, s in zip(supplied, shapes, strict=True)]


def zeros_of_matrices(
    params: optax.Params, matrix_axes: MatrixAxesSpec, dtype: DTypeLike
) -> optax.Updates:
    """A zero for each matrix: leaves (*batch), laid out as the batch axes of the parameters.

    Raises:
      ValueError: A leaf has no layout.
    """
    leaves, treedef = jax.tree.flatten(params)

    def zeros(x: Any, batch: Sequence[int]) -> Array:
        array, sharding = jnp.zeros([x.shape[a] for a in batch], dtype), known_sharding(x, None)
        if sharding is None:
            return array
        spec = (*sharding.spec, *[None] * (len(x.shape) - len(sharding.spec)))
        placed = NamedSharding(sharding.mesh, PartitionSpec(*(spec[a] for a in batch)))
        return jax.sharding.reshard(array, placed)

    routes = require_matrices(params, matrix_axes)
    batches = [r.axes.batch for r in routes if r.axes is not None]
    return treedef.unflatten([zeros(*pair) for pair in zip(leaves, batches, strict=True)])
