"""Random numbers by their position: threefry in elementwise operations, so that noise fuses.

`jax.random` writes counters and bits to memory before it makes numbers of them. Here the bits at a
position are a function of key and index alone: XLA computes them where they are used, inside of
`w + eps * z` say, a device of a mesh computes its own part, and a loop over layers the slice it
needs. They are the bits of `jax.random` for the same key.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_WORD = 32


def bits(
    keys: Array,
    shape: Sequence[int],
    *,
    offset: Sequence[Array | int] | None = None,
    within: Sequence[int] | None = None,
) -> UInt32[Array, "..."]:
    """32 random bits an entry: those of `jax.random.bits(key, shape)` for each key.

    Args:
      keys: Typed threefry keys of any shape.
      shape: What each key draws.
      offset: Index at which the drawn part begins; None: at 0.
      within: Shape of the whole of which `shape` is a part; None: `shape` is the whole.

    Returns:
      Bits of the shape of `keys`, followed by `shape`.

    Raises:
      ValueError: The whole has more than 2^32 entries.
    """
    whole = tuple(shape if within is None else within)
    if math.prod(whole) > 2**_WORD:
        raise ValueError(f"shape {whole} has more than 2^32 entries for one key")
    position = jnp.zeros(tuple(shape), jnp.uint32)
    stride = 1
    for axis in reversed(range(len(whole))):
        along = lax.broadcasted_iota(jnp.uint32, tuple(shape), axis)
        if offset is not None:
            along = along + jnp.asarray(offset[axis]).astype(jnp.uint32)
        # Strides of axes of length 1 may be 2^32; their index is 0.
        position = position + along * jnp.uint32(stride % 2**_WORD)
        stride *= whole[axis]
    data = jax.random.key_data(keys)
    ones = (1,) * len(whole)
    first, second = (data[..., k].reshape((*keys.shape, *ones)) for k in range(2))
    high, low = _threefry(first, second, jnp.zeros_like(position), position)
    return high ^ low


def normals(
    keys: Array, shape: Sequence[int], dtype: DTypeLike = "float32", **part: Sequence
) -> Float[Array, "..."]:
    """Standard normal numbers: in float32 those of `jax.random.normal` within 2 ulp.

    Args:
      keys: As for `bits`.
      shape: As for `bits`.
      dtype: float32, or float64: the same numbers, computed to more digits. Compilers round the
        last digits of the same expression differently in different programs.
      **part: `offset` and `within`, as for `bits`.

    Example:
      >>> key = jax.random.key(0)
      >>> bool(jnp.allclose(normals(key, (3,)), jax.random.normal(key, (3,))))
      True
    """
    below_one = (bits(keys, shape, **part) >> 9) | jnp.uint32(0x3F800000)
    uniform = lax.bitcast_convert_type(below_one, jnp.float32) - 1
    lowest = jnp.nextafter(jnp.float32(-1), jnp.float32(0))
    uniform = jnp.maximum(lowest, uniform * (1 - lowest) + lowest)
    return jnp.asarray(math.sqrt(2), dtype) * lax.erf_inv(uniform.astype(dtype))


def signs(
    keys: Array,
    shape: Sequence[int],
    *,
    offset: Sequence[Array | int] | None = None,
    within: Sequence[int] | None = None,
) -> Int8[Array, "..."]:
    """-1 or 1, each with probability one half, 32 of them from one word of bits.

    Entry j along the last axis is bit j mod 32 of word j // 32 of `bits(keys, (..., words))`.

    Args:
      keys: As for `bits`.
      shape: As for `bits`.
      offset: As for `bits`; along the last axis a multiple of 32.
      within: As for `bits`.
    """
    *outer, last = shape if len(shape) else (1,)
    if offset is not None:
        offset = (*offset[:-1], offset[-1] // _WORD)
    if within is not None:
        within = (*within[:-1], -(-within[-1] // _WORD))
    words = bits(keys, (*outer, -(-last // _WORD)), offset=offset, within=within)
    spread = words[..., None] >> jnp.arange(_WORD, dtype=jnp.uint32)
    flat = spread.reshape((*words.shape[:-1], -1))[..., :last]
    ones = 1 - 2 * (flat & 1).astype(jnp.int8)
    return ones.reshape((*keys.shape, *shape))


def _threefry(k0: Array, k1: Array, x0: Array, x1: Array) -> tuple[Array, Array]:
    """The block function of threefry2x32, 20 rounds (Salmon, Moraes, Dror and Shaw, 2011)."""
    schedule = (k0, k1, k0 ^ k1 ^ jnp.uint32(_PARITY))
    x0, x1 = x0 + schedule[0], x1 + schedule[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << rotation) | (x1 >> (_WORD - rotation))
            x1 = x0 ^ x1
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0, x1
