r"""The loss at the end of a run, extrapolated from its beginning.

Losses are fitted by a straight line in $z_t = \log(1 + t) / \log(1 + T)$, by least squares, and the
value of the line at the last step T is the estimate. Before there is data an expectation stands in
for it: the run ends at a share of its first loss. It weighs as much as some pseudo-observations at
both ends of the line, so the losses take over as they come in.

Our own addition; the paper takes the target as given.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Scalar = float | Array


class TargetEstimate(NamedTuple):
    """Normal equations of the line, two of the entries being the same."""

    weight: Float[Array, ""]  # sum of weights
    position: Float[Array, ""]  # of weights times positions
    square: Float[Array, ""]  # of weights times squared positions
    loss: Float[Array, ""]  # of weights times losses
    product: Float[Array, ""]  # of weights times positions times losses


def expected_target(
    first_loss: Scalar, total_steps: int, *, share: float, observations: float
) -> TargetEstimate:
    """The line from the first loss to a share of it, as pseudo-observations at its ends.

    Args:
      first_loss: Loss of the first step.
      total_steps: Steps of the run.
      share: Expected last loss over the first.
      observations: Weight of this expectation, in losses.
    """
    first = jnp.asarray(first_loss)
    weight = jnp.full_like(first, observations)
    last = share * first
    return TargetEstimate(2 * weight, weight, weight, weight * (first + last), weight * last)


def with_loss(
    estimate: TargetEstimate, loss: Scalar, step: Int[Array, ""], total_steps: int
) -> TargetEstimate:
    """The estimate with one more loss.

    Args:
      estimate: So far.
      loss: Loss of the step.
      step: 0 for the first.
      total_steps: Steps of the run.
    """
    z = jnp.log1p(step.astype(estimate.weight.dtype)) / math.log1p(total_steps)
    more = TargetEstimate(jnp.ones_like(z), z, z * z, loss * jnp.ones_like(z), z * loss)
    return TargetEstimate(*(a + b for a, b in zip(estimate, more, strict=True)))


def estimated_target(estimate: TargetEstimate) -> Float[Array, ""]:
    """The line's value at the last step; not negative.

    >>> start = expected_target(10.0, 100, share=0.35, observations=2.0)
    >>> round(float(estimated_target(start)), 3)
    3.5
    """
    n, z, zz, y, zy = estimate
    # Never 0: the expectation stands at both ends.
    determinant = n * zz - z * z
    slope, level = (n * zy - z * y) / determinant, (zz * y - z * zy) / determinant
    return jnp.maximum(level + slope, 0)
