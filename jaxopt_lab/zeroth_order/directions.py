"""Directions: what a probe adds to the parameters, drawn by key, leaf and position.

A direction is never stored. Its entries are a function of (key, count, probe, path of the leaf,
slice, position), so evaluation and update draw the same ones again, in any engine, layer by layer
or on any mesh. A slice is one matrix of a leaf under `matrix_axes`, a row of an embedding, or the
leaf itself.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.tree_util import KeyPath
from jaxtyping import Array

from jaxopt_lab.core.keys import leaf_key, path_names
from jaxopt_lab.core.matrices import MatrixAxes
from jaxopt_lab.core.numerics import wide_dtype
from jaxopt_lab.optim.matrix_leaves import known_sharding
from jaxopt_lab.optim.routing import (
    MatrixAxesSpec,
    broadcast_prefix,
    route,
    route_with_embeddings,
)


class Leaf(NamedTuple):
    """One leaf, and how its draws are divided into slices."""

    path: KeyPath
    shape: tuple[int, ...]
    dtype: Any  # in which it is perturbed: float32 or wider
    axes: MatrixAxes | None  # of its matrices; None: no matrix
    by_row: bool  # each row has a key of its own, so that a part of a table can be drawn
    moves: bool  # False: no direction touches it
    slices_before: int  # slices of the moving leaves before it
    entries_before: int
    sharding: NamedSharding | None  # where its type says so, on Explicit meshes

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """How many slices there are along each batch axis."""
        return () if self.axes is None else tuple(self.shape[a] for a in self.axes.batch)

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """(rows, columns) of a matrix; other leaves have at most two axes, further ones merged."""
        if self.axes is not None:
            return self.axes.matrix_shape(self.shape)[1:]
        if len(self.shape) > 2:
            return self.shape[0], math.prod(self.shape[1:])
        return self.shape

    @property
    def has_matrices(self) -> bool:
        """Whether directions touch it as matrices."""
        return self.moves and self.axes is not None

    @property
    def slices(self) -> int:
        """Number of slices."""
        return math.prod(self.batch_shape)

    def whole(self, key: Array) -> "Part":
        """All slices of the leaf, under the key of a probe."""
        return self._under(leaf_key(key, self.path))

    def _under(self, keys: Array) -> "Part":
        for size in self.batch_shape:
            keys = folded(keys, jnp.arange(size))
        return Part(self, keys, jnp.arange(self.slices).reshape(self.batch_shape))

    def one(self, key: Array, index: Sequence[Array | int]) -> "Part":
        """One slice, by its index along each batch axis."""
        own, number = leaf_key(key, self.path), jnp.zeros((), jnp.int32)
        for i, size in zip(index, self.batch_shape, strict=True):
            own, number = jax.random.fold_in(own, i), number * size + i
        return Part(self, own, number)

    def layer(self, key: Array, index: Array | int) -> "Part":
        """One layer of a stack whose first axis counts layers, as a leaf of its own."""
        assert self.axes is not None
        inner = MatrixAxes(*(tuple(a - 1 for a in axes if a) for axes in self.axes))
        inside = self._replace(shape=self.shape[1:], axes=inner)
        part = inside._under(jax.random.fold_in(leaf_key(key, self.path), index))
        return part._replace(leaf=inside, numbers=index * inside.slices + part.numbers)

    def arranged(self, drawn: Array) -> Array:
        """The leaf from its slices (*batch, *slice); slices may be of size 1 to be broadcast."""
        if self.axes is None or drawn.ndim == 0:
            return drawn.reshape(self.shape) if drawn.size == math.prod(self.shape) else drawn
        order = self.axes.batch + self.axes.reduction + self.axes.output
        rows, columns = drawn.shape[len(self.batch_shape) :]
        inner = [
            self.shape[a] if size != 1 else 1
            for size, axes in ((rows, self.axes.reduction), (columns, self.axes.output))
            for a in axes
        ]
        drawn = drawn.reshape((*self.batch_shape, *inner))
        return drawn.transpose([order.index(a) for a in range(len(order))])

    def placed(self, x: Array) -> Array:
        """`x`, which broadcasts to the leaf, in the layout that the leaf's type has."""
        if self.sharding is None:
            return x
        return jax.sharding.reshard(jnp.broadcast_to(x, self.shape), self.sharding)


