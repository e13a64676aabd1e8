r"""How well Kronecker factors and eigenbases approximate the second moment of the gradients.

Let $F$ be the (mn, mn) second moment of $\operatorname{vec}(G)$ (row-major) for gradients $G$ of
shape (m, n): the empirical Fisher matrix of one layer. Optimizers approximate it by $L \otimes R$,
or by $Q \operatorname{diag}(V) Q^\top$ with $Q = Q_L \otimes Q_R$. Each has its own scale (sums,
averages, powers of the gradient), so what is measured here does not depend on it, or says both:

===============  ======================================================================
relative         $\|F - X\| / \|F\|$
rescaled         $\min_c \|F - c X\| / \|F\|$
distance         the same two between $L \otimes R$ and the best Kronecker product
diagonal mass    $\|\operatorname{diag}(Q^\top F Q)\| / \|F\|$, 1 where $Q$ diagonalises $F$
===============  ======================================================================

All norms are Frobenius. $F$ comes in three forms with the same methods: formed in full
(`FullFisher`, small layers), as the weighted sum over a sample of gradients (`SampledFisher`, exact
and never formed), or known through products with random vectors alone (`ProbedFisher`, estimates).

Source: Yudin, Grishina, Veprikov, Beznosikov and Rakhuba, "DyKAF: Dynamical Kronecker Approximation
of the Fisher Information Matrix for Gradient Preconditioning", arXiv 2511.06477. Differs from the
released diagnostic, which compares a plain sum with an average, in being free of scale.
"""

from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxopt_lab.core.kronecker import rearrange
from jaxopt_lab.core.precision import matmul


class ApproximationErrors(NamedTuple):
    """Errors of one approximation; NaN where the exact matrix is zero."""

    relative: Float[Array, ""]  # as it is
    rescaled: Float[Array, ""]  # after the best scalar
    scalar: Float[Array, ""]  # that scalar; 0 for an approximation that is zero


class Fisher(Protocol):
    """A second moment, in whatever form it is known."""

    def kronecker_errors(
        self, left: Float[Array, "m m"], right: Float[Array, "n n"]
    ) -> ApproximationErrors:
        """Errors of the Kronecker product of two factors."""
        ...

    def eigenbasis_errors(
        self,
        values: Float[Array, "m n"],
        left_basis: Float[Array, "m m"],
        right_basis: Float[Array, "n n"],
    ) -> ApproximationErrors:
        """Errors of Q diag(V) Q^T."""
        ...

    def diagonal_mass(
        self, left_basis: Float[Array, "m m"], right_basis: Float[Array, "n n"]
    ) -> Float[Array, ""]:
        """Share of the norm on the diagonal in a Kronecker basis."""
        ...


class FullFisher(NamedTuple):
    """A second moment formed in full, for layers of a few hundred weights.

    Example:
      >>> fisher = FullFisher(jnp.kron(jnp.eye(2), jnp.ones((3, 3))).reshape(2, 3, 2, 3))
      >>> left, right = fisher.best_kronecker()
      >>> bool(fisher.kronecker_errors(left, right).relative < 1e-6)
      True
    """

    entries: Float[Array, "m n m n"]

    @property
    def matrix(self) -> Float[Array, "mn mn"]:
        """The matrix itself."""
        m, n = self.entries.shape[:2]
        return self.entries.reshape(m * n, m * n)

    def kronecker_errors(
        self, left: Float[Array, "m m"], right: Float[Array, "n n"]
    ) -> ApproximationErrors:
        """Errors of the Kronecker product of two factors."""
        product = left[:, None, :, None] * right[None, :, None, :]
        return approximation_errors(self.entries, product)

    def eigenbasis_errors(
        self,
        values: Float[Array, "m n"],
        left_basis: Float[Array, "m m"],
        right_basis: Float[Array, "n n"],
    ) -> ApproximationErrors:
        """Errors of Q diag(V) Q^T."""
        q = jnp.kron(left_basis, right_basis)
        return approximation_errors(self.matrix, matmul(q * values.reshape(-1), q.T))

    def diagonal(
        self, left_basis: Float[Array, "m m"], right_basis: Float[Array, "n n"]
    ) -> Float[Array, "m n"]:
        """diag(Q^T F Q) in the shape of the layer: the exact second moment in the eigenbasis."""
        q = jnp.kron(left_basis, right_basis)
        diagonal = jnp.sum(q * matmul(self.matrix, q), axis=0)
        return diagonal.reshape(self.entries.shape[:2])

    def diagonal_mass(
        self, left_basis: Float[Array, "m m"], right_basis: Float[Array, "n n"]
    ) -> Float[Array, ""]:
        """Share of the norm on the diagonal in a Kronecker basis."""
        unit = FullFisher(unit_entries(self.entries))
        return jnp.linalg.norm(unit.diagonal(left_basis, right_basis)) / norm(unit.entries)

    def best_kronecker(self) -> tuple[Float[Array, "m m"], Float[Array, "n n"]]:
        """The nearest Kronecker product, balanced, from the decomposition of the rearrangement."""
        m, n = self.entries.shape[:2]
        u, s, vt = jnp.linalg.svd(rearrange(self.matrix, m, n), full_matrices=False)
        root = jnp.sqrt(s[0])
        left, right = root * u[:, 0].reshape(m, m), root * vt[0].reshape(n, n)
        sign = jnp.where(jnp.trace(left) < 0, -1, 1)
        return sign * left, sign * right


