r"""The theorems about the canonical family of densities as executable checks.

Each check evaluates both sides of a statement about $D f(x) = \psi^n f(\psi x)$ by quadrature
in float64 and returns numbers: errors of equalities, and margins of inequalities, which are
negative where the inequality fails.

Source: Veprikov, Afanasiev, Khritankov, "A Mathematical Model of the Hidden Feedback Loop Effect in
Machine Learning Systems", arXiv 2405.02726.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike

from jaxopt_lab.dynamics.loop.density_family import (
    Density,
    Quadrature,
    integrate,
    quadrature,
    scale_density,
    scaled_norm,
    values_at,
)


class TransformationCheck(NamedTuple):
    """A scaling operator maps densities to densities, and its inverse has norm one."""

    mass_error: float  # |integral of D f - 1|
    minimum: float  # smallest value of D f; at least 0
    round_trip_error: float  # largest |D^-1 D f - f|
    inverse_norm_error: float  # | ||D^-1 f||_1 - 1 |


class LimitSetCheck(NamedTuple):
    """Where the family goes, seen by a continuous function of compact support."""

    integrals: np.ndarray  # (t,) integral of f_t phi
    distance_to_delta: np.ndarray  # (t,) |integral - phi(0)|
    distance_to_zero: np.ndarray  # (t,) |integral|
    envelope_margin: float  # smallest psi^n |g(psi x)| - f_t(x); at least 0
    envelope_norm: float  # ||g||_1; at least 1


class MomentsCheck(NamedTuple):
    """Moments scale by powers of psi, and Hölder's inequality bounds their sum."""

    scaling_error: float  # largest |psi^k nu_k^t - nu_k^0|
    envelope_margin: float  # smallest psi^-2k (integral of y^2k |g|) - nu_2k^t; at least 0
    sums: np.ndarray  # (t,) sum over k of |nu_k^t|
    bounds: np.ndarray  # (t,) its bound; infinite for psi <= 1
    margin: float  # smallest bound - sum; at least 0


class NormsCheck(NamedTuple):
    """L_q norms of the operator, and what it keeps of a uniform density."""

    norm_error: float  # largest relative error of ||D f||_q = psi^{n (1 - 1/q)} ||f||_q
    operator_norms: np.ndarray  # (t, q)
    kept: np.ndarray  # (t,) integral over A of D f_A, f_A uniform on A
    margin: float  # smallest operator norm - kept; at least 0


class AutonomyCheck(NamedTuple):
    """A scaling system is autonomous when ln f_t(0) is a straight line."""

    slope: float  # n ln a for psi_t = a^t
    r2: float  # of the least-squares line; 1 for an autonomous system
    semigroup_error: float  # largest |ln psi_{t+k} - ln psi_t - ln psi_k|


def check_transformation(
    density: Density, psi: float, *, support: tuple[float, float], dimension: int = 1
) -> TransformationCheck:
    r"""Theorem on transformations: $\int Df = 1$, $Df \ge 0$, the inverse is 1/ψ.

    Args:
      density: f, a density.
      psi: ψ > 0.
      support: Ends of the cube outside which f is negligible; exactly the support if f jumps there.
      dimension: n.

    >>> from jaxopt_lab.dynamics.loop.density_family import uniform_density
    >>> check = check_transformation(uniform_density(2.5), 3.0, support=(-2.5, 2.5))
    >>> check.mass_error < 1e-12, check.round_trip_error < 1e-12
    (True, True)
    """
    rule = _rule(support, 1.0, dimension)
    image = scale_density(density, psi, dimension=dimension)
    back = scale_density(image, 1.0 / psi, dimension=dimension)
    inverse = scale_density(density, 1.0 / psi, dimension=dimension)
    scaled_rule, inverse_rule = (_rule(support, p, dimension) for p in (psi, 1.0 / psi))
    round_trip = values_at(back, rule.points) - values_at(density, rule.points)
    return TransformationCheck(
        mass_error=abs(integrate(image, scaled_rule) - 1.0),
        minimum=float(np.min(values_at(image, scaled_rule.points))),
        round_trip_error=float(np.max(np.abs(round_trip))),
        inverse_norm_error=abs(integrate(inverse, inverse_rule) - 1.0),
    )


