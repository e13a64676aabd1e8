"""The arrays of one matrix leaf with its factors and bases, and the way to stacks and back."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array

from jaxopt_lab.core.matrices import MatrixAxes
from jaxopt_lab.core.stacks import Item, LeafLayout, ReplicatedWork, Slot, map_stacks

# In the coordinates of the leaf, and in those of its eigenbases.
_OF_LEAF, _ROTATED = ("grad", "direction"), ("mu", "nu")
_OTHER_SIDE = {
    f"{old}{side}_{what}": f"{old}{other}_{what}"
    for side, other in (("row", "column"), ("column", "row"))
    for what in ("nu", "factor", "basis", "order")
    for old in ("", "old_")
}


_Arrays = list[dict[str, Array | None]]  # some of every leaf


class FactorLeaf(NamedTuple):
    """One leaf; every array is (batch, ...), gradient and direction (batch, *inner)."""

    layout: LeafLayout
    arrays: Mapping[str, Array | None]

    def __getitem__(self, name: str) -> Array:
        """An array that is there."""
        array = self.arrays[name]
        assert array is not None, name
        return array

    def having(self, **arrays: Array | None) -> "FactorLeaf":
        """With some arrays added or replaced."""
        return self._replace(arrays={**self.arrays, **arrays})

    def slot(self, name: str) -> Slot:
        """The shape and layout of an array."""
        return slot_of(self.layout, name)

    def turned(self) -> "FactorLeaf":
        """The leaf transposed, where no axis is sharded."""
        layout = self.layout
        axes = MatrixAxes((0,), (1,), (2,))
        turned = LeafLayout((layout.batch, layout.n, layout.m), axes, None)
        turned.mesh = layout.mesh

        def turn(name: str) -> Array | None:
            x = self.arrays[_OTHER_SIDE.get(name, name)]
            return x if x is None or name not in (*_OF_LEAF, *_ROTATED) else x.mT

        return FactorLeaf(turned, {name: turn(name) for name in self.arrays})


def slot_of(layout: LeafLayout, name: str) -> Slot:
    """The shape and layout of a named array of a leaf."""
    if name in _OF_LEAF:
        return layout.matrix
    if name in _ROTATED:
        return layout.block(layout.m, layout.n)
    if name not in _OTHER_SIDE:
        return layout.number()
    size = layout.m if "row" in name else layout.n
    if name.endswith("order"):
        return layout.spread(size)
    return layout.vector(size) if name.endswith("nu") else layout.block(size, size)


def map_leaves(
    fn: Callable[..., tuple[Array | None, ...]],
    leaves: Sequence[FactorLeaf],
    names: Sequence[str],
    results: Sequence[str],
    *,
    transposable: bool,
    **options: Any,
) -> list[FactorLeaf]:
    """Replace the arrays `results` of every leaf by `fn` of the arrays `names`, in stacks.

    Args:
      fn: From stacks (b, ...), None where a leaf has no such array, to stacks.
      leaves: The leaves.
      names: Arguments of `fn`.
      results: What it returns. The leaves have a result if they have an array of that name, or if
        no leaf has one yet.
      transposable: Whether `fn` commutes with transposing a leaf and exchanging its sides; then
        leaves (m, n) and (n, m) share a stack.
      **options: Of `map_stacks`.
    """
    flips = [transposable and not x.layout.is_sharded and x.layout.m > x.layout.n for x in leaves]
    turned = [x.turned() if flip else x for x, flip in zip(leaves, flips, strict=True)]
    items = []
    for leaf in turned:
        arrays = tuple(leaf.arrays[name] for name in names)
        slots = tuple(None if x is None else leaf.slot(name)
                      for x, name in zip(arrays, names, strict=True))  # fmt: skip
        out = tuple(
            None if leaf.arrays.get(name, 0) is None else leaf.slot(name) for name in results
        )
        items.append(Item(arrays, slots, out, leaf.layout.mesh))
    mapped = map_stacks(fn, items, **options)
    done = []
    for leaf, flip, flipped, values in zip(leaves, flips, turned, mapped, strict=True):
        new = flipped.having(**dict(zip(results, values, strict=True)))
        done.append(FactorLeaf(leaf.layout, new.turned().arrays) if flip else new)
    return done


def map_sides(
    fn: Callable[[Array, Array], tuple[Array, Array, Array]],
    leaves: Sequence[FactorLeaf],
    *,
    replicated_work: ReplicatedWork,
) -> list[FactorLeaf]:
    """Replace factor, basis and order of every side by `fn(factor, basis)`.

    Sides of equal size share a stack, whatever leaf they belong to and whichever side they are.
    """
    results = ("factor", "basis", "order")
    sides = [
        (i, side)
        for i, leaf in enumerate(leaves)
        for side in ("row", "column")
        if leaf.arrays[f"{side}_factor"] is not None
    ]

    def item(leaf: FactorLeaf, side: str) -> Item:
        slots = {what: leaf.slot(f"{side}_{what}") for what in results}
        arrays = (leaf[f"{side}_factor"], leaf[f"{side}_basis"])
        return Item(
            arrays, (slots["factor"], slots["basis"]), tuple(slots.values()), leaf.layout.mesh
        )

    mapped = map_stacks(
        fn,
        [item(leaves[i], side) for i, side in sides],
        replicated_work=replicated_work,
        decomposes=True,
    )
    nothing = {f"{side}_order": None for side in ("row", "column")}
    done = [leaf.having(**nothing) for leaf in leaves]
    for (i, side), values in zip(sides, mapped, strict=True):
        names = (f"{side}_{what}" for what in results)
        done[i] = done[i].having(**dict(zip(names, values, strict=True)))
    return done


def branch(
    choose: Callable[[Callable[[_Arrays], _Arrays], _Arrays], _Arrays],
    step: Callable[[list[FactorLeaf]], list[FactorLeaf]],
    leaves: list[FactorLeaf],
    names: Sequence[str],
) -> list[FactorLeaf]:
    """`step(leaves)` or `leaves`.

    Args:
      choose: `choose(change, arrays)` returns `change(arrays)` or `arrays`.
      step: Changes the named arrays only.
      leaves: The leaves.
      names: What goes in and out of the branch.
    """

    def having(arrays: _Arrays) -> list[FactorLeaf]:
        return [leaf.having(**x) for leaf, x in zip(leaves, arrays, strict=True)]

    def named(leaves: list[FactorLeaf]) -> _Arrays:
        return [{name: leaf.arrays[name] for name in names} for leaf in leaves]

    return having(choose(lambda arrays: named(step(having(arrays))), named(leaves)))
