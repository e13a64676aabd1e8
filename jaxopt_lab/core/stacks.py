"""Batched work on the arrays of many leaves: equal shapes are stacked, sharded ones exchanged."""

import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array

from jaxopt_lab.core.ordering import serialize_after
from jaxopt_lab.core.whole_matrices import exchanged_axes, on_whole_matrices

ReplicatedWork = Literal["repeat", "share"]
# By name one array (batch, *inner) a leaf; None: the leaf has no such array. What belongs to a side
# of a matrix says which: "factor.0" is of the rows, "factor.1" of the columns.
Arrays = dict[str, list[Any]]


class Slot(NamedTuple):
    """How one array of a leaf enters a stack and leaves it."""

    inner: tuple[int, ...]  # shape without the batch axis, as stored
    whole: tuple[int, ...]  # shape of one entry inside the function
    spec: PartitionSpec  # of (batch, *inner)
    of_leaf: bool = False  # stored in the shape of the leaf, its axes not in order


class Member(NamedTuple):
    """A leaf, or a side of one, with the slots of its arrays."""

    slots: Mapping[str, Slot]
    mesh: Mesh | AbstractMesh | None = None  # None: the layout is not known, or trivial
    flips: bool = False  # enters transposed, its two sides exchanged; not sharded then
    # What the function takes first, unless it is None; members of two kinds share no stack.
    kind: Any = None

    def name(self, name: str) -> str:
        """The name under which the member has what its stack calls `name`."""
        what, dot, side = name.partition(".")
        return f"{what}.{1 - int(side)}" if self.flips and dot else name

    def slot(self, name: str) -> Slot:
        """How an array lies in the stack."""
        slot = self.slots[self.name(name)]
        if self.flips and "." not in name:
            slot = slot._replace(inner=slot.inner[::-1], whole=slot.whole[::-1])
        return slot

    def turned(self, name: str, x: Array) -> Array:
        """An array as the stack has it, and back."""
        return x.mT if self.flips and x.ndim == 3 and "." not in name else x


class Stacks:
    """Which members share a stack: decided once, for all that a step does with their arrays.

    Members of equal shapes and dtypes are concatenated along the batch axis. Where a layout shards
    an axis other than the batch, entries are exchanged so that each device works on whole ones
    (`on_whole_matrices`); those of different layouts, sharded over the same mesh axes, meet there.
    """

    def __init__(
        self,
        members: Sequence[Member],
        arrays: Arrays,
        *,
        replicated_work: ReplicatedWork = "repeat",
        enough: int | None = None,
    ) -> None:
        """Groups the members.

        Args:
          members: Leaves, or sides.
          arrays: Theirs.
          replicated_work: On mesh axes over which everything is replicated, either "repeat" the
            work or "share" it for one all-gather of the results.
          enough: Members with so many entries are left alone: concatenating them would cost more
            than their own calls. None: everything that fits is concatenated.
        """
        self._members, self._shares = members, replicated_work == "share"
        groups: dict[Hashable, list[int]] = {}
        for i, member in enumerate(members):
            own = {name: arrays[member.name(name)][i] for name in arrays}
            own = {name: x for name, x in own.items() if x is not None}
            slots = {name: member.slot(name) for name in own}
            layout: Any = tuple(slot.whole for slot in slots.values()), self._shares and member.mesh
            entries, mesh, alone = next(iter(own.values())).shape[0], member.mesh, False
            if mesh is not None and any(map(_is_sharded, slots.values())):
                axes = exchanged_axes([slot.spec for slot in slots.values()])
                layout = layout[0], frozenset(axes), mesh
                entries /= math.prod(mesh.shape[a] for names in axes for a in names)
                # A sharded leading axis cannot be concatenated without moving data.
                alone = any(len(s.spec) and s.spec[0] is not None for s in slots.values())
            alone |= enough is not None and entries >= enough
            kind = member.kind, tuple((name, x.dtype) for name, x in own.items())
            groups.setdefault((kind, layout, i if alone else None), []).append(i)
        self._groups = list(groups.values())

    def map(
        self,
        fn: Callable[..., Any],
        arrays: Arrays,
        names: Sequence[str],
        results: Sequence[str],
        *,
        operand: Any = None,
        decomposes: bool = False,
    ) -> Arrays:
        """Apply `fn` to the named arrays of all members, once a stack.

        Args:
          fn: From arrays (b, *whole), None where members have none, to one such array or a tuple.
          arrays: Those of the members.
          names: What `fn` takes.
          results: What it returns. A member whose array of that name is None has no such result.
          operand: If given, what `fn` takes before its arrays: a tree whose leaves are Python
            numbers, which stay such, and arrays, the same for all members.
          decomposes: Whether `fn` calls decompositions, which must not run at the same time
            (`serialize_after`).

        Returns:
          The results.
        """
        out: Arrays = {name: [None] * len(self._members) for name in results}
        done: Sequence[Array | None] = ()
        for group in self._groups:
            first = self._members[group[0]]

            def has(name: str, first: Member = first, i: int = group[0]) -> bool:
                own = arrays.get(first.name(name))
                return own is None or own[i] is not None

            packs = self._packs(group, [*filter(has, names)], [*filter(has, results)])
            stacks = [
                [self._stack(arrays, name, pack) if has(name) else None for name in names]
                for pack in packs
            ]
            if decomposes and first.mesh is None and done:
                stacks = [serialize_after(each, done) for each in stacks]
            heads = [self._members[pack[0]] for pack in packs]
            slots = [[x.slot(name) if has(name) else None for name in names] for x in heads]
            taken = [[x.slot(name) if has(name) else None for name in results] for x in heads]
            call = fn if first.kind is None else partial(fn, first.kind)
            all_done = _run(call, operand, stacks, slots, taken, first.mesh, self._shares)
            for pack, done in zip(packs, all_done, strict=True):
                self._unstack(arrays, pack, results, done, out)
        return out

    def _packs(
        self, group: Sequence[int], names: Sequence[str], results: Sequence[str]
    ) -> list[list[int]]:
        """The members of a group that are laid out alike: their arrays are exchanged as one."""
        packs: dict[Hashable, list[int]] = {}
        for i in group:
            slots = [self._members[i].slot(name) for name in (*names, *results)]
            alike = any(map(_is_sharded, slots))
            packs.setdefault(tuple(slots) if alike else None, []).append(i)
        return list(packs.values())

    def _stack(self, arrays: Arrays, name: str, group: Sequence[int]) -> Any:
        members = [(self._members[i], i) for i in group]
        own = [member.turned(name, arrays[member.name(name)][i]) for member, i in members]
        return _joined(own)

    def _unstack(
        self,
        arrays: Arrays,
        pack: Sequence[int],
        results: Sequence[str],
        done: Sequence[Array | None],
        out: Arrays,
    ) -> None:
        sizes = [next(arrays[n][i].shape[0] for n in arrays if arrays[n][i] is not None)
                 for i in pack]  # fmt: skip
        for name, stack in zip(results, done, strict=True):
            if stack is None:
                continue
            start = 0
            for i, size in zip(pack, sizes, strict=True):
                part = lax.slice_in_dim(stack, start, start + size)
                member = self._members[i]
                out[member.name(name)][i] = member.turned(name, part)
                start += size


