"""Spectral tools: norms and estimates from products, eigenbases and their refresh."""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxopt_lab.core.numerics import frobenius_norm, frobenius_unit, safe_divide, scale_to_unit
from jaxopt_lab.core.ordering import serialize_after
from jaxopt_lab.core.orthogonalization import reciprocal
from jaxopt_lab.core.precision import matmul

# Squaring the Gram matrix ten times is 1024 rounds of power iteration.
_SQUARINGS = 10
# Largest scale of a Newton-Schulz step. The best one for ever smaller singular values tends to the
# square root of 3, which sends the largest to zero, where rounding may change its sign; this sends
# it to 0.09.
_MOST_SCALE = 1.7


def power_iteration(
    x: Float[Array, "*batch m n"],
    start: Float[Array, "*batch n"],
    *,
    iterations: int = 3,
    eps: float = 0.0,
) -> Float[Array, "*batch"]:
    r"""Estimate the largest singular value from below.

    Each round takes $u = X v / \lVert X v \rVert$ and then $v = X^\top u / \lVert X^\top u \rVert$;
    the estimate is $\lVert X v \rVert$.

    Args:
      x: Matrices; leading axes are batch.
      start: One start vector a matrix; a Gaussian draw is never orthogonal to the leading one.
      iterations: Number of rounds (static).
      eps: Added to the norms, as released codes do.
    """
    v = start[..., None]
    for _ in range(iterations):
        u = frobenius_unit(x @ v, (-2, -1), eps=eps)
        v = frobenius_unit(x.mT @ u, (-2, -1), eps=eps)
    return jnp.linalg.norm(x @ v, axis=(-2, -1))


def stable_rank(
    x: Float[Array, "*batch m n"],
    start: Float[Array, "*batch n"],
    *,
    iterations: int = 3,
) -> Float[Array, "*batch"]:
    r"""Stable rank $\lVert X \rVert_F^2 / \sigma_1^2$ with $\sigma_1$ estimated; 0 for zero.

    Power iteration underestimates $\sigma_1$, so this overestimates the stable rank. The scale of
    $X$ does not matter.

    Args:
      x: Matrices; leading axes are batch.
      start: Start vectors of the power iteration.
      iterations: Rounds of the power iteration (static).
    """
    x = scale_to_unit(x, (-2, -1))
    sigma = power_iteration(x, start, iterations=iterations)
    return safe_divide(jnp.sum(jnp.square(x), axis=(-2, -1)), jnp.square(sigma))


