r"""The gap at which a warm-up ends: where the rate comes closest to a target form.

500 candidates $d$ between 0.01 and $\Delta_0 - 0.01$ are scored by an integral of the distance
between the rate $\eta$ with its peak at $d$ (`gap_rate.fit_curvature`) and a target that rises from
0 to $\eta_{\max}$ at $d$ and falls to $\eta_{\max}/r$ at $\Delta_0$, under the weight
$e^{-\kappa\sigma (x - d)^2/2}$. The first candidate with the best score wins.

Everything is formed in the distance $v = |x - d|$ on either side of the peak and as what is missing
to $\eta_{\max}$: near the peak both the rate and its target are $\eta_{\max}$ less something tiny,
and with narrow weights that is all the integral sees.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxopt_lab.core.numerics import Scalar

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
# Integrated without a search for changes of sign, which is a loop.
SMOOTH_OBJECTIVES: tuple[Objective, ...] = (
    "linear_and_cos",
    "max_linear_and_cos",
    "integral_0_x0",
)
TARGET_SHAPES: tuple[TargetShape, ...] = get_args(TargetShape)

CANDIDATES = 500
CHUNK = 50  # candidates scored together where they are scored in turn
MARGIN = 0.01  # distance of the candidates from both ends of the interval
NODES = 16  # of each Gauss-Legendre panel
UNIFORM_PANELS = 16  # on each side of the peak
# Panels end at these multiples of the weight's width and of the peak's, which may be far narrower
# than the interval.
WEIGHT_BREAKS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
PEAK_BREAKS = tuple(4.0**k for k in range(7))
BISECTIONS = 40


class _Side(NamedTuple):
    """One side of a candidate's peak: scalars, gaps as shares of the initial gap."""

    sign: float  # of x - d
    peak: Array  # d
    length: Array  # from the peak to the end of the interval
    depth: Scalar  # what the target loses from the peak to the end, as a share of the peak rate
    bend: Array  # c of the rate x / (x + c (x - d)^2)


# Distance from the peak -> value, both over the peak rate.
_Function: TypeAlias = Callable[[Array], Array]


def exact_peak_gap(
    initial_gap: Scalar,
    kappa_sigma: Scalar,
    div_factor: Scalar,
    objective: Objective = "linear_and_cos",
    target: TargetShape = "linear",
    *,
    chunk: int | None = CHUNK,
) -> Array:
    """The best candidate, by quadrature that resolves the weight and the peak.

    Independent of the peak rate. Works under `jit` and `vmap`; about half a million evaluations.

    >>> round(float(exact_peak_gap(7.78, 46.848, 100.0)), 3)
    2.498

    Args:
      initial_gap: The first loss less the target loss, above 0.02.
      kappa_sigma: `warmup_kappa` times the width parameter, usually 0.001.
      div_factor: The peak rate over the rate at the initial gap.
      objective: What is integrated; see `peak_gap_scores`.
      target: Form of the target in the objectives with derivatives.
      chunk: Candidates scored together, which bounds the memory; None scores all at once, in
        straight-line code if the objective is one of `SMOOTH_OBJECTIVES`.

    Raises:
      ValueError: The objective or the target is unknown.
    """
    gaps = peak_gap_candidates(initial_gap)
    scores = peak_gap_scores(
        gaps, initial_gap, kappa_sigma, div_factor, objective, target, chunk=chunk
    )
    return gaps[jnp.argmin(scores)]


def peak_gap_candidates(initial_gap: Scalar) -> Array:
    """The grid of peak gaps, shape (500,)."""
    step = (initial_gap - 2 * MARGIN) / (CANDIDATES - 1)
    return MARGIN + step * jnp.arange(CANDIDATES)


