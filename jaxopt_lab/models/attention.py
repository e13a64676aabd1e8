"""Rotary positions and attention on arrays (batch, positions, heads, head width)."""

import math

import jax
import jax.numpy as jnp

from jaxopt_lab.core.numerics import dropped
from jaxopt_lab.models.sharding import OnMesh
from jaxopt_lab.models.splash import splash, splash_applies

_CUDNN_MAX_HEAD_WIDTH = 128


def rotate(
    x_BxTxHxE: jax.Array, base: float, scaling: tuple[float, ...] | None = None
) -> jax.Array:
    """Rotary position embedding in the half-split convention.

    Coordinates i and i + E/2 form a plane that is turned by the angle t base^(-2 i / E) at
    position t, so that the product of a query and a key depends on their distance alone.

    Args:
        x_BxTxHxE: queries or keys.
        base: of the wavelengths.
        scaling: (factor, low, high, original context), for contexts longer than the original one:
            planes that turn at most `low` times in the original context turn `factor` times
            slower, those that turn at least `high` times as before, and between the two the speed
            is interpolated linearly in the number of turns.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding",
    arXiv 2104.09864; the pairing is that of the Hugging Face LLaMA layout. The scaling is that of
    Grattafiori et al., "The Llama 3 Herd of Models", arXiv 2407.21783, in its released code.
    """
    T, E = x_BxTxHxE.shape[1], x_BxTxHxE.shape[3]
    dtype = jnp.promote_types(x_BxTxHxE.dtype, jnp.float32)
    frequency_E = base ** (-jnp.arange(0, E, 2, dtype=dtype) / E)
    if scaling is not None:
        factor, low, high, original = scaling
        turns_E = original * frequency_E / (2 * math.pi)
        kept_E = jnp.clip((turns_E - low) / (high - low), 0, 1)
        frequency_E = frequency_E * (kept_E + (1 - kept_E) / factor)
    angle_TxE = jnp.arange(T, dtype=dtype)[:, None] * frequency_E
    cos_Tx1xE, sin_Tx1xE = jnp.cos(angle_TxE)[:, None], jnp.sin(angle_TxE)[:, None]
    a, b = jnp.split(x_BxTxHxE, 2, axis=-1)
    turned = (a * cos_Tx1xE - b * sin_Tx1xE, b * cos_Tx1xE + a * sin_Tx1xE)
    return jnp.concatenate(turned, axis=-1).astype(x_BxTxHxE.dtype)


def attend(
    q_BxTxHxE: jax.Array,
    k_BxTxKxE: jax.Array,
    v_BxTxKxE: jax.Array,
    segment_ids_BxT: jax.Array | None = None,
    *,
    kernel: str = "auto",
    causal: bool = True,
    dropout: tuple[float, jax.Array | None] = (0.0, None),
    mesh: OnMesh = None,
) -> jax.Array:
    """Attention with grouped key and value heads, optionally within documents.

    Args:
        q_BxTxHxE: queries.
        k_BxTxKxE: keys; K divides H.
        v_BxTxKxE: values.
        segment_ids_BxT: document of each position; a position sees its own document only.
        kernel: "xla", "cudnn", or "auto" for cuDNN on a GPU and JAX's own kernel on a TPU, where
            they apply.
        causal: whether a position sees only those before it and itself.
        dropout: of the attention weights: rate and key; no key, no dropout. No kernel has it: it
            forms the weights.
        mesh: over which rows and heads are spread; needed by the kernel on several TPUs.

    Returns:
        The mixed values, (B, T, H, E).
    """
    drops = dropout[0] > 0 and dropout[1] is not None
    fused = q_BxTxHxE.dtype != jnp.float64 and not drops
    if fused and kernel == "auto" and splash_applies(q_BxTxHxE, mesh):
        given = (q_BxTxHxE, k_BxTxKxE, v_BxTxKxE, segment_ids_BxT)
        return splash(*given, causal=causal, mesh=mesh)
    mask_Bx1xTxT = None
    if segment_ids_BxT is not None:
        mask_Bx1xTxT = (segment_ids_BxT[:, :, None] == segment_ids_BxT[:, None, :])[:, None]
    if not fused:
        return _attend_plain(q_BxTxHxE, k_BxTxKxE, v_BxTxKxE, mask_Bx1xTxT, causal, dropout)
    if kernel == "auto":
        kernel = "cudnn" if _cudnn_applies(q_BxTxHxE) else "xla"
    return jax.nn.dot_product_attention(
        q_BxTxHxE,
        k_BxTxKxE,
        v_BxTxKxE,
        mask=mask_Bx1xTxT,
        is_causal=causal,
        implementation="cudnn" if kernel == "cudnn" else "xla",
    )


def _cudnn_applies(q_BxTxHxE: jax.Array) -> bool:
    """Whether cuDNN's fused attention takes these queries on the default backend."""
    T, E = q_BxTxHxE.shape[1], q_BxTxHxE.shape[3]
    half = q_BxTxHxE.dtype in (jnp.bfloat16, jnp.float16)
    shapes = E % 8 == 0 and E <= _CUDNN_MAX_HEAD_WIDTH and T % 2 == 0
    return half and shapes and jax.default_backend() == "gpu"


def _attend_plain(
    q_BxTxHxE: jax.Array,
    k_BxTxKxE: jax.Array,
    v_BxTxKxE: jax.Array,
    mask_Bx1xTxT: jax.Array | None,
    causal: bool,
    dropout: tuple[float, jax.Array | None],
) -> jax.Array:
    """The definition; `jax.nn.dot_product_attention` takes its softmax in float32 always."""
    B, T, H, E = q_BxTxHxE.shape
    K = k_BxTxKxE.shape[2]
    q_BxTxKxGxE = q_BxTxHxE.reshape(B, T, K, H // K, E)
    scores_BxKxGxTxS = jnp.einsum(
        "btkge,bske->bkgts",
        q_BxTxKxGxE,
        k_BxTxKxE,
        preferred_element_type=jnp.promote_types(q_BxTxHxE.dtype, jnp.float32),
    )
    visible = jnp.ones((T, T), bool)
    visible = jnp.tril(visible) if causal else visible
    if mask_Bx1xTxT is not None:
        visible = visible & mask_Bx1xTxT[:, :, None]
    scores_BxKxGxTxS = jnp.where(visible, scores_BxKxGxTxS / E**0.5, -jnp.inf)
    weights_BxKxGxTxS = dropped(jax.nn.softmax(scores_BxKxGxTxS, axis=-1), *dropout)
    weights_BxKxGxTxS = weights_BxKxGxTxS.astype(v_BxTxKxE.dtype)
    return jnp.einsum("bkgts,bske->btkge", weights_BxKxGxTxS, v_BxTxKxE).reshape(B, T, H, E)
