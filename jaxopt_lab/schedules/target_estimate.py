r"""The loss at the end of a run, extrapolated from its beginning.

Losses are fitted by a straight line in $z_t = \log(1 + t) / \log(1 + T)$, by least squares, and the
value of the line at the last step T is the estimate. Before there is data an expectation stands in
for it: a run ends at a share of its first loss. It weighs as much as some losses at either end of
the line, so the losses take over as they come in.

Our own addition; the paper takes the target as given.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxopt_lab.core.numerics import Scalar

# Of a cross-entropy that starts at the logarithm of the vocabulary. Published runs ended at 0.29 of
# it and took any target from 0.27 to 0.45 equally well.
EXPECTED_SHARE = 0.35
# What the expectation weighs at each end, in losses, as a share of the steps.
EXPECTATION_WEIGHT = 0.02
# The estimate keeps this share of the first loss as a gap, however little the loss has moved.
SMALLEST_GAP_SHARE = 0.1


class TargetEstimate(NamedTuple):
    """The first loss, and the sums of the normal equations of the line."""

    first_loss: Float[Array, ""]
    weight: Float[Array, ""]  # sum of weights
    position: Float[Array, ""]  # of weights times positions
    square: Float[Array, ""]  # of weights times squared positions
    loss: Float[Array, ""]  # of weights times losses
    product: Float[Array, ""]  # of weights times positions times losses


def expected_target(first_loss: Float[Array, ""], total_steps: Scalar) -> TargetEstimate:
    """The line from the first loss to the expected share of it."""
    weight = jnp.full_like(first_loss, EXPECTATION_WEIGHT) * total_steps
    last = EXPECTED_SHARE * first_loss
    return TargetEstimate(
        first_loss, 2 * weight, weight, weight, weight * (first_loss + last), weight * last
    )


def with_loss(
    estimate: TargetEstimate, loss: Float[Array, ""], step: Int[Array, ""], total_steps: Scalar
) -> TargetEstimate:
    """The estimate with the loss of one more step; 0 is the first."""
    dtype = estimate.weight.dtype
    z = jnp.log1p(step.astype(dtype)) / jnp.log1p(jnp.asarray(total_steps, dtype))
    _, weight, position, square, total, product = estimate
    return TargetEstimate(
        estimate.first_loss,
        weight + 1,
        position + z,
        square + z * z,
        total + loss,
        product + z * loss,
    )


def estimated_target(estimate: TargetEstimate) -> Float[Array, ""]:
    """The value of the line at the last step, between 0 and nine tenths of the first loss.

    >>> start = expected_target(jnp.asarray(10.0), 100)
    >>> round(float(estimated_target(start)), 3)
    3.5
    """
    first, n, z, zz, y, zy = estimate
    # Never 0: the expectation stands at both ends.
    determinant = n * zz - z * z
    slope, level = (n * zy - z * y) / determinant, (zz * y - z * zy) / determinant
    return jnp.clip(level + slope, 0, (1 - SMALLEST_GAP_SHARE) * first)
