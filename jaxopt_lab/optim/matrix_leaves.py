"""The leaves of one update: how each lies as a stack of matrices, on a mesh, and the way there.

`LeafLayout` is the one description of a leaf. A matrix has two sides; a tensor without a layout is
one entry with as many sides as it has axes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import KeyPath
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Shaped

from jaxopt_lab.core.matrices import MatrixAxes
from jaxopt_lab.core.stacks import Arrays, Member, ReplicatedWork, Slot, map_stacks
from jaxopt_lab.optim.routing import MatrixAxesSpec, broadcast_prefix, require_matrices


def known_sharding(x: Any, given: NamedSharding | None = None) -> NamedSharding | None:
    """The sharding under which `x` is laid out, where that can be known while tracing.

    Explicit mesh axes carry it in the type. Auto axes do not, so it must be `given`. None when it
    is unknown, or says nothing because the mesh is one device.
    """
    typed = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    sharding = getattr(typed, "sharding", None)
    if not (isinstance(sharding, NamedSharding) and any(sharding.spec)):
        sharding = given
    return None if sharding is None or sharding.mesh.size == 1 else sharding


class LeafLayout:
    """How one leaf, and the arrays that belong to it, lie as stacks of entries (batch, *sides)."""

    def __init__(
        self,
        x: Any,
        axes: MatrixAxes,
        given: NamedSharding | None = None,
        path: KeyPath = (),
        sides: Sequence[int] | None = None,
        gathers: bool = False,
    ) -> None:
        """Resolves the layout of a leaf.

        Args:
          x: The leaf, or its type.
          axes: Which of its axes form its entries.
          given: Its sharding, where the type does not show it.
          path: Where it is in its tree.
          sides: Shape of an entry; None: (rows, columns).
          gathers: Whether views are whole on every device; no other array is sharded then.

        Raises:
          ValueError: A batch axis other than the leading one is sharded: merging the batch axes
            would move data.
        """
        self.shape, self.axes, self.path = tuple(x.shape), axes, path
        self.dtype = jnp.promote_types(x.dtype, jnp.float32)  # in which a method computes
        self.inner_axes = axes.reduction + axes.output
        self._order = axes.batch + self.inner_axes
        self.batch_shape = tuple(self.shape[a] for a in axes.batch)
        self.batch = math.prod(self.batch_shape)
        inner = tuple(self.shape[a] for a in self.inner_axes)
        pair = tuple(math.prod(self.shape[a] for a in side) for side in axes[1:])
        self.sides = pair if sides is None else tuple(sides)

        self._typed = known_sharding(x)
        self._gathers = gathers
        sharding = None if gathers else known_sharding(x, given)
        self.sharding, self.mesh = sharding, None if sharding is None else sharding.mesh
        entries = () if sharding is None else tuple(sharding.spec)
        entries += (None,) * (len(self.shape) - len(entries))
        leading, *others = [entries[a] for a in axes.batch] or [None]
        if any(entry is not None for entry in others):
            raise ValueError(
                f"only the first batch axis of a matrix leaf may be sharded, got {entries} "
                f"with batch axes {axes.batch}"
            )
        spec = [entries[a] for a in self.inner_axes]
        self._leading = PartitionSpec() if leading is None else PartitionSpec(leading)
        self._entries = [entry for entry in spec if entry is not None]
        self.is_sharded = leading is not None or bool(self._entries)
        # Inner axes are merged at once, unless one of them is sharded.
        self.matrix = Slot(
            inner if self.is_sharded else self.sides,
            self.sides,
            PartitionSpec(leading, *spec) if self.is_sharded else PartitionSpec(),
            of_leaf=True,
        )
        # Moments are kept by rows and columns; those of a tensor in its shape.
        self.moments = self.block(*self.sides) if axes.output else self.matrix
        # The axes that span an entry, none where no device has all of it.
        self.whole_axes = () if self._entries else self.inner_axes

    @property
    def is_tall(self) -> bool:
        """Whether its matrices may share the stack of wide ones, transposed."""
        return not self.is_sharded and self.sides[0] > self.sides[-1]

    def block(self, *sides: int) -> Slot:
        """An array (*sides) an entry, sharded like the leaf as far as it can be divided."""
        entries = [entry if side % self._ways(entry) == 0 else None
                   for entry, side in zip(self._entries, sides, strict=False)]  # fmt: skip
        entries += [None] * (len(sides) - len(entries))
        # What does not divide its own side may divide one that is free.
        for entry in [entry for entry in self._entries if entry not in entries]:
            free = [k for k, side in enumerate(sides)
                    if entries[k] is None and side % self._ways(entry) == 0]  # fmt: skip
            for place in free[:1]:
                entries[place] = entry
        leading = self._leading[0] if len(self._leading) else None
        spec = PartitionSpec(leading, *entries) if any(entries) else self._leading
        return Slot(sides, sides, spec)

    def vector(self, size: int) -> Slot:
        """A (size,) vector an entry, sharded over the first of those axes where it divides."""
        slot = self.block(size, 1)
        return Slot((size,), (size,), PartitionSpec(*slot.spec[:2]))

    def replicated(self, size: int) -> Slot:
        """A (size,) vector an entry, whole on every device that has the entry."""
        return Slot((size,), (size,), self._leading)

    def spread(self, size: int) -> Slot:
        """A (size,) vector an entry, folded so that every axis that shards the leaf shards it."""
        if len(self._entries) == 2:
            ways = self._ways(self._entries[1])
            folded = (size // ways, ways)
            if size % ways == 0 and folded[0] % self._ways(self._entries[0]) == 0:
                leading = self._leading[0] if len(self._leading) else None
                return Slot(folded, (size,), PartitionSpec(leading, *self._entries))
        return self.vector(size)

    def number(self) -> Slot:
        """One number an entry."""
        return Slot((), (), self._leading)

    def slots(self) -> dict[str, Slot]:
        """How all arrays of a leaf with a factor and a basis a side lie, by name.

        The leaf itself, moments in its bases, numbers of a matrix, and for side k its factor, its
        basis, the order of the columns of that, and a vector of second moments.
        """
        slots: dict[str, Slot] = dict.fromkeys(("grad", "direction"), self.matrix)
        slots |= dict.fromkeys(("mu", "nu"), self.moments)
        slots |= dict.fromkeys(("age", "status"), self.number())
        for k, size in enumerate(self.sides):
            square = self.block(size, size)
            slots |= {f"{what}.{k}": square for what in ("factor", "basis", "old_basis")}
            slots |= {f"nu.{k}": self.vector(size), f"order.{k}": self.spread(size)}
        return slots

    def view(self, x: Array) -> Array:
        """The leaf, or an array of its shape, as (batch, *inner)."""
        if self._gathers and self._typed is not None:
            x = jax.sharding.reshard(x, NamedSharding(self._typed.mesh, PartitionSpec()))
        return x.transpose(self._order).reshape((self.batch, *self.matrix.inner))

    def undo_view(self, y: Array) -> Array:
        """Inverse of `view`."""
        moved = y.reshape(tuple(self.shape[a] for a in self._order))
        x = moved.transpose([self._order.index(a) for a in range(len(self._order))])
        return jax.sharding.reshard(x, self._typed) if self._gathers and self._typed else x

    def per_matrix(self, values: Shaped[Array, "..."]) -> Array:
        """One number an entry, (batch,) or (*batch), so that it broadcasts against the leaf."""
        return jnp.expand_dims(values.reshape(self.batch_shape), self.inner_axes)

    def initial(self, slot: Slot, value: Array) -> Array:
        """`value` for every entry, (*batch, *inner), placed where arrays of the slot stay."""
        array = jnp.broadcast_to(value, (*self.batch_shape, *slot.inner))
        # No two leaves of a state may be one buffer: it could not be donated.
        array = jnp.copy(value) if array is value else array
        if self._typed is None:
            return array
        entries = (*slot.spec[:1], *[None] * len(self.batch_shape))[: len(self.batch_shape)]
        spec = PartitionSpec(*entries, *slot.spec[1:])
        return jax.sharding.reshard(array, NamedSharding(self._typed.mesh, spec))

    def refused(self, x: Array) -> Bool[Array, "..."]:
        """Which matrices (*batch) are NaN, where a matrix is NaN as a whole or not at all.

        Every device looks at its own part of each matrix: nothing is communicated.
        """
        inner = self.inner_axes

        def local(part: Array) -> Array:
            corner = part[tuple(slice(1) if a in inner else slice(None) for a in range(x.ndim))]
            return jnp.any(jnp.isnan(corner), axis=inner)

        if self.sharding is None:
            return local(x)
        spec = (*self.sharding.spec, *[None] * (x.ndim - len(self.sharding.spec)))
        # All parts of a matrix tell the same; the checker cannot see it.
        return jax.shard_map(
            local,
            mesh=self.sharding.mesh,
            in_specs=self.sharding.spec,
            out_specs=PartitionSpec(*(spec[a] for a in self.axes.batch)),
            check_vma=False,
        )(x)

    def _ways(self, entry: Any) -> int:
        assert self.mesh is not None
        names = (entry,) if isinstance(entry, str) else entry
        return math.prod(self.mesh.shape[name] for name in names)


class MatrixLeaves(NamedTuple):
    """The layouts of a tree of matrices, in the order of its leaves."""

    layouts: list[LeafLayout]
    members: list[Member]  # of stacks, with the slots of all arrays that belong to a leaf
    treedef: Any  # jax.tree_util.PyTreeDef

    @classmethod
    def with_sides(cls, layouts: list[LeafLayout], treedef: Any) -> "MatrixLeaves":
        """Leaves with a factor and a basis for each of their sides."""
        return cls(layouts, [Member(x.slots(), x.mesh) for x in layouts], treedef)

    @classmethod
    def of(
        cls, updates: optax.Updates, matrix_axes: MatrixAxesSpec, param_shardings: Any = None
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
        layouts = [LeafLayout(x, r.axes, s, r.path)
                   for x, r, s in zip(leaves, routes, given, strict=True) if r.axes]  # fmt: skip
        return cls.with_sides(layouts, treedef)

    def map_whole(
        self,
        fn: Callable[..., Any],
        matrices: Sequence[Sequence[Array]],
        *,
        vectors: Sequence[Sequence[Shaped[Array, "_ _"]]] = (),
        numbers: int = 0,
        transposable: bool = False,
        replicated_work: ReplicatedWork = "repeat",
    ) -> tuple[list[Array], ...]:
        """Apply `fn` to the whole matrices of all leaves, as few times as their shapes allow.

        Args:
          fn: `fn(*stacks, *vector_stacks)` with stacks (b, m, n) and vectors (b, n); returns one
            array (b, m, n), or a tuple of it and `numbers` arrays (b,).
          matrices: One or more lists of leaves; entry i of every list has the shape of leaf i.
          vectors: Lists with one array (batch, n) a leaf.
          numbers: How many arrays (b,) `fn` returns after the matrices.
          transposable: Whether `fn` commutes with transposition: then leaves (m, n) and (n, m)
            share a stack.
          replicated_work: As for `Stacks`.

        Returns:
          A list with the shape of the leaves, then `numbers` lists of (batch,) arrays.
        """
        arrays: Arrays = {f"matrix {k}": self.views(given) for k, given in enumerate(matrices)}
        arrays |= {f"vector {k}": list(given) for k, given in enumerate(vectors)}
        members = []
        for i, x in enumerate(self.layouts):
            slots = dict.fromkeys(arrays, x.matrix)
            slots |= {f"vector {k}": x.replicated(v[i].shape[1]) for k, v in enumerate(vectors)}
            slots |= {f"number {k}": x.number() for k in range(numbers)}
            members.append(Member(slots, x.mesh, transposable and x.is_tall))
        results = ("matrix 0", *(f"number {k}" for k in range(numbers)))
        done = map_stacks(
            fn, members, arrays, tuple(arrays), results, replicated_work=replicated_work
        )
        first, *others = done.values()
        return [x.undo_view(y) for x, y in zip(self.layouts, first, strict=True)], *others

    def views(self, tree: optax.Updates) -> list[Array]:
        """The leaves, or arrays of their shapes, as (batch, *inner)."""
        return [x.view(y) for x, y in zip(self.layouts, jax.tree.leaves(tree), strict=True)]

    def stacked(self, trees: Mapping[str, Any]) -> Arrays:
        """Trees by the names of their slots, absent leaves or trees masked, as (batch, *inner).

        What has the shape of a leaf becomes float32 or wider.
        """

        def one(x: LeafLayout, slot: Slot, y: Any) -> Array:
            if slot.of_leaf:
                return x.view(y.astype(x.dtype))
            return y.reshape((x.batch, *slot.inner))

        def leaves(name: str, tree: Any) -> list[Array | None]:
            if isinstance(tree, optax.MaskedNode):
                return [None] * len(self.layouts)
            own = zip(self.layouts, self.members, self.treedef.flatten_up_to(tree), strict=True)
            return [None if isinstance(y, optax.MaskedNode) else one(x, member.slots[name], y)
                    for x, member, y in own]  # fmt: skip

        return {name: leaves(name, tree) for name, tree in trees.items()}

    def unstacked(self, arrays: Arrays, like: Mapping[str, Any]) -> dict[str, Any]:
        """Inverse of `stacked`: arrays by name in the shapes of the trees in `like`."""

        def one(x: LeafLayout, slot: Slot, y: Array, before: Array) -> Array:
            return x.undo_view(y) if slot.of_leaf else y.reshape(before.shape)

        def tree(name: str, old: Any) -> Any:
            if isinstance(old, optax.MaskedNode):
                return old
            own = zip(
                self.layouts,
                self.members,
                arrays[name],
                self.treedef.flatten_up_to(old),
                strict=True,
            )
            return self.treedef.unflatten(
                [b if y is None else one(x, member.slots[name], y, b) for x, member, y, b in own]
            )

        return {name: tree(name, old) for name, old in like.items()}

    def refused(self, directions: Sequence[Array]) -> list[Bool[Array, "..."]]:
        """Which matrices (*batch) of each leaf are NaN as a whole."""
        return [x.refused(y) for x, y in zip(self.layouts, directions, strict=True)]

    def zeros(self, dtype: DTypeLike) -> optax.Updates:
        """A zero for each matrix: leaves (*batch), laid out as the batch axes."""
        zero = jnp.zeros([], dtype)
        return self.treedef.unflatten([x.initial(x.number(), zero) for x in self.layouts])
