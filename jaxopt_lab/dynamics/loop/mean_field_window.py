"""Mean-field closed forms of the sliding window.

An item that enters at time u brings a label of scale L(u), and stays for W steps. Notation and
limits are those of `mean_field`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

_NEWTON_STEPS = 64


def window_scale(
    steps: int,
    *,
    window: int,
    usage: ArrayLike,
    gain: ArrayLike,
    start: ArrayLike = 1.0,
    form: Literal["recursion", "integral"] = "recursion",
) -> Float[Array, "times ..."]:
    r"""Scale of the residuals in the sliding window after 0, 1, ..., `steps` steps.

    A label that enters at time u has scale $L(u) = (1-p)x_0 + p g x(u)$, and
    $L(u) = x_0$ for u < 0. Per step,

    $$
    x(t+1) = x(t) + \frac{L(t) - L(t-W)}{W};
    $$

    in continuous time $x(t) = W^{-1}\int_{t-W}^{t} L$, whose delay equation is integrated by
    the trapezoidal rule over steps of one (error about $p g t/W\,(pg/W)^2/12$).

    Args:
      steps: Number of steps.
      window: W, the size of the active set.
      usage: p; broadcasts against `gain` and `start`.
      gain: g of the rule, from `gain`.
      start: x_0, mean absolute residual under "mae", variance under "var".
      form: "recursion" (per step) or "integral" (continuous time).

    Returns:
      x(0), ..., x(steps) along the first axis.

    Raises:
      ValueError: For another form, or steps or window below their minimum of 0 and 1.

    >>> [round(float(x), 3) for x in window_scale(1400, window=600, usage=1.0, gain=0.5)[::700]]
    [1.0, 0.299, 0.071]
    """
    check_choice("form", form, ("recursion", "integral"))
    for name, value, least in (("steps", steps, 0), ("window", window, 1)):
        if value < least:
            raise ValueError(f"{name}: got {value}, expected at least {least}")
    # The factor one makes floating-point numbers of integers and keeps the precision of the rest.
    usage, gain, start = jnp.broadcast_arrays(
        *(jnp.asarray(value) * 1.0 for value in (usage, gain, start))
    )
    dtype = jnp.result_type(usage, gain, start)
    usage, gain, start = (value.astype(dtype) for value in (usage, gain, start))
    return _window_scale(steps, window, usage, gain, start, form == "integral")


@jax.jit(static_argnames=("steps", "window", "integral"))
def _window_scale(steps, window, usage, gain, start, integral):
    fresh, feedback = (1.0 - usage) * start, usage * gain

    def step(carry, index):
        scale, labels = carry
        oldest = labels[index % window]
        if integral:
            # The mean label scale over the step contains the scale at its end; solved for that.
            after = scale + (fresh + feedback * scale - oldest) / (window - feedback / 2.0)
            label = fresh + feedback * (scale + after) / 2.0
        else:
            label = fresh + feedback * scale
            after = scale + (label - oldest) / window
        return (after, labels.at[index % window].set(label)), after

    labels = jnp.broadcast_to(start, (window, *start.shape))
    _, later = jax.lax.scan(step, (start, labels), jnp.arange(steps))
    return jnp.concatenate([start[None], later])


def window_first_pass(
    step: ArrayLike, *, window: int, usage: ArrayLike, gain: ArrayLike, start: ArrayLike = 1.0
) -> Float[Array, "..."]:
    r"""The integral form in closed form while the first labels are being replaced, t <= W.

    From $x' = (p/W)(g x - x_0)$:
    $x(t) = x_0\big[1 + (g-1)\frac{p}{W}\,\frac{e^{kt}-1}{k}\big]$ with $k = pg/W$.

    >>> round(float(window_first_pass(600, window=600, usage=1.0, gain=0.0)), 6)
    0.0
    """
    step, usage, gain = jnp.asarray(step), jnp.asarray(usage), jnp.asarray(gain)
    growth = growth_integral(usage * gain / window, step)
    return jnp.asarray(start) * (1.0 + (gain - 1.0) * usage / window * growth)


def window_stationary(
    *, usage: ArrayLike, gain: ArrayLike, start: ArrayLike = 1.0
) -> Float[Array, "..."]:
    r"""Stationary scale $(1-p)x_0/(1-pg)$ of the window; infinite where $pg\ge 1$.

    At p = g = 1 labels come back at the scale they had, and the start is the answer.

    >>> round(float(window_stationary(usage=0.5, gain=0.5)), 5)
    0.66667
    """
    usage, gain = jnp.asarray(usage) * 1.0, jnp.asarray(gain) * 1.0
    feedback = usage * gain
    stationary = jnp.asarray(start) * (1.0 - usage) / jnp.where(feedback < 1.0, 1.0 - feedback, 1.0)
    stationary = jnp.where(feedback < 1.0, stationary, jnp.inf)
    return jnp.where((usage == 1.0) & (gain == 1.0), start, stationary)


def window_growth_rate(
    *, gain: ArrayLike, window: int, usage: ArrayLike = 1.0
) -> Float[Array, "..."]:
    r"""Growth rate γ per step of the window far from its start.

    The rate of $x \propto e^{\gamma t}$ solves $\gamma W = G(1 - e^{-\gamma W})$ with
    $G = p g$: positive above G = 1, negative below (decay to the stationary value), zero at
    it, and minus infinity at G = 0, where the first pass ends the transient.

    >>> round(float(window_growth_rate(gain=2.0, window=1)), 5)
    1.59362
    """
    total = jnp.asarray(usage) * jnp.asarray(gain) * 1.0
    safe = jnp.where(total > 0.0, total, 1.0)
    # The function is convex and positive at these points, so Newton's steps are monotone.
    z = jnp.where(safe > 1.0, safe, 2.0 * jnp.log(safe))

    def newton(_, z):
        slope = 1.0 - safe * jnp.exp(-z)
        return z - (z + safe * jnp.expm1(-z)) / jnp.where(slope == 0.0, 1.0, slope)

    z = jax.lax.fori_loop(0, _NEWTON_STEPS, newton, z)
    z = jnp.where(total == 1.0, 0.0, z)
    return jnp.where(total > 0.0, z, -jnp.inf) / window


def growth_integral(rate, time):
    """The quotient (exp(rate time) - 1) / rate, which is `time` at rate zero."""
    exponent = rate * time
    near = jnp.abs(exponent) < 1e-12
    safe = jnp.where(near, 1.0, exponent)
    return time * jnp.where(near, 1.0, jnp.expm1(safe) / safe)


def check_choice(name: str, value: str, wanted: tuple[str, ...]) -> None:
    """Refuses what is not one of the wanted names."""
    if value not in wanted:
        raise ValueError(f"{name}: got {value!r}, expected {' or '.join(wanted)}")
