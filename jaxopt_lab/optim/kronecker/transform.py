"""The Optax transformation around `EigenbasisAdam`: state, layouts, decay."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array

from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.core.stacks import LeafLayout
from jaxopt_lab.core.whole_matrices import known_sharding
from jaxopt_lab.optim.kronecker.checks import check_method
from jaxopt_lab.optim.kronecker.leaves import FactorLeaf, slot_of
from jaxopt_lab.optim.kronecker.step import BASES, FACTORS, REFUSED, EigenbasisAdam
from jaxopt_lab.optim.matrix_leaves import MatrixLeaves
from jaxopt_lab.optim.rates import check_rates
from jaxopt_lab.optim.routing import MatrixAxesSpec, broadcast_prefix, require_matrices

# The published limit: it keeps vocabularies out.
MAX_PRECOND_DIM = 10_000

_TREES = ("age", "mu", "nu", "row_nu", "column_nu", *FACTORS, *BASES)


class EigenbasisAdamState(NamedTuple):
    """State of `scale_by_soap` and `scale_by_dykaf`.

    Trees like the parameters. A leaf with batch axes (*batch) holds one matrix (m, n) for each of
    their entries. Arrays are float32 or wider, but for bases that rotate in bfloat16: those are
    kept as the rotations use them. `MaskedNode` stands where a side has no factor, and
    for the second moments that are not in use.
    """

    count: Array  # shape=(), dtype=int32: gradients seen
    age: optax.Updates  # (*batch), int32: 0 before a matrix has started, then 1 + updates applied
    notfinite_count: optax.Updates  # (*batch), int32: gradients refused: not finite, or too large
    mu: optax.Updates  # (*batch, m, n): first moment in the eigenbases
    nu: Any  # (*batch, m, n): second moment in the eigenbases
    row_nu: Any  # (*batch, m): factored second moment, rows
    column_nu: Any  # (*batch, n): and columns
    row_factor: optax.Updates  # (*batch, m, m): its symmetric part; see `core.precision.gram`
    column_factor: optax.Updates  # (*batch, n, n)
    row_basis: optax.Updates  # (*batch, m, m): eigenvectors in columns, by decreasing eigenvalue
    column_basis: optax.Updates  # (*batch, n, n)


def preconditioned_sides(
    m: int, n: int, max_precond_dim: int | None, smaller_side_only: bool = False
) -> tuple[bool, bool]:
    """Which sides of an (m, n) matrix have a factor."""
    limit = MAX_PRECOND_DIM if max_precond_dim is None else max_precond_dim
    rows, columns = 0 < m <= limit, 0 < n <= limit
    if smaller_side_only and rows and columns:
        return m <= n, m > n
    return rows, columns


def eigenbasis_transform(
    method: EigenbasisAdam,
    *,
    max_precond_dim: int | None,
    smaller_side_only: bool = False,
    weight_decay: Scalar,
    mask: Any,
    decay_rate: optax.ScalarOrSchedule | None,
    matrix_axes: MatrixAxesSpec,
    param_shardings: Any,
) -> optax.GradientTransformationExtraArgs:
    """The transformation of a method; its arguments are explained by `scale_by_soap`."""
    check_method(method, max_precond_dim)
    check_rates(weight_decay=weight_decay, decay_rate=decay_rate)
    # A traced number (from inject_hyperparams) may be anything; only a plain zero skips the decay.
    decays = not (isinstance(weight_decay, int | float) and weight_decay == 0)

    def sides(layout: LeafLayout) -> tuple[bool, bool]:
        return preconditioned_sides(layout.m, layout.n, max_precond_dim, smaller_side_only)

    def init(params: optax.Params) -> EigenbasisAdamState:
        routes = require_matrices(params, matrix_axes)
        leaves, treedef = jax.tree.flatten(params)
        given: Sequence[NamedSharding | None] = [None] * len(leaves)
        if param_shardings is not None:
            given = broadcast_prefix("param_shardings", param_shardings, params)
        columns: dict[str, list[Any]] = {name: [] for name in _TREES}
        for x, route, sharding in zip(leaves, routes, given, strict=True):
            assert route.axes is not None
            layout = LeafLayout(x.shape, route.axes, known_sharding(x, sharding))
            for name, array in _initial(x, layout, method, sides(layout)).items():
                columns[name].append(array)
        trees = {name: treedef.unflatten(values) for name, values in columns.items()}
        unused = ("row_nu", "column_nu") if method.second_moment == "full" else ("nu",)
        trees |= {name: optax.MaskedNode() for name in unused}
        return EigenbasisAdamState(
            count=jnp.zeros([], jnp.int32),
            notfinite_count=jax.tree.map(jnp.zeros_like, trees["age"]),
            **trees,
        )

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if decays and params is None:
            raise ValueError("weight_decay needs the parameters: call update(grads, state, params)")
        known = MatrixLeaves.of(updates, matrix_axes, param_shardings)
        grads = jax.tree.leaves(updates)
        shapes = [g.shape for g in grads]
        layouts = list(map(LeafLayout, shapes, known.axes, known.shardings))
        leaves = _leaves(state, known.treedef, layouts)
        directions, statuses, leaves = method.step(
            state.count, leaves, [g.astype(_wide_dtype(g)) for g in grads]
        )
        if decays:
            decaying = broadcast_prefix("mask", True if mask is None else mask, updates)
            rate: Any = decay_rate(state.count) if callable(decay_rate) else decay_rate
            directions = [
                decayed(d, w, known.per_matrix(i, method.applied(s), d), weight_decay, rate)
                if decaying[i]
                else d
                for i, (d, w, s) in enumerate(
                    zip(directions, jax.tree.leaves(params), statuses, strict=True)
                )
            ]
        unflatten = known.treedef.unflatten
        out = unflatten([d.astype(g.dtype) for d, g in zip(directions, grads, strict=True)])
        refused = [
            leaf.layout.undo_flat((status == REFUSED).astype(jnp.int32))
            for leaf, status in zip(leaves, statuses, strict=True)
        ]
        notfinite_count = jax.tree.leaves(state.notfinite_count)
        return out, state._replace(
            count=jnp.asarray(optax.safe_increment(state.count)),
            notfinite_count=unflatten(
                [a + b for a, b in zip(notfinite_count, refused, strict=True)]
            ),
            **_stored(state, leaves, unflatten),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _initial(
    x: Any, layout: LeafLayout, method: EigenbasisAdam, sides: tuple[bool, bool]
) -> dict[str, Any]:
    """The arrays of a leaf before its first gradient, in stored form."""
    dtype = _wide_dtype(x)

    def placed(name: str, array: Array) -> Array:
        """With the leaf's batch axes, laid out as it will stay."""
        slot = slot_of(layout, name)
        array = jnp.broadcast_to(array, (*layout.batch_shape, *slot.inner))
        sharding = known_sharding(x, None)
        if sharding is None:
            return array
        return jax.sharding.reshard(array, NamedSharding(sharding.mesh, layout.stored_spec(slot)))

    out: dict[str, Any] = {
        "age": placed("age", jnp.zeros([], jnp.int32)),
        "mu": placed("mu", jnp.zeros([], dtype)),
        "nu": placed("nu", jnp.zeros([], dtype)),
    }
    # The rank-one fit needs a positive start; sums of squares start from nothing.
    start = method.eps if method.second_moment == "rank_one" else 0.0
    for side, size, kept in zip(("row", "column"), (layout.m, layout.n), sides, strict=True):
        out[f"{side}_nu"] = placed(f"{side}_nu", jnp.asarray(start, dtype))
        eye = jnp.eye(size, dtype=dtype)
        scale = method.rule.initial(size, all(sides)) if kept else 0.0
        basis = eye.astype(method.basis_dtype(dtype))
        for what, array in (("factor", scale * eye), ("basis", basis)):
            name = f"{side}_{what}"
            out[name] = placed(name, array) if kept else optax.MaskedNode()
    return out


