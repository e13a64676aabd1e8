"""Attention on TPUs without its T x T scores, through the kernel that ships with JAX."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)
from jax.sharding import PartitionSpec

from jaxopt_lab.models.sharding import OnMesh, free_axes, free_spec, on_each_device, placement

SHORTEST = 256
"""Positions from which the kernel is used: below, the scores are smaller than its own buffers."""

_LANES = 128
_LARGEST_BLOCK = 512  # of positions; the scores of one block fit beside each other into VMEM
_OLD = ("TPU v2", "TPU v3")  # their matrix units take no bfloat16 operands from a kernel
_PRECISIONS = (None, "default", "bfloat16")
# Of positions that fill up the last block; a document has another one.
_PADDING = -(2**31)


def splash_applies(q_BxTxHxE: jax.Array, mesh: OnMesh) -> bool:
    """Whether these queries go through the kernel.

    They do on TPUs from v4 on, from `SHORTEST` positions, in bfloat16 or float32 and at the
    default precision of matrix products (the kernel has no "high" one), for heads of any width.
    Without a mesh only where there is one device: the compiler cannot split a kernel by itself,
    and a traced array does not tell over how many devices it will be spread.
    """
    if mesh is None and jax.device_count() > 1:
        return False
    device = jax.devices()[0] if mesh is None else placement(mesh).mesh.devices.flat[0]
    plain = jax.config.values["jax_default_matmul_precision"] in _PRECISIONS
    numbers = plain and q_BxTxHxE.dtype in (jnp.bfloat16, jnp.float32)
    here = device.platform == "tpu" and device.device_kind not in _OLD
    return here and numbers and q_BxTxHxE.shape[1] >= SHORTEST


def splash(
    q_BxTxHxE: jax.Array,
    k_BxTxKxE: jax.Array,
    v_BxTxKxE: jax.Array,
    segment_ids_BxT: jax.Array | None = None,
    *,
    causal: bool = True,
    mesh: OnMesh = None,
) -> jax.Array:
    """Attention as `jaxopt_lab.models.attention.attend` defines it, in blocks of positions.

    A block of scores is formed, used and forgotten, in the backward pass again; blocks that
    causality hides are skipped. So memory grows with T. It has a reverse-mode derivative of first
    order alone.

    Args:
        q_BxTxHxE: queries.
        k_BxTxKxE: keys; K divides H.
        v_BxTxKxE: values.
        segment_ids_BxT: document of each position; a position sees its own document only.
        causal: whether a position sees only those before it and itself.
        mesh: with axes among data, fsdp and tensor, and the rules by which rows and heads lie on
            them. Each device attends for its own ones; nothing is exchanged.

    Returns:
        The mixed values, (B, T, H, E).

    Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work
    Partitioning", arXiv 2307.08691, for the method; `jax.experimental.pallas.ops.tpu`
    (`splash_attention`) for the kernel.
    """
    spec = free_spec(mesh, ("batch", None, "heads", None), q_BxTxHxE.shape)
    split, sizes = spec[2] or (), free_axes(mesh)
    parts = math.prod(sizes[a] for a in ((split,) if isinstance(split, str) else split))
    # Where devices outnumber the key heads, several hold a copy of one; H = K G and parts both
    # are multiples of K copies.
    copies = parts // math.gcd(parts, k_BxTxKxE.shape[2])
    k_BxTxKxE, v_BxTxKxE = (
        jnp.repeat(x, copies, axis=2) if copies > 1 else x for x in (k_BxTxKxE, v_BxTxKxE)
    )
    arrays, specs = [q_BxTxHxE, k_BxTxKxE, v_BxTxKxE], (spec,) * 3
    if segment_ids_BxT is not None:
        arrays.append(segment_ids_BxT.astype(jnp.int32))
        specs += (PartitionSpec(spec[0], None),)
    own = functools.partial(_on_one_device, causal=causal)
    return on_each_device(own, arrays, mesh, specs, spec)


def _on_one_device(
    q_BxTxHxE: jax.Array,
    k_BxTxKxE: jax.Array,
    v_BxTxKxE: jax.Array,
    segment_ids_BxT: jax.Array | None = None,
    *,
    causal: bool,
) -> jax.Array:
    _, T, H, E = q_BxTxHxE.shape
    block, padding = _blocks(T)
    # In float32, or a scale that is no power of two would be rounded before the product is.
    q_BxTxHxE = (q_BxTxHxE.astype(jnp.float32) * E**-0.5).astype(q_BxTxHxE.dtype)
    q_BxHxTxE, k_BxKxTxE, v_BxKxTxE = (
        jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))
        for x in (q_BxTxHxE, k_BxTxKxE, v_BxTxKxE)
    )
    if segment_ids_BxT is None and padding and not causal:
        segment_ids_BxT = jnp.zeros(q_BxTxHxE.shape[:2], jnp.int32)
    ids = None
    if segment_ids_BxT is not None:
        padded = jnp.pad(segment_ids_BxT, ((0, 0), (0, padding)), constant_values=_PADDING)
        ids = kernels.SegmentIds(padded, padded)
    mask = (masks.CausalMask if causal else masks.FullMask)((T + padding, T + padding))
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * H),
        # Of queries and of keys, for the forward pass and both kernels of the backward pass.
        block_sizes=kernels.BlockSizes(block, block, block, block, block, block, block, block),
        head_shards=1,
        q_seq_shards=1,
    )
    y_BxHxTxE: Any = jax.vmap(kernel)(q_BxHxTxE, k_BxKxTxE, v_BxKxTxE, ids)
    return jnp.swapaxes(y_BxHxTxE[:, :, :T], 1, 2)


def _blocks(positions: int) -> tuple[int, int]:
    """Length of a block, a multiple of the lanes, and positions missing in the last one."""
    blocks = -(-positions // _LARGEST_BLOCK)
    block = _LANES * -(-positions // (_LANES * blocks))
    return block, blocks * block - positions
