"""Named matrix-product precisions that mean the same accuracy on every platform."""

from typing import Literal

import jax
from jax.lax import DotAlgorithmPreset, Precision

PrecisionName = Literal["default", "bf16_x3", "bf16_x6", "tf32_x3", "highest"]

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
