"""Second moments too large to form, known through gradients or through random products."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxopt_lab.core.precision import matmul
from jaxopt_lab.diagnostics.fisher import (
    ApproximationErrors,
    FullFisher,
    approximation_errors,
    errors_of,
    norm,
    unit_entries,
    unit_norm,
)


class SampledFisher(NamedTuple):
    r"""$F = \sum_i w_i \operatorname{vec} G_i \operatorname{vec} G_i^\top$ from its gradients.

    Everything is exact, from products of the size of a gradient and the Gram matrix of the sample:
    a thousand gradients of a layer that fits into memory are no problem. The second moment is that
    of the sample, of rank at most its length.

    Example:
      >>> grads = jax.random.normal(jax.random.key(0), (10, 3, 4))
      >>> fisher = SampledFisher(grads, moving_average_weights(10, 0.9))
      >>> left, right = fisher.best_kronecker()
      >>> best = fisher.kronecker_errors(left, right)
      >>> bool(best.relative < fisher.kronecker_errors(jnp.eye(3), right).rescaled)
      True
    """

    grads: Float[Array, "samples m n"]
    weights: Float[Array, "samples"]  # not negative

    def kronecker_errors(
        self, left: Float[Array, "m m"], right: Float[Array, "n n"]
    ) -> ApproximationErrors:
        """Errors of the Kronecker product of two factors."""
        scale, unit = self._unit()
        cosine = jnp.sum(unit.row_product(unit_norm(right)) * unit_norm(left)) / unit.norm()
        # Each factor in the units of a gradient: their product may be out of range.
        return errors_of((norm(left) / scale) * (norm(right) / scale) / unit.norm(), cosine)

    def eigenbasis_errors(
        self,
        values: Float[Array, "m n"],
        left_basis: Float[Array, "m m"],
        right_basis: Float[Array, "n n"],
    ) -> ApproximationErrors:
        """Errors of Q diag(V) Q^T."""
        scale, unit = self._unit()
        diagonal = unit.diagonal(left_basis, right_basis)
        cosine = jnp.sum(diagonal * unit_norm(values)) / unit.norm()
        return errors_of(norm(values) / scale / scale / unit.norm(), cosine)

    def diagonal_mass(
        self, left_basis: Float[Array, "m m"], right_basis: Float[Array, "n n"]
    ) -> Float[Array, ""]:
        """Share of the norm on the diagonal in a Kronecker basis."""
        _, unit = self._unit()
        return norm(unit.diagonal(left_basis, right_basis)) / unit.norm()

    def best_kronecker(
        self, *, tolerance: float = 1e-5, max_iterations: int = 300
    ) -> tuple[Float[Array, "m m"], Float[Array, "n n"]]:
        """The nearest Kronecker product, balanced, by alternating products from the identity.

        Args:
          tolerance: Stop when a sweep moves the unit right factor by less.
          max_iterations: Sweeps after which to stop anyway.
        """
        scale, unit = self._unit()

        def sweep(carry):
            right, _, count = carry
            left = unit_norm(unit.row_product(right))
            new = unit_norm(unit.column_product(left))
            return new, jnp.linalg.norm(new - right), count + 1

        def going(carry):
            return (carry[1] > tolerance) & (carry[2] < max_iterations)

        start = unit_norm(jnp.eye(self.grads.shape[-1], dtype=self.grads.dtype))
        infinite = jnp.asarray(jnp.inf, start.dtype)
        right, _, _ = jax.lax.while_loop(going, sweep, (start, infinite, 0))
        left = unit_norm(unit.row_product(right))
        right = unit.column_product(left)
        root = scale * jnp.sqrt(norm(right))
        return root * left, root * unit_norm(right)

    def norm(self) -> Float[Array, ""]:
        """Norm of the matrix."""
        vectors = self.grads.reshape(self.grads.shape[0], -1)
        squares = jnp.square(matmul(vectors, vectors.T))
        return jnp.sqrt(_einsum("i,ij,j->", self.weights, squares, self.weights))

    def row_product(self, x: Float[Array, "n n"]) -> Float[Array, "m m"]:
        """The rearranged matrix times vec(X)."""
        weighted = self.weights[:, None, None] * self.grads
        return _einsum("sij,jl,skl->ik", weighted, x, self.grads)

    def column_product(self, y: Float[Array, "m m"]) -> Float[Array, "n n"]:
        """The transposed rearranged matrix times vec(Y)."""
        weighted = self.weights[:, None, None] * self.grads
        return _einsum("sij,ik,skl->jl", weighted, y, self.grads)

    def diagonal(
        self, left_basis: Float[Array, "m m"], right_basis: Float[Array, "n n"]
    ) -> Float[Array, "m n"]:
        """diag(Q^T F Q) in the shape of the layer: the second moment in the eigenbasis."""
        rotated = _rotate(left_basis, self.grads, right_basis)
        return _einsum("s,sij->ij", self.weights, jnp.square(rotated))

    def form(self) -> FullFisher:
        """The matrix in full."""
        return FullFisher(_einsum("s,sij,skl->ijkl", self.weights, self.grads, self.grads))

    def _unit(self) -> "tuple[Array, SampledFisher]":
        """Units of a gradient, and the sample in them: fourth powers need the room."""
        scale = jnp.max(jnp.abs(self.grads))
        scale = jnp.where(scale > 0, scale, 1)
        return scale, self._replace(grads=self.grads / scale)


class ProbedFisher(NamedTuple):
    """A second moment known through its products with random vectors.

    Norms are estimated from the products, so every error has a relative sampling error of about the
    inverse root of the number of probes times the effective rank of what is measured. The best
    Kronecker product cannot be found from few probes; `SampledFisher` has it.
    """

    probes: Float[Array, "probes m n"]  # z, zero mean and unit covariance
    products: Float[Array, "probes m n"]  # F z

    @classmethod
    def of(
        cls,
        product: Callable[[Float[Array, "m n"]], Float[Array, "m n"]],
        shape: tuple[int, int],
        *,
        probes: int,
        key: Key[Array, ""],
    ) -> "ProbedFisher":
        """Takes the products with random signs.

        Args:
          product: The product with F of one vector in the shape of the layer.
          shape: (m, n).
          probes: Number of vectors; they are taken one after the other.
          key: Randomness.
        """
        z = jax.random.rademacher(key, (probes, *shape), jnp.float32)
        return cls(z, jax.lax.map(product, z))

    def kronecker_errors(
        self, left: Float[Array, "m m"], right: Float[Array, "n n"]
    ) -> ApproximationErrors:
        """Estimated errors of the Kronecker product of two symmetric factors."""
        # Symmetric factors: the rotation by them is the product with them.
        return approximation_errors(self.products, _rotate(left, self.probes, right))

    def eigenbasis_errors(
        self,
        values: Float[Array, "m n"],
        left_basis: Float[Array, "m m"],
        right_basis: Float[Array, "n n"],
    ) -> ApproximationErrors:
        """Estimated errors of Q diag(V) Q^T."""
        rotated = values * _rotate(left_basis, self.probes, right_basis)
        back = _rotate(left_basis.T, rotated, right_basis.T)
        return approximation_errors(self.products, back)

    def diagonal_mass(
        self, left_basis: Float[Array, "m m"], right_basis: Float[Array, "n n"]
    ) -> Float[Array, ""]:
        """Estimated share of the norm on the diagonal; needs two probes.

        The diagonal is the mean of (Q^T F z) ∘ (Q^T z). Its square is taken between different
        probes alone: the square of the mean would count the noise as diagonal.
        """
        count = self.probes.shape[0]
        products = unit_entries(self.products)
        z, fz = (_rotate(left_basis, x, right_basis) for x in (self.probes, products))
        estimates = z * fz
        whole = jnp.sum(jnp.square(jnp.sum(estimates, axis=0)))
        crossed = (whole - jnp.sum(jnp.square(estimates))) / (count * (count - 1))
        mean_square = jnp.sum(jnp.square(products)) / count
        return jnp.sqrt(jnp.maximum(crossed, 0) / mean_square)


def moving_average_weights(samples: int, decay: float) -> Float[Array, "samples"]:
    """Weights of an exponential average that starts with its first gradient at full weight.

    Args:
      samples: Number of gradients, the newest last.
      decay: $b$; 1 is the plain sum, the weight of a new gradient is 1 - b otherwise.
    """
    ages = jnp.arange(samples - 1, -1, -1)
    weights = jnp.where(ages == samples - 1, 1.0, 1.0 if decay == 1 else 1 - decay)
    return weights * jnp.asarray(decay, jnp.result_type(float)) ** ages


_einsum = functools.partial(jnp.einsum, precision="highest")


def _rotate(
    left: Float[Array, "m m"], x: Float[Array, "stack m n"], right: Float[Array, "n n"]
) -> Float[Array, "stack m n"]:
    """Q_L^T X Q_R."""
    return _einsum("ki,skl,lj->sij", left, x, right)
