"""Named matrix-product precisions that mean the same accuracy on every platform."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import DotAlgorithmPreset, Precision
from jaxtyping import Array, Float

PrecisionName = Literal["default", "tf32", "bf16_x3", "bf16_x6", "tf32_x3", "highest"]
ProductPrecision = Literal[
    "bfloat16", "default", "tf32", "bf16_x3", "bf16_x6", "tf32_x3", "highest"
]
# Rows and columns of a result from which a split product is formed as one deep product.
_SPLIT_FROM = 256
PRODUCT_PRECISIONS: tuple[ProductPrecision, ...] = get_args(ProductPrecision)

_SPLIT = {
    "tf32": DotAlgorithmPreset.TF32_TF32_F32,
    "bf16_x3": DotAlgorithmPreset.BF16_BF16_F32_X3,
    "bf16_x6": DotAlgorithmPreset.BF16_BF16_F32_X6,
    "tf32_x3": DotAlgorithmPreset.TF32_TF32_F32_X3,
}


def on_gpu(platform: str | None = None) -> bool:
    """Whether a platform, by default that of the default backend, is a GPU."""
    return (platform or jax.default_backend()) in ("gpu", "cuda", "rocm")


def dot_precision(
    name: PrecisionName, platform: str | None = None
) -> DotAlgorithmPreset | Precision:
    """The `precision=` argument that gives a product at least the named accuracy.

    The split algorithms build one float32 product from several on the tensor cores. They exist on
    GPUs only (elsewhere XLA refuses the name). Other platforms take `Precision.HIGH` for "bf16_x3"
    and "tf32", three products of bfloat16 on a TPU and a full float32 product on a CPU, and full
    float32 products for what is wider.

    Args:
      name: "default" (TF32 on a GPU), "tf32" (at least as accurate as TF32 everywhere), a split
        algorithm, or "highest".
      platform: "gpu", "tpu" or "cpu"; None asks the default backend.
    """
    if name == "default":
        return Precision.DEFAULT
    if name == "highest":
        return Precision.HIGHEST
    if on_gpu(platform):
        return _SPLIT[name]
    return Precision.HIGH if name in ("tf32", "bf16_x3") else Precision.HIGHEST


# Traced once for equal shapes; `inline`: without a trace in the program.
@partial(
    jax.jit,
    static_argnames=("precision", "transpose_a", "transpose_b", "rounded"),
    inline=True,
)
def matmul(
    a: Float[Array, "*batch _ _"],
    b: Float[Array, "*batch _ _"],
    precision: ProductPrecision = "highest",
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    rounded: bool = False,
) -> Float[Array, "*batch _ _"]:
    """The product of two stacks at a named precision, accumulated and returned in float32 or wider.

    Args:
      a: Left operands.
      b: Right operands.
      precision: "bfloat16" rounds the operands; the other names are those of `dot_precision`.
        float64 operands are always multiplied in float64.
      transpose_a: Use the transposed matrices of `a`.
      transpose_b: Use the transposed matrices of `b`.
      rounded: Return what a product in "bfloat16" that follows uses of the result: where this one
        is in "bfloat16", the result rounded to it.
    """
    dtype = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    rows, columns = a.shape[-1 if transpose_a else -2], b.shape[-2 if transpose_b else -1]
    if _splits(precision, dtype, rows, columns):
        return _split_product(a, b, transpose_a, transpose_b)
    if precision == "bfloat16" and dtype == jnp.float32:
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        algorithm = None
        dtype = jnp.bfloat16 if rounded else dtype
    else:
        a, b = a.astype(dtype), b.astype(dtype)
        name = "highest" if dtype == jnp.float64 or precision == "bfloat16" else precision
        algorithm = dot_precision(name)
    return _dot(a, b, transpose_a, transpose_b, algorithm, dtype)


def rotate(
    x: Float[Array, "batch ..."],
    bases: Sequence[Array | None],
    precision: ProductPrecision = "highest",
    *,
    back: bool = False,
    rounded: bool = False,
) -> Float[Array, "batch ..."]:
    r"""$Q_L^\top X Q_R$ for orthogonal $Q_L$, $Q_R$, or $Q_L X Q_R^\top$ with `back`.

    Args:
      x: Matrices, or a stack of tensors: those have a product along each side, at full precision.
      bases: $Q_L$ and $Q_R$, one a side; None: the identity.
      precision: Of the products.
      back: Out of the bases.
      rounded: As for `matmul`.
    """
    if x.ndim != 3:
        for k, basis in enumerate(bases):
            if basis is not None:
                basis = basis if back else basis.mT
                x = jax.vmap(partial(_along, side=k))(x, basis)
        return x
    rows, columns = bases[:2]
    if rows is not None:
        first = rounded or columns is not None
        x = matmul(rows, x, precision, transpose_a=not back, rounded=first)
    if columns is not None:
        x = matmul(x, columns, precision, transpose_b=back, rounded=rounded)
    return x


def _along(x: Array, matrix: Array, side: int) -> Array:
    """A matrix times every fibre of `x` along a side."""
    return jnp.moveaxis(jnp.tensordot(matrix, x, (1, side), precision=Precision.HIGHEST), 0, side)


def grams(
    x: Float[Array, "batch ..."], sides: Sequence[bool], precision: ProductPrecision = "highest"
) -> list[Any]:
    r"""$X_{(k)} X_{(k)}^\top$ of the unfolding along side $k$: all other sides are contracted.

    Args:
      x: A stack of matrices, as for `gram`, or of tensors, whose products are at full precision.
      sides: For which of them; the others have None.
      precision: Of the products.
    """

    def one(side: int) -> Array:
        if x.ndim == 3:
            return gram(x, precision, transpose=side == 1)
        unfolded = jnp.moveaxis(x, side + 1, 1).reshape(x.shape[0], x.shape[side + 1], -1)
        return matmul(unfolded, unfolded, transpose_b=True)

    return [one(k) if wanted else None for k, wanted in enumerate(sides)]


def gram(
    g: Float[Array, "*batch m n"],
    precision: ProductPrecision = "highest",
    *,
    transpose: bool = False,
) -> Float[Array, "*batch _ _"]:
    r"""$G G^\top$, or $G^\top G$ if `transpose`, up to a small skew-symmetric part.

    A split product is $H H^\top + H L^\top + L H^\top$ with the high and low halves of $G$. Its
    symmetric part is also that of $H (H + 2 L)^\top$, which takes two products instead of three.
    The skew part is a rounding of bfloat16; whoever decomposes the result symmetrises it anyway.
    """
    side = g.shape[-1 if transpose else -2]
    if not _splits(precision, jnp.promote_types(g.dtype, jnp.float32), side):
        return matmul(g, g, precision, transpose_a=transpose, transpose_b=not transpose)
    high, low = _halves(g)
    axis = -2 if transpose else -1
    once, twice = (jnp.concatenate(x, axis) for x in ((high, high), (high, 2 * low)))
    return _dot(once, twice, transpose, not transpose, None, jnp.float32)


def congruence(
    g: Float[Array, "*batch m n"],
    x: Float[Array, "*batch _ _"],
    precision: ProductPrecision = "highest",
    *,
    transpose: bool = False,
) -> Float[Array, "*batch _ _"]:
    r"""$G X G^\top$, or $G^\top X G$ if `transpose`, with the same skew-symmetric error as `gram`.

    The symmetric part of $H X (H + 2 L)^\top$ is that of $G X G^\top$, so in one of the two
    products, the larger one, an operand is exact with its high half.
    """
    m, n = g.shape[-2:]
    dtype = jnp.promote_types(jnp.promote_types(g.dtype, x.dtype), jnp.float32)
    if not _splits(precision, dtype, m, n):
        if transpose:
            return matmul(g, matmul(x, g, precision), precision, transpose_a=True)
        return matmul(matmul(g, x, precision), g, precision, transpose_b=True)
    high, low = _halves(g)
    axis = -2 if transpose else -1
    exact = jnp.concatenate((high, high), axis)
    full = jnp.concatenate((high, high, 2 * low), axis)
    first_is_larger = (m >= n) if transpose else (n >= m)
    first, second = (exact, full) if first_is_larger else (full, exact)

    def deep(y: Array, axis: int, other: Array) -> Array:
        """The halves of `y` that meet those of an operand in a product over `axis`."""
        y_high, y_low = _halves(y)
        return jnp.concatenate((y_high, y_low) if other is exact else (y_high, y_low, y_high), axis)

    if transpose:
        inner = _dot(deep(x, -1, first), first, False, False, None, jnp.float32)
        return _dot(second, deep(inner, -2, second), True, False, None, jnp.float32)
    inner = _dot(first, deep(x, -2, first), False, False, None, jnp.float32)
    return _dot(deep(inner, -1, second), second, False, True, None, jnp.float32)


def _splits(precision: ProductPrecision, dtype, *sides: int) -> bool:
    """Whether a product is formed from bfloat16 halves, as one of a greater depth.

    A narrow one would spend its time on forming split operands; the preset's kernel splits on the
    way.
    """
    wide = min(sides) >= _SPLIT_FROM and jax.default_backend() != "cpu"
    return precision == "bf16_x3" and dtype == jnp.float32 and wide


def _dot(a: Array, b: Array, transpose_a: bool, transpose_b: bool, precision, dtype) -> Array:
    # Transposition is a matter of which axes are contracted; as an operation of its own it would
    # lead compilers to other memory layouts, and those to copies.
    batch = tuple(range(a.ndim - 2))
    axes = (
        (a.ndim - 2 if transpose_a else a.ndim - 1,),
        (b.ndim - 1 if transpose_b else b.ndim - 2,),
    )
    return lax.dot_general(
        a, b, (axes, (batch, batch)), precision=precision, preferred_element_type=dtype
    )


def _split_product(a: Array, b: Array, transpose_a: bool, transpose_b: bool) -> Array:
    """High times high, high times low and low times high, as one product of three times the depth.

    The same mathematics as the preset BF16_BF16_F32_X3. As one plain product it runs at the full
    rate of the matrix units (1.3 to 1.8 times the preset's on an H200), and TPUs have it as well.
    An operand in bfloat16 has no low half, and two products do.
    """
    if a.dtype == jnp.bfloat16:
        once, twice = (a, a), _halves(b)
    elif b.dtype == jnp.bfloat16:
        once, twice = _halves(a), (b, b)
    else:
        (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
        once, twice = (a_high, a_low, a_high), (b_high, b_high, b_low)
    left = jnp.concatenate(once, axis=-2 if transpose_a else -1)
    right = jnp.concatenate(twice, axis=-1 if transpose_b else -2)
    return _dot(left, right, transpose_a, transpose_b, None, jnp.float32)


def _halves(x: Array) -> tuple[Array, Array]:
    """The leading bits of an array and what they leave, in bfloat16."""
    # Not a pair of casts: compilers may drop those as excess precision, and the low half dies.
    x = x.astype(jnp.float32)
    high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)
