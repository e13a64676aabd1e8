"""The three expensive parts of a Shampoo step, each batched over all problems of equal geometry.

On a mesh every part works on whole problems (`jaxopt_lab.core.whole_matrices`): what it reads and
writes is exchanged by all-to-alls, nothing is gathered.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxopt_lab.core.inverse_roots import inverse_root
from jaxopt_lab.core.matrices import batch_first, group_by, undo_batch_first
from jaxopt_lab.core.precision import PrecisionName, ProductPrecision
from jaxopt_lab.core.stacks import ReplicatedWork
from jaxopt_lab.core.whole_matrices import on_whole_matrices
from jaxopt_lab.optim.routing import Scalar
from jaxopt_lab.optim.shampoo_blocks import block_gram, block_product
from jaxopt_lab.optim.shampoo_problems import Problem

# Factors or inverse roots: a list a leaf, holding an array (*batch, blocks, d, d) a mode.
Factors = Sequence[Sequence[Array]]
StackFunction = Callable[..., tuple[Array, ...]]


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

    def on(problem: Problem) -> StackFunction:
        def grams(gradient: Array, *factors: Array) -> tuple[Array, ...]:
            blocks = _as_blocks(problem, gradient)
            out = []
            for mode, edge in enumerate(problem.blocks.edges):
                x = blocks
                for other, root in enumerate(factors):
                    if other != mode:
                        x = block_product(x, _flat(root), other, precision)
                gram = block_gram(x, mode, precision)
                out.append(gram.reshape((-1, problem.blocks.number, edge, edge)))
            return tuple(out)

        return grams

    results = _map_problems(on, problems, [gradients], roots, returns_factors=True)
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

    def on(problem: Problem) -> StackFunction:
        def direction(average: Array, *others: Array) -> tuple[Array]:
            x = _as_blocks(problem, average)
            for mode, root in enumerate(others[-problem.blocks.order :]):
                x = block_product(x, _flat(root), mode, precision)
            if grafts is not None:
                lent = _block_norm(_as_blocks(problem, others[0]))
                x = x * (lent / (_block_norm(x) + 1e-16))
            return (problem.blocks.join(x).reshape(average.shape),)

        return direction

    leaves = [averages] if grafts is None else [averages, grafts]
    results = _map_problems(on, problems, leaves, roots, returns_factors=False)
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
        p, spec = problems[i], problems[i].factor_spec(k)
        mesh = None if p.sharding is None else p.sharding.mesh
        alone = place if spec[0] else None
        exponent = rule.exponents[p.blocks.order - 1]
        return p.blocks.edges[k], factors[i][k].dtype, exponent, spec[2:], mesh, alone

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
        new = compute(*operands) if share is None else _part(compute, *operands, share)
        start = 0
        for i, k in members:
            last = roots[i][k]
            size = math.prod(last.shape[:-2])
            refreshed[i][k] = lax.slice_in_dim(new, start, start + size).reshape(last.shape)
            start += size
    return refreshed


def _stack_roots(rule: RootRule, problem: Problem, mode: int) -> Callable[..., Array]:
    """Inverse roots of a stack (n, d, d) laid out as the factors of a mode of a problem."""
    batch, _, *sides = problem.factor_spec(mode)
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
        if problem.sharding is None:
            return whole(*operands)[0]
        mesh = problem.sharding.mesh
        idle: tuple[str, ...] = ()
        if rule.replicated_work == "share":
            used = {a for e in spec if e for a in ((e,) if isinstance(e, str) else e)}
            idle = tuple(a for a in mesh.axis_names if a not in used and mesh.shape[a] > 1)
        specs = (spec, rows, rows, spec)
        return on_whole_matrices(whole, operands, specs, (spec,), mesh, share_over=idle)[0]

    return roots


def _part(compute: Callable, x: Array, divisors: Array, old: Array, share) -> Array:
    """Refresh the j-th of f parts of a stack; parts beyond its end are empty."""
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
    on: Callable[[Problem], StackFunction],
    problems: Sequence[Problem],
    leaves: Sequence[Sequence[Array]],
    factors: Factors | None,
    *,
    returns_factors: bool,
) -> list[tuple[Array, ...]]:
    """Apply `on(problem)` to the stacks of problems of one geometry.

    Returns:
      For each leaf what the function returned: arrays (b, blocks, d, d), one a mode, or one array
      (b, ...). Nothing for an empty leaf.
    """
    results: list[tuple[Array, ...]] = [()] * len(problems)
    members = [i for i, p in enumerate(problems) if p.blocks.order]

    def key(i: int) -> Hashable:
        p, spec = problems[i], problems[i].leaf_spec()
        if not any(spec):
            return p.blocks, leaves[0][i].dtype
        inner = tuple(p.shape[a] for a in p.inner_axes)
        mesh = None if p.sharding is None else p.sharding.mesh
        # A stack whose leading axis is sharded cannot be concatenated without moving data.
        return p.blocks, leaves[0][i].dtype, inner, spec, mesh, i if spec[0] else None

    for group in group_by([key(i) for i in members]):
        chosen = [members[j] for j in group]
        first = problems[chosen[0]]
        spec, modes = first.leaf_spec(), range(first.blocks.order)
        factor_specs = [first.factor_spec(k) for k in modes]
        views = [[_leaf_view(problems[i], ls[i]) for i in chosen] for ls in leaves]
        specs = [spec] * len(leaves)
        if factors is not None:
            views += [[_factor_view(problems[i], factors[i][k]) for i in chosen] for k in modes]
            specs += factor_specs
        stacks = [jnp.concatenate(xs) for xs in views]
        out_specs = factor_specs if returns_factors else [spec]
        out = _on_whole(on(first), stacks, specs, out_specs, first.sharding)
        start = 0
        for i, view in zip(chosen, views[0], strict=True):
            size = view.shape[0]
            results[i] = tuple(lax.slice_in_dim(y, start, start + size) for y in out)
            start += size
    return results


def _on_whole(fn, stacks, specs, out_specs, sharding: NamedSharding | None) -> tuple[Array, ...]:
    if sharding is None:
        return fn(*stacks)
    return on_whole_matrices(fn, stacks, specs, out_specs, sharding.mesh)


def _leaf_view(problem: Problem, leaf: Array) -> Array:
    x = batch_first(leaf, problem.axes)
    # Unsharded inner axes are merged here, so that leaves of other axes but one geometry stack.
    sharded = any(problem.leaf_spec())
    return x if sharded else x.reshape((x.shape[0], *problem.blocks.dims))


def _factor_view(problem: Problem, factor: Array) -> Array:
    return factor.reshape((math.prod(problem.batch_shape), *factor.shape[-3:]))


def _as_blocks(problem: Problem, leaf: Array) -> Array:
    return problem.blocks.split(leaf.reshape((-1, *problem.blocks.dims)))


def _flat(factor: Array) -> Array:
    return factor.reshape((-1, *factor.shape[-2:]))


def _block_norm(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)), keepdims=True))