def peak_gap_scores(
    gaps: Array,
    initial_gap: Scalar,
    kappa_sigma: Scalar,
    div_factor: Scalar,
    objective: Objective = "linear_and_cos",
    target: TargetShape = "linear",
    *,
    chunk: int | None = CHUNK,
) -> Array:
    r"""The scores of peak gaps; the smallest is best.

    With the weight $w$ and $\eta$ and its target $\tau$ over $\eta_{\max}$:

    ====================== ===================================================================
    linear_and_cos         mean of $w (\eta - \tau)^2$; $\tau$ a half cosine up to d, then a line
    max_linear_and_cos     sum of the two means of the same, over [0, d] and [d, $\Delta_0$]
    linear_and_linear      mean of $w |\eta - \tau|$; $\tau$ two lines
    integral_0_x0          mean of $-w \eta$
    func_prime             mean over [d, $\Delta_0$] of $w (|\eta - \tau| + |\eta' - \tau'|)$
    func_prime_0xs         the same over [0, d]
    double_prime           mean over [d, $\Delta_0$] of $w |\eta'' - \tau''|$
    ====================== ===================================================================

    In the last three $\tau$ has the form `target`.

    Args:
      gaps: Peak gaps d, shape (n,), inside the interval from 0 to the initial gap.
      initial_gap: As in `exact_peak_gap`.
      kappa_sigma: As in `exact_peak_gap`.
      div_factor: As in `exact_peak_gap`.
      objective: As above.
      target: "linear" or "cos".
      chunk: As in `exact_peak_gap`.

    Raises:
      ValueError: The objective or the target is unknown.
    """
    check_objective(objective, target)

    def score(gap: Array) -> Array:
        sharpness = kappa_sigma * jnp.square(initial_gap)
        return _score(
            _sides(gap, initial_gap, div_factor), sharpness, initial_gap, objective, target
        )

    return jax.vmap(score)(gaps) if chunk is None else jax.lax.map(score, gaps, batch_size=chunk)


def _score(
    sides: tuple[_Side, _Side],
    sharpness: Scalar,
    initial_gap: Scalar,
    objective: Objective,
    target: TargetShape,
) -> Array:
    below, above = sides

    def square(side: _Side, shape: TargetShape) -> Array:
        return _integral(side, sharpness, lambda v: jnp.square(_difference(side, shape, v)))

    def absolute(side: _Side, function: Callable[..., Array], shape: TargetShape) -> Array:
        return _absolute_integral(side, sharpness, lambda v: function(side, shape, v))

    def with_slopes(side: _Side) -> Array:
        # The published sum is not homogeneous: its slopes are per unit of loss.
        slopes = absolute(side, _slope_difference, target) / initial_gap
        return (absolute(side, _difference, target) + slopes) / side.length

    def negative_rate(side: _Side) -> Array:
        return _integral(side, sharpness, lambda v: _missing_rate(side, v) - 1)

    match objective:
        case "linear_and_cos":
            return square(below, "cos") + square(above, "linear")
        case "max_linear_and_cos":
            return square(below, "cos") / below.length + square(above, "linear") / above.length
        case "linear_and_linear":
            return absolute(below, _difference, "linear") + absolute(above, _difference, "linear")
        case "integral_0_x0":
            return negative_rate(below) + negative_rate(above)
        case "func_prime":
            return with_slopes(above)
        case "func_prime_0xs":
            return with_slopes(below)
        case "double_prime":
            return absolute(above, _bend_difference, target) / above.length


