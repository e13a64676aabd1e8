r"""The adaptive warm-up as released: its search on the host, its objectives, its first step.

The released code scores the candidates of `jaxopt_lab.schedules.peak_gap` without dividing the rate
by its peak: every integral is one call of SciPy's `quad` over its whole interval, and an absolute
tolerance of 1.5e-8 meets integrals of the size of the squared peak rate. The result therefore
depends on the peak rate, and with narrow weights it is an artefact.

The objectives, each under the weight $w$, for the rate $\eta$ and its target $\tau$:

- `linear_and_cos`: mean of $w (\eta - \tau)^2$; $\tau$ is half a cosine up to $d$, then a line.
- `max_linear_and_cos`: sum of the two means of the same, over $[0, d]$ and $[d, \Delta_0]$.
- `linear_and_linear`: mean of $w |\eta - \tau|$; $\tau$ is two lines.
- `integral_0_x0`: mean of $-w \eta$.
- `func_prime`: mean over $[d, \Delta_0]$ of $w (|\eta - \tau| + |\eta' - \tau'|)$.
- `func_prime_0xs`: the same over $[0, d]$.
- `double_prime`: mean over $[d, \Delta_0]$ of $w |\eta'' - \tau''|$.

In the last three $\tau$ has the form `target`.
"""

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import numpy as np
import optax
from jaxtyping import Array

from jaxopt_lab.core.checks import check_choice
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.schedules.adaptive_warmup import warmup_by
from jaxopt_lab.schedules.peak_gap import CANDIDATES, MARGIN, searched_if

Objective = Literal[
    "linear_and_cos",
    "max_linear_and_cos",
    "linear_and_linear",
    "integral_0_x0",
    "func_prime",
    "func_prime_0xs",
    "double_prime",
]
TargetShape = Literal["linear", "cos"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)

_Function: TypeAlias = Callable[[float], float]


def official_warmup(
    peak_lr: Scalar,
    total_steps: Scalar,
    target_loss: Scalar | Literal["auto"],
    div_factor: Scalar = 100.0,
    *,
    objective: Objective = "linear_and_cos",
    target: TargetShape = "linear",
    official_first_step: bool = True,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """`jaxopt_lab.adaptive_warmup` with the released search; defaults are those of the release.

    The search takes 0.1 to 1 s on the host at the first loss, and a GPU waits for it at every step.

    Args:
      peak_lr: As for `adaptive_warmup`, and so are the others that are not explained.
      total_steps: Optimizer steps of the whole run.
      target_loss: Guess of the final training loss.
      div_factor: The peak rate over the rate at the start.
      objective: What the search minimises, see above.
      target: Form of the target in the objectives with derivatives.
      official_first_step: Take the first step at the peak rate.
      **options: As for `adaptive_warmup`, where `fallback_after` is None: the rate follows the loss
        to the end. Two more are of the release: `sigma`, width parameter of the weight, and
        `use_current_loss`, with which a loss sets the rate of its own step.

    Raises:
      ValueError: As for `adaptive_warmup`; an objective or a target is unknown; or
        `use_current_loss`, where the first loss sets the first rate, meets `official_first_step`.
    """
    _check_objective(objective, target)
    if options.get("use_current_loss") and official_first_step:
        raise ValueError(
            "official_first_step and use_current_loss are both True; with use_current_loss the "
            "first loss sets the rate of the first step"
        )
    search = functools.partial(
        _quadrature_where, peak_lr=peak_lr, objective=objective, target=target
    )
    return warmup_by(
        peak_lr=peak_lr,
        total_steps=total_steps,
        target_loss=target_loss,
        div_factor=div_factor,
        search=search,
        first_step_at_peak=official_first_step,
        **options,
    )


def _check_objective(objective: str, target: str) -> None:
    check_choice("objective", objective, OBJECTIVES)
    check_choice("target", target, get_args(TargetShape))


@functools.partial(jax.jit, static_argnames=("objective", "target"))
def _quadrature_where(
    wanted: Array,
    known: Array,
    initial_gap: Array,
    kappa_sigma: Array,
    div_factor: Array,
    *,
    peak_lr: Array,
    objective: Objective,
    target: TargetShape,
) -> Array:
    """The released choice where it is wanted, else the peak gap that is known."""
    numbers = jax.lax.stop_gradient((initial_gap, kappa_sigma, div_factor, peak_lr))
    dtype, thread = numbers[0].dtype, _ieee_thread()

    def search(*numbers: Array) -> np.ndarray:
        gap, sharpness, div, peak = map(float, numbers)
        task = thread.submit(quadrature_peak_gap, gap, sharpness, div, peak, objective, target)
        return np.asarray(task.result(), dtype)

    def on_host(*numbers: Array) -> Array:
        result = jax.ShapeDtypeStruct((), dtype)
        return jax.pure_callback(search, result, *numbers, vmap_method="sequential")

    return searched_if(wanted, known, numbers, on_host)


@functools.cache
def _ieee_thread() -> ThreadPoolExecutor:
    """A thread with denormal numbers.

    XLA flushes them to zero wherever it computes, callbacks included, but the released integrals of
    narrow weights hang on them. A thread inherits this from the one that starts it: start it here,
    while a program is being traced.
    """
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="peak-gap")
    thread.submit(lambda: None).result()
    return thread


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
      objective: As above.
      target: As above.

    Raises:
      ValueError: The objective or the target is unknown.
    """
    _check_objective(objective, target)
    candidates = np.linspace(MARGIN, initial_gap - MARGIN, CANDIDATES).tolist()
    scores = [
        _score(d, initial_gap, kappa_sigma, div_factor, peak_lr, objective, target)
        for d in candidates
    ]
    return candidates[int(np.argmin(scores))]


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
        product = (self.k0 - self.k2 * x * x) * (self.k1 + 2 * self.k2 * x)
        return (-2 * self.k2 * x * k - 2 * product) / k**3


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
        length, form = self.high - self.low, 1.0
        if self.shape == "cos":
            form = math.pi * math.sin(math.pi * (x - self.low) / length) / 2
        return (self.b - self.a) * form / length

    def bend(self, x: float) -> float:
        if self.shape == "linear":
            return 0.0
        length = self.high - self.low
        z = (x - self.low) / length
        return (self.b - self.a) * math.pi**2 * math.cos(math.pi * z) / 2 / length**2


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
