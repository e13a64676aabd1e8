"""Orthonormal bases from matrix products: of the columns of a matrix, and of a changing factor.

Of independent columns both methods return the Q of a QR decomposition, up to the signs of its
columns. Householder's is the reference; on an accelerator, where it is a long chain of small
reflections, the other one is tens of times faster: block Gram-Schmidt over panels of columns,
applied twice, with a shifted Cholesky decomposition inside each panel.
"""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Int

from jaxopt_lab.core.precision import ProductPrecision, matmul, on_gpu

Orthogonalizer = Literal["cholesky_qr", "householder"]
ORTHOGONALIZERS: tuple[Orthogonalizer, ...] = ("cholesky_qr", "householder")

# A matrix whose blocks of columns before the one of an index are orthonormal; None: the only block.
Earlier = tuple[Array, Array] | None

# A panel must be wide enough for efficient products and narrow enough that its columns, cleaned of
# all earlier ones, are not nearly dependent on each other.
_PANEL = 128
# Panels of a block are cleaned of earlier blocks together, in large products. More blocks waste
# less on columns that are still zero, and take longer to compile.
_BLOCK_PANELS, _MOST_BLOCKS = 6, 4
# A pass is the last one if it took less than this part of every column, measured by squares.
_LOST, _MOST_PASSES = 1e-3, 8
# Columns whose overlaps with the others of their block have a smaller sum of squares are corrected,
# others decomposed again.
_NEAR = 1e-2
# What float32 products leave of a zero, relative to the factor's norm: below it, a direction keeps
# its basis vector instead of following rounding errors. Wider factors need it for zero alone.
_RIDGES = {"float32": 2.0**-20, "float64": 2.0**-100}


def orthonormal(
    x: Float[Array, "*batch n n"],
    method: Orthogonalizer = "cholesky_qr",
    *,
    precision: ProductPrecision = "bf16_x3",
    panel: int = _PANEL,
) -> Float[Array, "*batch n n"]:
    """Orthonormalise the columns from left to right.

    Args:
      x: Square matrices, float32 or wider. Columns may have any scale.
      method: "cholesky_qr" or "householder".
      precision: Of the products of "cholesky_qr"; inside a panel they are always at full precision.
      panel: Columns of a panel (static).

    Returns:
      Orthogonal matrices whose leading k columns span those of `x`, wherever these are numerically
      independent; columns that depend on earlier ones are replaced by arbitrary orthonormal ones
      ("householder") or by rounding noise made orthonormal ("cholesky_qr"). Finite for finite
      input.

      "cholesky_qr" needs that noise. A column of zeros stays zero, and the others are orthonormal
      all the same. Where dependent columns cancel exactly, as equal columns of the identity do, or
      more columns than the coordinates they have entries in, the surplus ones keep no certain
      length or direction, and those before them may be orthonormal to 1e-4 only.

    Raises:
      ValueError: The method is unknown.
    """
    if method not in ORTHOGONALIZERS:
        raise ValueError(
            f"orthogonalizer is {method!r}; choose one of {', '.join(ORTHOGONALIZERS)}"
        )
    if method == "householder":
        return jnp.linalg.qr(x)[0]
    # By the largest entry, so that the squares of no column vanish or overflow.
    largest = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
    return _panelled(x * reciprocal(largest), precision, panel)


