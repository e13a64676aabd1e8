"""Adam in slowly changing Kronecker eigenbases: what SOAP and DyKAF have in common.

A leaf keeps a factor for each of its sides and an orthogonal basis of eigenvectors for each factor.
Adam's moments live in those bases; a method is the rule by which the factors follow the gradients.
`EigenbasisAdam.step` says in order what happens to a gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxopt_lab.core.kronecker import rank_one_step
from jaxopt_lab.core.numerics import Scalar, one_minus_power, safe_divide
from jaxopt_lab.core.ordering import (
    cond_without_copy,
    refreshed_share,
    serialize_after,
)
from jaxopt_lab.core.orthogonalization import refresh_eigenbasis
from jaxopt_lab.core.precision import on_gpu, rotate
from jaxopt_lab.core.stacks import Arrays, Member, ReplicatedWork, Stacks, map_stacks
from jaxopt_lab.optim.kronecker.factors import STATIC, FactorRule, Sides
from jaxopt_lab.optim.options import Eigenbasis

# What a step does with one matrix.
REFUSED, WAITING, STARTED, APPLIED = -1, 0, 1, 2

# Leaves with so many matrices fill a device by themselves.
_ENOUGH = 8

# Bound on the coordinates of a direction in the eigenbases. As long as these stay, Cauchy-Schwarz
# bounds |M| / sqrt(V) by (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)), 1 for b1 = b2. A refresh
# rotates M and only permutes V, and a small entry of V may meet any part of M. After a refresh at
# every step of a 9 x 9 matrix a ratio of 19 was seen, with the usual ten steps from one to the next
# below 4; what is above the bound is no information about curvature. The direction of an (m, n)
# matrix then has a Frobenius norm of at most LARGEST_RATIO sqrt(m n).
LARGEST_RATIO = 32.0

MOMENTS = ("mu", "nu", "nu.0", "nu.1")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EigenbasisAdam:
    """One step of the family, on leaves whose arrays are at hand.

    A tree of its numbers, any of which may be traced. What follows `replicated_work` only the
    released codes set, through `jaxopt_lab.parity`.
    """

    rule: FactorRule
    b1: Scalar
    b2: Scalar
    eps: Scalar
    frequency: int
    eigenbasis: Eigenbasis = field(metadata=STATIC)
    replicated_work: ReplicatedWork = field(metadata=STATIC)
    eps_in_denominator: bool = field(default=True, metadata=STATIC)  # of the rank-one fit
    correct_bias: bool = field(default=True, metadata=STATIC)
    normalize_grads: bool = field(default=False, metadata=STATIC)  # N over its root mean square
    skip_first_step: bool = field(default=True, metadata=STATIC)
    largest_ratio: float | None = field(default=LARGEST_RATIO, metadata=STATIC)  # None: no bound

    def step(self, count: Array, members: Sequence[Member], arrays: Arrays) -> Arrays:
        """Take one gradient.

        Args:
          count: Gradients seen before this one.
          members: The leaves.
          arrays: Their gradients "grad", float32 or wider, and their state: "age", "mu", "nu", and
            for side k "nu.k", "factor.k" and "basis.k".

        Returns:
          The new arrays, among them the directions ("direction"), NaN for the matrices that take no
          step, and what was done with each matrix ("status").
        """
        factors = tuple(name for name in arrays if name.startswith("factor"))
        bases = tuple(name for name in arrays if name.startswith("basis"))
        # A place for the directions. Ones, not zeros: XLA would merge a buffer of zeros with every
        # other zero constant, and read those from memory.
        arrays = arrays | {"direction": [jnp.ones_like(g) for g in arrays["grad"]]}
        arrays["status"] = self._statuses(arrays, factors)
        starting = jnp.array(False)
        for status in arrays["status"]:
            starting = starting | jnp.any(status == STARTED)
        due = self._refresh_due(count)
        stacks = Stacks(members, arrays, replicated_work=self.replicated_work, enough=_ENOUGH)
        moved = ("direction", *MOMENTS, *factors)

        def start(arrays: Arrays) -> Arrays:
            """Factors and bases of the matrices that see their first gradient."""
            names = ("grad", "status", *factors, *bases)
            return stacks.map(
                EigenbasisAdam._start, arrays, names, (*factors, *bases),
                operand=self, decomposes=True,
            )  # fmt: skip

        def move(arrays: Arrays) -> Arrays:
            """Directions, and factors and moments that have seen the gradient."""
            names = ("grad", "status", "age", *MOMENTS, *factors, *bases)
            return stacks.map(EigenbasisAdam._move, arrays, names, moved, operand=self)

        def refresh(arrays: Arrays) -> Arrays:
            """Bases that follow the factors, and moments in them."""
            if self.eigenbasis.stagger:
                return arrays | self._refresh_share(count, members, arrays, (*factors, *bases))
            arrays = arrays | self._refresh_sides(members, arrays, factors)
            orders = tuple(name for name in arrays if name.startswith("order"))
            names = (*MOMENTS, *(f"old_{name}" for name in bases), *bases, *orders)
            return arrays | stacks.map(
                EigenbasisAdam._re_express, arrays, names, MOMENTS, operand=self
            )

        once, at_refresh = partial(cond_without_copy, starting), partial(cond_without_copy, due)
        arrays = _branch(once, start, arrays, (*factors, *bases))
        if on_gpu():
            # The host waits for the device at every loop and conditional, to know what to start.
            # All three predicates are evaluated before the heavy kernels, so that the host can
            # dispatch the next step while the device works. The bases stay outside of the last
            # branch, which would copy what it returns unchanged.
            unless_moved = partial(lax.cond, due, lambda held: held)
            arrays = _branch(at_refresh, lambda x: refresh(x | move(x)), arrays, (*moved, *bases))
            arrays = _branch(unless_moved, move, arrays, moved)
        else:  # half the program
            arrays |= move(arrays)
            arrays = _branch(at_refresh, refresh, arrays, (*MOMENTS, *factors, *bases))

        if self.rule.may_overflow:
            arrays["status"] = list(map(_overflown, arrays["status"], arrays["direction"]))
        statuses = zip(arrays["status"], arrays["direction"], strict=True)
        arrays["direction"] = [
            jnp.where(spread(self._applied(status), x), x, jnp.nan) for status, x in statuses
        ]
        arrays["age"] = list(map(self._grown, arrays["status"], arrays["age"]))
        return arrays

    def basis_dtype(self, dtype: DTypeLike) -> DTypeLike:
        """Of the bases of a matrix whose moments have `dtype`: what the rotations use of them."""
        rounds = self.eigenbasis.rotation_precision == "bfloat16" and dtype == jnp.float32
        return jnp.bfloat16 if rounds else dtype

    def _statuses(self, arrays: Arrays, factors: Sequence[str]) -> list[Array]:
        """What to do with each matrix."""
        rule_waits = self.rule.waits_for_gradient

        def status(i: int, grad: Array, age: Array) -> Array:
            largest = jnp.max(jnp.abs(grad), axis=tuple(range(1, grad.ndim)), initial=0)
            waits = rule_waits and all(arrays[name][i] is not None for name in factors)
            # Directions of subnormal gradients are rounding.
            is_something = largest >= jnp.finfo(grad.dtype).tiny
            starting = (age == 0) & (is_something | (not waits))
            taken = jnp.where(starting, STARTED, jnp.where(age > 0, APPLIED, WAITING))
            # The square of the Frobenius norm bounds whatever is formed of a gradient, with room
            # for rounding; once it overflows, averages would stay infinite for good.
            bound = jnp.square(2 * largest) * (grad.size // max(grad.shape[0], 1))
            return jnp.where(jnp.isfinite(bound), taken, REFUSED)

        pairs = zip(arrays["grad"], arrays["age"], strict=True)
        return [status(i, grad, age) for i, (grad, age) in enumerate(pairs)]

    def _applied(self, status: Array) -> Array:
        """Whether a matrix takes a step."""
        return (status == APPLIED) | ((status == STARTED) & (not self.skip_first_step))

    def _grown(self, status: Array, age: Array) -> Array:
        first = 1 if self.skip_first_step else 2
        applied = jnp.where(status == APPLIED, age + 1, age)
        return jnp.where(status == STARTED, first, applied).astype(jnp.int32)

    def _start(self, grad: Array, status: Array, *old: Array | None) -> Sides:
        """Factors and bases of a stack."""
        starts = status == STARTED
        first, bases = self.rule.start(
            old[: len(old) // 2], jnp.where(spread(starts, grad), grad, 0)
        )
        return select(starts, (*first, *bases), old)

    def _move(
        self, grad: Array, status: Array, age: Array, mu: Array, nu, row_nu, column_nu,
        *sides: Array | None,
    ) -> Sides:  # fmt: skip
        """One step of a stack of matrices. The gradient never enters the bases it is seen in."""
        factors, bases = sides[: len(sides) // 2], sides[len(sides) // 2 :]
        seen, fits = self.rule.step(factors, grad)
        taken = status > 0
        if fits is not None:  # fine by itself, but too much for a sum of squares
            taken = taken & fits
        applied = self._applied(status) & taken

        rotated = self._into(bases, jnp.where(spread(applied, grad), grad, 0))
        new_mu = self.b1 * mu + (1 - self.b1) * rotated
        moments, root = self._second_moment(nu, row_nu, column_nu, jnp.square(rotated))
        direction = safe_divide(new_mu, root)
        if self.normalize_grads:
            axes = tuple(range(1, direction.ndim))
            mean = jnp.mean(jnp.square(direction), axes, keepdims=True)
            direction = direction / (1e-30 + jnp.sqrt(mean))
        if self.correct_bias:
            k = jnp.maximum(age, 1).astype(direction.dtype)
            bias = jnp.sqrt(one_minus_power(self.b2, k)) / one_minus_power(self.b1, k)
            direction = spread(bias, direction) * direction
        direction = self._into(bases, self._bounded(direction), back=True)
        if fits is not None:
            direction = jnp.where(spread(taken, direction), direction, jnp.nan)
        new = select(applied, (new_mu, *moments), (mu, nu, row_nu, column_nu))
        return direction, *new, *select(taken, seen, factors)

    def _bounded(self, direction: Array) -> Array:
        """A direction in the eigenbases with no coordinate above `largest_ratio`."""
        if self.largest_ratio is None:
            return direction
        return jnp.clip(direction, -self.largest_ratio, self.largest_ratio)

    def _second_moment(self, nu, row_nu, column_nu, squares) -> tuple[Sides, Array]:
        """The new second moment, and what the first one is divided by."""
        if self.eigenbasis.second_moment == "full":
            nu = self.b2 * nu + (1 - self.b2) * squares
            return (nu, None, None), jnp.sqrt(nu) + self.eps
        if self.eigenbasis.second_moment == "factored":
            row_nu = self.b2 * row_nu + (1 - self.b2) * jnp.sum(squares, -1)
            column_nu = self.b2 * column_nu + (1 - self.b2) * jnp.sum(squares, -2)
            shares = safe_divide(row_nu, jnp.sum(row_nu, -1, keepdims=True))
        else:
            row_nu, column_nu = rank_one_step(row_nu, column_nu, squares, decay=self.b2)
            shares = row_nu
        root = jnp.sqrt(shares)[..., :, None] * jnp.sqrt(column_nu)[..., None, :]
        return (None, row_nu, column_nu), root + (self.eps if self.eps_in_denominator else 0.0)

    def _into(self, bases: Sides, x: Array, **options: Any) -> Array:
        return rotate(x, bases, self.eigenbasis.rotation_precision, **options)

    def _refresh_due(self, count: Array) -> Array:
        """Whether bases are refreshed after this step, all or, where staggered, some."""
        due = count > 0
        return due if self.eigenbasis.stagger else due & (self._turn(count) == 0)

    def _turn(self, count: Array) -> Array:
        return (count if self.skip_first_step else count + 1) % self.frequency

    @property
    def _refresh_side(self) -> Callable[[Array, Array], tuple[Array, Array, Array]]:
        """From a factor and a basis to both and the order of the columns."""
        return partial(
            refresh_eigenbasis,
            orthogonalizer=self.eigenbasis.orthogonalizer,
            precision=self.eigenbasis.factor_precision,
        )

    def _refresh_sides(
        self, members: Sequence[Member], arrays: Arrays, factors: Sequence[str]
    ) -> Arrays:
        """New bases, the order of their columns, and the old ones.

        Sides of equal size share a stack, whatever leaf they belong to and whichever side they are.
        """
        own, results = ("factor", "basis"), ("factor", "basis", "order")
        sides = [(i, name.removeprefix("factor")) for i in range(len(members)) for name in factors
                 if arrays[name][i] is not None]  # fmt: skip
        given: Arrays = {what: [arrays[what + k][i] for i, k in sides] for what in own}
        of_sides = [
            Member({what: members[i].slots[what + k] for what in results}, members[i].mesh)
            for i, k in sides
        ]
        done = map_stacks(
            self._refresh_side, of_sides, given, own, results,
            replicated_work=self.replicated_work, decomposes=True,
        )  # fmt: skip
        new: Arrays = {what + name.removeprefix("factor"): [None] * len(members)
                       for what in results for name in factors}  # fmt: skip
        for what, values in done.items():
            for (i, k), value in zip(sides, values, strict=True):
                new[what + k][i] = value
        return new | {f"old_{name}": arrays[name] for name in new if name.startswith("basis")}

    def _refresh_share(
        self, count: Array, members: Sequence[Member], arrays: Arrays, sides: Sequence[str]
    ) -> Arrays:
        """The same of a share of every stack, in which matrices (m, n) and (n, m) are together."""
        names, turned = (*MOMENTS, *sides), []
        for member in members:
            moments = member.slots["mu"]
            tall = moments.whole[0] > moments.whole[1] and not any(moments.spec)
            turned.append(member._replace(flips=tall))
        return map_stacks(
            _share_of_stack, turned, arrays, names, names, operand=(self, self._turn(count)),
            replicated_work=self.replicated_work, decomposes=True,
        )  # fmt: skip

    def _refresh_matrices(self, mu: Array, nu, row_nu, column_nu, *sides: Array | None) -> Sides:
        factors, bases = list(sides[: len(sides) // 2]), sides[len(sides) // 2 :]
        new, orders = list(bases), list[Any]([None] * len(bases))
        for k, (factor, basis) in enumerate(zip(factors, bases, strict=True)):
            if factor is not None and basis is not None:
                (factor,) = serialize_after([factor], new[:k])
                factors[k], new[k], orders[k] = self._refresh_side(factor, basis)
        moments = self._re_express(mu, nu, row_nu, column_nu, *bases, *new, *orders)
        return *moments, *factors, *new

    def _re_express(self, mu: Array, nu, row_nu, column_nu, *sides: Array | None) -> Sides:
        """Moments in the new bases."""
        third = len(sides) // 3
        old, new, orders = sides[:third], sides[third : 2 * third], sides[2 * third :]
        mu = self._into(new, self._into(old, mu, back=True, rounded=True))
        if nu is not None:
            # Without the barrier XLA fuses the last update of nu into the permutation, which then
            # cannot run in place.
            nu = lax.optimization_barrier(nu)
            for k, order in enumerate(orders):
                nu = permuted(nu, order, 1 + k)
        if row_nu is not None:
            row_nu, column_nu = permuted(row_nu, orders[0], -1), permuted(column_nu, orders[1], -1)
        return mu, nu, row_nu, column_nu


def _branch(
    choose: Callable[..., Arrays],
    change: Callable[[Arrays], Arrays],
    arrays: Arrays,
    names: Sequence[str],
) -> Arrays:
    """`arrays`, the named ones by `change` if `choose` takes the branch."""

    def changed(held: Arrays) -> Arrays:
        new = change(arrays | held)
        return {name: new[name] for name in names}

    return arrays | choose(changed, {name: arrays[name] for name in names})


def _share_of_stack(given: tuple[EigenbasisAdam, Array], *arrays: Array | None) -> Sides:
    method, turn = given
    return refreshed_share(method._refresh_matrices, arrays, turn, method.frequency)


def _overflown(status: Array, direction: Array) -> Array:
    """The status where a sum of squares would have overflown."""
    axes = tuple(range(1, direction.ndim))
    return jnp.where(jnp.any(jnp.isnan(direction), axis=axes), REFUSED, status)


def spread(per_matrix: Array, stack: Array) -> Array:
    """One number a matrix, with axes to broadcast against a stack."""
    return per_matrix.reshape(per_matrix.shape + (1,) * (stack.ndim - 1))


def select(condition: Array, new: Sequence[Array | None], old: Sequence[Array | None]) -> Sides:
    """`new` for the matrices for which the condition holds, in the dtypes of `old`."""

    def chosen(a: Array | None, b: Array | None) -> Array | None:
        if a is None or b is None:
            return None
        return jnp.where(spread(condition, a), a.astype(b.dtype), b)

    return tuple(map(chosen, new, old))


def permuted(x: Array | None, order: Array | None, axis: int) -> Any:
    """Entries along an axis in the given order, one order a matrix."""
    if x is None or order is None:
        return x
    others = tuple(a for a in range(1, x.ndim) if a != axis % x.ndim)
    taken = jnp.take_along_axis(x, jnp.expand_dims(order, others), axis=axis)
    # Left alone, compilers transpose at every step what is permuted at a few.
    return with_layout_constraint(taken, Layout(major_to_minor=tuple(range(x.ndim))))
