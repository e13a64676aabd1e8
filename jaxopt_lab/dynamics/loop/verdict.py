r"""What a repeated-learning loop does to the residuals, from records over seeds.

The decision rule. For each seed let

$$
G = \ln\frac{\mathrm{dev}_\mathrm{end}}{\mathrm{dev}_\mathrm{start}},
$$

where dev is the standard deviation of the residuals, its start that of the first fit and its end
the geometric mean over the last twentieth of the records (at least one). With the two-sided t
interval of the mean of G over seeds (95 % by default) and a margin (0.2 by default: a fifth),

- **positive loop**: the interval lies below -margin,
- **error amplification**: the interval lies above +margin,
- **neutral** otherwise; *resolved* if the interval lies inside the margins, so that a change of the
  scale by more than the margin is excluded, and not resolved if it straddles one of them: more
  seeds or more steps are then needed.

The verdict speaks of the steps that were run: a slow loop that is neutral after a thousand steps
need not be after a million. Slope and theory are reported beside it for that reason.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import ArrayLike, Float

from jaxopt_lab.dynamics.loop import mean_field
from jaxopt_lab.dynamics.loop.autonomy import AutonomyFit, fit_line, fit_pieces
from jaxopt_lab.dynamics.loop.config import LoopConfig
from jaxopt_lab.dynamics.loop.run import LoopRecord

Label = Literal["positive loop", "error amplification", "neutral"]

MARGIN = 0.2
"""Changes of ln dev smaller than this are called neutral."""

LEVEL = 0.95
"""Confidence of the intervals over seeds."""

# The end of a run is a mean over this share of its records.
_END_SHARE = 20


class Interval(NamedTuple):
    """A mean over seeds with its t interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """The mean and, in brackets, the ends."""
        return f"{self.mean:.3g} [{self.low:.3g}, {self.high:.3g}]"


class Band(NamedTuple):
    """Means over seeds with their t intervals, at every record."""

    mean: Float[np.ndarray, "records"]
    low: Float[np.ndarray, "records"]
    high: Float[np.ndarray, "records"]


class Expectation(NamedTuple):
    """What mean-field theory says about the same loop."""

    label: Label  # by the same margin, without the noise of seeds
    growth: float  # ln(dev end / dev start); -inf where nothing is left
    critical_adherence: float  # s* above which the scale grows
    divergence_adherence: float  # s* above which it grows without a limit


@dataclass(frozen=True)
class Verdict:
    """The verdict on a loop and what it rests on.

    Args:
      label: "positive loop", "error amplification" or "neutral".
      resolved: False for a neutral verdict whose interval straddles a margin.
      growth: Mean of ln(dev end / dev start) over seeds: the statistic that decides.
      slope: Least-squares slope of ln dev per step, over all records.
      mass_start: Mass in [-κ, κ] of the first fit.
      mass_end: Mass in [-κ, κ] at the end.
      kappa: κ of the masses.
      normality: Median p-value of the normality test over seeds, of the first fit and at the end.
      line: Robust line through ln f_t(0) of the mean over seeds; None with too few finite values.
      pieces: The same with a knot: at W in a window that is long enough, else the best one.
      deviation: Geometric mean of dev over seeds, with its band.
      expected: Mean-field theory.
      usage: p.
      adherence: s.
      steps: Steps of the run.
      seeds: Number of seeds.
      margin: Of the decision rule.
      level: Of the intervals.
    """

    label: Label
    resolved: bool
    growth: Interval
    slope: Interval
    mass_start: Interval
    mass_end: Interval
    kappa: float
    normality: tuple[float, float]
    line: AutonomyFit | None
    pieces: AutonomyFit | None
    deviation: Band
    expected: Expectation
    usage: float
    adherence: float
    steps: int
    seeds: int
    margin: float
    level: float

    def __str__(self) -> str:
        """A few lines of plain text."""
        factor = Interval(*map(_exp, self.growth))
        doubt = "" if self.resolved else " (not resolved: more seeds or steps are needed)"
        where = {
            "positive loop": f"lies below -{self.margin:g}",
            "error amplification": f"lies above {self.margin:g}",
            "neutral": f"lies within ±{self.margin:g}"
            if self.resolved
            else f"straddles ±{self.margin:g}",
        }[self.label]
        side = "above" if self.adherence > self.expected.critical_adherence else "not above"
        return "\n".join(
            [
                f"{self.label}{doubt}: p = {self.usage:g}, s = {self.adherence:g}, "
                f"{self.seeds} seeds, {self.steps} steps",
                f"  residuals end at {factor} of their start; ln of it {self.growth} {where}",
                f"  slope of ln dev {self.slope} per step",
                f"  mass in ±{self.kappa:g} {self.mass_start} -> {self.mass_end}",
                f"  normality p {self.normality[0]:.2g} -> {self.normality[1]:.2g}",
                f"  {self._autonomy()}",
                f"  theory: {self.expected.label}, factor {_exp(self.expected.growth):.3g}; s is "
                f"{side} the critical {self.expected.critical_adherence:.4g}",
            ]
        )

    def _autonomy(self) -> str:
        if self.line is None or self.pieces is None:
            return "ln f(0): too few finite values for a line"
        return (
            f"ln f(0): line r2 {float(self.line.r2):.3f}, slope {float(self.line.slope):.3g} a "
            f"step; two pieces r2 {float(self.pieces.r2):.3f}, knot {float(self.pieces.knot):.0f}"
        )