def check_limit_set(
    density: Density,
    psi: Sequence[float],
    *,
    support: tuple[float, float],
    envelope: Density | None = None,
    dimension: int = 1,
) -> LimitSetCheck:
    r"""Theorem on the limit set: the integrals of f_t φ go to φ(0) for ψ → ∞, to 0 for ψ → 0.

    The test function is $\phi(x) = e^{1 - 1/(1 - |x|^2)}$ on the unit ball, φ(0) = 1. It
    cannot see mass that leaves every bounded set: that is the "zero distribution".

    Args:
      density: f_0.
      psi: ψ_t for every t.
      support: Ends of the cube outside which f_0 is negligible.
      envelope: g with $f_t(x) \le \psi^n |g(\psi x)|$; f_0 by default.
      dimension: n.

    >>> from jaxopt_lab.dynamics.loop.density_family import normal_density
    >>> check = check_limit_set(normal_density(5.0), [1.0, 300.0], support=(-60.0, 60.0))
    >>> np.round(check.integrals, 3).tolist()
    [0.096, 1.0]
    """
    envelope = density if envelope is None else envelope
    integrals, margins = [], []
    for value in psi:
        scaled = scale_density(density, value, dimension=dimension)
        above = scale_density(envelope, value, dimension=dimension)
        rule = _rule(support, value, dimension)
        margins.append(
            np.min(np.abs(values_at(above, rule.points)) - values_at(scaled, rule.points))
        )
        low, high = max(support[0] / value, -1.0), min(support[1] / value, 1.0)
        seen = 0.0
        if low < high:
            inner = _rule((low, high), 1.0, dimension)
            seen = np.sum(inner.weights * values_at(scaled, inner.points) * _bump(inner.points))
        integrals.append(seen)
    integrals = np.array(integrals)
    rule = _rule(support, 1.0, dimension)
    return LimitSetCheck(
        integrals=integrals,
        distance_to_delta=np.abs(integrals - 1.0),
        distance_to_zero=np.abs(integrals),
        envelope_margin=float(np.min(margins)),
        envelope_norm=float(np.sum(rule.weights * np.abs(values_at(envelope, rule.points)))),
    )


def check_moments(
    density: Density,
    psi: Sequence[float],
    *,
    support: tuple[float, float],
    envelope: Density | None = None,
    orders: int = 20,
    q: float = 2.0,
) -> MomentsCheck:
    r"""Lemma on moments, in one dimension.

    Equality $\nu_k^t = \psi^{-k}\nu_k^0$ for odd and even k; the bound
    $\nu_{2k}^t \le \psi^{-2k}\int y^{2k}|g|$ under an envelope g; and for ψ > 1, with
    $1/p' + 1/q = 1$,

    $$
    \sum_k |\nu_k^t| \le (\psi^{p'} - 1)^{-1/p'}\,\lVert\nu^0\rVert_q
    $$

    (factor 1/ψ for q = 1). Sum and norm run over the same finite number of orders, for which
    the inequality holds just as well.

    Args:
      density: f_0.
      psi: ψ_t for every t.
      support: Where f_0 is not negligible.
      envelope: g; f_0 by default, for which the second statement is an equality.
      orders: The largest k.
      q: Norm of the sequence of moments, in [1, ∞].

    Raises:
      ValueError: If q is smaller than one.

    >>> from jaxopt_lab.dynamics.loop.density_family import uniform_density
    >>> check = check_moments(uniform_density(0.5), [2.0], support=(-0.5, 0.5))
    >>> round(float(check.sums[0]), 6), round(float(check.bounds[0]), 6)
    (0.021651, 0.048669)
    """
    if not q >= 1.0:
        raise ValueError(f"q: got {q}, expected a number from 1 to infinity")
    envelope = density if envelope is None else envelope
    k = np.arange(1, orders + 1)
    rule = _rule(support, 1.0, 1)
    initial = _moments(density, rule, k)
    above = _moments(lambda x: np.abs(values_at(envelope, x)), rule, k)
    norm = np.linalg.norm(initial, q)
    errors, margins, sums, bounds = [], [], [], []
    for value in psi:
        moments = _moments(scale_density(density, value), _rule(support, value, 1), k)
        errors.append(np.max(np.abs(moments * value**k - initial)))
        margins.append(np.min((above * value**-k - moments)[1::2]))
        sums.append(np.sum(np.abs(moments)))
        bounds.append(_geometric_norm(value, q) * norm)
    return MomentsCheck(
        scaling_error=float(np.max(errors)),
        envelope_margin=float(np.min(margins)),
        sums=np.array(sums),
        bounds=np.array(bounds),
        margin=float(np.min(np.array(bounds) - np.array(sums))),
    )


