"""Adam in slowly changing Kronecker eigenbases: what SOAP and DyKAF have in common.

A matrix keeps two factors, one a side, and an orthogonal basis of eigenvectors for each. Adam's
moments live in those bases; a method is the rule by which the factors follow the gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxopt_lab.core.kronecker import rank_one_step, symmetric
from jaxopt_lab.core.numerics import Scalar, one_minus_power
from jaxopt_lab.core.ordering import cond_without_copy, serialize_after
from jaxopt_lab.core.orthogonalization import Orthogonalizer
from jaxopt_lab.core.precision import ProductPrecision, matmul
from jaxopt_lab.core.spectral import refresh_eigenbasis
from jaxopt_lab.core.stacks import ReplicatedWork
from jaxopt_lab.optim.kronecker.factors import STATIC, FactorRule
from jaxopt_lab.optim.kronecker.leaves import FactorLeaf, branch, map_leaves, map_sides
from jaxopt_lab.optim.kronecker.sides import Side, permuted, select, spread

SecondMoment = Literal["full", "rank_one", "factored"]

# What a step does with one matrix.
REFUSED, WAITING, STARTED, APPLIED = -1, 0, 1, 2

# Leaves with so many matrices fill a device by themselves.
_ENOUGH = 8

MOMENTS = ("mu", "nu", "row_nu", "column_nu")
FACTORS = ("row_factor", "column_factor")
BASES = ("row_basis", "column_basis")
ORDERS = ("row_order", "column_order")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EigenbasisAdam:
    """One step of the family, on leaves whose arrays are at hand.

    A tree of its numbers, any of which may be traced.
    """

    rule: FactorRule
    b1: Scalar
    b2: Scalar
    eps: Scalar
    frequency: int
    second_moment: SecondMoment = field(metadata=STATIC)
    eps_in_denominator: bool = field(metadata=STATIC)
    correct_bias: bool = field(metadata=STATIC)
    normalize_grads: bool = field(metadata=STATIC)
    skip_first_step: bool = field(metadata=STATIC)
    stagger: bool = field(metadata=STATIC)
    orthogonalizer: Orthogonalizer = field(metadata=STATIC)
    factor_precision: ProductPrecision = field(metadata=STATIC)
    rotation_precision: ProductPrecision = field(metadata=STATIC)
    replicated_work: ReplicatedWork = field(metadata=STATIC)

    def step(
        self, count: Array, leaves: Sequence[FactorLeaf], grads: Sequence[Array]
    ) -> tuple[list[Array], list[Array], list[FactorLeaf]]:
        """Take one gradient.

        Args:
          count: Gradients seen before this one.
          leaves: State of each leaf.
          grads: One a leaf, float32 or wider.

        Returns:
          The directions, what was done with each matrix (`REFUSED`, ...), and the new leaves.
        """
        leaves = [leaf.having(grad=leaf.layout.view(g))
                  for leaf, g in zip(leaves, grads, strict=True)]  # fmt: skip
        # A place for the directions. Of ones: compilers merge equal constants, and would read these
        # from memory wherever a zero is wanted.
        leaves = [leaf.having(status=self._status(leaf), direction=jnp.ones_like(leaf["grad"]))
                  for leaf in leaves]  # fmt: skip
        starting = jnp.array(False)
        for leaf in leaves:
            starting = starting | jnp.any(leaf["status"] == STARTED)
        due = self._refresh_due(count)

        def move_and_refresh(leaves: list[FactorLeaf]) -> list[FactorLeaf]:
            return self._refresh(count, self._move(leaves))

        # A host waits for the device wherever it learns what to start next. Most steps ask three
        # times before they work and not afterwards, so that the device has work while the host
        # prepares the next program. The bases stay outside of the last branch, which would copy
        # what it hands on.
        leaves = branch(
            partial(cond_without_copy, starting), self._start, leaves, (*FACTORS, *BASES)
        )
        moved = ("status", "direction", *MOMENTS, *FACTORS)
        leaves = branch(partial(cond_without_copy, due), move_and_refresh, leaves, (*moved, *BASES))
        leaves = branch(partial(lax.cond, due, lambda arrays: arrays), self._move, leaves, moved)
        directions = [leaf.layout.undo_view(self._scaled(leaf)) for leaf in leaves]
        leaves = [leaf.having(age=self._grown(leaf)) for leaf in leaves]
        return directions, [leaf["status"] for leaf in leaves], leaves

    def basis_dtype(self, dtype: DTypeLike) -> DTypeLike:
        """Of the bases of a matrix whose moments have `dtype`: what the rotations use of them."""
        return (
            jnp.bfloat16
            if self.rotation_precision == "bfloat16" and dtype == jnp.float32
            else dtype
        )

    def applied(self, status: Array) -> Array:
        """Whether a matrix takes a step."""
        return (status == APPLIED) | ((status == STARTED) & (not self.skip_first_step))

    def _map(
        self, fn, leaves, names, results, *, scalars: Sequence[Array] = (), **options
    ) -> list[FactorLeaf]:
        """`map_leaves` with `fn(method, *stacks, *scalars)`, where the method's numbers follow."""
        numbers, treedef = jax.tree.flatten(self)
        traced = [i for i, x in enumerate(numbers) if isinstance(x, jax.Array)]

        def with_numbers(*arguments: Array) -> tuple[Side, ...]:
            arrays, given = arguments[: len(names) + len(scalars)], arguments[-len(traced) :]
            own = dict(zip(traced, given, strict=False))
            method = treedef.unflatten([own.get(i, x) for i, x in enumerate(numbers)])
            return fn(method, *arrays)

        return map_leaves(
            with_numbers,
            leaves,
            names,
            results,
            scalars=(*scalars, *(numbers[i] for i in traced)),
            replicated_work=self.replicated_work,
            **{"transposable": False, "enough": _ENOUGH, **options},
        )

    def _status(self, leaf: FactorLeaf) -> Array:
        """What to do with each matrix."""
        grad, age = leaf["grad"], leaf["age"]
        largest = jnp.max(jnp.abs(grad), axis=tuple(range(1, grad.ndim)), initial=0)
        two_sided = (
            leaf.arrays["row_factor"] is not None and leaf.arrays["column_factor"] is not None
        )
        waits = self.rule.waits_for_gradient and two_sided
        # Directions of subnormal gradients are rounding.
        is_something = largest >= jnp.finfo(grad.dtype).tiny
        starting = (age == 0) & (is_something | (not waits))
        status = jnp.where(starting, STARTED, jnp.where(age > 0, APPLIED, WAITING))
        # The square of the Frobenius norm bounds whatever is formed of a gradient, with room for
        # rounding; once it overflows, averages would stay infinite for good.
        bound = jnp.square(2 * largest) * (leaf.layout.m * leaf.layout.n)
        return jnp.where(jnp.isfinite(bound), status, REFUSED)

    def _start(self, leaves: list[FactorLeaf]) -> list[FactorLeaf]:
        def start(method, grad, rows, columns, row_basis, column_basis, status):
            grad = jnp.where(spread(status == STARTED, grad), grad, 0)
            first = method.rule.start((rows, columns), grad)
            new = (*first, *method.rule.bases(first, grad))
            old = (rows, columns, row_basis, column_basis)
            return select(status == STARTED, new, old)

        names = ("grad", *FACTORS, *BASES, "status")
        return self._map(start, leaves, names, (*FACTORS, *BASES), decomposes=True)

    def _move(self, leaves: list[FactorLeaf]) -> list[FactorLeaf]:
        """Take the gradient into factors and moments, and find the directions."""
        advanced = self._map(
            EigenbasisAdam._factor_step, leaves, ("grad", *FACTORS, "status"), FACTORS
        )
        leaves = list(map(self._unless_overflowing, advanced, leaves))
        names = ("grad", *MOMENTS, *BASES, "status")
        return self._map(EigenbasisAdam._adam_step, leaves, names, ("direction", *MOMENTS))

    def _factor_step(self, grad: Array, rows: Side, columns: Side, status: Array):
        old = (rows, columns)
        return select(status > 0, self.rule.step(old, grad), old)

    def _unless_overflowing(self, leaf: FactorLeaf, old: FactorLeaf) -> FactorLeaf:
        """Refuse gradients that are fine by themselves, but too much for a sum of them."""
        new, last = ((x.arrays["row_factor"], x.arrays["column_factor"]) for x in (leaf, old))
        fits = self.rule.in_range(new)
        if fits is None:
            return leaf
        kept = dict(zip(FACTORS, select(fits, new, last), strict=True))
        return leaf.having(status=jnp.where(fits, leaf["status"], REFUSED), **kept)

    def _grown(self, leaf: FactorLeaf) -> Array:
        first = 1 if self.skip_first_step else 2
        status, age = leaf["status"], leaf["age"]
        return jnp.where(
            status == STARTED, first, jnp.where(status == APPLIED, age + 1, age)
        ).astype(jnp.int32)

    def _adam_step(self, grad, mu, nu, row_nu, column_nu, row_basis, column_basis, status):
        applied = self.applied(status)
        rotated = self._rotate(jnp.where(spread(applied, grad), grad, 0), row_basis, column_basis)
        new_mu = self.b1 * mu + (1 - self.b1) * rotated
        moments, denominator = self._second_moment(nu, row_nu, column_nu, jnp.square(rotated))
        step = jnp.where(denominator > 0, new_mu / jnp.where(denominator > 0, denominator, 1), 0)
        step = self._rotate(step, row_basis, column_basis, back=True)
        if self.normalize_grads:
            step = step / (1e-30 + jnp.sqrt(jnp.mean(jnp.square(step), (-2, -1), keepdims=True)))
        new = select(applied, (new_mu, *moments), (mu, nu, row_nu, column_nu))
        return step, *new

    def _scaled(self, leaf: FactorLeaf) -> Array:
        """The direction without the bias of its moments; 0 for a matrix that takes no step."""
        direction = leaf["direction"]
        if self.correct_bias:
            k = jnp.maximum(leaf["age"], 1).astype(direction.dtype)
            bias = jnp.sqrt(one_minus_power(self.b2, k)) / one_minus_power(self.b1, k)
            direction = spread(bias, direction) * direction
        return jnp.where(spread(self.applied(leaf["status"]), direction), direction, 0)

    def _rotate(
        self, x: Array, rows: Side, columns: Side, *, back: bool = False, rounded: bool = False
    ) -> Array:
        """Into the eigenbases or back: $Q_L^T X Q_R$ or $Q_L X Q_R^T$.

        `rounded`: as far as another rotation uses it.
        """
        precision = self.rotation_precision
        if rows is not None:
            first = rounded or columns is not None
            x = matmul(rows, x, precision, transpose_a=not back, rounded=first)
        if columns is not None:
            x = matmul(x, columns, precision, transpose_b=back, rounded=rounded)
        return x

    def _second_moment(self, nu, row_nu, column_nu, squares):
        """The new second moment, and what the first one is divided by."""
        if self.second_moment == "full":
            nu = self.b2 * nu + (1 - self.b2) * squares
            return (nu, None, None), jnp.sqrt(nu) + self.eps
        if self.second_moment == "factored":
            row_nu = self.b2 * row_nu + (1 - self.b2) * jnp.sum(squares, -1)
            column_nu = self.b2 * column_nu + (1 - self.b2) * jnp.sum(squares, -2)
            total = jnp.sum(row_nu, -1)[..., None]
            shares = row_nu / jnp.where(total > 0, total, 1)
        else:
            row_nu, column_nu = rank_one_step(row_nu, column_nu, squares, decay=self.b2)
            shares = row_nu
        root = jnp.sqrt(shares)[..., :, None] * jnp.sqrt(column_nu)[..., None, :]
        floor = self.eps if self.eps_in_denominator else 0.0
        return (None, row_nu, column_nu), root + floor

    def _refresh_due(self, count: Array) -> Array:
        """Whether bases are refreshed after this step, all or, where staggered, some."""
        due = count > 0
        return due if self.stagger else due & (self._turn(count) == 0)

    def _turn(self, count: Array) -> Array:
        return (count if self.skip_first_step else count + 1) % self.frequency

    def _refresh(self, count: Array, leaves: list[FactorLeaf]) -> list[FactorLeaf]:
        """New bases, or those of a share of every stack, so that no step pays for all."""
        names = (*MOMENTS, *FACTORS, *BASES)
        if not self.stagger:
            return self._refresh_all(leaves)
        return self._map(
            _in_turn(self.frequency), leaves, names, names,
            scalars=(self._turn(count),), transposable=True, enough=None, decomposes=True,
        )  # fmt: skip

    def _refresh_all(self, leaves: list[FactorLeaf]) -> list[FactorLeaf]:
        """New bases, the first moment re-expressed in them, the second sorted."""
        old = [{f"old_{name}": leaf.arrays[name] for name in BASES} for leaf in leaves]
        leaves = map_sides(self._refresh_side, leaves, replicated_work=self.replicated_work)
        leaves = [leaf.having(**bases) for leaf, bases in zip(leaves, old, strict=True)]
        names = (*MOMENTS, "old_row_basis", "old_column_basis", *BASES, *ORDERS)
        return self._map(EigenbasisAdam._re_express, leaves, names, MOMENTS)

    def _refresh_side(self, factor: Array, basis: Array) -> tuple[Array, Array, Array]:
        factor = symmetric(factor)
        new, order = refresh_eigenbasis(
            factor, basis, orthogonalizer=self.orthogonalizer, precision=self.factor_precision
        )
        return factor, new.astype(basis.dtype), order

    def _re_express(
        self, mu, nu, row_nu, column_nu, old_rows, old_columns, rows, columns, row_order,
        column_order,
    ):  # fmt: skip
        mu = self._rotate(mu, old_rows, old_columns, back=True, rounded=True)
        mu = self._rotate(mu, rows, columns)
        # Or its last change would be part of the permutation, which then could not overwrite it.
        nu = lax.optimization_barrier(nu)
        nu = permuted(permuted(nu, row_order, -2), column_order, -1)
        return mu, nu, permuted(row_nu, row_order, -1), permuted(column_nu, column_order, -1)

    def _refresh_matrices(self, mu, nu, row_nu, column_nu, rows, columns, row_basis, column_basis):
        def refresh(factor: Side, basis: Side) -> tuple[Side, Side, Side]:
            if factor is None or basis is None:
                return None, None, None
            return self._refresh_side(factor, basis)

        rows, new_rows, row_order = refresh(rows, row_basis)
        if columns is not None:
            columns = serialize_after(columns, new_rows)
        columns, new_columns, column_order = refresh(columns, column_basis)
        moments = self._re_express(
            mu, nu, row_nu, column_nu, row_basis, column_basis, new_rows, new_columns, row_order,
            column_order,
        )  # fmt: skip
        return *moments, rows, columns, new_rows, new_columns


def _in_turn(turns: int):
    """Refresh one of `turns` shares of a stack."""

    def share_of(method: EigenbasisAdam, *arguments) -> tuple[Side, ...]:
        *arrays, turn = arguments
        batch = next(x.shape[0] for x in arrays if x is not None)
        size = -(-batch // turns)
        first = turn * size

        def part_done(arrays: Sequence[Side]) -> tuple[Side, ...]:
            # The last share may be short: its slice then reaches back into the one before.
            start = jnp.minimum(first, batch - size)
            mine = start + jnp.arange(size) >= first
            old = tuple(
                None if x is None else lax.dynamic_slice_in_dim(x, start, size) for x in arrays
            )
            new = select(mine, method._refresh_matrices(*old), old)
            return tuple(
                None if x is None or y is None else lax.dynamic_update_slice_in_dim(x, y, start, 0)
                for x, y in zip(arrays, new, strict=True)
            )

        return cond_without_copy(first < batch, part_done, tuple(arrays))

    return share_of
