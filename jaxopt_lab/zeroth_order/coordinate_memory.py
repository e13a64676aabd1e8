r"""JAGUAR's estimator: the last difference seen of each coordinate, as the gradient.

Its error at a fixed point shrinks by $1 - 1/d$ an iteration, at two values each: where iterates
slow down, the variance of the estimate goes to zero.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxopt_lab.core.checks import check_number
from jaxopt_lab.zeroth_order.differences import (
    PROBABILITY,
    Estimator,
    Feedback,
    Found,
    check_probing,
)
from jaxopt_lab.zeroth_order.probes import check_integer


class Coordinates(NamedTuple):
    """Probes of coordinates: directions are $s_b e_{i_b}$.

    Attributes:
      index: Coordinates, distinct.
      sign: +1, or random where a probe takes a single value.
    """

    index: Int[Array, " b"]
    sign: Float[Array, " b"]


class CoordinateMemory(NamedTuple):
    """State of the estimator.

    Attributes:
      h: The last difference of each coordinate, in the order of the raveled point.
    """

    h: Float[Array, " d"]


def coordinate_memory(
    *,
    eps: float = 1e-3,
    num_coordinates: int = 1,
    feedback: Feedback = "deterministic",
    h0: str = "full",
    sega: bool = False,
    refill: float = 0.0,
) -> Estimator:
    r"""Refresh some coordinates of a memory and return it.

    $$h_i \leftarrow D_i \quad (i \in I), \qquad \text{direction } h, \text{ or }
    h^{old} + \frac{d}{B} \sum_{i \in I} (D_i - h^{old}_i) e_i$$

    with the correction of SEGA, which is unbiased. A difference that is not finite leaves its
    coordinate as it is.

    Args:
      eps: $\tau$.
      num_coordinates: $B$, distinct coordinates an iteration.
      feedback: See `jaguar_frank_wolfe`.
      h0: "full" fills the memory with 2 d values first, "zeros" does not.
      sega: Correct the direction.
      refill: Probability with which an iteration fills the memory again first, with 2 d values.

    Raises:
      ValueError: An argument is out of its range.

    Source: Veprikov, Bogdanov, Minashkin and Beznosikov, "New Aspects of Black Box Conditional
    Gradient: Variance Reduction and One Point Feedback", arXiv 2409.10442; the correction: Hanzely,
    Mishchenko and Richtárik, "SEGA: Variance Reduction via Gradient Sketching", arXiv 1809.03054.

    Differs from the released code in: the memory holds plain differences (an older script scales
    them by d / B); with a single value it is overwritten whatever the sign drawn.
    """
    check_probing(feedback, eps)
    if h0 not in ("full", "zeros"):
        raise ValueError(f"h0 is {h0!r}; choose 'full' or 'zeros'")
    check_number("refill", refill, PROBABILITY)
    if refill and h0 == "zeros":
        raise ValueError(f"refill is {refill} with h0='zeros'; a memory filled again needs 'full'")

    def init(d: int, dtype: Any) -> CoordinateMemory:
        return CoordinateMemory(jnp.zeros(d, dtype))

    def estimate(
        memory: CoordinateMemory, probes: Coordinates, found: Found
    ) -> tuple[Array, CoordinateMemory]:
        fresh = found.differences * probes.sign
        new = fill(memory, probes.index, fresh, found.finite)
        if not sega:
            return new.h, new
        # The change of the memory, scaled: zero where nothing was refreshed.
        return memory.h + found.x.size / fresh.size * (new.h - memory.h), new

    def fill(
        memory: CoordinateMemory, coordinates: Array, differences: Array, finite: Array
    ) -> CoordinateMemory:
        fresh = jnp.where(finite, differences, memory.h[coordinates])
        return CoordinateMemory(memory.h.at[coordinates].set(fresh))

    draw, point = coordinate_probes(num_coordinates, feedback)
    return Estimator(
        feedback=feedback,
        eps=eps,
        num_probes=lambda d: check_coordinates(num_coordinates, d),
        init=init,
        draw=draw,
        point=point,
        estimate=estimate,
        fill=fill,
        fill_first=h0 == "full",
        refill=refill,
    )


def coordinate_probes(num_coordinates: int | None, feedback: Feedback) -> tuple[Any, Any]:
    """`draw` and `point` of an estimator that looks along coordinates (None: along all)."""

    def draw(key: Array, d: int) -> Coordinates:
        number = d if num_coordinates is None else num_coordinates
        key, sign_key = jax.random.split(key)
        if number == d:
            index = jnp.arange(d)
        elif number == 1:
            index = jax.random.randint(key, (1,), 0, d)
        else:
            index = jax.random.choice(key, d, (number,), replace=False)
        signs = jax.random.rademacher(sign_key, (number,), jnp.float32)
        return Coordinates(index, signs if feedback == "single" else jnp.ones_like(signs))

    def point(x: Array, probes: Coordinates, b: Array, offset: Array) -> Array:
        return x.at[probes.index[b]].add((probes.sign[b] * offset).astype(x.dtype))

    return draw, point


def check_coordinates(number: int, d: int) -> int:
    """A number of coordinates that a point of d entries has.

    Raises:
      ValueError: It does not.
    """
    check_integer("num_coordinates", number)
    if number > d:
        raise ValueError(f"num_coordinates is {number}; the point has {d}")
    return number
