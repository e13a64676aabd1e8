"""One step of SOAP with one factor an axis, on leaves whose arrays are at hand."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array

from jaxopt_lab.core.modes import merged_shape, mode_gram, mode_product
from jaxopt_lab.core.numerics import Scalar, one_minus_power
from jaxopt_lab.core.ordering import serialize_after
from jaxopt_lab.core.orthogonalization import ORTHOGONALIZERS, Orthogonalizer
from jaxopt_lab.core.spectral import eigenbasis, refresh_eigenbasis, trace_in_range
from jaxopt_lab.optim.kronecker.checks import check_choice, gradient_weight

# One array for each axis that has a factor, `optax.MaskedNode()` for the others.
Modes = tuple[Any, ...]


class TensorLeaf(NamedTuple):
    """One leaf in its merged shape while it is updated."""

    age: Array
    mu: Array
    nu: Array
    factors: Modes
    bases: Modes
    finite: Array  # the gradient, its square and the factors with it
    runs: Array  # takes up a gradient that is not its first
    starts: Array  # takes up its first
    moves: Array  # applies an update


class TensorRule(NamedTuple):
    """The options, named as in `scale_by_tensor_soap`, and what one step does with each leaf."""

    b1: Scalar
    b2: Scalar
    factor_decay: Scalar
    eps: Scalar
    precondition_frequency: Scalar
    max_precond_dim: int
    merge_dims: bool
    correct_bias: bool
    normalize_grads: bool
    skip_first_step: bool
    orthogonalizer: Orthogonalizer

    def check(self) -> None:
        """Raise `ValueError` for a number out of range; traced numbers pass."""
        wanted: dict[str, tuple[Callable[[Any], bool], str]] = {
            "b1": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
            "b2": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
            "factor_decay": (lambda x: 0 <= x <= 1, "between 0 and 1"),
            "eps": (lambda x: 0 <= x < math.inf, "a finite number of at least 0"),
            "precondition_frequency": (
                lambda x: 1 <= x < math.inf and x == int(x),
                "a whole number of at least 1",
            ),
            "max_precond_dim": (lambda x: x >= 0, "at least 0"),
        }
        for name, (allowed, text) in wanted.items():
            value = getattr(self, name)
            if isinstance(value, int | float) and not allowed(value):
                raise ValueError(f"{name} is {value}; it must be {text}")
        check_choice("orthogonalizer", self.orthogonalizer, ORTHOGONALIZERS)

    def shape_of(self, x: Any) -> tuple[int, ...]:
        """The shape in which a leaf is updated."""
        merges = self.merge_dims and self.max_precond_dim > 0
        return merged_shape(x.shape, self.max_precond_dim) if merges else x.shape

    def step(
        self, count: Array, grads: list[Array], leaves: list[TensorLeaf]
    ) -> tuple[list[Array], list[TensorLeaf]]:
        """Take one gradient.

        Args:
          count: Gradients seen before this one.
          grads: One a leaf, in its shape and dtype.
          leaves: State of each leaf.

        Returns:
          The directions, 0 where nothing is applied, and the new leaves.
        """
        # Conditions on the shared counter stay branches when members are vmapped.
        updates_due = count + (0 if self.skip_first_step else 1)
        refreshing = (count > 0) & (updates_due % self.precondition_frequency == 0)
        pairs = [self.take_up(g, x) for g, x in zip(grads, leaves, strict=True)]
        new = _if_due(count == 0, self.started, [leaf for _, leaf in pairs])
        pairs = [self.moved(g, x) for (g, _), x in zip(pairs, new, strict=True)]
        new = _if_due(refreshing, self.refreshed, [leaf for _, leaf in pairs])
        return [direction for direction, _ in pairs], new

    def take_up(self, grad: Array, leaf: TensorLeaf) -> tuple[Array, TensorLeaf]:
        """The gradient, zero if refused, and the leaf with its factors advanced."""
        finite = jnp.isfinite(jnp.sum(jnp.square(grad)))
        clean = jnp.where(finite, grad, 0)
        weight = gradient_weight(self.factor_decay)
        factors = _map_modes(
            lambda k, x: self.factor_decay * x + weight * mode_gram(clean, k), leaf.factors
        )
        for x in jax.tree.leaves(factors):  # sums may overflow where the gradient does not
            finite &= trace_in_range(x)
        starts, runs = finite & (leaf.age == 0), finite & (leaf.age > 0)
        return jnp.where(finite, clean, 0), leaf._replace(
            finite=finite,
            runs=runs,
            starts=starts,
            moves=runs if self.skip_first_step else runs | starts,
            factors=_where(runs | starts, factors, leaf.factors),
        )

    def started(self, leaf: TensorLeaf, earlier: Array | None) -> tuple[TensorLeaf, Array]:
        """The leaf with its first bases, and the last decomposition."""
        bases = list(leaf.bases)
        for k, x in _present(leaf.factors):
            earlier = bases[k] = eigenbasis(serialize_after(x, earlier))
        assert earlier is not None
        return leaf._replace(bases=_where(leaf.starts, tuple(bases), leaf.bases)), earlier

    def moved(self, grad: Array, leaf: TensorLeaf) -> tuple[Array, TensorLeaf]:
        """The direction, and the leaf with its moments advanced."""
        in_basis = _into(leaf.bases, grad)
        mu = self.b1 * leaf.mu + (1 - self.b1) * in_basis
        nu = self.b2 * leaf.nu + (1 - self.b2) * jnp.square(in_basis)
        size = jnp.sqrt(nu) + self.eps
        direction = _out_of(leaf.bases, mu / jnp.where(size > 0, size, 1))
        if self.normalize_grads:
            direction = direction / (1e-30 + jnp.sqrt(jnp.mean(jnp.square(direction))))
        if self.correct_bias:
            t = jnp.maximum(leaf.age, 1).astype(mu.dtype)
            correction = jnp.sqrt(one_minus_power(self.b2, t)) / one_minus_power(self.b1, t)
            direction = correction * direction
        return jnp.where(leaf.moves, direction, 0), leaf._replace(
            age=leaf.age + leaf.starts + leaf.moves,
            mu=jnp.where(leaf.moves, mu, leaf.mu),
            nu=jnp.where(leaf.moves, nu, leaf.nu),
        )

    def refreshed(self, leaf: TensorLeaf, earlier: Array | None) -> tuple[TensorLeaf, Array]:
        """The leaf in new bases, and the last decomposition."""
        nu, bases = leaf.nu, list(leaf.bases)
        for k, x in _present(leaf.factors):
            earlier, order = refresh_eigenbasis(
                serialize_after(x, earlier),
                leaf.bases[k],
                orthogonalizer=self.orthogonalizer,
                precision="highest",
            )
            bases[k] = earlier
            nu = jnp.take(nu, order, axis=k)
        assert earlier is not None
        mu = _into(bases, _out_of(leaf.bases, leaf.mu))
        return _where(leaf.runs, leaf._replace(mu=mu, nu=nu, bases=tuple(bases)), leaf), earlier


def _if_due(
    due: Array,
    fn: Callable[[TensorLeaf, Array | None], tuple[TensorLeaf, Array]],
    leaves: list[TensorLeaf],
) -> list[TensorLeaf]:
    """`fn` of the leaves that have a factor, one after the other, if `due`.

    The others stay outside of the branch, which would copy them.
    """
    having = [i for i, leaf in enumerate(leaves) if _present(leaf.factors)]
    if not having:
        return leaves

    def in_turn(old: list[TensorLeaf]) -> list[TensorLeaf]:
        new, earlier = [], None
        for leaf in old:
            leaf, earlier = fn(leaf, earlier)
            new.append(leaf)
        return new

    taken = lax.cond(due, in_turn, lambda old: old, [leaves[i] for i in having])
    new = dict(zip(having, taken, strict=True))
    return [new.get(i, leaf) for i, leaf in enumerate(leaves)]


def _present(modes: Sequence[Any]) -> list[tuple[int, Array]]:
    return [(k, x) for k, x in enumerate(modes) if not isinstance(x, optax.MaskedNode)]


def _map_modes(fn: Callable[[int, Array], Array], modes: Modes) -> Modes:
    new = list(modes)
    for k, x in _present(modes):
        new[k] = fn(k, x)
    return tuple(new)


def _where(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _into(bases: Sequence[Any], x: Array) -> Array:
    for k, q in _present(bases):
        x = mode_product(x, q.T, k)
    return x


def _out_of(bases: Sequence[Any], x: Array) -> Array:
    for k, q in _present(bases):
        x = mode_product(x, q, k)
    return x