def check_objective(objective: str, target: str) -> None:
    """Check two names.

    Raises:
      ValueError: One is unknown.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective is {objective!r}; choose one of {', '.join(OBJECTIVES)}")
    if target not in TARGET_SHAPES:
        raise ValueError(f"target is {target!r}; choose one of {', '.join(TARGET_SHAPES)}")


def _sides(gap: Array, initial_gap: Scalar, div_factor: Scalar) -> tuple[_Side, _Side]:
    peak, above = gap / initial_gap, (initial_gap - gap) / initial_gap
    bend = (div_factor - 1) / jnp.square(above)
    return _Side(-1.0, peak, peak, 1.0, bend), _Side(1.0, peak, above, 1 - 1 / div_factor, bend)


def _integral(side: _Side, sharpness: Scalar, function: _Function) -> Array:
    """The integral of a smooth function over a side under the weight."""
    return _by_panels(_breaks(side, sharpness), sharpness, function)


def _absolute_integral(side: _Side, sharpness: Scalar, function: _Function) -> Array:
    """The integral of the absolute value, with panels that end where the function changes sign."""
    breaks = _breaks(side, sharpness)
    breaks = jnp.sort(jnp.concatenate([breaks, _sign_changes(function, breaks)]))
    return _by_panels(breaks, sharpness, lambda v: jnp.abs(function(v)))


def _by_panels(breaks: Array, sharpness: Scalar, function: _Function) -> Array:
    start, half = breaks[:-1, None], (breaks[1:, None] - breaks[:-1, None]) / 2
    rule = np.polynomial.legendre.leggauss(NODES)
    nodes, weights = (jnp.asarray(x, half.dtype)[None] for x in rule)
    v = start + half * (1 + nodes)  # (panels, nodes)
    values = jnp.exp(-sharpness / 2 * v * v) * function(v)
    return jnp.sum(half * weights * values)


def _breaks(side: _Side, sharpness: Scalar) -> Array:
    """Where panels meet, as distances from the peak, sorted: (panels + 1,)."""
    uniform = side.length * np.arange(UNIFORM_PANELS + 1) / UNIFORM_PANELS
    of_peak = jnp.asarray(PEAK_BREAKS) * jnp.sqrt(side.peak / side.bend)
    of_weight = jnp.asarray(WEIGHT_BREAKS) / jnp.sqrt(sharpness)
    breaks = jnp.concatenate([uniform, of_peak, of_weight])
    return jnp.sort(jnp.minimum(breaks, side.length))


def _sign_changes(function: _Function, breaks: Array) -> Array:
    """One sign change in each panel, by bisection; the end of the panel where there is none."""
    # Not from the very start: at the peak all differences are zero.
    low, high = breaks[:-1] + (breaks[1:] - breaks[:-1]) / 1024, breaks[1:]
    sign = jnp.sign(function(low))

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = (ends[0] + ends[1]) / 2
        before = sign * function(middle) > 0
        return jnp.where(before, middle, ends[0]), jnp.where(before, ends[1], middle)

    _, root = jax.lax.fori_loop(0, BISECTIONS, halve, (low, high))
    return jnp.where(sign * function(high) < 0, root, high)


def _missing_rate(side: _Side, v: Array) -> Array:
    """1 - eta."""
    bent = side.bend * v * v
    return bent / (side.peak + side.sign * v + bent)


def _difference(side: _Side, shape: TargetShape, v: Array) -> Array:
    """The target less the rate."""
    share = v / side.length
    missing = side.depth * (share if shape == "linear" else jnp.sin(jnp.pi / 2 * share) ** 2)
    return _missing_rate(side, v) - missing


def _slope_difference(side: _Side, shape: TargetShape, v: Array) -> Array:
    # eta' = -c (x - d) (x + d) / (x + c (x - d)^2)^2, towards larger gaps; here both slopes are
    # taken away from the peak, which changes the sign of both or of neither.
    x = side.peak + side.sign * v
    of_rate = -side.bend * v * (x + side.peak) / jnp.square(x + side.bend * v * v)
    fall = 1.0 if shape == "linear" else jnp.pi / 2 * jnp.sin(jnp.pi * v / side.length)
    return of_rate + side.depth / side.length * fall


def _bend_difference(side: _Side, shape: TargetShape, v: Array) -> Array:
    u = side.sign * v
    x, c = side.peak + u, side.bend
    k = x + c * u * u
    of_rate = -2 * c * (x * k - u * (x + side.peak) * (1 + 2 * c * u)) / k**3
    if shape == "linear":
        return of_rate
    turn = jnp.cos(jnp.pi * v / side.length) * (jnp.pi / side.length) ** 2 / 2
    return of_rate + side.depth * turn