class Part(NamedTuple):
    """Some slices of a leaf, or some rows of one: what a sampler draws at once."""

    leaf: Leaf
    keys: Array  # (*batch,) typed
    numbers: Array  # (*batch,) of the slices within the leaf
    rows: Array | None = None  # (r,) of a slice; None: all
    columns: tuple[Array | int, int] | None = None  # the first one and how many; None: all

    def per_slice(self, values: Array) -> Array:
        """Shape one number a slice (*batch,) so that it broadcasts against the slices."""
        return values.reshape((*self.keys.shape, *(1,) * len(self.leaf.slice_shape)))

    def cut(self, x: Array) -> Array:
        """The rows and columns of a whole slice."""
        x = x if self.rows is None else x[self.rows]
        return x if self.columns is None else jax.lax.dynamic_slice_in_dim(x, *self.columns, -1)


def folded(keys: Array, numbers: Array) -> Array:
    """Keys (*batch, k): each key folded with each of k numbers."""
    one = jax.vmap(jax.random.fold_in, (None, 0))
    both = jax.vmap(one, (0, None))(keys.reshape(-1), numbers)
    return both.reshape((*keys.shape, numbers.size))


def _none(*_: Any) -> None:
    return None


@dataclass(frozen=True, eq=False)
class Sampler:
    """How the entries of a direction are drawn; see `jaxopt_lab.zeroth_order.samplers`."""

    name: str
    """What replays and errors call it."""

    slices: Callable[[Part, Any], Array]
    """(part, shared) -> (*batch, *slice), float32 or the dtype of the leaf."""

    shared: Callable[[Array, Array, Sequence[Leaf]], Any] = _none
    """(key of the step, key of the probe, leaves) -> what is drawn for the whole tree."""

    support: Callable[[Part, Any], Array | None] = _none
    """(part, shared) -> which entries are drawn at all, to be broadcast; None: every one."""

    support_of: Callable[[Array], Array | None] = _none
    """The support of a direction that was given, not drawn."""

    factors: Callable[[Part], tuple[Array, Array]] | None = None
    """(part of a matrix) -> (*batch, rows, rank) and (*batch, columns, rank), whose product is the
    slices; None: they have no factors. See `jaxopt_lab.zeroth_order.low_rank`."""


def leaves_of(
    params: optax.Params, matrix_axes: MatrixAxesSpec = None, trainable: Any = None
) -> list[Leaf]:
    """How directions divide a tree, in the order of its leaves.

    A matrix is what `matrix_axes` gives a layout or, without it, what has two axes and is not named
    as a vector; embeddings and heads are matrices. Leaves of more axes without a layout are viewed
    as (first axis, the others), unless `matrix_axes` leaves them out.

    Raises:
      ValueError: A layout or `trainable` does not match the tree.
    """
    leaves = jax.tree.leaves(params)
    matrices = {r.path: r for r in route_with_embeddings(params, matrix_axes)}
    moves = jax.tree.leaves(moving(params, trainable))
    out: list[Leaf] = []
    slices = entries = 0
    for r, x, m in zip(route(params, matrix_axes), leaves, moves, strict=True):
        found, shape = matrices.get(r.path), tuple(x.shape)
        axes = None if found is None else found.axes
        if r.role == "unspecified":
            axes = MatrixAxes((), (0,), tuple(range(1, len(shape))))
        by_row = found is not None and found.role == "embedding"
        sharding = known_sharding(x, None)
        leaf = Leaf(r.path, shape, wide_dtype(x), axes, by_row, m, slices, entries, sharding)
        out.append(leaf)
        if m:
            slices, entries = slices + leaf.slices, entries + math.prod(shape)
    return out


def moving(params: optax.Params, trainable: Any = None) -> Any:
    """Which leaves move, a tree of bools.

    Raises:
      ValueError: `trainable` does not match the tree, or has something else for a leaf.
    """
    entries = broadcast_prefix("trainable", True if trainable is None else trainable, params)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    for (path, _), entry in zip(leaves, entries, strict=True):
        if not isinstance(entry, bool) and getattr(entry, "dtype", None) != "bool":
            where = jax.tree_util.keystr(path)
            raise ValueError(f"trainable of leaf {where}: got {entry!r}, wanted a bool")
    return treedef.unflatten(map(bool, entries))


