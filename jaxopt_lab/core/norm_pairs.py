r"""The norms in which norm-constrained optimizers take their steps, and the dual ones.

=============  ==================  ================  =========================
pair           norm of a matrix    its dual          largest dual over norm
=============  ==================  ================  =========================
``spectral``   spectral            nuclear           $\min(m, n)$
``sign``       largest entry       sum of entries    $m n$
``frobenius``  Frobenius           Frobenius         1
=============  ==================  ================  =========================

Muon steps in the first, Lion and signSGD in the second, normalized SGD in the third. Over several
matrices the norm is the largest of theirs and the dual norm the sum of their dual norms, so that
$\langle G, X \rangle \le \lVert G \rVert_* \lVert X \rVert$.
"""

from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

NormPair = Literal["spectral", "sign", "frobenius"]
NORM_PAIRS: tuple[NormPair, ...] = get_args(NormPair)


def matrix_norm(x: Float[Array, "*batch m n"], pair: NormPair) -> Float[Array, "*batch"]:
    """The norm of each matrix.

    >>> x = jnp.array([[3.0, 0.0], [0.0, -4.0]])
    >>> [float(matrix_norm(x, pair)) for pair in NORM_PAIRS]
    [4.0, 4.0, 5.0]

    Args:
      x: Matrices, float32 or wider.
      pair: One of `NORM_PAIRS`.

    Raises:
      ValueError: The pair is unknown.
    """
    check_pair(pair)
    if pair == "sign":
        return jnp.max(jnp.abs(x), axis=(-2, -1), initial=0)
    if pair == "spectral":
        return jnp.max(singular_values(x), axis=-1, initial=0)
    return _frobenius(x)


def dual_norm(x: Float[Array, "*batch m n"], pair: NormPair) -> Float[Array, "*batch"]:
    """The dual norm of each matrix.

    >>> x = jnp.array([[3.0, 0.0], [0.0, -4.0]])
    >>> [float(dual_norm(x, pair)) for pair in NORM_PAIRS]
    [7.0, 7.0, 5.0]

    Args:
      x: Matrices, float32 or wider.
      pair: One of `NORM_PAIRS`.

    Raises:
      ValueError: The pair is unknown.
    """
    check_pair(pair)
    if pair == "sign":
        return jnp.sum(jnp.abs(x), axis=(-2, -1))
    if pair == "spectral":
        return jnp.sum(singular_values(x), axis=-1)
    return _frobenius(x)


def singular_values(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch k"]:
    """Singular values, the largest first.

    Of the triangle of a QR decomposition where a matrix is not square: several times faster than
    the decomposition of the matrix itself, and as accurate.
    """
    if x.shape[-2] < x.shape[-1]:
        x = x.mT
    if x.shape[-2] > x.shape[-1]:
        x = jnp.linalg.qr(x, mode="r")
    return jnp.linalg.svd(x, compute_uv=False)


def largest_dual(rows: int, columns: int, pair: NormPair) -> int:
    """The largest dual norm of a matrix whose norm is 1.

    >>> [largest_dual(100, 16, pair) for pair in NORM_PAIRS]
    [16, 1600, 1]

    Raises:
      ValueError: The pair is unknown.
    """
    check_pair(pair)
    return {"spectral": min(rows, columns), "sign": rows * columns, "frobenius": 1}[pair]


def check_pair(pair: str) -> None:
    """Check a name.

    Raises:
      ValueError: The pair is unknown.
    """
    if pair not in NORM_PAIRS:
        raise ValueError(f"norm is {pair!r}; choose one of {', '.join(NORM_PAIRS)}")


def _frobenius(x: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1)))