def approximation_errors(
    exact: Float[Array, "..."], approximation: Float[Array, "..."]
) -> ApproximationErrors:
    """Errors of an approximation of the same shape, both given entry by entry.

    With two stacks of products with the same random vectors (F z and X z) instead of F and X, these
    are estimates of the errors of X.
    """
    size = jnp.max(jnp.abs(exact))
    exact, length = exact / size, norm(approximation) / size
    direction = unit_norm(approximation)
    best = jnp.vdot(exact, direction)
    return ApproximationErrors(
        relative=norm(exact - length * direction) / norm(exact),
        rescaled=norm(exact - best * direction) / norm(exact),
        scalar=jnp.where(length > 0, best / jnp.where(length > 0, length, 1), 0),
    )


def kronecker_distance(
    left: Float[Array, "m m"],
    right: Float[Array, "n n"],
    reference: tuple[Float[Array, "m m"], Float[Array, "n n"]],
) -> ApproximationErrors:
    """Errors of one Kronecker product as an approximation of another, from the factors alone.

    Args:
      left: $L$.
      right: $R$.
      reference: The factors to compare with, the best ones say.
    """
    cosine = 1.0
    ratio = 1.0
    for factor, wanted in zip((left, right), reference, strict=True):
        cosine = cosine * jnp.sum(unit_norm(factor) * unit_norm(wanted))
        ratio = ratio * norm(factor) / norm(wanted)
    return errors_of(ratio, cosine)


def basis_distance(
    bases: tuple[Float[Array, "m m"], Float[Array, "n n"]],
    reference: tuple[Float[Array, "m m"], Float[Array, "n n"]],
) -> Float[Array, ""]:
    r"""Relative distance of two Kronecker bases $Q_L \otimes Q_R$, whatever the columns' signs.

    0 for equal bases, near $\sqrt 2$ for unrelated ones. Order and nearly equal eigenvalues count:
    two bases of one eigenspace are far apart although neither is worse.

    Args:
      bases: $(Q_L, Q_R)$, columns ordered.
      reference: The bases to compare with.
    """
    overlap = 1.0
    for basis, wanted in zip(bases, reference, strict=True):
        overlap = overlap * jnp.mean(jnp.abs(jnp.sum(basis * wanted, axis=0)))
    return jnp.sqrt(jnp.maximum(2 - 2 * overlap, 0))


def softmax_hessian(
    probabilities: Float[Array, "batch classes"], features: Float[Array, "batch features"]
) -> FullFisher:
    r"""Mean Hessian of softmax regression, for weights of shape (classes, features).

    With the row-major vec it is the mean of $(\operatorname{diag}(p) - p p^\top) \otimes x x^\top$.

    Args:
      probabilities: Predicted probabilities $p$ of every example.
      features: Features $x$ of every example.
    """
    batch, classes = probabilities.shape
    spread = probabilities[:, :, None] * (jnp.eye(classes) - probabilities[:, None, :])
    entries = jnp.einsum("bik,bj,bl->ijkl", spread, features, features, precision="highest")
    return FullFisher(entries / batch)


def errors_of(ratio: Array | float, cosine: Array | float) -> ApproximationErrors:
    """Errors of an approximation from its relative length and its cosine with the exact matrix.

    In float32 an error below 1e-3 drowns in rounding.
    """
    squared = 1 - 2 * ratio * cosine + jnp.square(ratio)
    rest = (1 - cosine) * (1 + cosine)
    return ApproximationErrors(
        relative=jnp.sqrt(jnp.where(squared < 0, 0, squared)),
        rescaled=jnp.sqrt(jnp.where(rest < 0, 0, rest)),
        scalar=jnp.where(ratio == 0, 0, cosine / jnp.where(ratio == 0, 1, ratio)),
    )


def norm(x: Float[Array, "..."]) -> Float[Array, ""]:
    """Frobenius norm; neither tiny nor huge entries leave the range of float32."""
    scale = jnp.max(jnp.abs(x))
    return scale * jnp.sqrt(jnp.sum(jnp.square(unit_entries(x))))


def unit_norm(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Divided by its norm; 0 for 0."""
    x = unit_entries(x)
    size = jnp.sqrt(jnp.sum(jnp.square(x)))
    return x / jnp.where(size > 0, size, 1)


def unit_entries(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Divided by its largest entry in size; 0 for 0."""
    scale = jnp.max(jnp.abs(x))
    return x / jnp.where(scale > 0, scale, 1)
