"""Which problems take part in a step: those whose gradient is finite."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jaxopt_lab.core.numerics import Scalar, one_minus_power
from jaxopt_lab.optim.kronecker.shampoo_problems import Problem

Leaves = list[Array]
zip_strict = functools.partial(zip, strict=True)


class Guard(NamedTuple):
    """Acceptance and age of every problem; lists in the order of the leaves."""

    accepted: Leaves  # bool, (*batch) with 1 for the axes of the problem: broadcasts to the leaf
    age: Leaves  # the same shape: gradients accepted so far, this one included; at least 1
    notfinite_count: Leaves  # (*batch,) int32: gradients refused so far

    @classmethod
    def of(
        cls,
        problems: Sequence[Problem],
        gradients: Sequence[Array],
        count: Array,
        notfinite_count: Sequence[Array],
    ) -> "Guard":
        """Look at this step's gradients.

        Args:
          problems: One a leaf.
          gradients: One a leaf, in the dtype of the computation.
          count: () steps, this one included.
          notfinite_count: The last counters.
        """
        accepted, ages, refused = [], [], []
        for p, g, r in zip_strict(problems, gradients, notfinite_count):
            # The sum of squares bounds every entry of the Gram matrices, so that these are finite.
            total = jnp.sum(jnp.square(g), axis=p.inner_axes, keepdims=True)
            accepted.append(jnp.isfinite(total))
            refused.append(r + ~jnp.squeeze(accepted[-1], p.inner_axes))
            age = jnp.expand_dims(count - refused[-1], p.inner_axes)
            ages.append(jnp.maximum(age, 1).astype(g.dtype))
        return cls(accepted, ages, refused)

    def refusing(self, problems: Sequence[Problem], fits: Sequence[Array]) -> "Guard":
        """Refuse also where `fits`, (*batch) a leaf, does not hold."""
        accepted, ages, refused = [], [], []
        for p, fit, a, age, r in zip_strict(problems, fits, *self):
            late = a & ~jnp.expand_dims(fit, p.inner_axes)
            accepted.append(a & ~late)
            ages.append(jnp.maximum(age - late, 1))
            refused.append(r + jnp.squeeze(late, p.inner_axes))
        return Guard(accepted, ages, refused)

    def choose(self, new: Sequence[Array], old: Sequence[Array]) -> Leaves:
        """`new` where the gradient was accepted, else `old`; arrays of the shapes of the leaves."""
        return [jnp.where(a, x, y) for a, x, y in zip_strict(self.accepted, new, old)]

    def or_zero(self, leaves: Sequence[Array]) -> Leaves:
        """Zero where the gradient was refused."""
        return [jnp.where(a, x, 0) for a, x in zip_strict(self.accepted, leaves)]

    def choose_factors(
        self, problem: Problem, index: int, new: Sequence[Array], old: Sequence[Array]
    ) -> Leaves:
        """As `choose`, for the factors (*batch, blocks, d, d) of leaf `index`."""
        flag = jnp.squeeze(self.accepted[index], problem.inner_axes)[..., None, None, None]
        return [jnp.where(flag, x, y) for x, y in zip_strict(new, old)]

    def corrections(self, b: Scalar) -> Leaves:
        """(batch,) how far a moment of decay b is filled: 1 - b^age, or 1 for sums (b = 1)."""
        filled = [one_minus_power(b, age.reshape(-1)) for age in self.age]
        return [jnp.where(b == 1, 1, x) for x in filled]