class Direction:
    """The direction of one probe: `mean + std * noise` on the support of its sampler, 0 elsewhere.

    A loss that perturbs its layers inside of its own loop asks for parts by the name of the leaf,
    which is the names along its path joined by "/".
    """

    def __init__(
        self,
        sampler: Sampler,
        step_key: Array,
        probe: Array | int,
        leaves: Sequence[Leaf],
        *,
        mean: Sequence[Array] | None = None,
        std: Any = 1.0,
        given: Sequence[Array] | None = None,
    ) -> None:
        """Draws what belongs to the whole tree.

        Args:
          sampler: How entries are drawn.
          step_key: Key of the step; that of the probe is folded from it.
          probe: Number of the probe.
          leaves: As from `leaves_of`.
          mean: One array a leaf; None: 0.
          std: Standard deviation about the mean.
          given: Directions to take instead of drawing, (probes, *shape) a leaf.
        """
        self.leaves, self._sampler, self._probe = leaves, sampler, probe
        self._key = jax.random.fold_in(step_key, probe)
        self._mean, self._std, self._given = mean, std, given
        self._shared = None if given else sampler.shared(step_key, self._key, leaves)

    def of(self, number: int) -> Array:
        """The direction of a leaf, by its number in the tree; in the leaf's wide dtype."""
        leaf = self.leaves[number]
        if not leaf.moves:
            return leaf.placed(jnp.zeros(leaf.shape, leaf.dtype))
        if self._given is not None:
            return leaf.placed(self._given[number][self._probe].astype(leaf.dtype))
        z = self._whole(leaf, self._sampler.slices)
        assert z is not None
        mean = None if self._mean is None else self._mean[number].astype(leaf.dtype)
        return self._placed(z, mean, self.support_of(number))

    def support_of(self, number: int) -> Array | None:
        """Which entries of a leaf are drawn, to be broadcast against it; None: every one."""
        leaf = self.leaves[number]
        if not leaf.moves:
            return jnp.zeros((), bool)
        if self._given is not None:
            return self._sampler.support_of(self._given[number][self._probe])
        return self._whole(leaf, self._sampler.support)

    def factors_of(self, number: int) -> tuple[Array, Array] | None:
        """Factors (*batch, rows or columns, rank) of a leaf's matrices; None: there are none."""
        leaf, factors = self.leaves[number], self._sampler.factors
        if factors is None or self._given is not None or self._mean is not None:
            return None
        return factors(leaf.whole(self._key)) if leaf.has_matrices else None

    def slice(self, name: str, *index: Array | int) -> Array:
        """One matrix (rows, columns) of a leaf, or a vector as it is.

        Args:
          name: Of the leaf, such as "layers/kernel".
          *index: Along each of its batch axes.
        """
        number, leaf = self._named(name)
        if self._given is not None or not leaf.moves:
            return _slice(self.of(number), leaf, index)
        mean = None if self._mean is None else _slice(self._mean[number], leaf, index)
        return self._drawn(leaf.one(self._key, index), mean)

    def layer(self, name: str, index: Array | int) -> Array:
        """One layer of a leaf whose first axis counts layers, in the shape of the others.

        Args:
          name: Of the leaf, such as "layers/mlp/up/kernel".
          index: Of the layer.

        Raises:
          ValueError: The layout of the leaf says that its first axis counts no layers.
        """
        number, leaf = self._named(name)
        if leaf.shape[:1] == () or (leaf.axes is not None and 0 not in leaf.axes.batch):
            raise ValueError(
                f"probe_fn asks for a layer of leaf {name}, but its shape is {leaf.shape} and "
                "matrix_axes does not say that the first axis counts layers, so its layers have no "
                "draws of their own. Give the layout in Probes(matrix_axes=...), such as "
                "models.matrix_axes(config); pass value_fn for a model whose layers are not stacked"
            )
        if leaf.axes is None or self._given is not None or not leaf.moves:
            return self.of(number)[index]  # of vectors, or whole already
        mean = None if self._mean is None else self._mean[number][index]
        part = leaf.layer(self._key, index)
        return self._drawn(part, mean, part.leaf.arranged)

    def rows(self, name: str, rows: Array) -> Array:
        """Some rows (r, columns) of an embedding.

        Args:
          name: Of the leaf.
          rows: Which ones.
        """
        number, leaf = self._table(name)
        if self._given is not None or not leaf.moves:
            return self.of(number)[rows]
        part = leaf.one(self._key, ())._replace(rows=rows)
        return self._drawn(part, None if self._mean is None else part.cut(self._mean[number]))

    def columns(self, name: str, start: Array | int, size: int) -> Array:
        """Some columns (rows, size) of an output head.

        Args:
          name: Of the leaf.
          start: The first one, a multiple of 32.
          size: How many.
        """
        number, leaf = self._table(name)
        if self._given is not None or not leaf.moves:
            return jax.lax.dynamic_slice_in_dim(self.of(number), start, size, 1)
        part = leaf.one(self._key, ())._replace(columns=(start, size))
        return self._drawn(part, None if self._mean is None else part.cut(self._mean[number]))

    def _whole(self, leaf: Leaf, draw: Callable[[Part, Any], Array | None]) -> Array | None:
        """What is drawn of a leaf; on an Explicit mesh by each device for itself."""

        def drawn(data: Array, shared: Any) -> Array | None:
            key = jax.random.wrap_key_data(data, impl="threefry2x32")
            found = draw(leaf.whole(key), shared)
            if found is None:
                return None
            found = leaf.arranged(found if found.dtype == bool else found.astype(leaf.dtype))
            return found if leaf.sharding is None else jnp.broadcast_to(found, leaf.shape)

        return spread_like(leaf, drawn, jax.random.key_data(self._key), self._shared)

    def _drawn(
        self,
        part: Part,
        mean: Array | None,
        arranged: Callable[[Array], Array] = lambda slices: slices,
    ) -> Array:
        z = self._sampler.slices(part, self._shared).astype(part.leaf.dtype)
        support = self._sampler.support(part, self._shared)
        support = None if support is None else arranged(support)
        return self._placed(arranged(z), mean, support)

    def _placed(self, z: Array, mean: Array | None, support: Array | None) -> Array:
        if mean is not None:
            z = mean.astype(z.dtype) + jnp.asarray(self._std, z.dtype) * z
        return z if support is None else jnp.where(support, z, 0)

    def _table(self, name: str) -> tuple[int, Leaf]:
        number, leaf = self._named(name)
        if not leaf.by_row:
            raise ValueError(
                f"leaf {name}: its rows have no keys; only those of embeddings and heads do. If it "
                "is one, give it no layout in Probes(matrix_axes=...), as "
                "models.matrix_axes(config) does"
            )
        return number, leaf

    def _named(self, name: str) -> tuple[int, Leaf]:
        names = ["/".join(path_names(leaf.path)) for leaf in self.leaves]
        if name not in names:
            raise ValueError(f"no leaf {name!r}; there are {', '.join(names)}")
        number = names.index(name)
        return number, self.leaves[number]


def spread_like(leaf: Leaf, drawn: Callable[..., Any], *args: Any) -> Any:
    """`drawn(*args)`, of the shape of a leaf; on an Explicit mesh laid out as the leaf is.

    Operations whose operands say nothing of a layout have results that are whole on every device.
    Where axes are Auto, the layout of the result reaches back to the first counter.
    """
    if leaf.sharding is None or jax.eval_shape(drawn, *args) is None:
        return drawn(*args)
    spread: Any = jax.sharding.auto_axes(drawn, out_sharding=leaf.sharding)
    return spread(*args)


def _slice(x: Array, leaf: Leaf, index: Sequence[Array | int]) -> Array:
    if leaf.axes is None:
        return x.reshape(leaf.slice_shape)
    x = x.transpose(leaf.axes.batch + leaf.axes.reduction + leaf.axes.output)
    return x[tuple(index)].reshape(leaf.slice_shape)