def refresh_eigenbasis(
    factor: Float[Array, "*batch n n"],
    basis: Float[Array, "*batch n n"],
    *,
    orthogonalizer: Orthogonalizer = "cholesky_qr",
    precision: ProductPrecision = "bf16_x3",
) -> tuple[Float[Array, "*batch n n"], Float[Array, "*batch n n"], Int[Array, "*batch n"]]:
    r"""Follow a slowly changing eigenbasis by one power iteration.

    The columns of $Q$ are sorted by decreasing $\operatorname{diag}(Q^\top X Q)$ and replaced by
    the orthogonal factor of $X Q$. Directions in which a factor is zero to working precision stay
    as they are: a small multiple of the norm of $X$ is added to its diagonal. A basis whose
    successor is not finite stays as it is: moments and parameters would be lost with it for good.

    Args:
      factor: $X$, positive semidefinite; its symmetric part is taken.
      basis: $Q$, orthogonal; may be rounded to bfloat16, which saves a third of the product.
      orthogonalizer: "cholesky_qr" or "householder".
      precision: Of the products.

    Returns:
      The factor made symmetric, the new basis in the dtype of the old one, and the permutation that
      sorted that: entry j of the new order was entry `order[j]`. Whatever is stored in the
      eigenbasis follows it.
    """
    factor, dtype = (factor + factor.mT) / 2, basis.dtype
    # By the largest entry first, so that the squares of no factor vanish or overflow. It stands on
    # the diagonal.
    largest = jnp.max(jnp.diagonal(factor, axis1=-2, axis2=-1), axis=-1)[..., None, None]
    unit = factor * reciprocal(largest)
    size = largest * jnp.sqrt(jnp.sum(jnp.square(unit), axis=(-2, -1), keepdims=True))
    # In rows: those lie together in memory, and are sorted several times faster than columns.
    rows = matmul(basis, factor, precision, transpose_a=True) * reciprocal(size)
    basis = basis.astype(rows.dtype)
    order = jnp.argsort(jnp.sum(basis.mT * rows, axis=-1), axis=-1, descending=True)
    rows = rows + _RIDGES[rows.dtype.name] * basis.mT
    rows = jnp.take_along_axis(rows, order[..., :, None], axis=-2)
    new = orthonormal(rows.mT, orthogonalizer, precision=precision)
    usable = jnp.isfinite(new).all(axis=(-2, -1))[..., None]
    order = jnp.where(usable, order, jnp.arange(order.shape[-1]))
    return factor, jnp.where(usable[..., None], new, basis).astype(dtype), order


