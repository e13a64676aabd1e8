r"""Mean-field closed forms of the repeated-learning loop.

The estimation error of the regressor is neglected (its relative size is (d + 1) / n_train). What
remains are linear equations for the scale of the residuals of the active set. With
:math:`c = \sqrt{2/\pi}`, the mean absolute value of a standard normal, the label that replaces an
item has residual scale :math:`g\,x`, where

- under the rule "mae" x is the mean absolute residual and the gain is :math:`g = s c`,
- under the rule "var" x is the variance of the residuals and the gain is :math:`g = s`.

The loop is that of Veprikov, Afanasiev, Khritankov, "A Mathematical Model of the Hidden Feedback
Loop Effect in Machine Learning Systems", arXiv 2405.02726; the closed forms are derived here, the
paper does not have them.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

Rule = Literal["mae", "var"]
Setup = Literal["window", "sampling"]

MEAN_ABSOLUTE_NORMAL = math.sqrt(2.0 / math.pi)
"""c: the mean absolute value of a standard normal variable."""

_NEWTON_STEPS = 64


class ResidualScale(NamedTuple):
    """Mean-field scale of the active-set residuals."""

    mae: Float[Array, "..."]  # mean absolute residual
    variance: Float[Array, "..."]  # mean squared residual


def gain(adherence: ArrayLike, rule: Rule) -> Float[Array, "..."]:
    r"""The factor g between the scale of the residuals and that of new labels.

    Args:
      adherence: s, at least 0.
      rule: "mae" (g = s c, on the mean absolute residual) or "var" (g = s, on the variance).

    Raises:
      ValueError: For another rule.

    >>> round(float(gain(1.2533141, "mae")), 6), float(gain(3.0, "var"))
    (1.0, 3.0)
    """
    _check_rule(rule)
    return jnp.asarray(adherence) * (MEAN_ABSOLUTE_NORMAL if rule == "mae" else 1.0)


def critical_adherence(
    rule: Rule,
    *,
    setup: Setup,
    usage: float = 1.0,
    kind: Literal["growth", "divergence"] = "growth",
) -> float:
    r"""The adherence s* at which the scale of the residuals changes its direction.

    Growth means that the scale ends above its start: :math:`g = 1`, in both set-ups and whatever
    the usage, that is :math:`\sqrt{\pi/2}` under "mae" and 1 under "var". Divergence means that no
    stationary scale exists: the same in the sampling set-up, :math:`p g = 1` in the window, because
    fresh labels keep coming.

    Args:
      rule: "mae" or "var".
      setup: "window" or "sampling".
      usage: p in [0, 1]. Without any usage nothing changes and s* is infinite.
      kind: Which of the two questions.

    Raises:
      ValueError: For an unknown rule, set-up or kind, or a usage outside [0, 1].

    >>> round(critical_adherence("mae", setup="sampling"), 4)
    1.2533
    >>> critical_adherence("var", setup="window", usage=0.5, kind="divergence")
    2.0
    """
    _check_rule(rule)
    _check_choice("setup", setup, ("window", "sampling"))
    _check_choice("kind", kind, ("growth", "divergence"))
    if not 0.0 <= usage <= 1.0:
        raise ValueError(f"usage: got {usage!r}, expected a probability in [0, 1]")
    if usage == 0.0:
        return math.inf
    growth = 1.0 / MEAN_ABSOLUTE_NORMAL if rule == "mae" else 1.0
    return growth / usage if setup == "window" and kind == "divergence" else growth


def sampling_scale(
    tau: ArrayLike,
    *,
    adherence: ArrayLike,
    rule: Rule,
    mae: ArrayLike = MEAN_ABSOLUTE_NORMAL,
    variance: ArrayLike = 1.0,
) -> ResidualScale:
    r"""Scale of the residuals in the sampling set-up.

    Every item is relabelled at rate one in :math:`\tau = p t / N`. Under "mae", with
    :math:`a = s c - 1`,

    .. math::
      m(\tau) = m_0 e^{a\tau},\qquad
      V(\tau) = e^{-\tau}\Big[V_0 + s^2 m_0^2 \frac{e^{(2a+1)\tau} - 1}{2a + 1}\Big],

    and under "var", with :math:`b = (s + 1)/2`,

    .. math::
      V(\tau) = V_0 e^{(s-1)\tau},\qquad
      m(\tau) = e^{-\tau}\Big[m_0 + c\sqrt{s V_0}\,\frac{e^{b\tau} - 1}{b}\Big].

    The quotients are evaluated so that they keep their limit :math:`\tau` at a zero denominator.

    Args:
      tau: Relabelled fraction p t / N, any shape.
      adherence: s, broadcast against `tau`.
      rule: "mae" or "var".
      mae: m_0 of the start.
      variance: V_0 of the start.

    Raises:
      ValueError: For another rule.

    >>> scale = sampling_scale(2.0, adherence=3.0, rule="mae", mae=0.8)
    >>> round(float(scale.mae), 2)
    12.99
    """
    _check_rule(rule)
    tau, adherence, mae, variance = map(jnp.asarray, (tau, adherence, mae, variance))
    if rule == "var":
        rate = (adherence + 1.0) / 2.0
        source = MEAN_ABSOLUTE_NORMAL * jnp.sqrt(adherence * variance)
        return ResidualScale(
            mae=_relaxed(tau, rate, mae, source), variance=variance * jnp.exp((adherence - 1) * tau)
        )
    rate = adherence * MEAN_ABSOLUTE_NORMAL - 1.0
    source = jnp.square(adherence * mae)
    return ResidualScale(
        mae=mae * jnp.exp(rate * tau),
        variance=_relaxed(tau, 2.0 * rate + 1.0, variance, source),
    )


def sampling_slope(
    *, usage: ArrayLike, adherence: ArrayLike, items: int, rule: Rule
) -> Float[Array, "..."]:
    r"""Slope of ln f_t(0) per step in the sampling set-up, for large t and s > s*.

    It is minus the growth rate of the scale: :math:`-p(sc - 1)/N` under "mae", and
    :math:`-p(s - 1)/(2N)` under "var". It speaks of a density estimate whose resolution follows the
    spread of the residuals, as the histogram of the paper does: the exact density at zero of the
    mixture cannot fall faster than :math:`e^{-pt/N}`, the fraction of labels never touched.

    >>> round(float(sampling_slope(usage=1.0, adherence=3.0, items=2000, rule="mae")) * 1e4, 2)
    -6.97
    """
    excess = gain(adherence, rule) - 1.0
    return -jnp.asarray(usage) * excess / items * (1.0 if rule == "mae" else 0.5)


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

    A label that enters at time u has scale :math:`L(u) = (1-p)x_0 + p g x(u)`, and
    :math:`L(u) = x_0` for u < 0. Per step,

    .. math:: x(t+1) = x(t) + \frac{L(t) - L(t-W)}{W};

    in continuous time :math:`x(t) = W^{-1}\int_{t-W}^{t} L`, whose delay equation is integrated by
    the trapezoidal rule over steps of one (error about :math:`p g t/W\,(pg/W)^2/12`).

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
    _check_choice("form", form, ("recursion", "integral"))
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

    From :math:`x' = (p/W)(g x - x_0)`:
    :math:`x(t) = x_0\big[1 + (g-1)\frac{p}{W}\,\frac{e^{kt}-1}{k}\big]` with :math:`k = pg/W`.

    >>> round(float(window_first_pass(600, window=600, usage=1.0, gain=0.0)), 6)
    0.0
    """
    step, usage, gain = jnp.asarray(step), jnp.asarray(usage), jnp.asarray(gain)
    growth = _growth_integral(usage * gain / window, step)
    return jnp.asarray(start) * (1.0 + (gain - 1.0) * usage / window * growth)


