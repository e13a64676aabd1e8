"""One step of Shampoo on the leaves of a tree, and the options it depends on."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import jax.numpy as jnp
from jaxtyping import Array

from jaxopt_lab.core.inverse_roots import check_root
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.core.ordering import cond_without_copy
from jaxopt_lab.core.precision import PRODUCT_PRECISIONS, PrecisionName, ProductPrecision
from jaxopt_lab.core.spectral import trace_in_range
from jaxopt_lab.core.stacks import ReplicatedWork
from jaxopt_lab.optim.kronecker.blocks import MERGE_RULES
from jaxopt_lab.optim.kronecker.grafting import (
    GRAFTS,
    average_gradient,
    graft_direction,
    keeps_squares,
)
from jaxopt_lab.optim.kronecker.roots import (
    Factors,
    RootRule,
    gram_matrices,
    precondition,
    refreshed_roots,
)
from jaxopt_lab.optim.kronecker.shampoo_guard import Guard, Leaves, zip_strict
from jaxopt_lab.optim.kronecker.shampoo_problems import MAX_ORDER, Problem


class ShampooRule(NamedTuple):
    """Every choice that does not change during a run; named as in `scale_by_shampoo`."""

    b1: Scalar
    b2: Scalar
    b3: Scalar | None
    epsilon: Scalar
    relative_epsilon: bool
    precondition_frequency: Scalar
    start_preconditioning_step: Scalar
    exponent: float | Mapping[int, float] | None
    bias_correction: bool
    graft: str | None
    graft_b2: Scalar
    graft_eps: Scalar
    momentum: Scalar | None
    dampening: Scalar
    nesterov: bool
    weight_decay_type: str
    trace_scaling: bool
    kl_factors: bool
    max_preconditioner_dim: int
    merge: str
    root_method: str
    root_precision: PrecisionName
    factor_precision: ProductPrecision
    direction_precision: ProductPrecision
    stagger: bool
    replicated_work: ReplicatedWork

    def check(self) -> None:
        """Raise `ValueError` for a choice that does not exist or a number out of range.

        Only Python numbers can be looked at: `optax.inject_hyperparams` passes tracers.
        """
        choices: dict[str, Sequence[Any]] = {
            "graft": GRAFTS,
            "merge": MERGE_RULES,
            "weight_decay_type": ("decoupled", "l2"),
            "root_precision": get_args(PrecisionName),
            "factor_precision": PRODUCT_PRECISIONS,
            "direction_precision": PRODUCT_PRECISIONS,
            "replicated_work": ("repeat", "share"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                known = ", ".join(map(str, allowed))
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {known}")
        if isinstance(self.b2, int | float) and not 0 <= self.b2 <= 1:
            raise ValueError(f"b2 is {self.b2}; it must be in [0, 1], where 1 accumulates sums")
        for name in ("b1", "b3", "graft_b2", "momentum", "dampening"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; it must be in [0, 1)")
        for name in ("epsilon", "graft_eps"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; it must be a finite number of at least 0")
        self._check_steps()
        limit = self.max_preconditioner_dim
        if not isinstance(limit, int) or limit < 1:
            raise ValueError(
                f"max_preconditioner_dim is {limit!r}; it must be a Python integer of at least 1 "
                "(with optax.inject_hyperparams, one of its static_args)"
            )
        self.root_rule()

    def _check_steps(self) -> None:
        frequency, start = self.precondition_frequency, self.start_preconditioning_step
        for name in ("precondition_frequency", "start_preconditioning_step"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not (
                value >= 1 and math.isfinite(value) and value == int(value)
            ):
                raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")
        both = isinstance(frequency, int | float) and isinstance(start, int | float)
        if both and start < frequency:
            raise ValueError(
                f"start_preconditioning_step is {start}; it must be at least the "
                f"precondition_frequency of {frequency}"
            )
        if self.stagger and not isinstance(frequency, int):
            raise ValueError(
                f"precondition_frequency is {frequency!r}; with stagger=True it must be a Python "
                "integer (with optax.inject_hyperparams, one of its static_args)"
            )

    def root_rule(self) -> RootRule:
        """How factors become roots, with the exponent of every order.

        Raises:
          ValueError: An exponent or an order is out of range, or the method cannot take it.
        """
        by_order = self.exponent is None or isinstance(self.exponent, Mapping)
        given = self.exponent if isinstance(self.exponent, Mapping) else {}
        for order in given:
            if order not in range(1, MAX_ORDER + 1):
                raise ValueError(
                    f"exponent has an entry for order {order!r}; orders are 1 to {MAX_ORDER}"
                )
        exponents = []
        for order in range(1, MAX_ORDER + 1):
            value = given.get(order, 1 / (2 * order)) if by_order else self.exponent
            if not isinstance(value, int | float):
                raise ValueError(
                    f"exponent is {value!r}; it must be a Python number (with "
                    "optax.inject_hyperparams, one of its static_args)"
                )
            check_root(self.root_method, value)
            exponents.append(float(value))
        return RootRule(
            exponents=tuple(exponents),
            epsilon=self.epsilon,
            relative=self.relative_epsilon,
            trace_scaling=self.trace_scaling,
            method=self.root_method,
            precision=self.root_precision,
            replicated_work=self.replicated_work,
        )

    def accumulate(
        self, problems: Sequence[Problem], guard: Guard, g: Leaves, factors: Factors, roots: Factors
    ) -> tuple[Guard, list[Leaves]]:
        """The factors with this step's Gram matrices; gradients that make them overflow refused."""
        grams = gram_matrices(
            problems, g, roots if self.kl_factors else None, self.factor_precision
        )
        weight = jnp.where(self.b2 == 1, 1, 1 - self.b2)
        mixed = [
            [self.b2 * x + weight.astype(x.dtype) * y for x, y in zip_strict(old, new)]
            for old, new in zip_strict(factors, grams)
        ]
        # Averages of squares stay as small as these; plain sums and multiplied gradients may not.
        if self.kl_factors or not isinstance(self.b2, int | float) or self.b2 == 1:
            fits = [_in_range(p, modes) for p, modes in zip_strict(problems, mixed)]
            guard = guard.refusing(problems, fits)
        pairs = enumerate(zip_strict(problems, mixed, factors))
        return guard, [guard.choose_factors(p, i, new, old) for i, (p, new, old) in pairs]

    def refresh(
        self,
        t: Array,
        problems: Sequence[Problem],
        guard: Guard,
        factors: Factors,
        roots: Factors,
    ) -> Factors:
        """The roots of step t: computed anew where that is due, else the last ones."""
        rule = self.root_rule()
        corrections = guard.corrections(self.b2 if self.bias_correction else 1)
        first, frequency = self.start_preconditioning_step, self.precondition_frequency

        def all_of_them(roots: Factors) -> Factors:
            return refreshed_roots(rule, problems, factors, corrections, roots)

        def a_part(roots: Factors) -> Factors:
            assert isinstance(frequency, int)
            share = t % frequency, frequency
            return refreshed_roots(rule, problems, factors, corrections, roots, share)

        if isinstance(first, int) and first == 1 and not self.stagger:
            return all_of_them(roots)
        if self.stagger:
            return cond_without_copy(
                t > first, a_part, cond_without_copy(t == first, all_of_them, roots)
            )
        due = (t == first) | ((t > first) & (t % frequency == 0))
        return cond_without_copy(due, all_of_them, roots)

    def directions(
        self,
        t: Array,
        problems: Sequence[Problem],
        guard: Guard,
        g: Leaves,
        mu: Leaves,
        squares: Leaves,
        roots: Factors,
    ) -> tuple[Leaves, Leaves, Leaves]:
        """Preconditioned and grafted directions, the next first and second moments."""
        averaged = [
            average_gradient(
                m, x, age, b1=self.b1, b3=self.b3, bias_correction=self.bias_correction
            )
            for m, x, age in zip_strict(mu, g, guard.age)
        ]
        averages, new_mu = [a for a, _ in averaged], [m for _, m in averaged]
        if self.graft is None:
            direction = precondition(problems, averages, None, roots, self.direction_precision)
            return direction, guard.choose(new_mu, mu), squares
        lent = [
            graft_direction(self.graft, a, s, x, age, b2=self.graft_b2, eps=self.graft_eps)
            for a, s, x, age in zip_strict(averages, squares or g, g, guard.age)
        ]
        grafts = [d for d, _ in lent]
        direction = precondition(problems, averages, grafts, roots, self.direction_precision)
        early = t < self.start_preconditioning_step
        direction = [jnp.where(early, *pair) for pair in zip_strict(grafts, direction)]
        if keeps_squares(self.graft):
            squares = guard.choose([s for _, s in lent], squares)
        return direction, guard.choose(new_mu, mu), squares

    def with_momentum(
        self, guard: Guard, direction: Leaves, velocity: Leaves
    ) -> tuple[Leaves, Leaves]:
        """Heavy-ball or Nesterov momentum on the direction, and the next velocity."""
        if self.momentum is None:
            return direction, velocity
        damped = [(1 - self.dampening) * d for d in direction]
        new = [self.momentum * v + d for v, d in zip_strict(velocity, damped)]
        if self.nesterov:
            direction = [d + self.momentum * v for d, v in zip_strict(damped, new)]
        else:
            direction = new
        return direction, guard.choose(new, velocity)


def _in_range(problem: Problem, factors: Leaves) -> Array:
    """(*batch) whether the factors of all modes and blocks are far enough from overflowing."""
    fits = jnp.ones(problem.batch_shape, bool)
    for x in factors:
        fits = fits & jnp.all(trace_in_range(x), axis=-1)
    return fits
