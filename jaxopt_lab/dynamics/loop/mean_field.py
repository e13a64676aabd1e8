r"""Mean-field closed forms of the repeated-learning loop.

The estimation error of the regressor is neglected (its relative size is (d + 1) / n_train). What
remains are linear equations for the scale of the residuals of the active set. With
$c = \sqrt{2/\pi}$, the mean absolute value of a standard normal, the label that replaces an
item has residual scale $g\,x$, where

- under the rule "mae" x is the mean absolute residual and the gain is $g = s c$,
- under the rule "var" x is the variance of the residuals and the gain is $g = s$.

The loop is that of Veprikov, Afanasiev, Khritankov, "A Mathematical Model of the Hidden Feedback
Loop Effect in Machine Learning Systems", arXiv 2405.02726; the closed forms are derived here, the
paper does not have them.
"""

import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from jaxopt_lab.dynamics.loop.config import Rule, Setup
from jaxopt_lab.dynamics.loop.mean_field_window import check_choice, growth_integral, window_scale

MEAN_ABSOLUTE_NORMAL = math.sqrt(2.0 / math.pi)
"""c: the mean absolute value of a standard normal variable."""


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

    Growth means that the scale ends above its start: $g = 1$, in both set-ups and whatever
    the usage, that is $\sqrt{\pi/2}$ under "mae" and 1 under "var". Divergence means that no
    stationary scale exists: the same in the sampling set-up, $p g = 1$ in the window, because
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
    check_choice("setup", setup, ("window", "sampling"))
    check_choice("kind", kind, ("growth", "divergence"))
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

    Every item is relabelled at rate one in $\tau = p t / N$. Under "mae", with
    $a = s c - 1$,

    $$
    m(\tau) = m_0 e^{a\tau},\qquad
    V(\tau) = e^{-\tau}\Big[V_0 + s^2 m_0^2 \frac{e^{(2a+1)\tau} - 1}{2a + 1}\Big],
    $$

    and under "var", with $b = (s + 1)/2$,

    $$
    V(\tau) = V_0 e^{(s-1)\tau},\qquad
    m(\tau) = e^{-\tau}\Big[m_0 + c\sqrt{s V_0}\,\frac{e^{b\tau} - 1}{b}\Big].
    $$

    The quotients are evaluated so that they keep their limit $\tau$ at a zero denominator.

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

    It is minus the growth rate of the scale: $-p(sc - 1)/N$ under "mae", and
    $-p(s - 1)/(2N)$ under "var". It speaks of a density estimate whose resolution follows the
    spread of the residuals, as the histogram of the paper does: the exact density at zero of the
    mixture cannot fall faster than $e^{-pt/N}$, the fraction of labels never touched.

    >>> round(float(sampling_slope(usage=1.0, adherence=3.0, items=2000, rule="mae")) * 1e4, 2)
    -6.97
    """
    excess = gain(adherence, rule) - 1.0
    return -jnp.asarray(usage) * excess / items * (1.0 if rule == "mae" else 0.5)


def obedient_mass(
    step: ArrayLike, *, setup: Setup, size: int, initial: ArrayLike, usage: ArrayLike = 1.0
) -> Float[Array, "..."]:
    r"""Mass of the residuals in [-κ, κ] under exact obedience, s = 0.

    A replaced label has no residual, so only the others can lie outside:
    $1 - (1 - F_0)(1 - p\min(t/W, 1))$ in the window, $1 - (1 - F_0)e^{-pt/N}$ in the
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
    check_choice("setup", setup, ("window", "sampling"))
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
    check_choice("setup", setup, ("window", "sampling"))
    factor = gain(adherence, rule)
    if setup == "window":
        path = window_scale(steps, window=size, usage=usage, gain=factor)
    else:
        rate = jnp.asarray(usage) * (factor - 1.0) / size
        path = jnp.exp(jnp.arange(steps + 1).reshape(-1, *[1] * rate.ndim) * rate)
    return path if rule == "mae" else jnp.sqrt(path)


def relative_deviation(
    steps: int, *, setup: Setup, size: int, usage: ArrayLike, adherence: ArrayLike, rule: Rule
) -> Float[Array, "times ..."]:
    r"""Standard deviation of the residuals after 0, 1, ..., `steps` steps relative to its start.

    Under "var" the same as `relative_scale`. Under "mae", with normal residuals at the start, the
    variance is that of :func:`sampling_scale`, or in the window the mean of the variances
    $(1-p)V_0 + p s^2 m(u)^2$ of the labels of the last W steps.

    Args:
      steps: Number of steps.
      setup: "window" or "sampling".
      size: W of the window, N of the sampling set-up.
      usage: p; broadcasts against `adherence`.
      adherence: s.
      rule: "mae" or "var".

    >>> path = relative_deviation(
    ...     100, setup="sampling", size=100, usage=1.0, adherence=0.0, rule="mae"
    ... )
    >>> round(float(path[-1]), 4)
    0.6065
    """
    scale = relative_scale(
        steps, setup=setup, size=size, usage=usage, adherence=adherence, rule=rule
    )
    if rule == "var":
        return scale
    usage, adherence = jnp.asarray(usage), jnp.asarray(adherence)
    if setup == "sampling":
        time = jnp.arange(steps + 1).reshape(-1, *[1] * (scale.ndim - 1))
        tau = usage * time / size
        return jnp.sqrt(sampling_scale(tau, adherence=adherence, rule=rule).variance)
    noise = jnp.square(adherence * MEAN_ABSOLUTE_NORMAL * scale[:-1])
    change = usage * (noise - 1.0)  # of the label variance, against that of an item never touched
    changes = jnp.concatenate([jnp.zeros_like(scale[:1]), jnp.cumsum(change, 0)])
    gone = jnp.concatenate([jnp.zeros_like(scale[:size]), changes])[: steps + 1]
    return jnp.sqrt(jnp.maximum(1.0 + (changes - gone) / size, 0.0))


def _relaxed(tau, rate, start, source):
    """Solution of x' = -x + source e^{(rate - 1) tau}."""
    return jnp.exp(-tau) * (start + source * growth_integral(rate, tau))


def _check_rule(rule: str) -> None:
    check_choice("rule", rule, ("mae", "var"))
