"""Batched work on the matrices of many leaves: equal shapes are stacked, sharded ones exchanged."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from jaxopt_lab.core.matrices import (
    MatrixAxes,
    batch_first,
    batch_first_spec,
    group_by,
    undo_batch_first,
)
from jaxopt_lab.core.whole_matrices import on_whole_matrices

ReplicatedWork = Literal["repeat", "share"]


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

    Leaves of equal matrix shape, dtype and layout are stacked into one (batch, m, n) array. A leaf
    that is sharded on a matrix axis is exchanged so that each device works on whole matrices
    (`on_whole_matrices`).

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
      replicated_work: On mesh axes over which a sharded mesh's leaves are replicated, either
        "repeat" the work or "share" it for one all-gather of the results.

    Returns:
      A list with the shape of the leaves, then `numbers` lists of (batch,) arrays.
    """
    layouts = [_Layout.of(x, a, s) for x, a, s in zip(matrices[0], axes, shardings, strict=True)]
    keys = [layout.key(transposable, replicated_work) for layout in layouts]
    results: list[list] = [[None] * len(axes) for _ in range(1 + numbers)]
    for members in group_by(keys):
        first = layouts[members[0]]
        turned = [transposable and layouts[i].is_tall and first.local for i in members]
        stacks = [_stack([ls[i] for i in members], members, layouts, turned) for ls in matrices]
        rows = [jnp.concatenate([ls[i] for i in members]) for ls in vectors]
        out = first.run(fn, stacks, rows, numbers, replicated_work)
        start = 0
        for i, turn in zip(members, turned, strict=True):
            layout = layouts[i]
            pieces = [lax.slice_in_dim(y, start, start + layout.batch) for y in out]
            piece = pieces[0].mT if turn else pieces[0]
            results[0][i] = undo_batch_first(piece, layout.shape, layout.axes)
            for k in range(numbers):
                results[1 + k][i] = pieces[1 + k]
            start += layout.batch
    return tuple(results)


def _stack(leaves, members, layouts, turned) -> Array:
    views = []
    for x, i, turn in zip(leaves, members, turned, strict=True):
        view = layouts[i].view(x)
        views.append(view.mT if turn else view)
    return jnp.concatenate(views)


class _Layout:
    """How one leaf enters a stack."""

    def __init__(self, x: Array, axes: MatrixAxes, sharding: NamedSharding | None):
        self.shape, self.axes, self.dtype = x.shape, axes, x.dtype
        self.batch, self.m, self.n = axes.matrix_shape(x.shape)
        self.sharding = sharding
        spec = PartitionSpec() if sharding is None else batch_first_spec(sharding.spec, axes)
        # Local: no mesh is known, or no axis is sharded; then the inner axes can be merged here.
        self.local = not any(entry is not None for entry in spec)
        self.spec = PartitionSpec(None) if self.local else spec
        self.inner = tuple(x.shape[a] for a in axes.reduction + axes.output)

    @classmethod
    def of(cls, x: Array, axes: MatrixAxes, sharding: NamedSharding | None) -> "_Layout":
        return cls(x, axes, sharding)

    @property
    def is_tall(self) -> bool:
        return self.m > self.n

    def key(self, transposable: bool, replicated_work: ReplicatedWork):
        mesh = None if self.sharding is None else self.sharding.mesh
        if self.local:
            sides = (self.n, self.m) if transposable and self.is_tall else (self.m, self.n)
            return self.dtype, sides, mesh if replicated_work == "share" else None
        # A stack whose leading axis is sharded cannot be concatenated without moving data.
        alone = id(self) if self.spec[0] is not None else None
        return self.dtype, self.inner, len(self.axes.reduction), self.spec, mesh, alone

    def view(self, x: Array) -> Array:
        x = batch_first(x, self.axes)
        return x.reshape((self.batch, self.m, self.n)) if self.local else x

    def run(self, fn, stacks, rows, numbers: int, replicated_work: ReplicatedWork):
        if self.local and (self.sharding is None or replicated_work == "repeat"):
            return fn(*stacks, *rows)
        assert self.sharding is not None
        mesh, m, n = self.sharding.mesh, self.m, self.n
        used = {a for e in self.spec if e for a in ((e,) if isinstance(e, str) else e)}
        idle = tuple(a for a in mesh.axis_names if a not in used and mesh.shape[a] > 1)

        def whole(*arrays: Array) -> tuple[Array, ...]:
            inner = arrays[0].shape[1:]
            b = arrays[0].shape[0]
            flat = [x.reshape((b, m, n)) for x in arrays[: len(stacks)]]
            first, *others = fn(*flat, *arrays[len(stacks) :])
            return (first.reshape((b, *inner)), *others)

        plain = PartitionSpec(self.spec[0])
        return on_whole_matrices(
            fn if self.local else whole,
            (*stacks, *rows),
            (self.spec,) * len(stacks) + (plain,) * len(rows),
            (self.spec,) + (plain,) * numbers,
            mesh,
            share_over=idle if replicated_work == "share" else (),
        )
