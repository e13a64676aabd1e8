"""The elementwise parts of a Shampoo step: averages of the gradient and grafting directions."""

import jax.numpy as jnp
from jaxtyping import Array

from jaxopt_lab.core.numerics import Scalar, one_minus_power

# What lends its step size to a block; None: nothing does.
GRAFTS = ("adam", "rmsprop", "adagrad", "sgd", None)


def keeps_squares(graft: str | None) -> bool:
    """Whether a grafting method has a second moment."""
    return graft not in ("sgd", None)


def average_gradient(
    mu: Array, g: Array, age: Array, *, b1: Scalar, b3: Scalar | None, bias_correction: bool
) -> tuple[Array, Array]:
    r"""The averaged gradient to descend along, and the next first moment.

    $m_t = b_1 m_{t-1} + (1 - b_1) G_t$. The average is $m_t / (1 - b_1^t)$ or, with $b_3$, the
    look-ahead $(b_3 m_{t-1} + (1 - b_3) G_t) / (1 - b_3 b_1^{t-1})$.

    Args:
      mu: $m_{t-1}$.
      g: $G_t$, in the dtype of the computation.
      age: $t$: gradients accepted so far, this one included; broadcasts against `g`.
      b1: Decay.
      b3: Decay of the look-ahead.
      bias_correction: Whether to divide.
    """
    new = b1 * mu + (1 - b1) * g
    average, correction = new, one_minus_power(b1, age)
    if b3 is not None:
        # Without a first moment there is nothing to look ahead from.
        average = jnp.where(b1 == 0, g, b3 * mu + (1 - b3) * g)
        correction = jnp.where(b1 == 0, 1, 1 - b3 * (1 - one_minus_power(b1, age - 1)))
    return (average / correction if bias_correction else average), new


def graft_direction(
    kind: str | None,
    average: Array,
    squares: Array,
    g: Array,
    age: Array,
    *,
    b2: Scalar,
    eps: Scalar,
) -> tuple[Array, Array]:
    """The direction whose norm is lent to the blocks, and the next second moment.

    Args:
      kind: One of `GRAFTS`.
      average: The averaged gradient.
      squares: The last second moment; anything where `keeps_squares` is false.
      g: The gradient.
      age: Gradients accepted so far, this one included.
      b2: Decay of "adam" and "rmsprop".
      eps: Added to the root of the second moment.
    """
    if not keeps_squares(kind):
        return average, squares
    if kind == "adagrad":
        new = squares + jnp.square(g)
    else:
        new = b2 * squares + (1 - b2) * jnp.square(g)
    second = new / one_minus_power(b2, age) if kind == "adam" else new
    return average / (jnp.sqrt(second) + eps), new
