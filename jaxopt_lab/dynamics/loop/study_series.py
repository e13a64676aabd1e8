"""From records and verdicts to the curves of figures and the numbers of result files."""

import math
from typing import Any

import jax
import numpy as np

from jaxopt_lab.dynamics.loop import mean_field
from jaxopt_lab.dynamics.loop.config import LoopConfig
from jaxopt_lab.dynamics.loop.run import LoopRecord
from jaxopt_lab.dynamics.loop.verdict import Verdict, band_over_seeds
from jaxopt_lab.report.loop_figures import LoopSeries

# Points of a curve in a result file.
_KEPT = 201


def series_of(
    record: LoopRecord, verdict: Verdict, config: LoopConfig, items: int, *, label: str, name: str
) -> LoopSeries:
    """The curves of one setting over its seeds, with mean-field theory where there is any.

    Theory takes its start (deviation, f_0(0), mass) from the simulation. f_t(0) of theory is that
    of a density whose scale alone changes, f_0(0) x_0/x(t); under exact obedience relabelled items
    make a peak of their own, and there is no such theory.

    Args:
      record: Of one setting, the seeds as its axis of runs.
      verdict: On the record.
      config: The loop.
      items: Number of items of the data.
      label: Title of the figure.
      name: In the legend of a figure of several settings.
    """
    statistics: Any = jax.tree.map(np.asarray, record.statistics)
    step = np.asarray(record.step)
    kappas = [f"{kappa:g}" for kappa in config.kappas]
    size = config.num_active(items)
    common: dict[str, Any] = dict(setup=config.setup, size=size, usage=verdict.usage)
    with jax.enable_x64(True):
        strength: dict[str, Any] = dict(adherence=verdict.adherence, rule=config.rule)
        deviation = mean_field.relative_deviation(int(step[-1]), **common, **strength)
        scale = mean_field.relative_scale(int(step[-1]), **common, **strength)
        mass = {}
        if verdict.adherence == 0.0:
            starts = statistics.mass[:, 0].mean(0)
            for kappa, start in zip(kappas, starts, strict=True):
                law = mean_field.obedient_mass(step, initial=start, **common)
                mass[kappa] = np.asarray(law)
    density = np.array(band_over_seeds(statistics.density_at_zero, level=verdict.level))
    theory_density = None
    if verdict.adherence > 0.0:
        theory_density = density[0, 0] / np.asarray(scale)[step]
    return LoopSeries(
        label=label,
        name=name,
        step=step,
        deviation=np.array(verdict.deviation),
        density=density,
        mass={
            kappa: np.array(band_over_seeds(statistics.mass[..., i], level=verdict.level))
            for i, kappa in enumerate(kappas)
        },
        normality=np.quantile(statistics.normality, [0.5, 0.25, 0.75], axis=0),
        moments=_moments(statistics, config),
        fits=_fits(verdict),
        theory_deviation=verdict.deviation.mean[0] * np.asarray(deviation)[step],
        theory_density=theory_density,
        theory_mass=mass,
    )


def describe(verdict: Verdict, series: LoopSeries) -> dict[str, Any]:
    """A verdict and thinned-out curves as JSON values; what is not finite becomes null."""
    kept = np.unique(np.linspace(0, len(series.step) - 1, _KEPT).round().astype(int))

    def curve(values: np.ndarray | None) -> Any:
        return None if values is None else _json(np.asarray(values)[..., kept])

    fits = {"line": verdict.line, "pieces": verdict.pieces}
    return {
        "usage": verdict.usage,
        "adherence": verdict.adherence,
        "verdict": verdict.label,
        "resolved": verdict.resolved,
        "margin": verdict.margin,
        "level": verdict.level,
        "seeds": verdict.seeds,
        "steps": verdict.steps,
        "growth": _json(verdict.growth),
        "slope": _json(verdict.slope),
        "kappa": verdict.kappa,
        "mass_start": _json(verdict.mass_start),
        "mass_end": _json(verdict.mass_end),
        "normality_start_end": _json(verdict.normality),
        "theory": {name: _json(value) for name, value in verdict.expected._asdict().items()},
        "autonomy": {
            name: None if fit is None else {
                field: _json(getattr(fit, field))
                for field in ("intercept", "slope", "slope_after", "knot", "r2", "breusch_pagan_p")
            }
            for name, fit in fits.items()
        },
        "curves": {
            "step": curve(series.step),
            "deviation": curve(series.deviation),
            "density_at_zero": curve(series.density),
            "mass": {name: curve(band) for name, band in series.mass.items()},
            "normality": curve(series.normality),
            "log1p_moments": {name: curve(values) for name, values in series.moments.items()},
            "theory_deviation": curve(series.theory_deviation),
            "theory_mass": {name: curve(values) for name, values in series.theory_mass.items()},
        },
    }  # fmt: skip


def _moments(statistics: Any, config: LoopConfig) -> dict[str, np.ndarray]:
    """Single moments in the sampling set-up, the sum of many in the window, as published."""
    if config.setup == "window":
        return {"sum of 300": np.logaddexp(0.0, statistics.log_moment_sum).mean(0)}
    return {f"k = {k}": np.log1p(np.abs(statistics.moments[..., k - 1].mean(0))) for k in (2, 4, 6)}


def _fits(verdict: Verdict) -> dict[str, np.ndarray]:
    if verdict.line is None or verdict.pieces is None:
        return {}
    return {
        f"line, r² = {float(verdict.line.r2):.3f}": np.asarray(verdict.line.fitted),
        f"two pieces, r² = {float(verdict.pieces.r2):.3f}": np.asarray(verdict.pieces.fitted),
    }


def _json(value: Any) -> Any:
    """Numbers rounded to what they are worth, in lists; null for what is not finite."""
    if isinstance(value, str):
        return value
    array = np.asarray(value, np.float64)
    if array.ndim:
        return [_json(item) for item in array]
    number = float(array)
    return float(f"{number:.8g}") if math.isfinite(number) else None
