"""Orthonormal bases of the columns of square matrices, in order, from matrix products.

Both methods return the Q of a QR decomposition, up to the signs of its columns. Householder's is
the reference; on an accelerator, where it is a long chain of small reflections, the other one is
tens of times faster: block Gram-Schmidt over panels of columns, applied twice, with a shifted
Cholesky decomposition inside each panel.
"""

import functools
import itertools
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float

from jaxopt_lab.core.precision import ProductPrecision, matmul

Orthogonalizer = Literal["panels", "householder"]
ORTHOGONALIZERS: tuple[Orthogonalizer, ...] = ("panels", "householder")

# A panel must be wide enough for efficient products and narrow enough that its columns, cleaned of
# all earlier ones, are not nearly dependent on each other.
_PANEL = 128
# Panels are projected against a prefix of the basis; prefixes grow in this many stages, so that few
# programs are compiled and little is multiplied by the part of the basis that is still zero.
_STAGES = 4


def orthonormal(
    x: Float[Array, "*batch n n"],
    method: Orthogonalizer = "panels",
    *,
    precision: ProductPrecision = "bf16_x3",
    panel: int = _PANEL,
) -> Float[Array, "*batch n n"]:
    """Orthonormalise the columns from left to right.

    Args:
      x: Square matrices, float32 or wider. Columns may have any scale.
      method: "panels" or "householder".
      precision: Of the products of "panels"; inside a panel they are always at full precision.
      panel: Columns of a panel (static).

    Returns:
      Orthogonal matrices whose leading k columns span those of `x`, wherever these are numerically
      independent; columns that depend on earlier ones are replaced by arbitrary orthonormal ones
      ("householder") or by rounding noise made orthonormal ("panels"). Finite for finite input.

    Raises:
      ValueError: The method is unknown.
    """
    if method == "householder":
        return jnp.linalg.qr(x)[0]
    if method == "panels":
        return _panelled(x, precision, panel)
    raise ValueError(f"orthogonalizer is {method!r}; choose one of {', '.join(ORTHOGONALIZERS)}")


def _panelled(x: Array, precision: ProductPrecision, panel: int) -> Array:
    *batch, n, _ = x.shape
    x = _unit_columns(x.reshape((-1, n, n)))
    if n <= panel:
        return _orthonormal_panel(x, passes=3).reshape((*batch, n, n))
    count = -(-n // panel)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, count * panel - n)))
    basis = jnp.zeros_like(x)  # filled from the left; what is still zero takes no part in products
    stages = [-(-count * stage // _STAGES) for stage in range(_STAGES + 1)]
    for start, stop in itertools.pairwise(stages):
        body = functools.partial(
            _add_panel, x=x, prefix=stop * panel, panel=panel, precision=precision
        )
        basis = lax.fori_loop(start, stop, body, basis)
    return basis[..., :n].reshape((*batch, n, n))


def _add_panel(index, basis, *, x, prefix, panel, precision):
    columns = lax.dynamic_slice_in_dim(x, index * panel, panel, axis=-1)
    before = basis[..., :prefix]
    # Once is enough for columns that are independent in floating point, twice for all others; what
    # a nearly dependent panel lacks after that is a matter of its own columns alone.
    for passes in (1, 2):
        inside = matmul(before, matmul(before.mT, columns, precision), precision)
        columns = _orthonormal_panel(_unit_columns(columns - inside), passes)
    return lax.dynamic_update_slice_in_dim(basis, columns, index * panel, axis=-1)


def _orthonormal_panel(columns: Array, passes: int) -> Array:
    """Shifted Cholesky-QR; the shift keeps it defined for dependent columns."""
    for _ in range(passes):
        gram = matmul(columns.mT, columns)
        bound = jnp.max(jnp.sum(jnp.abs(gram), axis=-1), axis=-1)[..., None, None]
        eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
        shifted = gram + 4 * jnp.finfo(gram.dtype).eps * jnp.maximum(bound, 1) * eye
        lower = jnp.linalg.cholesky(shifted, symmetrize_input=False)
        inverse = solve_triangular(lower, jnp.broadcast_to(eye, lower.shape), lower=True)
        columns = matmul(columns, inverse.mT)
    return columns


def _unit_columns(x: Array) -> Array:
    # By the largest entry first: squares of tiny columns would vanish.
    largest = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
    x = x * jnp.where(largest > 0, 1 / jnp.where(largest > 0, largest, 1), 0)
    size = jnp.sqrt(jnp.sum(jnp.square(x), axis=-2, keepdims=True))
    return x / jnp.where(size > 0, size, 1)
