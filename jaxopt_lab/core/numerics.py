"""Small pieces of floating-point arithmetic that every method uses."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

Scalar = int | float | jax.Array


def wide_dtype(x: Any) -> Any:
    """The dtype in which a method computes with `x`: float32, or wider if `x` is."""
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def widened(x: Array) -> Array:
    """`x` in `wide_dtype`."""
    return x.astype(wide_dtype(x))


def perturbed(x: Array, scale: Array, direction: Array) -> Array:
    """`x + scale * direction`, computed in float32 or wider, in the dtype of `x`."""
    return (widened(x) + scale.astype(wide_dtype(x)) * direction).astype(x.dtype)


def safe_divide(x: Array, y: Array) -> Array:
    """`x / y`, and 0 where `y` is 0."""
    nonzero = y != 0
    return jnp.where(nonzero, x / jnp.where(nonzero, y, 1), 0)


def frobenius_norm(x: Array, axes: Sequence[int] | int | None = None) -> Array:
    """The root of the sum of squares along `axes` (None: all), which stay with size 1."""
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))


def scale_to_unit(x: Array, axes: Sequence[int] | int) -> Array:
    """`x` times a power of two that brings its largest entry along `axes` to [1, 2).

    Squares of the result neither overflow nor vanish, and multiplying by a power of two rounds
    nothing. Zeros and what is not finite stay as they are.
    """
    # The power is piecewise constant: no derivative passes through it.
    largest = lax.stop_gradient(jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0))
    usable = (largest > 0) & jnp.isfinite(largest)
    exponent = jnp.where(usable, jnp.frexp(jnp.where(usable, largest, 1))[1] - 1, 0)
    # In two halves: 2**-exponent itself may overflow where x is subnormal.
    half, one = exponent // 2, jnp.ones_like(largest)
    return x * jnp.ldexp(one, -half) * jnp.ldexp(one, half - exponent)


def frobenius_unit(
    x: Array, axes: Sequence[int] | int, *, factor: float = 1.0, eps: float = 0.0
) -> Array:
    r"""$X / (f \lVert X \rVert_F)$, whatever the scale of $X$; zero stays zero, NaN spreads.

    Args:
      x: Arrays whose entries along `axes` belong together.
      axes: The axes of the norm.
      factor: $f$.
      eps: Added to the denominator, as released codes do: the result then depends on the scale.
    """
    if eps:
        return x / (factor * frobenius_norm(x, axes) + eps)
    if math.prod(x.shape[axis] for axis in ((axes,) if isinstance(axes, int) else axes)) == 1:
        # Without a sum XLA moves the powers below out of the square and folds them to 0 and inf.
        return jnp.where(jnp.isfinite(x), jnp.sign(x), jnp.nan) / factor
    # One pass over `x`, whichever of the sums neither overflows nor vanishes: a pass that looks for
    # the largest entry first would read it twice. Powers of two round nothing.
    power = 2.0 ** (jnp.finfo(x.dtype).maxexp // 2)
    plain, lifted, lowered = (
        jnp.sum(jnp.square(x * scale), axis=axes, keepdims=True) for scale in (1, power, 1 / power)
    )
    fits, large = (plain > 1 / power) & (plain < jnp.inf), plain > 1
    square = jnp.where(fits, plain, jnp.where(large, lowered, lifted))
    scale = jnp.where(fits, 1, jnp.where(large, power, 1 / power))
    return x / (factor * scale * jnp.sqrt(jnp.where(square == 0, 1, square)))


def one_minus_power(b: Scalar, t: Array) -> Array:
    """`1 - b**t` without the cancellation that costs float32 five digits at b = 0.999, t = 1."""
    if isinstance(b, int | float):
        log_b = math.log(b) if b > 0 else -math.inf
    else:
        log_b = jnp.log(b)
    return -jnp.expm1(t * log_b)


def dropped(x: Array, rate: float, key: Array | None) -> Array:
    """Entries zeroed with probability `rate`, the others divided by 1 - rate.

    The backward pass keeps one bit an entry. Without the packing XLA keeps the 32 random bits that
    the mask is made of.

    >>> x = dropped(jnp.ones((4, 100)), 0.5, jax.random.key(0))
    >>> sorted(set(x.ravel().tolist()))
    [0.0, 2.0]

    Args:
      x: One axis at least.
      rate: Below 1.
      key: Of the draw; None: x as it is.
    """
    if key is None or rate == 0:
        return x
    packed = jnp.packbits(jax.random.bernoulli(key, 1 - rate, x.shape), axis=-1)
    stays = jnp.unpackbits(packed, axis=-1, count=x.shape[-1])
    return jnp.where(stays.astype(bool), x / (1 - rate), 0)