# Compiled as one: outside `jit` every loop would be compiled anew.
@jax.jit
def spectral_norm(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch"]:
    r"""The largest singular value, to working precision, from matrix products alone.

    With the Gram matrix $A$ of the smaller side it is the root of
    $\operatorname{tr} A^{p + 1} / \operatorname{tr} A^p$, an average of the eigenvalues; at
    $p \approx 1 / \epsilon$, by repeated squaring, whatever is not the largest to a few units of
    round-off has no weight left, and ties do not matter.

    >>> float(spectral_norm(jnp.array([[3.0, 0.0, 0.0], [0.0, -4.0, 0.0]])))
    4.0

    Args:
      x: Matrices, float32 or wider.

    Returns:
      Norms; NaN for a matrix that is not finite.
    """
    unit, scale = _wide_and_unit(x)
    gram = matmul(unit, unit, transpose_b=True)
    power = _squared(gram, round(-math.log2(jnp.finfo(x.dtype).eps)))
    average = jnp.sum(gram * power * reciprocal(_traces(power)), axis=(-2, -1))
    return scale * jnp.sqrt(average)


@jax.jit
def nuclear_norm(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch"]:
    r"""The sum of the singular values, from matrix products alone.

    It is $\langle U, X \rangle$ with the polar factor $U$ of $X$, which Newton-Schulz steps
    $Y \leftarrow \tfrac12 (3 I - Y Y^\top) Y$, each applied to $c Y$, find from $Y = X / \lVert X
    \rVert_F$. The scales $c$ are those that fit singular values from $l$ to 1, with $l = \epsilon /
    \sqrt{\min(m, n)}$ where rounding starts to drown them. Smaller values count less than they are,
    so that together they cost at most $\sqrt{\min(m, n)} \, \epsilon$ of the result. Rounding of
    $U$ itself enters squared.

    >>> round(float(nuclear_norm(jnp.array([[3.0, 0.0, 0.0], [0.0, -4.0, 0.0]]))), 5)
    7.0

    Args:
      x: Matrices, float32 or wider.

    Returns:
      Norms; NaN for a matrix that is not finite.

    Source: Chen and Chow, "A stable scaling of Newton-Schulz for improving the sign function
    computation of a Hermitian matrix", Argonne National Laboratory, ANL/MCS-P5059-0114 (2014).
    """
    unit, scale = _wide_and_unit(x)
    length = frobenius_norm(unit, (-2, -1))
    start = unit * reciprocal(length)

    def step(y: Array, c: Array) -> tuple[Array, None]:
        gram = matmul(y, y, transpose_b=True)
        return 1.5 * c * y - matmul(0.5 * c**3 * gram, y), None

    scales = _newton_schulz_scales(x.dtype, min(x.shape[-2:]))
    polar, _ = lax.scan(step, start, jnp.asarray(scales, x.dtype))
    return scale * jnp.sum(polar * unit, axis=(-2, -1))


def _newton_schulz_scales(dtype: DTypeLike, side: int) -> list[float]:
    """Scales of the steps that take singular values of a unit matrix to 1."""
    eps = float(jnp.finfo(dtype).eps)
    smallest, scales = eps / math.sqrt(max(side, 1)), []
    while 1 - smallest > eps:
        # Both ends of the range go to the same value.
        scales.append(min(math.sqrt(3 / (1 + smallest + smallest**2)), _MOST_SCALE))
        ends = (scales[-1] * smallest, scales[-1])
        smallest = min((3 * end - end**3) / 2 for end in ends)
    return scales


def leading_singular_triple(
    x: Float[Array, "*batch m n"],
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch m"], Float[Array, "*batch n"]]:
    r"""The largest singular value with its vectors, from matrix products alone.

    The Gram matrix of the smaller side is squared again and again; what is left is the projector
    onto the leading singular vector. Deterministic; two values whose ratio is above 0.999 are not
    told apart, and the vector then lies between theirs.

    Args:
      x: Matrices, float32 or wider.

    Returns:
      $(\sigma, u, v)$ with $\sigma u v^\top$ the leading term of $X$; all zero for a zero matrix.
    """
    m, n = x.shape[-2:]
    if m > n:
        sigma, v, u = leading_singular_triple(x.mT)
        return sigma, u, v
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    unit = x * reciprocal(largest)
    projector = _squared(matmul(unit, unit.mT), _SQUARINGS)
    column = jnp.argmax(jnp.diagonal(projector, axis1=-2, axis2=-1), axis=-1)[..., None, None]
    u = jnp.take_along_axis(projector, column, axis=-1)
    u = u * reciprocal(frobenius_norm(u, (-2, -1)))
    v = matmul(unit.mT, u)
    v = v * reciprocal(frobenius_norm(v, (-2, -1)))
    u = matmul(unit, v)
    size = frobenius_norm(u, (-2, -1))
    return (size * largest)[..., 0, 0], (u * reciprocal(size))[..., 0], v[..., 0]


def complete_basis(u: Float[Array, "*batch n"]) -> Float[Array, "*batch n n"]:
    """An orthogonal matrix whose first column is `u` up to sign: a Householder reflection.

    Of all such matrices it is the closest to the identity. For a zero vector it is the identity.

    Args:
      u: Unit vectors.
    """
    eye = jnp.broadcast_to(jnp.eye(u.shape[-1], dtype=u.dtype), (*u.shape, u.shape[-1]))
    first = eye[..., 0]
    sign = jnp.where(u[..., :1] > 0, 1, -1)
    length = jnp.sum(jnp.square(u), axis=-1, keepdims=True)
    w = u + jnp.where(length > 0, sign, 0) * first
    scale = 2 * reciprocal(jnp.sum(jnp.square(w), axis=-1))[..., None, None]
    return eye - scale * w[..., :, None] * w[..., None, :]


def eigenbasis(factor: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """Eigenvectors of symmetric matrices as columns, by decreasing eigenvalue.

    Where the decomposition fails, the identity, from which a refresh goes on.
    """
    # On a TPU JAX's choice, spectral divide and conquer, unrolls QR decompositions by panels of 128
    # columns for every size into which it divides: minutes to compile, for one start. Jacobi's
    # method is one loop.
    default = partial(lax.linalg.eigh, symmetrize_input=False)
    jacobi = partial(default, implementation=lax.linalg.EighImplementation.JACOBI)
    symmetric = (factor + factor.mT) / 2
    vectors, _ = lax.platform_dependent(symmetric, tpu=jacobi, default=default)
    found = jnp.isfinite(vectors).all(axis=(-2, -1), keepdims=True)
    eye = jnp.eye(vectors.shape[-1], dtype=vectors.dtype)
    vectors = jnp.where(found, jnp.flip(vectors, axis=-1), eye)
    # Decompositions return their results column by column. Left alone, compilers hand that layout
    # on to all who share a buffer with them, and every step of an optimizer copies its bases.
    return with_layout_constraint(vectors, Layout(major_to_minor=tuple(range(vectors.ndim))))


def eigenbases(factors: Sequence[Array | None]) -> tuple[Array | None, ...]:
    """`eigenbasis` of each factor, one after the other; None where there is none."""
    bases: list[Array | None] = []
    for factor in factors:
        if factor is not None and any(basis is not None for basis in bases):
            (factor,) = serialize_after([factor], bases)
        bases.append(None if factor is None else eigenbasis(factor))
    return tuple(bases)


def trace_in_range(*factors: Float[Array, "*batch _ _"]) -> Bool[Array, "*batch"]:
    r"""Whether a positive semidefinite matrix is finite, and so is what optimizers form of it.

    The trace bounds all entries and those of a product with an orthogonal matrix; there is room for
    the sum of two and for rounding. Of several matrices, the same of their Kronecker product, whose
    trace $\prod_k \operatorname{tr} X_k$ bounds the squares of factors of equal norm.

    Args:
      *factors: $X_k$.
    """
    traces = [jnp.trace(x, axis1=-2, axis2=-1) for x in factors]
    return jnp.isfinite(4 * math.prod(traces))


def _wide_and_unit(x: Array) -> tuple[Array, Array]:
    """Matrices that are not tall and whose largest entry is 1, and their scale; zero stays zero."""
    x = x.mT if x.shape[-2] > x.shape[-1] else x
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0)
    normal = largest >= jnp.finfo(x.dtype).tiny
    # Twice by a root: the inverse, as which compilers divide, underflows for the largest numbers.
    root = 1 / jnp.sqrt(jnp.where(normal, largest, 1))
    return x * root * root, largest[..., 0, 0]


def _squared(power: Array, times: int) -> Array:
    """Positive semidefinite matrices squared again and again, each brought to trace 1 before."""

    def square(_: Array, power: Array) -> Array:
        power = power * reciprocal(_traces(power))
        # Transposed, or the skew part that rounding leaves doubles every time.
        return matmul(power, power, transpose_b=True)

    return lax.fori_loop(0, times, square, power)


def _traces(x: Array) -> Array:
    return jnp.trace(x, axis1=-2, axis2=-1)[..., None, None]
