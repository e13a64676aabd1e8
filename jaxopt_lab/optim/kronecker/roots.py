"""The three expensive parts of a Shampoo step, each batched over all problems of equal geometry.

On a mesh every part works on whole problems (`jaxopt_lab.core.whole_matrices`): what it reads and
writes is exchanged by all-to-alls, nothing is gathered.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from jaxopt_lab.core.inverse_roots import inverse_root
from jaxopt_lab.core.matrices import batch_first, group_by, undo_batch_first
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.core.ordering import serialize_after
from jaxopt_lab.core.precision import PrecisionName, ProductPrecision
from jaxopt_lab.core.stacks import Item, ReplicatedWork, map_stacks
from jaxopt_lab.core.whole_matrices import on_whole_matrices
from jaxopt_lab.optim.kronecker.blocks import Blocks, block_gram, block_product
from jaxopt_lab.optim.kronecker.shampoo_problems import Problem

# Factors or inverse roots: a list a leaf, holding an array (*batch, blocks, d, d) a mode.
Factors = Sequence[Sequence[Array]]


def gram_matrices(
    problems: Sequence[Problem],
    gradients: Sequence[Array],
    roots: Factors | None,
    precision: ProductPrecision,
) -> list[list[Array]]:
    """Gram matrix of every mode of every block, in the shapes and layouts of the factors.

    Args:
      problems: One a leaf.
      gradients: One a leaf.
      roots: When given, each gradient is first multiplied along all other modes by these.
      precision: Of the products.
    """

    def grams(blocks: Blocks, gradient: Array, *factors: Array) -> tuple[Array, ...]:
        pieces = blocks.split(gradient)
        out = []
        for mode, edge in enumerate(blocks.edges):
            x = pieces
            for other, root in enumerate(factors):
                if other != mode:
                    x = block_product(x, _flat(root), other, precision)
            gram = block_gram(x, mode, precision)
            out.append(gram.reshape((gradient.shape[0], blocks.number, edge, edge)))
        return tuple(out)

    results = _map_problems(grams, problems, [gradients], roots, returns_factors=True)
    return [
        [y.reshape(p.factor_shape(k)) for k, y in enumerate(pieces)]
        for p, pieces in zip(problems, results, strict=True)
    ]


def precondition(
    problems: Sequence[Problem],
    averages: Sequence[Array],
    grafts: Sequence[Array] | None,
    roots: Factors,
    precision: ProductPrecision,
) -> list[Array]:
    """Averages times the inverse roots along every mode, with the norms of `grafts` block by block.

    Args:
      problems: One a leaf.
      averages: What to precondition, one a leaf.
      grafts: Directions that lend their norms; None: every block keeps its own.
      roots: Inverse roots.
      precision: Of the products.
    """

    def direction(blocks: Blocks, average: Array, *others: Array) -> tuple[Array]:
        x = blocks.split(average)
        for mode, root in enumerate(others[-blocks.order :]):
            x = block_product(x, _flat(root), mode, precision)
        if grafts is not None:
            lent = _block_norm(blocks.split(others[0]))
            x = x * (lent / (_block_norm(x) + 1e-16))
        return (blocks.join(x),)

    leaves = [averages] if grafts is None else [averages, grafts]
    results = _map_problems(direction, problems, leaves, roots, returns_factors=False)
    return [
        undo_batch_first(pieces[0], p.shape, p.axes) if pieces else x
        for p, x, pieces in zip(problems, averages, results, strict=True)
    ]


class RootRule(NamedTuple):
    """How factors become inverse roots."""

    exponents: tuple[float, ...]  # by order, from 1
    epsilon: Scalar
    relative: bool
    trace_scaling: bool
    method: str
    precision: PrecisionName
    replicated_work: ReplicatedWork


def refreshed_roots(
    rule: RootRule,
    problems: Sequence[Problem],
    factors: Factors,
    corrections: Sequence[Array],
    roots: Factors,
    share: tuple[Array, int] | None = None,
) -> list[list[Array]]:
    """Inverse roots of the factors, one batched computation for all blocks of one size.

    Where a root comes out non-finite the last one stays.

    Args:
      rule: How.
      problems: One a leaf.
      factors: Accumulated factors.
      corrections: (batch,) divisors of the factors, one array a leaf.
      roots: The last inverse roots.
      share: (j, f): of every stack, refresh the j-th of f parts alone.
    """
    refreshed = [list(modes) for modes in roots]
    places = [(i, k) for i, p in enumerate(problems) for k in range(p.blocks.order)]

    def key(place: tuple[int, int]) -> Hashable:
        i, k = place
        p, spec = problems[i], problems[i].factor_slot(k).spec
        alone = place if spec[0] else None
        exponent = rule.exponents[p.blocks.order - 1]
        return p.blocks.edges[k], factors[i][k].dtype, exponent, spec[2:], p.mesh, alone

    new: Array | None = None
    for group in group_by([key(place) for place in places]):
        members = [places[j] for j in group]
        i, k = members[0]
        compute = _stack_roots(rule, problems[i], k)
        operands = (
            jnp.concatenate([_flat(factors[i][k]) for i, k in members]),
            jnp.concatenate(
                [jnp.repeat(corrections[i], problems[i].blocks.number) for i, _ in members]
            ),
            jnp.concatenate([_flat(roots[i][k]) for i, k in members]),
        )
        if problems[i].mesh is None:
            operands = (serialize_after(operands[0], new), *operands[1:])
        new = compute(*operands) if share is None else part_of_stack(compute, *operands, share)
        start = 0
        for i, k in members:
            last = roots[i][k]
            size = math.prod(last.shape[:-2])
            refreshed[i][k] = lax.slice_in_dim(new, start, start + size).reshape(last.shape)
            start += size
    return refreshed


def _stack_roots(rule: RootRule, problem: Problem, mode: int) -> Callable[..., Array]:
    """Inverse roots of a stack (n, d, d) laid out as the factors of a mode of a problem."""
    batch, _, *sides = problem.factor_slot(mode).spec
    spec, rows = PartitionSpec(batch, *sides), PartitionSpec(batch)

    def whole(x: Array, divisors: Array, eps: Array, old: Array) -> tuple[Array]:
        x = x / divisors[:, None, None]
        if rule.trace_scaling:
            trace = jnp.trace(x, axis1=-2, axis2=-1)
            x = x * jnp.where(trace > 0, jnp.where(trace > 0, trace, 1) ** -0.5, 1)[:, None, None]
        new = inverse_root(
            x,
            rule.exponents[problem.blocks.order - 1],
            eps=eps,
            relative=rule.relative,
            method=rule.method,
            precision=rule.precision,
        )
        return (jnp.where(jnp.isfinite(new).all(axis=(-2, -1), keepdims=True), new, old),)

    def roots(x: Array, divisors: Array, old: Array) -> Array:
        # An operand: a traced constant of the function could not cross into an Explicit mesh.
        eps = jnp.zeros_like(divisors) + rule.epsilon
        operands = (x, divisors, eps.astype(x.dtype), old)
        mesh = problem.mesh
        if mesh is None:
            return whole(*operands)[0]
        idle: tuple[str, ...] = ()
        if rule.replicated_work == "share":
            used = {a for e in spec if e for a in ((e,) if isinstance(e, str) else e)}
            idle = tuple(a for a in mesh.axis_names if a not in used and mesh.shape[a] > 1)
        specs = (spec, rows, rows, spec)
        return on_whole_matrices(whole, operands, specs, (spec,), mesh, share_over=idle)[0]

    return roots


def part_of_stack(
    compute: Callable[..., Array],
    x: Array,
    divisors: Array,
    old: Array,
    share: tuple[Array, int],
) -> Array:
    """Refresh the j-th of f parts of a stack; parts beyond its end are empty.

    Args:
      compute: New roots (k, d, d) from k factors, divisors and old roots.
      x: Factors (n, d, d).
      divisors: (n,).
      old: The last roots (n, d, d).
      share: (j, f).
    """
    part, parts = share
    total = x.shape[0]
    size = -(-total // parts)

    def refresh(old: Array) -> Array:
        # The slice of a last, shorter part begins earlier: some roots are refreshed once more.
        pieces = [lax.dynamic_slice_in_dim(y, part * size, size) for y in (x, divisors, old)]
        return lax.dynamic_update_slice_in_dim(
            old, compute(*pieces), jnp.minimum(part * size, total - size), 0
        )

    if size * (parts - 1) < total:
        return refresh(old)
    return lax.cond(part * size < total, refresh, lambda old: old, old)


def _map_problems(
    fn: Callable[..., tuple[Array, ...]],
    problems: Sequence[Problem],
    leaves: Sequence[Sequence[Array]],
    factors: Factors | None,
    *,
    returns_factors: bool,
) -> list[tuple[Array, ...]]:
    """Apply `fn(blocks, *stacks)` to whole problems (b, *dims) and factors (b, blocks, d, d).

    Returns:
      For each leaf what the function returned: arrays (b, blocks, d, d), one a mode, or one array
      (b, ...). Nothing for an empty leaf.
    """
    results: list[tuple[Any, ...]] = [()] * len(problems)
    # One call for all problems cut in the same way; inside it, one stack for all of equal layout.
    for members in group_by([p.blocks for p in problems]):
        blocks = problems[members[0]].blocks
        if not blocks.order:
            continue
        items = []
        for i in members:
            p = problems[i]
            square = tuple(p.factor_slot(k) for k in range(blocks.order))
            arrays = [
                batch_first(ls[i], p.axes).reshape((p.batch, *p.leaf_slot.inner)) for ls in leaves
            ]
            slots = (p.leaf_slot,) * len(arrays)
            if factors is not None:
                arrays += [x.reshape((p.batch, *x.shape[-3:])) for x in factors[i]]
                slots += square
            results_of = square if returns_factors else (p.leaf_slot,)
            items.append(Item(tuple(arrays), slots, results_of, p.mesh))
        for i, out in zip(members, map_stacks(partial(fn, blocks), items), strict=True):
            results[i] = out
    return results


def _flat(factor: Array) -> Array:
    return factor.reshape((math.prod(factor.shape[:-2]), *factor.shape[-2:]))


def _block_norm(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)), keepdims=True))