def _panelled(x: Array, precision: ProductPrecision, panel: int) -> Array:
    *batch, n, _ = x.shape
    x = x.reshape((-1, n, n))
    width = panel * max(_BLOCK_PANELS, -(-n // (panel * _MOST_BLOCKS)))
    if n <= width:
        return _orthonormal_block(x, None, panel, precision).reshape((*batch, n, n))

    # One program for all blocks: on a TPU a large product takes seconds to compile.
    def add(index, x):
        block = _orthonormal_block(_columns(x, index, width), (x, index), panel, precision)
        return lax.dynamic_update_slice_in_dim(x, block, index * width, axis=-1)

    count = -(-n // width)
    # Columns that fill up the last block are zero and stay zero.
    x = jnp.pad(x, ((0, 0), (0, 0), (0, count * width - n)))
    return lax.fori_loop(0, count, add, x)[..., :n].reshape((*batch, n, n))


def _orthonormal_block(
    block: Array, earlier: Earlier, panel: int, precision: ProductPrecision
) -> Array:
    """Orthonormal columns for a block, with nothing of earlier ones."""
    coarse = _coarse(precision)
    # The first pass removes almost everything and needs few digits.
    block = _without_blocks(block, earlier, coarse, coarse)
    block = _gram_schmidt(block, panel, coarse)

    # The second one is the last, unless it finds that columns were nearly dependent on others.
    def refine(carry):
        block = _without_blocks(carry[0], earlier, precision, coarse)
        upper, scale, near, again = _overlaps(block, precision)
        block = lax.cond(
            near,
            lambda block: _corrected(block, upper, scale, coarse),
            lambda block: _gram_schmidt(block, panel, coarse),
            block,
        )
        return block, again, carry[2] + 1

    return lax.while_loop(
        lambda carry: carry[1] & (carry[2] < _MOST_PASSES), refine, (block, jnp.array(True), 1)
    )[0]


def _columns(x: Array, index: Array, width: int) -> Array:
    return lax.dynamic_slice_in_dim(x, index * width, width, axis=-1)


def _without_blocks(
    block: Array, earlier: Earlier, precision: ProductPrecision, removal: ProductPrecision
) -> Array:
    """A block without its overlap with all earlier ones."""
    if earlier is None:
        return block
    x, index = earlier

    def remove(other, block):
        return _without(block, (_columns(x, other, block.shape[-1]),), precision, removal)

    return lax.fori_loop(0, index, remove, block)


def _coarse(precision: ProductPrecision) -> ProductPrecision:
    """TF32 on a GPU, whose 11 bits are enough for a first pass; no coarser than asked elsewhere."""
    return "default" if on_gpu() else precision


def _without(
    columns: Array, earlier: Sequence[Array], precision: ProductPrecision, removal: ProductPrecision
) -> Array:
    """Columns without their overlap with earlier ones.

    In a last pass the overlap is small: it must be known well, but removed with few digits.
    """
    for basis in earlier:
        overlap = matmul(basis, columns, precision, transpose_a=True)
        # As a sum it is one operation with the product, in place.
        columns = columns + matmul(basis, -overlap, removal)
    return columns


def _gram_schmidt(block: Array, panel: int, precision: ProductPrecision) -> Array:
    """One pass of Gram-Schmidt over the panels of a block."""
    width = block.shape[-1]
    panel = min(panel, width)
    count = -(-width // panel)
    # Columns that fill up the last panel are zero and stay zero.
    block = jnp.pad(block, ((0, 0), (0, 0), (0, count * panel - width)))
    first = _cholesky_qr(_unit_columns(block[..., :panel]))

    def add(index, basis):
        columns = lax.dynamic_slice_in_dim(block, index * panel, panel, axis=-1)
        # What is not filled yet is zero and takes nothing away. The first panel holds what
        # dominates an image under power iteration; of that one removal leaves too much.
        columns = _without(columns, (basis, first), precision, precision)
        columns = _cholesky_qr(_unit_columns(columns))
        return lax.dynamic_update_slice_in_dim(basis, columns, index * panel, axis=-1)

    basis = jnp.pad(first, ((0, 0), (0, 0), (0, (count - 1) * panel)))
    return lax.fori_loop(1, count, add, basis)[..., :width]


def _overlaps(block: Array, precision: ProductPrecision) -> tuple[Array, Array, Array, Array]:
    """What columns of length 1 overlap with later ones of their block.

    Returns the overlaps, an upper triangle; what scales the columns to length 1; whether
    `_corrected` makes them nearly orthogonal; and whether another pass is needed even so.
    """
    gram = matmul(block, block, precision, transpose_a=True)
    squares = jnp.diagonal(gram, axis1=-2, axis2=-1)
    lost = jnp.max(jnp.where(squares > 0, 1 - squares, 0))
    scale = reciprocal(jnp.sqrt(jnp.maximum(squares, 0)))
    upper = jnp.triu(scale[..., :, None] * gram * scale[..., None, :], 1)
    left = jnp.sum(jnp.square(upper), axis=-1) + jnp.sum(jnp.square(upper), axis=-2)
    # A matrix that is not finite compares false: it must not end the passes of the others.
    left = jnp.max(jnp.where(left >= 0, left, 0))
    third_order = jnp.finfo(gram.dtype).eps ** (2 / 3) / 2
    return upper, scale, left < _NEAR, (lost > _LOST) | (left > third_order)


def _corrected(block: Array, upper: Array, scale: Array, coarse: ProductPrecision) -> Array:
    r"""Orthonormalise columns that nearly are.

    With the columns scaled to length 1 their Gram matrix is $I + E = R^\top R$. Up to the third
    power of $E$, and with $U$ its upper triangle,

    $$
    R^{-1} = I - U + U^2 + \mathrm{upper}(U^\top U) + \tfrac12 \mathrm{diag}(U^\top U)
    $$
    """
    # Of the small second order few digits are enough.
    second = matmul(upper, upper, "bfloat16", transpose_a=True)
    eye = jnp.broadcast_to(jnp.eye(second.shape[-1], dtype=second.dtype), second.shape)
    second = jnp.triu(second) - 0.5 * second * eye
    second = second + matmul(upper, upper, "bfloat16")
    change = scale[..., :, None] * (upper - second)
    diagonal = eye * (1 - scale[..., None, :])
    return block - matmul(block, change + diagonal, coarse)


def _cholesky_qr(columns: Array) -> Array:
    """Shifted Cholesky-QR; the shift keeps it defined for dependent columns."""
    gram = matmul(columns, columns, transpose_a=True)
    bound = jnp.max(jnp.sum(jnp.abs(gram), axis=-1), axis=-1)[..., None, None]
    eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    shifted = gram + 4 * jnp.finfo(gram.dtype).eps * jnp.maximum(bound, 1) * eye
    lower = jnp.linalg.cholesky(shifted, symmetrize_input=False)
    inverse = solve_triangular(lower, eye, lower=True)
    return matmul(columns, inverse, "bf16_x3", transpose_b=True)


def _unit_columns(x: Array) -> Array:
    """Columns of length 1."""
    return x * reciprocal(jnp.sqrt(jnp.sum(jnp.square(x), axis=-2, keepdims=True)))


def reciprocal(x: Array) -> Array:
    """The inverse, and 0 for 0 and for subnormal numbers, whose inverse may overflow."""
    normal = x >= jnp.finfo(x.dtype).tiny
    return jnp.where(normal, 1 / jnp.where(normal, x, 1), 0)
