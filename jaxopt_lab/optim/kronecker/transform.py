"""The direction of SOAP and DyKAF as an Optax transformation: its state and the way to the step."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxopt_lab.core.checks import (
    COUNT,
    DECAY_OR_SUM,
    NOT_NEGATIVE,
    check_decays,
    check_number,
)
from jaxopt_lab.optim.kronecker.step import REFUSED, EigenbasisAdam
from jaxopt_lab.optim.matrix_leaves import LeafLayout, MatrixLeaves
from jaxopt_lab.optim.options import Eigenbasis, MeshWork
from jaxopt_lab.optim.routing import MatrixAxesSpec

# Name of an array during a step -> field of the state.
_FIELDS = {
    **{"age": "age", "mu": "mu", "nu": "nu", "nu.0": "row_nu", "nu.1": "column_nu"},
    **{"factor.0": "row_factor", "factor.1": "column_factor"},
    **{"basis.0": "row_basis", "basis.1": "column_basis"},
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

    def by_name(self) -> dict[str, Any]:
        """Trees by the names that their arrays have during a step."""
        return {name: getattr(self, field) for name, field in _FIELDS.items()}

    def with_names(self, trees: Mapping[str, Any], **others: Any) -> "EigenbasisAdamState":
        """The state with new trees, and new values of other fields."""
        return self._replace(**{_FIELDS[name]: tree for name, tree in trees.items()}, **others)


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

    def leaves_of(tree: Any) -> MatrixLeaves:
        return MatrixLeaves.of(tree, matrix_axes, mesh.param_shardings)

    def init(params: optax.Params) -> EigenbasisAdamState:
        leaves = leaves_of(params)
        rows = [_initial(layout, method, eigenbasis) for layout in leaves.layouts]
        trees = {name: leaves.treedef.unflatten([row[name] for row in rows]) for name in _FIELDS}
        unused = ("nu.0", "nu.1") if eigenbasis.second_moment == "full" else ("nu",)
        trees |= {name: optax.MaskedNode() for name in unused}
        return EigenbasisAdamState(
            count=jnp.zeros([], jnp.int32),
            notfinite_count=jax.tree.map(jnp.zeros_like, trees["age"]),
            **{_FIELDS[name]: tree for name, tree in trees.items()},
        )

    return direction_of_step(method, leaves_of, init)


def direction_of_step(
    method: EigenbasisAdam,
    leaves_of: Callable[[Any], MatrixLeaves],
    init: optax.TransformInitFn,
) -> optax.GradientTransformationExtraArgs:
    """The transformation of a step: its arrays out of the state, as stacks, and back.

    Args:
      method: The step.
      leaves_of: The layouts of a tree of gradients.
      init: The state before the first one, with methods like those of `EigenbasisAdamState`.
    """

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        leaves, trees = leaves_of(updates), state.by_name()
        arrays = leaves.stacked(trees | {"grad": updates})
        arrays = method.step(state.count, leaves.members, arrays)
        new = leaves.unstacked(arrays, trees | {"direction": updates, "status": state.age})
        direction, status = new.pop("direction"), new.pop("status")
        state = state.with_names(
            new,
            count=jnp.asarray(optax.safe_increment(state.count)),
            notfinite_count=jax.tree.map(
                lambda n, s: n + (s == REFUSED).astype(jnp.int32), state.notfinite_count, status
            ),
        )
        return direction, state

    return optax.GradientTransformationExtraArgs(init, update)


def _initial(layout: LeafLayout, method: EigenbasisAdam, eigenbasis: Eigenbasis) -> dict[str, Any]:
    """The arrays of a leaf before its first gradient, by name."""
    dtype, slots = layout.dtype, layout.slots()
    limit, one_sided = eigenbasis.max_precond_dim, eigenbasis.one_sided
    (m, n), zero = layout.sides, jnp.zeros([], dtype)
    sides = preconditioned_sides(m, n, limit, one_sided)
    # The rank-one fit needs a positive start; sums of squares start from nothing.
    start = jnp.asarray(method.eps if eigenbasis.second_moment == "rank_one" else 0.0, dtype)
    values: dict[str, Any] = {"age": jnp.zeros([], jnp.int32), "mu": zero, "nu": zero}
    for k, (size, kept) in enumerate(zip(layout.sides, sides, strict=True)):
        values[f"nu.{k}"] = start
        values |= {f"factor.{k}": None, f"basis.{k}": None}
        if kept:
            eye = jnp.eye(size, dtype=dtype)
            values[f"factor.{k}"] = method.rule.initial(size, all(sides)) * eye
            values[f"basis.{k}"] = eye.astype(method.basis_dtype(dtype))
    return {name: optax.MaskedNode() if x is None else layout.initial(slots[name], x)
            for name, x in values.items()}  # fmt: skip


def check_numbers(method: EigenbasisAdam) -> None:
    """Raise `ValueError` for a number out of range; names the argument."""
    check_decays(b1=method.b1, b2=method.b2)
    check_number("factor_decay", method.rule.decay, DECAY_OR_SUM)
    check_number("eps", method.eps, NOT_NEGATIVE)
    check_number("precondition_frequency", method.frequency, COUNT)
    if method.eigenbasis.stagger and not isinstance(method.frequency, int):
        raise ValueError(
            "stagger divides stacks into precondition_frequency shares, so that must be a plain "
            "integer; under optax.inject_hyperparams name it in static_args"
        )
