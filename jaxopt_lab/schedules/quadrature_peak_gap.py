"""The peak gap as the released code finds it: adaptive quadrature on the host, with its luck.

The same candidates and objectives as in `peak_gap`, but the rate is not divided by its peak, every
integral is one call of SciPy's `quad` over its whole interval, and an absolute tolerance of 1.5e-8
meets integrals of the size of the squared peak rate. The result therefore depends on the peak rate,
and with narrow weights it is an artefact: needed to repeat published runs, and for nothing else.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import numpy as np

from jaxopt_lab.schedules.peak_gap import (
    CANDIDATES,
    MARGIN,
    Objective,
    TargetShape,
    check_objective,
)

_Function: TypeAlias = Callable[[float], float]


class _Rate(NamedTuple):
    """x / (k0 + k1 x + k2 x^2) with its peak at a candidate."""

    k0: float
    k1: float
    k2: float

    def value(self, x: float) -> float:
        return x / (self.k0 + self.k1 * x + self.k2 * x * x)

    def slope(self, x: float) -> float:
        k = self.k0 + self.k1 * x + self.k2 * x * x
        return (self.k0 - self.k2 * x * x) / k**2

    def bend(self, x: float) -> float:
        k = self.k0 + self.k1 * x + self.k2 * x * x
        turned = (self.k0 - self.k2 * x * x) * (self.k1 + 2 * self.k2 * x)
        return (-2 * self.k2 * x * k - 2 * turned) / k**3


class _Target(NamedTuple):
    """A monotone form from `a` at `low` to `b` at `high`."""

    shape: TargetShape
    low: float
    high: float
    a: float
    b: float

    def value(self, x: float) -> float:
        z = (x - self.low) / (self.high - self.low)
        return self.a + (self.b - self.a) * (
            z if self.shape == "linear" else (1 - math.cos(math.pi * z)) / 2
        )

    def slope(self, x: float) -> float:
        length = self.high - self.low
        if self.shape == "linear":
            return (self.b - self.a) / length
        z = (x - self.low) / length
        return (self.b - self.a) * math.pi * math.sin(math.pi * z) / 2 / length

    def bend(self, x: float) -> float:
        if self.shape == "linear":
            return 0.0
        length = self.high - self.low
        z = (x - self.low) / length
        return (self.b - self.a) * math.pi**2 * math.cos(math.pi * z) / 2 / length**2


def quadrature_peak_gap(
    initial_gap: float,
    kappa_sigma: float,
    div_factor: float,
    peak_lr: float,
    objective: Objective = "linear_and_cos",
    target: TargetShape = "linear",
) -> float:
    """The candidate that the released code would choose; takes 0.1 to 1 s.

    >>> round(quadrature_peak_gap(7.78, 46.848, 100.0, 1e-3), 3)
    5.515

    Args:
      initial_gap: The first loss less the target loss, above 0.02.
      kappa_sigma: `warmup_kappa` times the width parameter, usually 0.001.
      div_factor: The peak rate over the rate at the initial gap.
      peak_lr: The peak rate.
      objective: As in `peak_gap.peak_gap_scores`.
      target: As in `peak_gap.peak_gap_scores`.

    Raises:
      ValueError: The objective or the target is unknown.
    """
    check_objective(objective, target)
    candidates = np.linspace(MARGIN, initial_gap - MARGIN, CANDIDATES).tolist()
    scores = [
        _score(d, initial_gap, kappa_sigma, div_factor, peak_lr, objective, target)
        for d in candidates
    ]
    return candidates[int(np.argmin(scores))]


def _score(
    d: float,
    initial_gap: float,
    kappa_sigma: float,
    div_factor: float,
    peak_lr: float,
    objective: Objective,
    target: TargetShape,
) -> float:
    rate = _rate_with_peak(d, initial_gap, div_factor, peak_lr)
    last_lr = peak_lr / div_factor
    rise = _Target("linear", 0.0, d, 0.0, peak_lr)
    fall = _Target("linear", d, initial_gap, peak_lr, last_lr)

    def mean(integrand: _Function, low: float, high: float) -> float:
        def weighted(x: float) -> float:
            return math.exp(-((x - d) ** 2) * kappa_sigma / 2) * integrand(x)

        return _quad(weighted, low, high) / (high - low)

    def squared(x: float) -> float:
        wanted = rise._replace(shape="cos").value(x) if x < d else fall.value(x)
        return (rate.value(x) - wanted) ** 2

    match objective:
        case "linear_and_cos":
            return mean(squared, 0.0, initial_gap)
        case "max_linear_and_cos":
            return mean(squared, 0.0, d) + mean(squared, d, initial_gap)
        case "linear_and_linear":
            return mean(
                lambda x: abs(rate.value(x) - (rise if x < d else fall).value(x)), 0.0, initial_gap
            )
        case "integral_0_x0":
            return -mean(rate.value, 0.0, initial_gap)
        case "func_prime":
            return mean(_with_slopes(rate, fall._replace(shape=target)), d, initial_gap)
        case "func_prime_0xs":
            return mean(_with_slopes(rate, rise._replace(shape=target)), 0.0, d)
        case "double_prime":
            wanted = fall._replace(shape=target)
            return mean(lambda x: abs(rate.bend(x) - wanted.bend(x)), d, initial_gap)


def _rate_with_peak(d: float, initial_gap: float, div_factor: float, peak_lr: float) -> _Rate:
    k2 = initial_gap * (div_factor - 1) / (peak_lr * (initial_gap - d) ** 2)
    return _Rate(k2 * d * d, 1 / peak_lr - 2 * k2 * d, k2)


def _with_slopes(rate: _Rate, target: _Target) -> _Function:
    return lambda x: abs(rate.value(x) - target.value(x)) + abs(rate.slope(x) - target.slope(x))


def _quad(function: _Function, low: float, high: float) -> float:
    # Here because SciPy's integrators take longer to import than the rest of this package.
    from scipy.integrate import quad

    # The full output comes without warnings; that the tolerance may be missed is known.
    return quad(function, low, high, full_output=1)[0]