def judge(
    record: LoopRecord,
    *,
    usage: float,
    adherence: float,
    config: LoopConfig,
    items: int,
    kappa: float | None = None,
    margin: float = MARGIN,
    level: float = LEVEL,
) -> Verdict:
    """Positive loop, error amplification or neutral, by the rule of this module.

    Args:
      record: Of `run_many` at one (p, s), with the seeds as its one axis of runs.
      usage: p of the record.
      adherence: s of the record.
      config: The loop of the record.
      items: Number of items of the data.
      kappa: Half-width of the mass that is reported, one of `config.kappas`; the middle one by
        default.
      margin: Change of ln dev that counts.
      level: Confidence of the intervals.

    Raises:
      ValueError: If the record has no axis of at least two seeds or a single refit, a margin is
        negative, the level lies outside (0, 1), or κ was not recorded.
    """
    statistics: Any = jax.tree.map(np.asarray, record.statistics)
    deviation = statistics.dev
    if deviation.ndim != 2 or deviation.shape[0] < 2 or deviation.shape[1] < 2:
        raise ValueError(
            f"record: got runs and refits of shape {deviation.shape}, expected one axis of at "
            "least 2 seeds, and at least 2 refits"
        )
    if margin < 0 or not 0 < level < 1:
        raise ValueError(
            f"margin, level: got {margin}, {level}, expected at least 0 and inside (0, 1)"
        )
    kappa = config.kappas[len(config.kappas) // 2] if kappa is None else kappa
    if kappa not in config.kappas:
        raise ValueError(f"kappa: got {kappa}, expected one of those recorded: {config.kappas}")
    step = np.asarray(record.step, np.float64)
    last = max(1, deviation.shape[1] // _END_SHARE)
    growth, log_deviation = _growth(deviation, last, level)
    label, resolved = _decide(growth, margin)
    mass = statistics.mass[..., config.kappas.index(kappa)]
    line, pieces = fit_autonomy(step, statistics.density_at_zero, config=config, items=items)
    band = band_over_seeds(log_deviation, level=level)
    return Verdict(
        label=label,
        resolved=resolved,
        growth=growth,
        slope=_interval(np.polyfit(step, log_deviation.T, 1)[0], level),
        mass_start=_interval(mass[:, 0], level),
        mass_end=_interval(mass[:, -last:].mean(1), level),
        kappa=kappa,
        normality=_medians(statistics.normality, last),
        line=line,
        pieces=pieces,
        deviation=Band(*map(np.exp, band)),
        expected=expect(
            config=config, items=items, usage=usage, adherence=adherence, steps=int(step[-1]),
            margin=margin,
        ),
        usage=usage,
        adherence=adherence,
        steps=int(step[-1]),
        seeds=deviation.shape[0],
        margin=margin,
        level=level,
    )  # fmt: skip


def record_at(record: LoopRecord, index: int | tuple[int, ...]) -> LoopRecord:
    """The runs of one setting out of a record with leading axes of settings.

    Args:
      record: Of `run_many`.
      index: Of the leading axes.
    """
    runs = jax.tree.map(lambda leaf: leaf[index], record._replace(step=None))
    return runs._replace(step=record.step)


def expect(
    *,
    config: LoopConfig,
    items: int,
    usage: float,
    adherence: float,
    steps: int,
    margin: float = MARGIN,
) -> Expectation:
    """The verdict of mean-field theory on a loop, without running it.

    Args:
      config: The loop.
      items: Number of items of the data.
      usage: p.
      adherence: s.
      steps: Steps of the loop.
      margin: Change of the logarithm of the scale that counts.

    >>> config = LoopConfig(setup="window")
    >>> expect(config=config, items=2000, usage=1.0, adherence=3.0, steps=1400).label
    'error amplification'
    """
    with jax.enable_x64(True):
        path = mean_field.relative_deviation(
            steps, setup=config.setup, size=config.num_active(items), usage=usage,
            adherence=adherence, rule=config.rule,
        )  # fmt: skip
    last = np.asarray(path)[-max(1, steps // _END_SHARE) :]
    # Rounding of the variance leaves around 1e-8 of a deviation that theory makes zero.
    growth = float(np.mean(np.log(last))) if last.min() > 1e-7 else -math.inf
    label, _ = _decide(Interval(growth, growth, growth), margin)
    critical, divergence = (
        mean_field.critical_adherence(config.rule, setup=config.setup, usage=usage, kind=kind)
        for kind in ("growth", "divergence")
    )
    return Expectation(label, growth, critical, divergence)


def fit_autonomy(
    step: ArrayLike, density_at_zero: ArrayLike, *, config: LoopConfig, items: int
) -> tuple[AutonomyFit, AutonomyFit] | tuple[None, None]:
    """Robust line and two pieces through ln f_t(0), f_t(0) averaged over seeds first.

    Args:
      step: Steps of the records, shape (records,).
      density_at_zero: f_t(0), shape (seeds, records).
      config: The loop; the knot of a window is its size W.
      items: Number of items of the data.

    Returns:
      Both fits in float64, or twice None where f_t(0) > 0 at fewer than four records.
    """
    step = np.asarray(step, np.float64)
    with np.errstate(divide="ignore"):
        value = np.log(np.mean(np.asarray(density_at_zero), 0))
    if np.isfinite(value).sum() < 4:
        return None, None
    knot = float(config.num_active(items)) if config.setup == "window" else None
    if knot is not None and not step[0] < knot < step[-1]:
        knot = None
    with jax.enable_x64(True):
        return fit_line(step, value), fit_pieces(step, value, knot=knot)


def band_over_seeds(values: ArrayLike, *, level: float = LEVEL) -> Band:
    """Mean over the first axis with its t interval.

    Args:
      values: Shape (seeds, records), at least two seeds.
      level: Confidence.

    >>> band = band_over_seeds([[1.0, 2.0], [3.0, 2.0]])
    >>> band.mean.tolist(), np.round(band.high, 2).tolist()
    ([2.0, 2.0], [14.71, 2.0])
    """
    # Here, because it takes as long as all else that `import jaxopt_lab` brings.
    from scipy.special import stdtrit

    values = np.asarray(values, np.float64)
    seeds = values.shape[0]
    mean = values.mean(0)
    half = stdtrit(seeds - 1, 0.5 + level / 2) * values.std(0, ddof=1) / math.sqrt(seeds)
    return Band(mean, mean - half, mean + half)


def _growth(deviation: np.ndarray, last: int, level: float) -> tuple[Interval, np.ndarray]:
    """The statistic that decides, and ln dev, finite even for residuals of exactly 0."""
    limits = np.finfo(np.float64)
    finite = np.nan_to_num(deviation, nan=limits.max, posinf=limits.max)
    log_deviation = np.log(np.clip(finite, limits.tiny, limits.max))
    return _interval(log_deviation[:, -last:].mean(1) - log_deviation[:, 0], level), log_deviation


def _decide(growth: Interval, margin: float) -> tuple[Label, bool]:
    if growth.high < -margin:
        return "positive loop", True
    if growth.low > margin:
        return "error amplification", True
    return "neutral", -margin <= growth.low and growth.high <= margin


def _interval(values: np.ndarray, level: float) -> Interval:
    return Interval(*(float(end) for end in band_over_seeds(values, level=level)))


def _medians(p_values: np.ndarray, last: int) -> tuple[float, float]:
    return float(np.median(p_values[:, 0])), float(np.median(p_values[:, -last:]))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