def window_stationary(
    *, usage: ArrayLike, gain: ArrayLike, start: ArrayLike = 1.0
) -> Float[Array, "..."]:
    r"""Stationary scale :math:`(1-p)x_0/(1-pg)` of the window; infinite where :math:`pg\ge 1`.

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

    The rate of :math:`x \propto e^{\gamma t}` solves :math:`\gamma W = G(1 - e^{-\gamma W})` with
    :math:`G = p g`: positive above G = 1, negative below (decay to the stationary value), zero at
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


def obedient_mass(
    step: ArrayLike, *, setup: Setup, size: int, initial: ArrayLike, usage: ArrayLike = 1.0
) -> Float[Array, "..."]:
    r"""Mass of the residuals in [-κ, κ] under exact obedience, s = 0.

    A replaced label has no residual, so only the others can lie outside:
    :math:`1 - (1 - F_0)(1 - p\min(t/W, 1))` in the window, :math:`1 - (1 - F_0)e^{-pt/N}` in the
    sampling set-up. Accurate while the error of the fit is small against κ.

    Args:
      step: t, any shape.
      setup: "window" or "sampling".
      size: W of the window, N of the sampling set-up.
      initial: F_0, the mass at the start.
      usage: p.

    >>> round(float(obedient_mass(300, setup="window", size=600, initial=0.4)), 3)
    0.7
    """
    _check_choice("setup", setup, ("window", "sampling"))
    passed, usage = jnp.asarray(step) / size, jnp.asarray(usage)
    if setup == "window":
        kept = 1.0 - usage * jnp.minimum(passed, 1.0)
    else:
        kept = jnp.exp(-usage * passed)
    return 1.0 - (1.0 - jnp.asarray(initial)) * kept


def relative_scale(
    steps: int, *, setup: Setup, size: int, usage: ArrayLike, adherence: ArrayLike, rule: Rule
) -> Float[Array, "times ..."]:
    r"""Residual scale after 0, 1, ..., `steps` steps relative to its start, in length units.

    The mean absolute residual under "mae", the root mean square under "var".

    Args:
      steps: Number of steps.
      setup: "window" or "sampling".
      size: W of the window, N of the sampling set-up.
      usage: p; broadcasts against `adherence`.
      adherence: s.
      rule: "mae" or "var".

    >>> path = relative_scale(
    ...     100, setup="sampling", size=100, usage=1.0, adherence=0.0, rule="mae"
    ... )
    >>> round(float(path[-1]), 4)
    0.3679
    """
    _check_choice("setup", setup, ("window", "sampling"))
    factor = gain(adherence, rule)
    if setup == "window":
        path = window_scale(steps, window=size, usage=usage, gain=factor)
    else:
        rate = jnp.asarray(usage) * (factor - 1.0) / size
        path = jnp.exp(jnp.arange(steps + 1).reshape(-1, *[1] * rate.ndim) * rate)
    return path if rule == "mae" else jnp.sqrt(path)


def _relaxed(tau, rate, start, source):
    """Solution of x' = -x + source e^{(rate - 1) tau}."""
    return jnp.exp(-tau) * (start + source * _growth_integral(rate, tau))


def _growth_integral(rate, time):
    """(exp(rate time) - 1) / rate, which is `time` at rate zero."""
    exponent = rate * time
    near = jnp.abs(exponent) < 1e-12
    safe = jnp.where(near, 1.0, exponent)
    return time * jnp.where(near, 1.0, jnp.expm1(safe) / safe)


def _check_rule(rule: str) -> None:
    _check_choice("rule", rule, ("mae", "var"))


def _check_choice(name: str, value: str, wanted: tuple[str, ...]) -> None:
    if value not in wanted:
        raise ValueError(f"{name}: got {value!r}, expected {' or '.join(wanted)}")