def check_norms(
    density: Density,
    psi: Sequence[float],
    *,
    support: tuple[float, float],
    q: Sequence[float] = (1.0, 2.0, np.inf),
    half_width: float = 1.0,
    dimension: int = 1,
) -> NormsCheck:
    r"""Lemma on norms: $\lVert D\rVert_q \ge \int_A D f_A$ with f_A uniform on A.

    D contracts no L_q norm, q > 1, as long as some uniform density keeps its mass inside its
    support: a positive loop shrinks moments and *grows* L_q norms.

    Args:
      density: f.
      psi: ψ_t for every t.
      support: Ends of the cube outside which f is negligible.
      q: Orders of the norms, infinity allowed.
      half_width: A is the cube [-half_width, half_width]^n.
      dimension: n.

    >>> from jaxopt_lab.dynamics.loop.density_family import normal_density
    >>> check = check_norms(normal_density(1.0), [0.25, 4.0], support=(-12.0, 12.0), q=[2.0])
    >>> check.operator_norms.ravel().tolist(), np.round(check.kept, 12).tolist()
    ([0.5, 2.0], [0.25, 1.0])
    """
    rule = _rule(support, 1.0, dimension)
    values = values_at(density, rule.points)
    uniform = (2.0 * half_width) ** -dimension
    errors, kept = [], []
    for value in psi:
        scaled = scale_density(density, value, dimension=dimension)
        image_rule = _rule(support, value, dimension)
        image = values_at(scaled, image_rule.points)
        for order in q:
            wanted = scaled_norm(_norm(values, rule, order), value, order, dimension=dimension)
            errors.append(abs(_norm(image, image_rule, order) / wanted - 1.0))
        side = min(half_width, half_width / value)
        inside = _rule((-side, side), 1.0, dimension)
        kept.append(np.sum(inside.weights) * value**dimension * uniform)
    kept = np.array(kept)
    norms = scaled_norm(1.0, np.asarray(psi)[:, None], np.asarray(q), dimension=dimension)
    return NormsCheck(
        norm_error=float(np.max(errors)),
        operator_norms=norms,
        kept=kept,
        margin=float(np.min(norms - kept[:, None])),
    )


def check_autonomy(
    psi: Callable[[np.ndarray], ArrayLike], steps: int, *, dimension: int = 1
) -> AutonomyCheck:
    r"""Theorem on autonomy: autonomous ⇔ ψ_{τ+κ} = ψ_τ ψ_κ ⇔ ψ_t = a^t ⇔ ln f_t(0) is linear.

    Args:
      psi: From times t = 1, 2, ... to ψ_t.
      steps: The last time; at least 3.
      dimension: n.

    Raises:
      ValueError: If there are too few steps to see a curvature.

    >>> power = check_autonomy(lambda t: 1.05**t, 40)
    >>> round(power.r2, 12), round(power.slope, 6)
    (1.0, 0.04879)
    >>> check_autonomy(lambda t: t, 40).r2 < 0.9
    True
    """
    if steps < 3:
        raise ValueError(f"steps: got {steps}, expected at least 3")
    time = np.arange(1.0, steps + 1.0)
    log_psi = np.log(values_at(psi, time))
    center = dimension * log_psi  # ln f_t(0) - ln f_0(0)
    slope, intercept = np.polyfit(time, center, 1)
    spread = np.sum(np.square(center - center.mean()))
    rest = np.sum(np.square(center - intercept - slope * time))
    first, second = np.meshgrid(np.arange(steps), np.arange(steps), indexing="ij")
    inside = first + second + 2 <= steps
    first, second = first[inside], second[inside]
    semigroup = log_psi[first + second + 1] - log_psi[first] - log_psi[second]
    return AutonomyCheck(
        slope=float(slope),
        r2=float(1.0 - rest / spread) if spread > 0.0 else 1.0,
        semigroup_error=float(np.max(np.abs(semigroup))),
    )


def _rule(support: tuple[float, float], psi: float, dimension: int) -> Quadrature:
    """A rule on the support of the scaled density; coarser axes where there are several."""
    panels = 64 if dimension == 1 else 8
    low, high = support[0] / psi, support[1] / psi
    return quadrature(low, high, dimension=dimension, panels=panels)


def _bump(points: np.ndarray) -> np.ndarray:
    squares = np.square(points) if points.ndim == 1 else np.sum(np.square(points), -1)
    rest = np.where(squares < 1.0, 1.0 - squares, 1.0)
    return np.where(squares < 1.0, np.exp(1.0 - 1.0 / rest), 0.0)


def _moments(density: Density, rule: Quadrature, orders: np.ndarray) -> np.ndarray:
    weighted = rule.weights * values_at(density, rule.points)
    return np.power(rule.points[:, None], orders).T @ weighted


def _geometric_norm(psi: float, q: float) -> float:
    """The norm dual to q of the sequence psi^-k, k = 1, 2, ..."""
    if psi <= 1.0:
        return np.inf
    if q == 1.0:
        return 1.0 / psi
    dual = 1.0 if np.isinf(q) else q / (q - 1.0)
    return (psi**dual - 1.0) ** (-1.0 / dual)


def _norm(values: np.ndarray, rule: Quadrature, q: float) -> float:
    if np.isinf(q):
        return float(np.max(np.abs(values)))
    return float(np.sum(rule.weights * np.abs(values) ** q) ** (1.0 / q))
