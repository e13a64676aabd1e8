"""Inverse roots of positive semidefinite matrices, batched."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from jaxopt_lab.core.precision import PrecisionName, matmul

# Ridge of the Newton iteration in units of round-off times the largest eigenvalue: an eigenvalue
# below it is round-off, of the matrix or of the products, and may be negative, where the iteration
# grows. Products of two bfloat16 pieces are eight times coarser.
_NEWTON_FLOOR, _COARSE_FLOOR = 8.0, 64.0
_NEWTON_ITERATIONS = 100
# No scaled iteration multiplies an eigenvalue by less: what it leaves would be cancellation.
_LEAST_FACTOR = 0.01


def inverse_root(
    x: Float[Array, "*batch n n"],
    exponent: ArrayLike,
    *,
    eps: ArrayLike = 0.0,
    relative: bool = False,
    method: str = "eigh",
    precision: PrecisionName = "highest",
) -> Float[Array, "*batch n n"]:
    r"""$(X + \epsilon I)^{-p}$ of symmetric positive semidefinite matrices.

    The input is symmetrised first. Directions in which the ridged matrix is exactly zero (possible
    with $\epsilon = 0$) get zero, as in a pseudo-inverse, so the result is never infinite for them.

    Args:
      x: The matrices.
      exponent: $p > 0$. With method "newton" the inverse of an integer, as a Python number.
      eps: $\epsilon \ge 0$; broadcasts against the batch axes.
      relative: Use $\epsilon \lambda_{\max}(X)$ instead, each matrix by its own.
      method: One of `ROOT_METHODS`. "eigh": by eigendecomposition, the reference. "newton": by
        matrix products alone, many times faster on accelerators. It resolves eigenvalues down to 8
        units of round-off of the largest (64 at precision "bf16_x3" or "default") and treats
        smaller ones as if they were that large.
      precision: Of the products of "newton" (float64 input: always full).

    Returns:
      Symmetric matrices of the dtype of `x`.

    Raises:
      ValueError: The method is unknown, or it does not know the exponent.

    Example:
      >>> x = jnp.diag(jnp.array([1.0, 16.0]))
      >>> [round(float(r), 4) for r in jnp.diag(inverse_root(x, 0.25))]
      [1.0, 0.5]

    Source: Anil, Gupta, Koren, Regan and Singer, "Scalable second order optimization for deep
    learning", arXiv 2002.09018 (2020), for the use of the coupled Newton iteration; Guo and Higham,
    "A Schur-Newton method for the matrix pth root and its inverse", SIAM J. Matrix Anal. Appl. 28
    (2006), for the iteration.
    """
    check_root("exponent", exponent, method)
    eps = jnp.broadcast_to(jnp.asarray(eps, x.dtype), x.shape[:-2])
    if 0 in x.shape:
        return x
    root = ROOT_METHODS[method]((x + x.mT) / 2, exponent, eps, relative, precision)
    return (root + root.mT) / 2


def check_root(name: str, exponent: Any, method: str) -> None:
    """Raise `ValueError` for a method that does not exist or that cannot take this exponent."""
    if method not in ROOT_METHODS:
        raise ValueError(f"method: got {method!r}, wanted one of {', '.join(ROOT_METHODS)}")
    # Of an array, which may be a tracer, nothing is known.
    number = math.nan if isinstance(exponent, bool | str) else exponent
    known = isinstance(number, int | float)
    if not isinstance(number, jax.Array) and not (known and 0 < number < math.inf):
        raise ValueError(f"{name}: got {exponent!r}, wanted a finite number > 0")
    if method == "newton" and not (known and math.isclose(1 / number, round(1 / number))):
        raise ValueError(
            f"{name}: got {exponent!r}, wanted the inverse of an integer as a Python number (1/2, "
            '1/4, 1/6, ...), unless method is "eigh"'
        )


def _by_eigh(x: Array, exponent: ArrayLike, eps: Array, relative: bool, precision) -> Array:
    del precision
    values, vectors = jnp.linalg.eigh(x)
    smallest, largest = values[..., :1], values[..., -1:]
    ridge = eps[..., None]
    if relative:
        ridge = ridge * jnp.maximum(largest, 0)
    # A negative eigenvalue is round-off: move the whole spectrum so that the smallest becomes the
    # ridge exactly, which keeps distances between eigenvalues.
    values = values - jnp.minimum(smallest, 0) + ridge
    positive = values > 0
    roots = jnp.where(positive, jnp.where(positive, values, 1) ** -jnp.asarray(exponent), 0)
    return matmul(vectors * roots.astype(x.dtype)[..., None, :], vectors.mT, "highest")


def _by_newton(x: Array, exponent, eps: Array, relative: bool, precision: PrecisionName) -> Array:
    q = round(1 / exponent)
    identity = jnp.eye(x.shape[-1], dtype=x.dtype)
    largest = jnp.max(jnp.abs(x), axis=(-2, -1))
    largest = largest if relative else jnp.maximum(largest, eps)
    usable = (largest > 0) & jnp.isfinite(largest)
    # The power of two that brings the largest entry to [2, 4): it and its inverse are normal
    # numbers, where the inverse of the norm itself might vanish.
    power = jnp.frexp(jnp.where(usable, largest, 1))[1] - 2
    inverse = jnp.ldexp(jnp.ones_like(largest), -power)
    scaled = x * inverse[..., None, None]
    lower, upper = _largest_eigenvalue(scaled, precision)
    ridge = eps * lower if relative else eps * inverse
    coarse = precision in ("default", "bf16_x3") and x.dtype == jnp.float32
    floor = _COARSE_FLOOR if coarse else _NEWTON_FLOOR
    ridge = jnp.maximum(ridge, floor * jnp.finfo(x.dtype).eps * lower)
    bound = upper + ridge
    zero = bound == 0
    bound = jnp.where(zero, 1, bound)
    m = (scaled + ridge[..., None, None] * jnp.broadcast_to(identity, x.shape)) / bound[
        ..., None, None
    ]
    root = _coupled_newton(m, ridge / bound, q, precision)
    root = root * (bound ** (-1 / q) * jnp.exp2(power.astype(x.dtype) / -q))[..., None, None]
    return jnp.where(zero[..., None, None], 0, root)


def _largest_eigenvalue(x: Array, precision: PrecisionName) -> tuple[Array, Array]:
    """A lower and an upper bound of the largest eigenvalue of X with entries up to 4, from traces.

    The upper one is at most n^(1/16) too large; the lower one is exact when the large eigenvalues
    are alike or far apart, and a few per cent too small in between.
    """
    unit = 4 * x.shape[-1]  # the powers of what is left do not overflow
    x2 = _square(x / unit, precision)
    x4 = _square(x2, precision)
    # Powers up to 8 of norms between 1/n and 1 stay within float32 up to n of about 10^4.
    norm4 = jnp.linalg.norm(x4, axis=(-2, -1))
    x4 = x4 / jnp.where(norm4 > 0, norm4, 1)[..., None, None]
    x8 = _square(x4, precision)
    t16 = jnp.sum(jnp.square(x8), axis=(-2, -1))
    t12 = jnp.sum(x8 * x4, axis=(-2, -1))
    fourth = jnp.where(norm4 > 0, norm4, 0) ** (1 / 4) * unit
    upper = t16 ** (1 / 16) * fourth
    lower = (t16 / jnp.where(t12 > 0, t12, 1)) ** (1 / 4) * fourth
    return lower, jnp.maximum(upper, lower)


def _square(x: Array, precision: PrecisionName) -> Array:
    return matmul(x, x, precision)


def _coupled_newton(m: Array, smallest: Array, q: int, precision: PrecisionName) -> Array:
    r"""$M^{-1/q}$ for eigenvalues of M between `smallest` and 1.

    With the map $f(\mu) = \mu ((q + 1 - \mu) / q)^q$, whose maximum is $f(1) = 1$, iterate

    $$T = ((q + 1) I - c M) / q, \qquad X \leftarrow c^{1/q} X T, \qquad M \leftarrow T^q c M$$

    until $M = I$. The scale $c$ would best send the smallest eigenvalue $l$ and the largest, 1, to
    one value, $c = (q + 1) (1 - l^{1/q}) / (1 - l^{1 + 1/q})$; a limit on it keeps the largest ones
    from cancellation. It halves the number of iterations at a condition of 1e6.

    Each matrix stops by itself: when it has converged, when the last iteration no longer helped, or
    when it got worse, in which case the iterate before is kept.
    """
    n = m.shape[-1]
    eye = jnp.eye(n, dtype=m.dtype)
    tolerance = jnp.finfo(m.dtype).eps * math.sqrt(n)

    def identity() -> Array:
        # Broadcast where it is used: as a constant of the loop every iteration would read it.
        return jnp.broadcast_to(eye, m.shape)

    def error_of(m: Array) -> Array:
        return jnp.linalg.norm(m - identity(), axis=(-2, -1))

    def body(carry):
        k, m, root, smallest, error, active = carry
        scale = _newton_scale(smallest, q)
        scaling = scale > 1
        m_scaled = m * scale[..., None, None]
        t = ((q + 1) * identity() - m_scaled) / q
        new_m = matmul(_power(t, q, precision), m_scaled, precision)
        new_root = matmul(root, t, precision) * (scale ** (1 / q))[..., None, None]
        # Products of commuting symmetric matrices: what is not symmetric is round-off that grows.
        new_m = (new_m + new_m.mT) / 2
        new_error = error_of(new_m)
        # Eigenvalues in [0, 1] have an error of sqrt(n) at most. Without scaling it decreases, but
        # while small eigenvalues climb it may stand still in round-off.
        limit = jnp.where(scaling, 2 * math.sqrt(n), 1.02 * error)
        finite = jnp.isfinite(new_error) & jnp.isfinite(new_root).all(axis=(-2, -1))
        better = active & finite & (new_error <= limit)
        stalled = ~scaling & (error < 0.1) & (new_error > error / 2)
        lowest = jnp.minimum(_newton_map(scale * smallest, q), _newton_map(scale, q))
        return (
            k + 1,
            jnp.where(better[..., None, None], new_m, m),
            jnp.where(better[..., None, None], new_root, root),
            lowest,
            jnp.where(better, new_error, error),
            better & (new_error > tolerance) & ~stalled,
        )

    def unfinished(carry) -> Bool[Array, ""]:
        return (carry[0] < _NEWTON_ITERATIONS) & jnp.any(carry[-1])

    error = error_of(m)
    active = jnp.isfinite(error) & (error > tolerance)
    return lax.while_loop(unfinished, body, (0, m, identity(), smallest, error, active))[2]


def _newton_scale(smallest: Array, q: int) -> Array:
    """The factor on an iterate whose eigenvalues lie between `smallest` and 1; 1 near the end."""
    root = smallest ** (1 / q)
    balanced = (q + 1) * (1 - root) / jnp.where(smallest < 0.9, 1 - root * smallest, 1)
    limit = q + 1 - q * _LEAST_FACTOR ** (1 / q)
    return jnp.where(smallest < 0.9, jnp.minimum(balanced, limit), 1)


def _newton_map(eigenvalue: Array, q: int) -> Array:
    """Where an iteration sends an eigenvalue."""
    return eigenvalue * ((q + 1 - eigenvalue) / q) ** q


def _power(t: Array, q: int, precision: PrecisionName) -> Array:
    """T^q by repeated squaring."""
    result = None
    while q:
        if q & 1:
            result = t if result is None else matmul(result, t, precision)
        q >>= 1
        if q:
            t = _square(t, precision)
    assert result is not None
    return result


ROOT_METHODS: dict[str, Callable[..., jax.Array]] = {"eigh": _by_eigh, "newton": _by_newton}
