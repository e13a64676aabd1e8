"""The elementwise parts of a Shampoo step: the averaged gradient, and the graft's direction."""

import jax.numpy as jnp
from jaxtyping import Array

from jaxopt_lab.core.numerics import Scalar, frobenius_norm, one_minus_power, safe_divide, widened
from jaxopt_lab.optim.options import Graft


def keeps_squares(graft: Graft) -> bool:
    """Whether a grafting method has a second moment."""
    return graft.kind not in ("sgd", None)


def graft_decay(graft: Graft, b2: Scalar) -> Scalar:
    """Decay of the second moment: its own or that of the factors, unless these are sums."""
    if graft.b2 is not None:
        return graft.b2
    if isinstance(b2, int | float):
        return 0.999 if b2 == 1 else b2
    return jnp.where(b2 == 1, 0.999, widened(b2))  # which is 1 in bfloat16


def average_gradient(
    mu: Array, g: Array, steps: Array, *, b1: Scalar, b3: Scalar | None, bias_correction: bool
) -> tuple[Array, Array]:
    r"""The averaged gradient to descend along, and the next first moment.

    $m_t = b_1 m_{t-1} + (1 - b_1) G_t$. The average is $m_t / (1 - b_1^t)$ or, with $b_3$, the
    look-ahead $(b_3 m_{t-1} + (1 - b_3) G_t) / (1 - b_3 b_1^{t-1})$. `steps` is $t$, the gradients
    taken in so far, this one included; it broadcasts against `g`.
    """
    new = b1 * mu + (1 - b1) * g
    average, filled = new, one_minus_power(b1, steps)
    if b3 is not None:
        # Without a first moment there is nothing to look ahead from.
        average = jnp.where(b1 == 0, g, b3 * mu + (1 - b3) * g)
        filled = jnp.where(b1 == 0, 1, 1 - b3 * (1 - one_minus_power(b1, steps - 1)))
    return (average / filled if bias_correction else average), new


def graft_direction(
    graft: Graft, average: Array, nu: Array, g: Array, steps: Array, *, b2: Scalar
) -> tuple[Array, Array]:
    """The direction whose norm the blocks take, and the next second moment.

    `average`, `g` and `steps` are those of `average_gradient`, `nu` is the last second moment
    (anything where `keeps_squares` is false), `b2` is `graft_decay`.
    """
    if not keeps_squares(graft):
        return average, nu
    if graft.kind == "adagrad":
        # A sum that would overflow stays at the largest number.
        new = jnp.minimum(nu + jnp.square(g), jnp.finfo(nu.dtype).max)
    else:
        new = b2 * nu + (1 - b2) * jnp.square(g)
    second = new / one_minus_power(b2, steps) if graft.kind == "adam" else new
    return safe_divide(average, jnp.sqrt(second) + graft.eps), new


def with_norm_of(x: Array, other: Array) -> Array:
    """`x` with the norm of `other`, each entry of the first axis for itself; zero stays zero."""
    axes = tuple(range(1, x.ndim))
    # Roots of tiny gradients make a direction of 1e24 from one of 1e18. A power of two keeps its
    # squares within float32, and loses directions below 1e-11, which only gradients far below the
    # epsilon of a graft have.
    norm = frobenius_norm(x * 2.0**-24, axes) * 2.0**24
    return safe_divide(x, norm) * frobenius_norm(other, axes)
