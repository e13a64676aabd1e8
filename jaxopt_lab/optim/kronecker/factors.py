"""How the Kronecker factors of a leaf start from its first gradient and follow the later ones."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxopt_lab.core.kronecker import INTEGRATORS, StartScale, nearest_kronecker
from jaxopt_lab.core.modes import mode_gram
from jaxopt_lab.core.numerics import Scalar, safe_divide
from jaxopt_lab.core.ordering import serialize_after
from jaxopt_lab.core.precision import ProductPrecision, gram
from jaxopt_lab.core.spectral import complete_basis, eigenbasis, trace_in_range
from jaxopt_lab.optim.kronecker.leaves import Sides

# Frobenius norm of the start "eps" of the released code.
_EPS_START = 1e-3

# Marks a field that is no number; the others may be traced.
STATIC: dict[str, Any] = {"static": True}


class FactorRule(Protocol):
    """What `EigenbasisAdam` asks of a method."""

    @property
    def decay(self) -> Scalar:
        """Of the factors."""
        ...

    @property
    def waits_for_gradient(self) -> bool:
        """Whether a matrix with factors on all sides has not started while its gradient is zero."""
        ...

    @property
    def may_overflow(self) -> bool:
        """Whether factors may leave the range of floats although no gradient does."""
        ...

    def initial(self, size: int, all_sides: bool) -> float:
        """Multiple of the identity that a factor is before the first gradient."""
        ...

    def in_range(self, factors: Sides) -> Array:
        """Whether nothing overflows that is formed of the factors, a matrix."""
        ...

    def start(self, factors: Sides, grad: Array) -> Sides:
        """Factors before the first step, from the first gradient."""
        ...

    def step(self, factors: Sides, grad: Array) -> Sides:
        """Factors after one gradient."""
        ...

    def bases(self, factors: Sides, grad: Array) -> Sides:
        """Eigenbases of the factors after the first step, from where they start."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GramFactors:
    r"""SOAP's factors: averages of $G_{(k)} G_{(k)}^\top$ over the unfoldings, from zero."""

    decay: Scalar
    precision: ProductPrecision = field(metadata=STATIC)
    # Frobenius norm of the start.
    identity: float = field(default=0.0, metadata=STATIC)

    waits_for_gradient = False

    @property
    def may_overflow(self) -> bool:
        """See `FactorRule`."""
        return not _averages(self.decay)

    def initial(self, size: int, all_sides: bool) -> float:
        """See `FactorRule`."""
        return self.identity / size**0.5

    def in_range(self, factors: Sides) -> Array:
        """See `FactorRule`."""
        fits = jnp.array(True)
        for factor in factors:
            if factor is not None:
                fits = fits & trace_in_range(factor)
        return fits

    def start(self, factors: Sides, grad: Array) -> Sides:
        """See `FactorRule`."""
        return factors

    def step(self, factors: Sides, grad: Array) -> Sides:
        """See `FactorRule`."""
        weight = gradient_weight(self.decay)
        return tuple(
            None if x is None else self.decay * x + weight * self._gram(grad, k)
            for k, x in enumerate(factors)
        )

    def bases(self, factors: Sides, grad: Array) -> Sides:
        """See `FactorRule`."""
        # The start is a multiple of the identity: one gradient decides about all eigenvectors.
        bases: list[Array | None] = []
        for k, factor in enumerate(factors):
            seen = None if factor is None else serialize_after(self._gram(grad, k), *bases)
            bases.append(None if seen is None else eigenbasis(seen))
        return tuple(bases)

    def _gram(self, grad: Array, side: int) -> Array:
        if grad.ndim == 3:  # a stack of matrices
            return gram(grad, self.precision, transpose=side == 1)
        return jax.vmap(partial(mode_gram, axis=side))(grad)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KroneckerFactors:
    """DyKAF's factors: the tracked best Kronecker approximation of the second moment."""

    decay: Scalar
    single: GramFactors  # where one side has no factor
    precision: ProductPrecision = field(metadata=STATIC)
    integrator: str = field(metadata=STATIC)
    init: str = field(metadata=STATIC)  # "kron" or "eps"
    kron_init_scale: StartScale = field(default="sigma", metadata=STATIC)

    @property
    def waits_for_gradient(self) -> bool:
        """See `FactorRule`."""
        return self.init == "kron"

    @property
    def may_overflow(self) -> bool:
        """See `FactorRule`."""
        return not _averages(self.decay) or self.single.may_overflow

    def initial(self, size: int, all_sides: bool) -> float:
        """See `FactorRule`."""
        if not all_sides:
            return self.single.initial(size, all_sides)
        return _EPS_START / size**0.5 if self.init == "eps" else 0.0

    def in_range(self, factors: Sides) -> Array:
        """See `FactorRule`."""
        rows, columns = factors
        if rows is None or columns is None:
            return self.single.in_range(factors)
        return trace_in_range(rows, columns)

    def start(self, factors: Sides, grad: Array) -> Sides:
        """See `FactorRule`."""
        rows, columns = factors
        if self.init == "eps" or rows is None or columns is None:
            return factors
        return nearest_kronecker(grad, self.kron_init_scale)

    def step(self, factors: Sides, grad: Array) -> Sides:
        """See `FactorRule`."""
        rows, columns = factors
        if rows is None or columns is None:
            return self.single.step(factors, grad)
        return INTEGRATORS[self.integrator](
            rows,
            columns,
            grad,
            decay=self.decay,
            weight=gradient_weight(self.decay),
            precision=self.precision,
            balanced=True,
        )

    def bases(self, factors: Sides, grad: Array) -> Sides:
        """See `FactorRule`."""
        rows, columns = factors
        if self.init == "eps" or rows is None or columns is None:
            return self.single.bases(factors, grad)
        # The step after this start keeps its rank of one: a column is the eigenvector, and of the
        # bases of the rest the one nearest to the identity is taken.
        return complete_basis(_leading_column(rows)), complete_basis(_leading_column(columns))


def gradient_weight(decay: Scalar) -> Scalar:
    """The weight of a new gradient beside a decay: 1 - decay, and 1 beside a plain sum."""
    if isinstance(decay, int | float):
        return 1.0 if decay == 1 else 1 - decay
    return jnp.where(decay == 1, 1, 1 - decay)


def _averages(decay: Scalar) -> bool:
    """Whether squares of gradients are averaged, which cannot outgrow them; traced: unknown."""
    return isinstance(decay, int | float) and decay < 1


def _leading_column(factor: Array) -> Array:
    diagonal = jnp.diagonal(factor, axis1=-2, axis2=-1)
    index = jnp.argmax(diagonal, axis=-1)[..., None, None]
    column = jnp.take_along_axis(factor, index, axis=-1)[..., 0]
    column = safe_divide(column, jnp.max(jnp.abs(column), axis=-1, keepdims=True))
    return safe_divide(column, jnp.sqrt(jnp.sum(jnp.square(column), axis=-1, keepdims=True)))
