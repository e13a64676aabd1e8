"""Batched work on the matrices of many leaves: equal shapes are stacked, sharded ones exchanged."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from jaxopt_lab.core.matrices import (
    MatrixAxes,
    batch_first,
    batch_first_spec,
    group_by,
    undo_batch_first,
)
from jaxopt_lab.core.ordering import serialize_after
from jaxopt_lab.core.whole_matrices import on_whole_matrices

ReplicatedWork = Literal["repeat", "share"]


class Slot(NamedTuple):
    """How one array of an item enters a stack and leaves it."""

    inner: tuple[int, ...]  # shape without the batch axis, as stored
    whole: tuple[int, ...]  # shape of one entry inside the function
    spec: PartitionSpec  # of (batch, *inner)


class Item(NamedTuple):
    """The arrays of one leaf, each (batch, *inner)."""

    arrays: tuple[Array | None, ...]  # None: the leaf has no such array
    slots: tuple[Slot | None, ...]  # one an array
    results: tuple[Slot | None, ...]  # one a result of the function
    mesh: Mesh | AbstractMesh | None  # None: the layout is not known, or trivial


def map_stacks(
    fn: Callable[..., tuple[Array | None, ...]],
    items: Sequence[Item],
    *,
    replicated_work: ReplicatedWork = "repeat",
    enough: int | None = None,
    decomposes: bool = False,
    operand: Any = None,
) -> list[tuple[Array | None, ...]]:
    """Apply `fn` to the arrays of all items, as few times as their shapes allow.

    Items of equal shapes, dtypes and layouts are concatenated along the batch axis. Where a layout
    shards an axis other than the batch, entries are exchanged so that each device works on whole
    ones (`on_whole_matrices`).

    Args:
      fn: From arrays (b, *whole), None where the items have none, to such arrays.
      items: One a leaf.
      replicated_work: On mesh axes over which everything is replicated, either "repeat" the work or
        "share" it for one all-gather of the results.
      enough: Items with so many entries are left alone: concatenating them would cost more than
        their own calls. None: everything that fits is concatenated.
      decomposes: Whether `fn` calls decompositions, which must not run at the same time
        (`serialize_after`).
      operand: If given, what `fn` takes before its arrays: a tree whose leaves are Python numbers,
        which stay such, and arrays, the same for all items.

    Returns:
      For each item its results, (batch, *inner).
    """
    out: list[tuple[Array | None, ...]] = [()] * len(items)
    earlier: tuple[Array | None, ...] = ()
    for members in group_by([_key(item, replicated_work, enough) for item in items]):
        first = items[members[0]]
        stacks = [_concatenate([items[i].arrays[k] for i in members])
                  for k in range(len(first.arrays))]  # fmt: skip
        if decomposes and first.mesh is None:
            stacks = [x if x is None else serialize_after(x, *earlier) for x in stacks]
        results = _run(fn, stacks, first, replicated_work, operand)
        earlier = results
        start = 0
        for i in members:
            size = _entries(items[i])
            out[i] = tuple(
                None if y is None else lax.slice_in_dim(y, start, start + size) for y in results
            )
            start += size
    return out


def _key(item: Item, replicated_work: ReplicatedWork, enough: int | None):
    if enough is not None and _entries(item) >= enough:
        return id(item)
    dtypes = tuple(None if x is None else x.dtype for x in item.arrays)
    slots = tuple(s for s in (*item.slots, *item.results) if s is not None)
    if not any(map(_is_sharded, slots)):
        whole = tuple(None if s is None else s.whole for s in (*item.slots, *item.results))
        return dtypes, whole, item.mesh if replicated_work == "share" else None
    # A stack whose leading axis is sharded cannot be concatenated without moving data.
    alone = id(item) if any(s.spec and s.spec[0] is not None for s in slots) else None
    return dtypes, item.slots, item.results, item.mesh, alone


def _entries(item: Item) -> int:
    return next(x.shape[0] for x in item.arrays if x is not None)


def _is_sharded(slot: Slot) -> bool:
    return any(entry is not None for entry in slot.spec)


def _concatenate(arrays: Sequence[Array | None]) -> Array | None:
    present = [x for x in arrays if x is not None]
    if not present:
        return None
    return present[0] if len(present) == 1 else jnp.concatenate(present)


def _run(fn, stacks, item: Item, replicated_work: ReplicatedWork, operand: Any):
    """Call `fn` on whole entries, leaving out the arrays that the items do not have."""
    slots = [s for s in item.slots if s is not None]
    results = [s for s in item.results if s is not None]

    def whole(operand: Any, arrays: Sequence[Array]) -> tuple[Array, ...]:
        b = arrays[0].shape[0]
        given = (x.reshape((b, *s.whole)) for x, s in zip(arrays, slots, strict=True))
        flat = [None if slot is None else next(given) for slot in item.slots]
        out = fn(*flat) if operand is None else fn(operand, *flat)
        present = [y for y in out if y is not None]
        return tuple(y.reshape((b, *s.inner)) for y, s in zip(present, results, strict=True))

    arrays = [x for x in stacks if x is not None]
    sharded = any(map(_is_sharded, (*slots, *results)))
    if item.mesh is None or not (sharded or replicated_work == "share"):
        out = whole(operand, arrays)
    else:
        used = {a for s in (*slots, *results) for e in s.spec if e
                for a in ((e,) if isinstance(e, str) else e)}  # fmt: skip
        sizes = item.mesh.shape
        idle = tuple(a for a in item.mesh.axis_names if a not in used and sizes[a] > 1)
        # Traced numbers of the operand cannot be closed over; Python's stay what they are.
        numbers, treedef = jax.tree.flatten(operand)
        traced = [i for i, x in enumerate(numbers) if isinstance(x, jax.Array)]

        def local(*arguments: Array) -> tuple[Array, ...]:
            own = dict(zip(traced, arguments[len(arrays) :], strict=True))
            given = treedef.unflatten([own.get(i, x) for i, x in enumerate(numbers)])
            return whole(given, arguments[: len(arrays)])

        out = on_whole_matrices(
            local,
            arrays,
            [s.spec for s in slots],
            [s.spec for s in results],
            item.mesh,
            share_over=idle if replicated_work == "share" else (),
            scalars=[numbers[i] for i in traced],
        )
    done = iter(out)
    return tuple(None if slot is None else next(done) for slot in item.results)


class LeafLayout:
    """How the arrays that belong to one leaf are laid out: the leaf, its sides, its numbers."""

    def __init__(
        self, shape: Sequence[int], axes: MatrixAxes, sharding: NamedSharding | None
    ) -> None:
        """Resolves the layout of a leaf.

        Args:
          shape: Of the leaf.
          axes: Which of its axes form the matrices.
          sharding: Where it is known and not trivial.

        Raises:
          ValueError: A batch axis other than the leading one is sharded.
        """
        self.shape, self.axes = tuple(shape), axes
        self.batch, self.m, self.n = axes.matrix_shape(shape)
        self.batch_shape = tuple(shape[a] for a in axes.batch)
        spec = PartitionSpec() if sharding is None else batch_first_spec(sharding.spec, axes)
        self.is_sharded = any(entry is not None for entry in spec)
        # Inner axes are merged at once, unless one of them is sharded.
        inner = tuple(shape[a] for a in axes.reduction + axes.output)
        inner = inner if self.is_sharded else (self.m, self.n)
        self.mesh = None if sharding is None else sharding.mesh
        self.matrix = Slot(inner, (self.m, self.n), spec if self.is_sharded else PartitionSpec())
        leading = spec[0] if len(spec) else None
        self._leading = PartitionSpec() if leading is None else PartitionSpec(leading)
        self._entries = [entry for entry in spec[1:] if entry is not None]

    @property
    def sides(self) -> tuple[int, ...]:
        """Sizes of what may have a factor: rows and columns."""
        return self.m, self.n

    def slots(self) -> dict[str, Slot]:
        """The slots of all arrays of a leaf with a factor and a basis a side, by name.

        The leaf itself, what lives in its bases, numbers a matrix, and for side k its factor, its
        basis and the order of the columns of that.
        """
        slots = dict.fromkeys(("grad", "direction"), self.matrix)
        slots |= dict.fromkeys(("mu", "nu"), self.block(self.m, self.n))
        slots |= dict.fromkeys(("age", "status"), self.number())
        for k, size in enumerate(self.sides):
            names = (f"{old}{what}{k}" for old in ("", "old_") for what in ("factor", "basis"))
            slots |= dict.fromkeys(names, self.block(size, size))
            slots[f"order{k}"] = self.spread(size)
        return slots | {"row_nu": self.vector(self.m), "column_nu": self.vector(self.n)}

    def transposed(self) -> "LeafLayout":
        """The layout of the transposed matrices, where no axis is sharded."""
        axes = MatrixAxes((0,), (1,), (2,))
        flipped = LeafLayout((self.batch, self.n, self.m), axes, None)
        flipped.mesh = self.mesh
        return flipped

    def block(self, rows: int, columns: int) -> Slot:
        """A (rows, columns) matrix an entry, sharded like the leaf as far as it can be divided."""
        sides = (rows, columns)
        # One sharded axis of the leaf is one of the rows here; a second one is of the columns.
        entries = [entry if self._divides(entry, side) else None
                   for entry, side in zip(self._entries, sides, strict=False)]  # fmt: skip
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
            if size % ways == 0 and self._divides(self._entries[0], folded[0]):
                leading = self._leading[0] if len(self._leading) else None
                return Slot(folded, (size,), PartitionSpec(leading, *self._entries))
        return self.vector(size)

    def number(self) -> Slot:
        """One number an entry."""
        return Slot((), (), self._leading)

    def view(self, x: Array) -> Array:
        """The leaf as (batch, *inner)."""
        return batch_first(x, self.axes).reshape((self.batch, *self.matrix.inner))

    def undo_view(self, y: Array) -> Array:
        """Inverse of `view`."""
        return undo_batch_first(y, self.shape, self.axes)

    def flat(self, x: Array) -> Array:
        """Merge the batch axes of an array (*batch, ...) that belongs to the leaf."""
        return x.reshape((self.batch, *x.shape[len(self.batch_shape) :]))

    def undo_flat(self, y: Array) -> Array:
        """Inverse of `flat`."""
        return y.reshape((*self.batch_shape, *y.shape[1:]))

    def flat_all(self, arrays: Mapping[str, Array | None]) -> dict[str, Array | None]:
        """`flat` of all arrays that there are."""
        return {name: None if x is None else self.flat(x) for name, x in arrays.items()}

    def undo_flat_all(self, arrays: Mapping[str, Array | None]) -> dict[str, Array | None]:
        """Inverse of `flat_all`."""
        return {name: None if y is None else self.undo_flat(y) for name, y in arrays.items()}

    def stored_spec(self, slot: Slot) -> PartitionSpec:
        """The partition of an array (*batch, *inner) with the slot's layout."""
        if not len(slot.spec):
            return PartitionSpec()
        leading = (None,) * len(self.batch_shape)
        if self.batch_shape:
            leading = (slot.spec[0], *leading[1:])
        return PartitionSpec(*leading, *slot.spec[1:])

    def _divides(self, entry, size: int) -> bool:
        return size % self._ways(entry) == 0

    def _ways(self, entry) -> int:
        assert self.mesh is not None
        names = (entry,) if isinstance(entry, str) else entry
        return math.prod(self.mesh.shape[name] for name in names)


