r"""Newton-Schulz iterations: orthogonalisation by matrix products alone.

Each step applies an odd polynomial to the singular values,
$X \leftarrow a X + (b A + c A^2) X$ with $A = X X^\top$.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxopt_lab.core.numerics import frobenius_unit, wide_dtype


class Coefficients(NamedTuple):
    """One polynomial a step; the last one repeats when there are more steps."""

    steps: tuple[tuple[float, float, float], ...]
    # The input is divided by this times its Frobenius norm: bounds below 1 keep a polynomial that
    # would leave its interval (through rounding) from diverging.
    norm_factor: float


COEFFICIENTS: dict[str, Coefficients] = {
    # Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024): largest slope
    # at zero; singular values end in about [0.68, 1.13] after five steps and do not converge to 1.
    "quintic": Coefficients(((3.4445, -4.7750, 2.0315),), 1.0),
    # Amsel, Persson, Musco and Gower, "The Polar Express", arXiv 2505.16932: the minimax-optimal
    # composition for singular values in [1e-3, 1]. Each step but the final one is deflated by 1.01.
    "polar_express": Coefficients(
        tuple(
            (a / s, b / s**3, c / s**5)
            for s, (a, b, c) in zip(
                (1.01,) * 7 + (1.0,),
                (
                    (8.28721201814563, -23.595886519098837, 17.300387312530933),
                    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
                    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
                    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
                    (1.875, -1.25, 0.375),
                ),
                strict=True,
            )
        ),
        1.01,
    ),
    # Jiacheng You, https://x.com/YouJiacheng/status/1905861218138804534 (29 March 2025): five
    # polynomials tuned together. Optax calls them "dion", other libraries "quintic".
    "you_jiacheng": Coefficients(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        1.0,
    ),
}


def newton_schulz(
    x: Float[Array, "*batch m n"],
    *,
    steps: int = 5,
    coefficients: str = "quintic",
    compute_dtype: DTypeLike | None = None,
    eps: float = 0.0,
) -> Float[Array, "*batch m n"]:
    r"""Approximate the polar factor $U V^\top$ of $X = U S V^\top$, whatever the scale of $X$.

    A zero matrix stays zero; one with a NaN becomes NaN as a whole.

    Args:
      x: Matrices; leading axes are batch.
      steps: Number of iterations (static).
      coefficients: A name in `COEFFICIENTS`.
      compute_dtype: Dtype of the iterates and of the result; None keeps that of `x`. Products
        accumulate in float32 (or wider) whatever this is.
      eps: Added to the Frobenius norm before dividing. Released codes take 1e-7, which shortens the
        update of a matrix whose norm is not much larger.

    Returns:
      Matrices of the shape of `x` in `compute_dtype`.

    Example:
      >>> import jax.numpy as jnp
      >>> q = newton_schulz(jnp.diag(jnp.array([3.0, 1.0])), steps=8, coefficients="polar_express")
      >>> bool(jnp.allclose(q, jnp.eye(2), atol=1e-3))
      True
    """
    dtype = jnp.dtype(compute_dtype or x.dtype)
    table = COEFFICIENTS[coefficients]
    polynomials = [table.steps[min(i, len(table.steps) - 1)] for i in range(steps)]
    # The iteration commutes with transposition; the Gram matrix of the short side is the cheap one.
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    wide = wide_dtype(jnp.zeros((), dtype))
    # What float16 does not hold is rounded after the division alone.
    x = x if dtype == jnp.float16 else x.astype(dtype)
    x = x.astype(jnp.promote_types(x.dtype, wide))
    y = frobenius_unit(x, (-2, -1), factor=table.norm_factor, eps=eps).astype(dtype)
    for a, b, c in polynomials:
        gram = _matmul(y, y.mT)
        square = _matmul(gram, gram)
        inner = (b * gram.astype(wide) + c * square.astype(wide)).astype(dtype)
        y = (a * y.astype(wide) + _matmul(inner, y).astype(wide)).astype(dtype)
    return y.mT if tall else y


def newton_schulz_flops(m: int, n: int, steps: int) -> int:
    """FLOPs of `steps` iterations on one m x n matrix.

    With sides d <= D an iteration forms X X^T, its square and the product with X:
    2 d^2 (2 D + d).
    """
    small, large = sorted((m, n))
    return steps * 2 * small**2 * (2 * large + small)


def _matmul(x: Array, y: Array) -> Array:
    # HIGHEST: without it float32 products run in TF32 on a GPU. It does not affect bfloat16.
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