def map_stacks(
    fn: Callable[..., Any],
    members: Sequence[Member],
    arrays: Arrays,
    names: Sequence[str],
    results: Sequence[str],
    *,
    replicated_work: ReplicatedWork = "repeat",
    **options: Any,
) -> Arrays:
    """`Stacks.map` of members that are grouped for this call alone."""
    stacks = Stacks(members, arrays, replicated_work=replicated_work)
    return stacks.map(fn, arrays, names, results, **options)


def _is_sharded(slot: Slot) -> bool:
    return any(entry is not None for entry in slot.spec)


def _run(
    fn: Callable[..., Any],
    operand: Any,
    stacks: Sequence[Sequence[Array | None]],
    slots: Sequence[Sequence[Slot | None]],
    results: Sequence[Sequence[Slot | None]],
    mesh: Mesh | AbstractMesh | None,
    shares: bool,
) -> list[list[Array | None]]:
    """Call `fn` once on whole entries of all packs, without the arrays that members do not have."""
    given = [s for pack in slots for s in pack if s is not None]
    taken = [s for pack in results for s in pack if s is not None]
    arrays = [x for pack in stacks for x in pack if x is not None]
    # Traced numbers cannot be closed over; Python's stay what they are.
    traced = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else None, operand)

    def whole(*arguments: Any) -> tuple[Array, ...]:
        *parts, numbers = arguments
        own = (x.reshape((x.shape[0], *s.whole)) for x, s in zip(parts, given, strict=True))
        packs = [[None if s is None else next(own) for s in pack] for pack in slots]
        sizes = [next(x.shape[0] for x in pack if x is not None) for pack in packs]
        entries = [None if same[0] is None else _joined(same) for same in zip(*packs, strict=True)]
        if operand is not None:
            entries.insert(0, jax.tree.map(lambda x, y: x if y is None else y, operand, numbers))
        out = fn(*entries)
        out = [y for y in (out if isinstance(out, tuple) else (out,)) if y is not None]
        ends = list(itertools.accumulate(sizes))
        each = [y[end - b : end] for b, end in zip(sizes, ends, strict=True) for y in out]
        return tuple(y.reshape((y.shape[0], *s.inner)) for y, s in zip(each, taken, strict=True))

    specs, out_specs = [s.spec for s in given], [s.spec for s in taken]
    if mesh is None or not (shares or any(map(_is_sharded, (*given, *taken)))):
        done = iter(whole(*arrays, traced))
    else:
        used = {a for spec in (*specs, *out_specs) for e in spec if e
                for a in ((e,) if isinstance(e, str) else e)}  # fmt: skip
        idle = [a for a in mesh.axis_names if a not in used and mesh.shape[a] > 1]
        counts = [sum(x is not None for x in pack) for pack in stacks]
        firsts = [
            end - count for count, end in zip(counts, itertools.accumulate(counts), strict=True)
        ]
        sources = [
            k for k, pack in zip(firsts, results, strict=True) for s in pack if s is not None
        ]
        done = iter(
            on_whole_matrices(
                whole, arrays, specs, out_specs, mesh,
                share_over=idle * shares, scalars=(traced,), sources=sources,
            )
        )  # fmt: skip
    return [[None if s is None else next(done) for s in pack] for pack in results]


def _joined(stacks: Sequence[Array]) -> Array:
    return stacks[0] if len(stacks) == 1 else jnp.concatenate(stacks)
