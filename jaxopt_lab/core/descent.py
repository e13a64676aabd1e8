"""Steepest-descent directions of a matrix and the scales the LionMuon family puts on them.

Rows are the reduction side (fan in) and columns the output side (fan out), as in Flax kernels.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

# Singular values of 1 give an m x n matrix the RMS 1 / sqrt(max(m, n)); this factor makes it 0.2,
# the typical RMS of an AdamW update.
ADAMW_RMS = 0.2

SPECTRAL_SCALES = ("match_rms", "fan", "none")
SIGN_SCALES = ("none", "frob", "muon")


def spectral_scale(kind: str, m: int, n: int) -> float:
    """Factor on an orthogonalised m x n direction.

    Args:
      kind: "match_rms": 0.2 sqrt(max(m, n)); "fan": sqrt(max(1, fan_out / fan_in)); "none": 1.
      m: Rows (fan in).
      n: Columns (fan out).
    """
    if kind == "none" or m == 0 or n == 0:
        return 1.0
    return ADAMW_RMS * math.sqrt(max(m, n)) if kind == "match_rms" else math.sqrt(max(1.0, n / m))


def sign_scale(kind: str, m: int, n: int) -> float:
    """Factor on the sign of an m x n direction.

    Args:
      kind: "none": 1; "frob": 1 / sqrt(max(m, n)); "muon": "frob" times the "fan" factor.
      m: Rows (fan in).
      n: Columns (fan out).
    """
    if kind == "none" or m == 0 or n == 0:
        return 1.0
    frob = 1.0 / math.sqrt(max(m, n))
    return frob if kind == "frob" else frob * spectral_scale("fan", m, n)


def frobenius_direction(
    x: Float[Array, "..."], axes: Sequence[int], m: int, n: int
) -> Float[Array, "..."]:
    r"""$X / (\lVert X \rVert_F + 10^{-7})$ times $\sqrt{\min(m, n)}$ and the "fan" factor.

    Args:
      x: A leaf holding matrices.
      axes: The axes that span each matrix; the others are batch.
      m: Rows (fan in).
      n: Columns (fan out).
    """
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(axes), keepdims=True))
    return x / (norm + 1e-7) * (math.sqrt(min(m, n)) * spectral_scale("fan", m, n))
