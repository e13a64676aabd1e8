"""The arrays of leaves with factors and bases, by name, and their way to stacks and back.

A leaf has any number of sides, each with a factor, a basis and, while bases are refreshed, the
order of its columns: `factor0`, `basis0`, `order0` belong to its first side. A matrix has two.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array

from jaxopt_lab.core.stacks import Item, ReplicatedWork, Slot, map_stacks

# One entry a leaf, (batch, ...); None: the leaf has no such array.
Arrays = dict[str, list[Any]]
Sides = tuple[Array | None, ...]  # of a stack; None: that side has no factor

_OTHER = {"row_nu": "column_nu", "column_nu": "row_nu"} | {
    f"{old}{what}{side}": f"{old}{what}{1 - side}"
    for old in ("", "old_")
    for what in ("factor", "basis", "order")
    for side in (0, 1)
}
# Arrays in the coordinates of a matrix or of its bases.
_MATRICES = ("grad", "direction", "mu", "nu")


class Leaves(NamedTuple):
    """Where the arrays of every leaf are, and how they enter a stack."""

    layouts: Sequence[Any]
    slots: list[dict[str, Slot]]

    @classmethod
    def of(cls, layouts: Sequence[Any]) -> "Leaves":
        """From the layouts: `LeafLayout`, or anything that has its sides and slots."""
        return cls(layouts, [layout.slots() for layout in layouts])

    def map(
        self,
        fn: Callable[..., Sides],
        operand: Any,
        arrays: Arrays,
        names: Sequence[str],
        results: Sequence[str],
        *,
        transposable: bool = False,
        **options: Any,
    ) -> Arrays:
        """`fn(operand, *stacks)` of the named arrays of all leaves, as few times as they allow.

        Args:
          fn: From stacks (b, ...), None where a leaf has no such array, to stacks.
          operand: As for `map_stacks`.
          arrays: Those of the leaves.
          names: What `fn` takes.
          results: What it returns. A leaf has a result if it has an array of that name.
          transposable: Whether `fn` commutes with transposing a matrix and exchanging its sides;
            then leaves (m, n) and (n, m) share a stack.
          **options: Of `map_stacks`.
        """
        flips = [transposable and not x.is_sharded and x.sides[0] > x.sides[1]
                 for x in self.layouts]  # fmt: skip
        items = []
        for i, flip in enumerate(flips):
            layout, slots = self.layouts[i], self.slots[i]
            if flip:
                layout = layout.transposed()
                slots = layout.slots()
            leaf = {name: arrays[name][i] for name in arrays}
            leaf = _flipped(leaf) if flip else leaf
            given = tuple(leaf[name] for name in names)
            taken = tuple(None if x is None else slots[name]
                          for x, name in zip(given, names, strict=True))  # fmt: skip
            out = tuple(None if leaf[name] is None else slots[name] for name in results)
            items.append(Item(given, taken, out, layout.mesh))
        mapped = map_stacks(fn, items, operand=operand, **options)
        new = [dict(zip(results, values, strict=True)) for values in mapped]
        new = [_flipped(leaf) if flip else leaf for leaf, flip in zip(new, flips, strict=True)]
        return {name: [leaf[name] for leaf in new] for name in results}

    def map_sides(
        self,
        fn: Callable[..., Sides],
        operand: Any,
        arrays: Arrays,
        *,
        replicated_work: ReplicatedWork,
    ) -> Arrays:
        """Factor, basis and order of every side by `fn(operand, factor, basis)`.

        Sides of equal size share a stack, whatever leaf they belong to and whichever side they are.
        """
        factors = [name for name in arrays if name.startswith("factor")]
        sides = [(i, int(name[6:])) for i in range(len(self.layouts)) for name in factors
                 if arrays[name][i] is not None]  # fmt: skip
        items = []
        for i, k in sides:
            slots = tuple(self.slots[i][f"{what}{k}"] for what in ("factor", "basis", "order"))
            given = (arrays[f"factor{k}"][i], arrays[f"basis{k}"][i])
            items.append(Item(given, slots[:2], slots, self.layouts[i].mesh))
        mapped = map_stacks(
            fn, items, operand=operand, replicated_work=replicated_work, decomposes=True
        )
        names = [f"{what}{name[6:]}" for what in ("factor", "basis", "order") for name in factors]
        new: Arrays = {name: [None] * len(self.layouts) for name in names}
        for (i, k), values in zip(sides, mapped, strict=True):
            new[f"factor{k}"][i], new[f"basis{k}"][i], new[f"order{k}"][i] = values
        return new


def _flipped(leaf: dict[str, Any]) -> dict[str, Any]:
    """The arrays of the transposed matrices."""

    def flip(name: str) -> Array | None:
        x = leaf[_OTHER.get(name, name)]
        return x if x is None or name not in _MATRICES else x.mT

    return {name: flip(name) for name in leaf if _OTHER.get(name, name) in leaf}