def map_matrices(
    fn: Callable[..., tuple[Array, ...]],
    matrices: Sequence[Sequence[Array]],
    axes: Sequence[MatrixAxes],
    shardings: Sequence[NamedSharding | None],
    *,
    vectors: Sequence[Sequence[Shaped[Array, "_ _"]]] = (),
    numbers: int = 0,
    transposable: bool = False,
    replicated_work: ReplicatedWork = "repeat",
) -> tuple[list[Array], ...]:
    """Apply `fn` to the matrices of all leaves, as few times as their shapes allow.

    Args:
      fn: `fn(*stacks, *vector_stacks)` with stacks (b, m, n) and vectors (b, n); returns a tuple of
        one (b, m, n) array followed by `numbers` arrays (b,).
      matrices: One or more lists of leaves; entry i of every list has the shape of leaf i.
      axes: The resolved layout of each leaf.
      shardings: The known sharding of each leaf; None where it is unknown or trivial.
      vectors: Lists with one array (batch, n) a leaf.
      numbers: How many arrays (b,) `fn` returns after the matrices.
      transposable: Whether `fn` commutes with transposition: then leaves (m, n) and (n, m) share a
        stack.
      replicated_work: As for `map_stacks`.

    Returns:
      A list with the shape of the leaves, then `numbers` lists of (batch,) arrays.
    """
    layouts = [LeafLayout(x.shape, a, s)
               for x, a, s in zip(matrices[0], axes, shardings, strict=True)]  # fmt: skip
    turned = [transposable and not each.is_sharded and each.m > each.n for each in layouts]
    items = []
    for i, (layout, turn) in enumerate(zip(layouts, turned, strict=True)):
        views = [layout.view(leaves[i]) for leaves in matrices]
        slot = layout.matrix
        if turn:
            views = [x.mT for x in views]
            slot = Slot((layout.n, layout.m), (layout.n, layout.m), slot.spec)
        rows = [leaves[i] for leaves in vectors]
        slots = (slot,) * len(views) + tuple(layout.replicated(x.shape[1]) for x in rows)
        results = (slot,) + (layout.number(),) * numbers
        items.append(Item((*views, *rows), slots, results, layout.mesh))
    done = map_stacks(fn, items, replicated_work=replicated_work)
    out: list[list] = [[], *([] for _ in range(numbers))]
    for layout, turn, (first, *others) in zip(layouts, turned, done, strict=True):
        assert first is not None
        out[0].append(layout.undo_view(first.mT if turn else first))
        for k, number in enumerate(others):
            out[1 + k].append(number)
    return tuple(out)
