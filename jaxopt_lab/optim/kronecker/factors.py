"""How the Kronecker factors of a leaf start from its first gradient and follow the later ones."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxopt_lab.core.kronecker import INTEGRATORS, StartScale, nearest_kronecker
from jaxopt_lab.core.numerics import Scalar, frobenius_unit
from jaxopt_lab.core.precision import ProductPrecision, grams
from jaxopt_lab.core.spectral import complete_basis, eigenbases, trace_in_range

Sides = tuple[Array | None, ...]  # of a stack; None: that side has no factor

# Frobenius norm of the start "eps" of the released code.
_EPS_START = 1e-3

# Marks a field that is no number; the others may be traced.
STATIC: dict[str, Any] = {"static": True}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GramFactors:
    r"""SOAP's factors: averages of $G_{(k)} G_{(k)}^\top$ over the unfoldings, from zero."""

    decay: Scalar
    precision: ProductPrecision = field(metadata=STATIC)
    # Frobenius norm of the start.
    identity: float = field(default=0.0, metadata=STATIC)

    waits_for_gradient = False  # before a matrix starts

    @property
    def may_overflow(self) -> bool:
        """Whether factors may leave the range of floats although no gradient does."""
        return not _averages(self.decay)

    def initial(self, size: int, all_sides: bool) -> float:
        """Multiple of the identity that a factor is before the first gradient."""
        return self.identity / size**0.5

    def start(self, factors: Sides, grad: Array) -> tuple[Sides, Sides]:
        """Factors before the first step, and bases after it, from the first gradient."""
        # The start is a multiple of the identity: one gradient decides about all eigenvectors.
        seen = grams(grad, [x is not None for x in factors], self.precision)
        return factors, eigenbases(seen)

    def step(self, factors: Sides, grad: Array) -> tuple[Sides, Array | None]:
        """Factors after a gradient, and whether nothing formed of them overflows; None: yes."""
        weight = gradient_weight(self.decay)
        seen = grams(grad, [x is not None for x in factors], self.precision)
        new = tuple(None if x is None else self.decay * x + weight * y
                    for x, y in zip(factors, seen, strict=True))  # fmt: skip
        if not self.may_overflow:
            return new, None
        fits = [trace_in_range(x) for x in new if x is not None]
        return new, jnp.all(jnp.stack(fits), axis=0) if fits else None


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
        """Whether a matrix with both factors starts at its first gradient that is not zero."""
        return self.init == "kron"

    @property
    def may_overflow(self) -> bool:
        """Whether factors may leave the range of floats although no gradient does."""
        return not _averages(self.decay) or self.single.may_overflow

    def initial(self, size: int, all_sides: bool) -> float:
        """Multiple of the identity that a factor is before the first gradient."""
        if not all_sides:
            return self.single.initial(size, all_sides)
        return _EPS_START / size**0.5 if self.init == "eps" else 0.0

    def start(self, factors: Sides, grad: Array) -> tuple[Sides, Sides]:
        """Factors before the first step, and bases after it, from the first gradient."""
        if self.init == "eps" or any(x is None for x in factors):
            return self.single.start(factors, grad)
        # The step after this start keeps its rank of one: a column is the eigenvector, and of the
        # bases of the rest the one nearest to the identity is taken.
        rows, columns = nearest_kronecker(grad, self.kron_init_scale)
        bases = complete_basis(_leading_column(rows)), complete_basis(_leading_column(columns))
        return (rows, columns), bases

    def step(self, factors: Sides, grad: Array) -> tuple[Sides, Array | None]:
        """Factors after a gradient, and whether nothing formed of them overflows; None: yes."""
        rows, columns = factors
        if rows is None or columns is None:
            return self.single.step(factors, grad)
        new = INTEGRATORS[self.integrator](
            rows,
            columns,
            grad,
            decay=self.decay,
            weight=gradient_weight(self.decay),
            precision=self.precision,
            balanced=True,
        )
        return new, trace_in_range(*new) if self.may_overflow else None


FactorRule = GramFactors | KroneckerFactors


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
    return frobenius_unit(jnp.take_along_axis(factor, index, axis=-1)[..., 0], -1)