def _leaves(
    state: EigenbasisAdamState, treedef: Any, layouts: Sequence[LeafLayout]
) -> list[FactorLeaf]:
    """The state of each leaf, batch axes merged."""
    columns = {}
    for name in _TREES:
        tree = getattr(state, name)
        unused = isinstance(tree, optax.MaskedNode)
        columns[name] = [tree] * len(layouts) if unused else treedef.flatten_up_to(tree)

    def merged(x: Any, layout: LeafLayout) -> Array | None:
        return None if isinstance(x, optax.MaskedNode) else layout.flat(x)

    return [
        FactorLeaf(layout, {name: merged(columns[name][i], layout) for name in _TREES})
        for i, layout in enumerate(layouts)
    ]


def _stored(state: EigenbasisAdamState, leaves: Sequence[FactorLeaf], unflatten) -> dict[str, Any]:
    """The fields of the state that hold the leaves."""

    def stored(name: str, leaf: FactorLeaf) -> Any:
        x, layout = leaf.arrays[name], leaf.layout
        if x is None:
            return optax.MaskedNode()
        return (
            layout.undo_view(x) if slot_of(layout, name) is layout.matrix else layout.undo_flat(x)
        )

    used = [name for name in _TREES if not isinstance(getattr(state, name), optax.MaskedNode)]
    return {name: unflatten([stored(name, leaf) for leaf in leaves]) for name in used}


def decayed(
    direction: Array, w: Array, applied: Array, weight_decay: Scalar, rate: Scalar | None
) -> Array:
    """The direction with the decay of the matrices that take a step."""
    # After the step: W' = (1 - rate decay)(W - rate D), as one update.
    shrunk = 1.0 if rate is None else 1 - rate * weight_decay
    return shrunk * direction + jnp.where(applied, weight_decay * w.astype(direction.dtype), 0)


def _wide_dtype(x: Any) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
