"""How the Kronecker factors of a matrix start from its first gradient and follow the later ones."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxopt_lab.core.kronecker import INTEGRATORS, StartScale, nearest_kronecker
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.core.ordering import serialize_after
from jaxopt_lab.core.precision import ProductPrecision, gram
from jaxopt_lab.core.spectral import complete_basis, eigenbasis, trace_in_range
from jaxopt_lab.optim.kronecker.sides import Pair, Side

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
        """Whether a matrix whose gradient is zero has not started."""
        ...

    def initial(self, size: int, two_sided: bool) -> float:
        """Multiple of the identity that a factor is before the first gradient."""
        ...

    def in_range(self, factors: Pair) -> Array | None:
        """Whether nothing overflows that is formed of the factors, a matrix; None: it cannot."""
        ...

    def start(self, factors: Pair, grad: Array) -> Pair:
        """Factors before the first step, from the first gradient."""
        ...

    def step(self, factors: Pair, grad: Array) -> Pair:
        """Factors after one gradient."""
        ...

    def bases(self, factors: Pair, grad: Array) -> Pair:
        """Eigenbases of the factors after the first step, from where they start."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GramFactors:
    r"""SOAP's factors: averages of $G G^\top$ and $G^\top G$, from zero."""

    decay: Scalar
    weight: Scalar
    precision: ProductPrecision = field(metadata=STATIC)
    # Frobenius norm of the start.
    identity: float = field(default=0.0, metadata=STATIC)

    waits_for_gradient = False

    def initial(self, size: int, two_sided: bool) -> float:
        """See `FactorRule`."""
        return self.identity / size**0.5

    def in_range(self, factors: Pair) -> Array | None:
        """See `FactorRule`."""
        if _averages(self.decay):
            return None
        fits = jnp.array(True)
        for factor in factors:
            if factor is not None:
                fits = fits & trace_in_range(factor)
        return fits

    def start(self, factors: Pair, grad: Array) -> Pair:
        """See `FactorRule`."""
        return factors

    def step(self, factors: Pair, grad: Array) -> Pair:
        """See `FactorRule`."""

        def follow(factor: Side, transpose: bool) -> Side:
            if factor is None:
                return None
            seen = gram(grad, self.precision, transpose=transpose)
            return self.decay * factor + self.weight * seen

        return follow(factors[0], False), follow(factors[1], True)

    def bases(self, factors: Pair, grad: Array) -> Pair:
        """See `FactorRule`."""
        # The start is a multiple of the identity: one gradient decides about all eigenvectors.
        rows, columns = factors
        if rows is not None:
            rows = eigenbasis(gram(grad, self.precision))
        if columns is not None:
            columns = eigenbasis(serialize_after(gram(grad, self.precision, transpose=True), rows))
        return rows, columns


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KroneckerFactors:
    """DyKAF's factors: the tracked best Kronecker approximation of the second moment."""

    decay: Scalar
    weight: Scalar
    single: GramFactors  # where one side has no factor
    precision: ProductPrecision = field(metadata=STATIC)
    integrator: str = field(metadata=STATIC)
    init: str = field(metadata=STATIC)  # "kron" or "eps"
    kron_init_scale: StartScale = field(metadata=STATIC)

    @property
    def waits_for_gradient(self) -> bool:
        """See `FactorRule`."""
        return self.init == "kron"

    def initial(self, size: int, two_sided: bool) -> float:
        """See `FactorRule`."""
        if not two_sided:
            return self.single.initial(size, two_sided)
        return _EPS_START / size**0.5 if self.init == "eps" else 0.0

    def in_range(self, factors: Pair) -> Array | None:
        """See `FactorRule`."""
        rows, columns = factors
        if rows is None or columns is None:
            return self.single.in_range(factors)
        return None if _averages(self.decay) else trace_in_range(rows, columns)

    def start(self, factors: Pair, grad: Array) -> Pair:
        """See `FactorRule`."""
        if self.init == "eps" or _is_single(factors):
            return factors
        return nearest_kronecker(grad, self.kron_init_scale)

    def step(self, factors: Pair, grad: Array) -> Pair:
        """See `FactorRule`."""
        rows, columns = factors
        if rows is None or columns is None:
            return self.single.step(factors, grad)
        integrate = INTEGRATORS[self.integrator]
        return integrate(
            rows,
            columns,
            grad,
            decay=self.decay,
            weight=self.weight,
            precision=self.precision,
            balanced=True,
        )

    def bases(self, factors: Pair, grad: Array) -> Pair:
        """See `FactorRule`."""
        if self.init == "eps" or _is_single(factors):
            return self.single.bases(factors, grad)
        # The step after this start keeps its rank of one: a column is the eigenvector, and of the
        # bases of the rest the one nearest to the identity is taken.
        rows, columns = (complete_basis(_leading_column(x)) for x in factors)
        return rows, columns


def _averages(decay: Scalar) -> bool:
    """Whether squares of gradients are averaged, which cannot outgrow them; traced: unknown."""
    return isinstance(decay, int | float) and decay < 1


def _is_single(factors: Pair) -> bool:
    return factors[0] is None or factors[1] is None


def _leading_column(factor: Side) -> Array:
    assert factor is not None
    diagonal = jnp.diagonal(factor, axis1=-2, axis2=-1)
    index = jnp.argmax(diagonal, axis=-1)[..., None, None]
    column = jnp.take_along_axis(factor, index, axis=-1)[..., 0]
    largest = jnp.max(jnp.abs(column), axis=-1, keepdims=True)
    column = column / jnp.where(largest > 0, largest, 1)
    length = jnp.sqrt(jnp.sum(jnp.square(column), axis=-1, keepdims=True))
    return column / jnp.where(length > 0, length, 1)
