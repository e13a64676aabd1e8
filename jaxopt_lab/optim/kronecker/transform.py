"""The Optax transformations around `EigenbasisAdam`: state, layouts, routing of a model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array

from jaxopt_lab.core.checks import (
    COUNT,
    DECAY_OR_SUM,
    NOT_NEGATIVE,
    check_decays,
    check_number,
    check_rates,
)
from jaxopt_lab.core.numerics import wide_dtype, widened
from jaxopt_lab.core.stacks import LeafLayout
from jaxopt_lab.core.whole_matrices import known_sharding
from jaxopt_lab.optim.fallback import with_fallback
from jaxopt_lab.optim.kronecker.leaves import Arrays, Leaves
from jaxopt_lab.optim.kronecker.step import REFUSED, EigenbasisAdam
from jaxopt_lab.optim.kronecker.tensors import tensor_direction
from jaxopt_lab.optim.matrix_leaves import MatrixLeaves
from jaxopt_lab.optim.nonfinite import guarded
from jaxopt_lab.optim.options import AdamW, Eigenbasis, MeshWork, Routing
from jaxopt_lab.optim.rates import decayed_weights
from jaxopt_lab.optim.routing import FALLBACK_LABEL, MatrixAxesSpec, Route, route

# The group of tensors that get one factor an axis.
MODES_LABEL = "modes"

# Field of the state -> name of its arrays while a gradient is taken.
_FIELDS = {
    **{"age": "age", "mu": "mu", "nu": "nu", "row_nu": "row_nu", "column_nu": "column_nu"},
    **{"row_factor": "factor0", "column_factor": "factor1"},
    **{"row_basis": "basis0", "column_basis": "basis1"},
}


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
    m: int, n: int, max_precond_dim: int, smaller_side_only: bool = False
) -> tuple[bool, bool]:
    """Which sides of an (m, n) matrix have a factor."""
    rows, columns = 0 < m <= max_precond_dim, 0 < n <= max_precond_dim
    if smaller_side_only and rows and columns:
        return m <= n, m > n
    return rows, columns


def eigenbasis_direction(
    method: EigenbasisAdam, matrix_axes: MatrixAxesSpec, eigenbasis: Eigenbasis, mesh: MeshWork
) -> optax.GradientTransformationExtraArgs:
    """The direction of a method for leaves that are matrices, NaN where it takes no step.

    Raises:
      ValueError: A number is out of range; at `init`, a leaf is not a matrix.
    """
    check_numbers(method)

    def known(tree: Any) -> tuple[MatrixLeaves, list[LeafLayout]]:
        leaves = MatrixLeaves.of(tree, matrix_axes, mesh.param_shardings)
        shapes = [x.shape for x in jax.tree.leaves(tree)]
        return leaves, list(map(LeafLayout, shapes, leaves.axes, leaves.shardings))

    def init(params: optax.Params) -> EigenbasisAdamState:
        matrices, layouts = known(params)
        pairs = zip(jax.tree.leaves(params), layouts, strict=True)
        rows = [_initial(x, layout, method, eigenbasis) for x, layout in pairs]
        trees = {name: matrices.treedef.unflatten([row[name] for row in rows]) for name in _FIELDS}
        unused = ("row_nu", "column_nu") if method.second_moment == "full" else ("nu",)
        trees |= {name: optax.MaskedNode() for name in unused}
        return EigenbasisAdamState(
            count=jnp.zeros([], jnp.int32),
            notfinite_count=jax.tree.map(jnp.zeros_like, trees["age"]),
            **trees,
        )

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        matrices, layouts = known(updates)
        grads = [layout.view(widened(g))
                 for layout, g in zip(layouts, jax.tree.leaves(updates), strict=True)]  # fmt: skip
        arrays = _arrays(state, matrices.treedef, layouts)
        directions, arrays = method.step(state.count, Leaves.of(layouts), arrays, grads)
        undone = [layout.undo_view(d) for layout, d in zip(layouts, directions, strict=True)]
        return matrices.treedef.unflatten(undone), _stored(state, matrices.treedef, layouts, arrays)

    return optax.GradientTransformationExtraArgs(init, update)


def _initial(
    x: Any, layout: LeafLayout, method: EigenbasisAdam, eigenbasis: Eigenbasis
) -> dict[str, Any]:
    """The arrays of a leaf before its first gradient, by field."""
    dtype, slots = wide_dtype(x), layout.slots()
    sides = preconditioned_sides(
        layout.m, layout.n, eigenbasis.max_precond_dim, eigenbasis.one_sided
    )

    def placed(field: str, array: Array) -> Array:
        """With the leaf's batch axes, laid out as it will stay."""
        slot = slots[_FIELDS[field]]
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
    for side, size, kept in zip(("row", "column"), layout.sides, sides, strict=True):
        out[f"{side}_nu"] = placed(f"{side}_nu", jnp.asarray(start, dtype))
        eye = jnp.eye(size, dtype=dtype)
        scale = method.rule.initial(size, all(sides)) if kept else 0.0
        basis = eye.astype(method.basis_dtype(dtype))
        for what, array in (("factor", scale * eye), ("basis", basis)):
            name = f"{side}_{what}"
            out[name] = placed(name, array) if kept else optax.MaskedNode()
    return out


