"""Named matrix-product precisions that mean the same accuracy on every platform."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import DotAlgorithmPreset, Precision
from jaxtyping import Array, Float

PrecisionName = Literal["default", "bf16_x3", "bf16_x6", "tf32_x3", "highest"]
ProductPrecision = Literal["bfloat16", "default", "bf16_x3", "bf16_x6", "tf32_x3", "highest"]
# Rows and columns of a result from which a split product is formed as one deep product.
_SPLIT_FROM = 256
PRODUCT_PRECISIONS: tuple[ProductPrecision, ...] = get_args(ProductPrecision)

_SPLIT = {
    "bf16_x3": DotAlgorithmPreset.BF16_BF16_F32_X3,
    "bf16_x6": DotAlgorithmPreset.BF16_BF16_F32_X6,
    "tf32_x3": DotAlgorithmPreset.TF32_TF32_F32_X3,
}


def dot_precision(
    name: PrecisionName, platform: str | None = None
) -> DotAlgorithmPreset | Precision:
    """The `precision=` argument that gives a product at least the named accuracy.

    The split algorithms build one float32 product from several on the tensor cores. They exist on
    GPUs only (elsewhere XLA refuses the name), so other platforms use their full float32 product.

    Args:
      name: "default" (TF32 on a GPU), a split algorithm, or "highest".
      platform: "gpu", "tpu" or "cpu"; None asks the default backend.
    """
    if name == "default":
        return Precision.DEFAULT
    if name == "highest":
        return Precision.HIGHEST
    on_gpu = (platform or jax.default_backend()) in ("gpu", "cuda", "rocm")
    return _SPLIT[name] if on_gpu else Precision.HIGHEST


def matmul(
    a: Float[Array, "*batch m k"],
    b: Float[Array, "*batch k n"],
    precision: ProductPrecision = "highest",
) -> Float[Array, "*batch m n"]:
    """The product of two stacks at a named precision, accumulated and returned in float32 or wider.

    Args:
      a: Left operands.
      b: Right operands.
      precision: "bfloat16" rounds the operands; the other names are those of `dot_precision`.
        float64 operands are always multiplied in float64.
    """
    wide = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
    if wide == jnp.float64:
        return jnp.matmul(a, b, precision=Precision.HIGHEST)
    if precision == "bfloat16":
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        return jnp.matmul(a, b, preferred_element_type=wide)
    # A split algorithm works on float32 operands.
    a, b = a.astype(wide), b.astype(wide)
    # A narrow product would spend its time on forming split operands; the preset's kernel splits
    # on the way.
    wide_enough = min(a.shape[-2], b.shape[-1]) >= _SPLIT_FROM
    if precision == "bf16_x3" and wide_enough and jax.default_backend() != "cpu":
        return _split_product(a, b)
    return jnp.matmul(a, b, precision=dot_precision(precision), preferred_element_type=wide)


def _split_product(a: Array, b: Array) -> Array:
    """High times high, high times low and low times high, as one product of three times the depth.

    The same mathematics as the preset BF16_BF16_F32_X3. As one plain product it runs at the full
    rate of the matrix units (1.3 to 1.8 times the preset's on an H200), and TPUs have it as well.
    """

    def halves(x: Array) -> tuple[Array, Array]:
        # Not a pair of casts: compilers may drop those as excess precision, and the low half dies.
        high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)

    (a_high, a_low), (b_high, b_low) = halves(a), halves(b)
    left = jnp.concatenate([a_high, a_high, a_low], axis=-1)
    right = jnp.concatenate([b_high, b_low, b_high], axis=-2)
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)
