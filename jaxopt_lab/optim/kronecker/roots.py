"""The three expensive parts of a Shampoo step, each batched over all blocks of equal geometry.

On a mesh every part works on whole matrices (`jaxopt_lab.core.whole_matrices`): what it reads and
writes is exchanged by all-to-alls, nothing is gathered.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jaxopt_lab.core.inverse_roots import inverse_root
from jaxopt_lab.core.matrices import batch_first, group_by, undo_batch_first
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.core.ordering import serialize_after
from jaxopt_lab.core.precision import ProductPrecision
from jaxopt_lab.core.stacks import Item, ReplicatedWork, map_stacks
from jaxopt_lab.core.whole_matrices import on_whole_matrices
from jaxopt_lab.optim.kronecker.blocks import BlockedLeaf, Blocks, block_gram, block_product
from jaxopt_lab.optim.kronecker.grafting import with_norm_of
from jaxopt_lab.optim.options import InverseRoot

# Factors or inverse roots: a list a leaf, holding an array (*batch, blocks, d, d) a mode.
Factors = Sequence[Sequence[Array]]

# Small eigenvalues of a factor, which its root makes large, need more than bfloat16; a direction
# does not.
FACTOR_PRECISION: ProductPrecision = "bf16_x3"
DIRECTION_PRECISION: ProductPrecision = "default"


def gram_matrices(leaves: Sequence[BlockedLeaf], gradients: Sequence[Array]) -> list[list[Array]]:
    """Gram matrix of every mode of every block, in the shapes and layouts of the factors."""

    def grams(blocks: Blocks, gradient: Array) -> tuple[Array, ...]:
        pieces = blocks.split(gradient)
        shapes = [(gradient.shape[0], blocks.number, edge, edge) for edge in blocks.edges]
        each = [block_gram(pieces, mode, FACTOR_PRECISION) for mode in range(blocks.order)]
        return tuple(x.reshape(shape) for x, shape in zip(each, shapes, strict=True))

    results = _map_leaves(grams, leaves, [gradients], None, returns_factors=True)
    return [
        [y.reshape(leaf.factor_shape(k)) for k, y in enumerate(pieces)]
        for leaf, pieces in zip(leaves, results, strict=True)
    ]


def precondition(
    leaves: Sequence[BlockedLeaf],
    averages: Sequence[Array],
    grafts: Sequence[Array] | None,
    roots: Factors,
) -> list[Array]:
    """Averages times the inverse roots along every mode, with the norms of `grafts` block by block.

    Args:
      leaves: One a leaf.
      averages: What to precondition, one a leaf.
      grafts: Directions whose norms the blocks take; None: every block keeps its own.
      roots: Inverse roots.
    """

    def direction(blocks: Blocks, average: Array, *others: Array) -> tuple[Array]:
        x = blocks.split(average)
        for mode, root in enumerate(others[-blocks.order :]):
            x = block_product(x, _flat(root), mode, DIRECTION_PRECISION)
        if grafts is not None:
            x = with_norm_of(x, blocks.split(others[0]))
        return (blocks.join(x),)

    arrays = [averages] if grafts is None else [averages, grafts]
    results = _map_leaves(direction, leaves, arrays, roots, returns_factors=False)
    return [
        undo_batch_first(pieces[0], leaf.shape, leaf.axes) if pieces else x
        for leaf, x, pieces in zip(leaves, averages, results, strict=True)
    ]


def refreshed_roots(
    options: InverseRoot,
    eps: Scalar,
    replicated_work: ReplicatedWork,
    leaves: Sequence[BlockedLeaf],
    factors: Factors,
    filled: Sequence[Array],
    roots: Factors,
    share: tuple[Array, int] | None = None,
) -> list[list[Array]]:
    """Inverse roots of the factors, one batched computation for all blocks of one size.

    Where a root comes out non-finite the last one stays.

    Args:
      options: How.
      eps: The ridge.
      replicated_work: As in `MeshWork`.
      leaves: One a leaf.
      factors: Accumulated factors.
      filled: (batch,) divisors of the factors, one array a leaf.
      roots: The last inverse roots.
      share: (j, f): of every stack, refresh the j-th of f parts alone.
    """
    refreshed = [list(modes) for modes in roots]
    places = [(i, k) for i, leaf in enumerate(leaves) for k in range(leaf.blocks.order)]

    def key(place: tuple[int, int]) -> Hashable:
        i, k = place
        leaf, spec = leaves[i], leaves[i].factor_slot(k).spec
        alone = place if spec[0] else None
        exponent = options.of_order(leaf.blocks.order)
        return leaf.blocks.edges[k], factors[i][k].dtype, exponent, spec[2:], leaf.mesh, alone

    new: Array | None = None
    for group in group_by([key(place) for place in places]):
        members = [places[j] for j in group]
        i, k = members[0]
        compute = _stack_roots(options, eps, replicated_work, leaves[i], k)
        operands = (
            _joined([_flat(factors[i][k]) for i, k in members]),
            _joined([_for_every_block(filled[i], leaves[i].blocks.number) for i, _ in members]),
            _joined([_flat(roots[i][k]) for i, k in members]),
        )
        if leaves[i].mesh is None:
            operands = (serialize_after(operands[0], new), *operands[1:])
        new = compute(*operands) if share is None else part_of_stack(compute, *operands, share)
        start = 0
        for i, k in members:
            last = roots[i][k]
            size = math.prod(last.shape[:-2])
            refreshed[i][k] = lax.slice_in_dim(new, start, start + size).reshape(last.shape)
            start += size
    return refreshed


def _stack_roots(
    options: InverseRoot,
    eps: Scalar,
    replicated_work: ReplicatedWork,
    leaf: BlockedLeaf,
    mode: int,
) -> Callable[..., Array]:
    """Inverse roots of a stack (n, d, d) laid out as the factors of a mode of a leaf."""
    batch, _, *sides = leaf.factor_slot(mode).spec
    spec, rows = PartitionSpec(batch, *sides), PartitionSpec(batch)

    def whole(x: Array, filled: Array, ridge: Array, old: Array) -> tuple[Array]:
        new = inverse_root(
            x / filled[:, None, None],
            options.of_order(leaf.blocks.order),
            eps=ridge,
            relative=options.relative_eps,
            method=options.method,
            precision=options.precision,
        )
        return (jnp.where(jnp.isfinite(new).all(axis=(-2, -1), keepdims=True), new, old),)

    def roots(x: Array, filled: Array, old: Array) -> Array:
        # An operand: a traced constant of the function could not cross into an Explicit mesh.
        ridge = (jnp.zeros_like(filled) + eps).astype(x.dtype)
        operands = (x, filled, ridge, old)
        if leaf.mesh is None:
            return whole(*operands)[0]
        idle: tuple[str, ...] = ()
        if replicated_work == "share":
            used = {a for e in spec if e for a in ((e,) if isinstance(e, str) else e)}
            sizes = leaf.mesh.shape
            idle = tuple(a for a in leaf.mesh.axis_names if a not in used and sizes[a] > 1)
        specs = (spec, rows, rows, spec)
        if batch and not any(sides) and not idle:
            # Each device ends its own iteration: one over the whole stack would have to ask all.
            local = jax.shard_map(
                whole, mesh=leaf.mesh, in_specs=specs, out_specs=(spec,), check_vma=False
            )
            return local(*operands)[0]
        return on_whole_matrices(whole, operands, specs, (spec,), leaf.mesh, share_over=idle)[0]

    return roots


def part_of_stack(
    compute: Callable[..., Array],
    x: Array,
    filled: Array,
    old: Array,
    share: tuple[Array, int],
) -> Array:
    """Refresh the j-th of f parts of a stack; parts beyond its end are empty.

    Args:
      compute: New roots (k, d, d) from k factors, divisors and old roots.
      x: Factors (n, d, d).
      filled: (n,) divisors.
      old: The last roots (n, d, d).
      share: (j, f).
    """
    part, parts = share
    total = x.shape[0]
    size = -(-total // parts)

    def refresh(old: Array) -> Array:
        # The slice of a last, shorter part begins earlier: some roots are refreshed once more.
        pieces = [lax.dynamic_slice_in_dim(y, part * size, size) for y in (x, filled, old)]
        return lax.dynamic_update_slice_in_dim(
            old, compute(*pieces), jnp.minimum(part * size, total - size), 0
        )

    if size * (parts - 1) < total:
        return refresh(old)
    return lax.cond(part * size < total, refresh, lambda old: old, old)


def _map_leaves(
    fn: Callable[..., tuple[Array, ...]],
    leaves: Sequence[BlockedLeaf],
    arrays: Sequence[Sequence[Array]],
    factors: Factors | None,
    *,
    returns_factors: bool,
) -> list[tuple[Array, ...]]:
    """Apply `fn(blocks, *stacks)` to whole matrices (b, *dims) and factors (b, blocks, d, d).

    Returns:
      For each leaf what the function returned: arrays (b, blocks, d, d), one a mode, or one array
      (b, ...). Nothing for an empty leaf.
    """
    results: list[tuple[Any, ...]] = [()] * len(leaves)
    # One call for all leaves cut in the same way; inside it, one stack for all of equal layout.
    for members in group_by([leaf.blocks for leaf in leaves]):
        blocks = leaves[members[0]].blocks
        if not blocks.order:
            continue
        items = []
        for i in members:
            leaf = leaves[i]
            square = tuple(leaf.factor_slot(k) for k in range(blocks.order))
            inner = (leaf.batch, *leaf.leaf_slot.inner)
            given = [batch_first(each[i], leaf.axes).reshape(inner) for each in arrays]
            slots = (leaf.leaf_slot,) * len(given)
            if factors is not None:
                given += [x.reshape((leaf.batch, *x.shape[-3:])) for x in factors[i]]
                slots += square
            results_of = square if returns_factors else (leaf.leaf_slot,)
            items.append(Item(tuple(given), slots, results_of, leaf.mesh))
        for i, out in zip(members, map_stacks(partial(fn, blocks), items), strict=True):
            results[i] = out
    return results


def _joined(arrays: Sequence[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)


def _for_every_block(x: Array, blocks: int) -> Array:
    """(batch,) to (batch * blocks,)."""
    return jnp.broadcast_to(x[:, None], (*x.shape, blocks)).reshape((x.size * blocks,))


def _flat(factor: Array) -> Array:
    return factor.reshape((math.prod(factor.shape[:-2]), *factor.shape[-2:]))