def _arrays(state: EigenbasisAdamState, treedef: Any, layouts: list[LeafLayout]) -> Arrays:
    """The state by name, batch axes merged."""
    columns: Arrays = {}
    for field, name in _FIELDS.items():
        tree = getattr(state, field)
        unused = isinstance(tree, optax.MaskedNode)
        leaves = [tree] * len(layouts) if unused else treedef.flatten_up_to(tree)
        columns[name] = [None if isinstance(x, optax.MaskedNode) else x for x in leaves]
    rows = [layout.flat_all({name: column[i] for name, column in columns.items()})
            for i, layout in enumerate(layouts)]  # fmt: skip
    return {name: [row[name] for row in rows] for name in columns}


def _stored(
    state: EigenbasisAdamState, treedef: Any, layouts: list[LeafLayout], arrays: Arrays
) -> EigenbasisAdamState:
    """The state after a gradient."""
    names = (*_FIELDS.values(), "status")
    rows = [layout.undo_flat_all({name: arrays[name][i] for name in names})
            for i, layout in enumerate(layouts)]  # fmt: skip

    def tree(name: str) -> Any:
        return treedef.unflatten([optax.MaskedNode() if row[name] is None else row[name]
                                  for row in rows])  # fmt: skip

    used = [field for field in _FIELDS if not isinstance(getattr(state, field), optax.MaskedNode)]
    return state._replace(
        count=jnp.asarray(optax.safe_increment(state.count)),
        notfinite_count=jax.tree.map(
            lambda n, status: n + (status == REFUSED).astype(jnp.int32),
            state.notfinite_count,
            tree("status"),
        ),
        **{field: tree(_FIELDS[field]) for field in used},
    )


def eigenbasis_optimizer(
    label: str,
    method: EigenbasisAdam,
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: optax.ScalarOrSchedule,
    mask: Any,
    matrix_axes: MatrixAxesSpec,
    eigenbasis: Eigenbasis,
    routing: Routing,
    fallback: AdamW,
    mesh: MeshWork,
) -> optax.GradientTransformationExtraArgs:
    """A method on whole models: matrices, tensors with one factor an axis, and AdamW's leaves.

    AdamW has the numbers of the method and its order: it skips the first gradient, and its epsilon
    stands outside of the bias correction. Arguments are those of `soap`.
    """
    check_rates(learning_rate=learning_rate)
    rest = (
        decayed_weights(weight_decay, mask, routing),
        optax.scale_by_learning_rate(learning_rate),
    )
    return with_fallback(
        label,
        guarded(eigenbasis_direction(method, matrix_axes, eigenbasis, mesh), *rest),
        learning_rate,
        fallback,
        b1=method.b1,
        b2=method.b2,
        eps=method.eps,
        weight_decay=weight_decay,
        mask=mask,
        matrix_axes=matrix_axes,
        routing=routing,
        skip_first_step=True,
        labels=_labels(label, matrix_axes, eigenbasis, routing),
        modes=guarded(tensor_direction(method, eigenbasis), *rest),
    )


def _labels(
    label: str, matrix_axes: MatrixAxesSpec, eigenbasis: Eigenbasis, routing: Routing
) -> Callable[[optax.Params], Any]:
    limit = eigenbasis.max_precond_dim

    def name(r: Route, shape: tuple[int, ...]) -> str:
        if r.axes is not None:
            _, m, n = r.axes.matrix_shape(shape)
            return label if any(preconditioned_sides(m, n, limit)) else FALLBACK_LABEL
        modes = r.role == "unspecified" and routing.on_uncovered == "modes"
        return MODES_LABEL if modes and min(shape) <= limit else FALLBACK_LABEL

    def labels(params: optax.Params) -> Any:
        routes = route(params, matrix_axes, routing)
        shapes = [x.shape for x in jax.tree.leaves(params)]
        return jax.tree.unflatten(jax.tree.structure(params), list(map(name, routes, shapes)))

    return labels


def check_numbers(method: EigenbasisAdam) -> None:
    """Raise `ValueError` for a number out of range; names the argument."""
    check_decays(b1=method.b1, b2=method.b2)
    check_number("factor_decay", method.rule.decay, DECAY_OR_SUM)
    check_number("eps", method.eps, NOT_NEGATIVE)
    check_number("precondition_frequency", method.frequency, COUNT)
    if method.stagger and not isinstance(method.frequency, int):
        raise ValueError(
            "stagger divides stacks into precondition_frequency shares, so that must be a plain "
            "integer; under optax.inject_hyperparams name it in static_args"
        )
