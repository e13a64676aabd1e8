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

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxopt_lab.core.checks import check_choice
from jaxopt_lab.core.numerics import frobenius_norm
from jaxopt_lab.core.spectral import nuclear_norm, spectral_norm

DualNorms = Literal["spectral", "sign", "frobenius"]
DUAL_NORMS: tuple[DualNorms, ...] = get_args(DualNorms)


def matrix_norm(x: Float[Array, "*batch m n"], pair: DualNorms) -> Float[Array, "*batch"]:
    """The norm of each matrix.

    >>> x = jnp.array([[3.0, 0.0], [0.0, -4.0]])
    >>> [float(matrix_norm(x, pair)) for pair in DUAL_NORMS]
    [4.0, 4.0, 5.0]

    Args:
      x: Matrices, float32 or wider.
      pair: One of `DUAL_NORMS`.

    Raises:
      ValueError: The pair is unknown.
    """
    return pair_of(pair).norm(x)


def dual_norm(x: Float[Array, "*batch m n"], pair: DualNorms) -> Float[Array, "*batch"]:
    """The dual norm of each matrix.

    >>> x = jnp.array([[3.0, 0.0], [0.0, -4.0]])
    >>> [round(float(dual_norm(x, pair)), 5) for pair in DUAL_NORMS]
    [7.0, 7.0, 5.0]

    Args:
      x: Matrices, float32 or wider.
      pair: One of `DUAL_NORMS`.

    Raises:
      ValueError: The pair is unknown.
    """
    return pair_of(pair).dual(x)


def largest_dual(rows: int, columns: int, pair: DualNorms) -> int:
    """The largest dual norm of a matrix whose norm is 1.

    >>> [largest_dual(100, 16, pair) for pair in DUAL_NORMS]
    [16, 1600, 1]

    Raises:
      ValueError: The pair is unknown.
    """
    return pair_of(pair).largest_dual(rows, columns)


def _frobenius(x: Array) -> Array:
    return frobenius_norm(x, (-2, -1))[..., 0, 0]


class _Pair(NamedTuple):
    norm: Callable[[Array], Array]
    dual: Callable[[Array], Array]
    largest_dual: Callable[[int, int], int]  # of rows and columns


_PAIRS: dict[str, _Pair] = {
    "spectral": _Pair(spectral_norm, nuclear_norm, min),
    "sign": _Pair(
        lambda x: jnp.max(jnp.abs(x), axis=(-2, -1), initial=0),
        lambda x: jnp.sum(jnp.abs(x), axis=(-2, -1)),
        lambda rows, columns: rows * columns,
    ),
    "frobenius": _Pair(_frobenius, _frobenius, lambda rows, columns: 1),
}


def pair_of(pair: str) -> _Pair:
    """A row of the table above; raises `ValueError` for an unknown one."""
    check_choice("norm", pair, DUAL_NORMS)
    return _PAIRS[pair]
