"""The study of a small network: from a trained point to measured against predicted variances."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxopt_lab.dynamics.landscape import systems
from jaxopt_lab.dynamics.landscape.comparison import (
    Summary,
    has_noise,
    summarise,
    summary_table,
)
from jaxopt_lab.dynamics.landscape.curvature import eigenbasis, mean_hessian
from jaxopt_lab.dynamics.landscape.digits import read_digits
from jaxopt_lab.dynamics.landscape.ensemble import Ensemble, run_ensemble
from jaxopt_lab.dynamics.landscape.noise import NoiseStatistics, noise_statistics
from jaxopt_lab.dynamics.landscape.reference import ReferencePoint, reference_point
from jaxopt_lab.dynamics.landscape.regimes import REGIMES
from jaxopt_lab.dynamics.landscape.study_config import SgdConfig, record_interval
from jaxopt_lab.dynamics.landscape.study_findings import Findings
from jaxopt_lab.dynamics.landscape.systems import System
from jaxopt_lab.dynamics.landscape.text import read_text

# Digits are averaged to as many pixels a side before the convolution.
_CNN_PIXELS = 8
# Where batch statistics couple the samples, noise and curvature are those of drawn batches.
_NOISE_BATCHES, _HESSIAN_BATCHES = 1024, 32
# A prediction holds with a scatter of ln(measured / predicted) of at most so many times that of
# sampling, and a median ratio within the second. (A log-correlation tests nothing: the noise of the
# directions spans decades, and eta^2 d n without curvature reaches 0.976.)
SCATTER, MEDIAN_RATIO = 2.0, 1.25


def build_system(config: SgdConfig) -> System:
    """The network and its data.

    Raises:
      ValueError: The data are missing, or fewer than `samples`.
    """
    if config.system == "nanogpt":
        return systems.nano_gpt(read_text(config.text), samples=config.samples)
    try:
        digits = read_digits(config.digits, limit=config.samples)
    except ValueError as error:
        # The fields of a study have names of their own.
        names = {"source": "digits", "limit": "samples"}
        argument, _, problem = str(error).partition(": ")
        raise ValueError(f"{names[argument]}: {problem}") from error
    if config.system == "mlp":
        return systems.mlp(*digits)
    return systems.cnn(*digits, pooled=_CNN_PIXELS)


def network_findings(
    config: SgdConfig, say: Callable[[str], None], system: System | None = None
) -> Findings:
    """Measures and predicts; call it with float64 enabled.

    Args:
      config: The study, resolved.
      say: Called with a line of text before each stage.
      system: Instead of the one that `config.system` names.

    Raises:
      ValueError: The data are missing or the reference run diverges.
    """
    assert config.learning_rate and config.steps and config.replicas and config.batch_size
    system = build_system(config) if system is None else system
    keys = jax.random.split(jax.random.key(config.seed), 4)
    say(f"{system.name}: {system.parameters:,} parameters, {system.samples:,} samples; reference")
    point = _reference(keys[0], system, config)
    say(f"loss {point.loss[-1]:.4f}, gradient norm {point.gradient_norm[-1]:.1e}; mean Hessian")
    at = (system.loss, point.params, system.data)
    batches = _drawn(keys[1], system, config)
    basis = eigenbasis(mean_hessian(*at, batches=batches))
    say(f"curvature {basis.eigenvalues[0]:.2e} to {basis.eigenvalues[-1]:.2e}; gradient noise")
    noise = noise_statistics(
        *at, directions=basis.directions, batch_size=config.batch_size,
        curvature="diagonal" if config.curvature_noise else "none",
        batches=None if batches is None else _NOISE_BATCHES,
        key=None if batches is None else keys[2],
    )  # fmt: skip
    say(f"{config.replicas:,} replicas of {config.steps:,} steps at rate {config.learning_rate:g}")
    ensemble = run_ensemble(
        keys[3], *at, directions=basis.directions, learning_rate=config.learning_rate,
        batch_size=config.batch_size, steps=config.steps, replicas=config.replicas,
        record_every=record_interval(config.steps),
    )  # fmt: skip
    return _findings(config, system, point, basis.eigenvalues, noise, ensemble)


def _reference(key: Any, system: System, config: SgdConfig) -> ReferencePoint:
    assert config.reference_sgd_steps is not None and config.reference_rate
    assert config.reference_gd_steps is not None and config.batch_size
    return reference_point(
        key, system, sgd_steps=config.reference_sgd_steps, sgd_rate=config.reference_rate,
        batch_size=config.batch_size, gd_steps=config.reference_gd_steps,
        gd_rate=config.reference_gd_rate,
    )  # fmt: skip


def _drawn(key: Any, system: System, config: SgdConfig) -> np.ndarray | None:
    """Batches over which the Hessian is averaged; None where that of all data is the same."""
    if config.system != "cnn":
        return None
    assert config.batch_size
    size = (_HESSIAN_BATCHES, config.batch_size)
    return np.asarray(jax.random.randint(key, size, 0, system.samples))


def _findings(
    config: SgdConfig,
    system: System,
    point: ReferencePoint,
    curvature: np.ndarray,
    noise: NoiseStatistics,
    ensemble: Ensemble,
) -> Findings:
    assert config.learning_rate
    d = noise.gradient_variance
    silent = ~has_noise(d)
    noise = noise._replace(gradient_variance=np.where(silent, 0.0, d))
    summary = summarise(
        ensemble, curvature, noise, learning_rate=config.learning_rate,
        with_curvature_noise=config.curvature_noise,
    )  # fmt: skip
    growth = float(np.nanmedian(summary.flat_growth))
    gamma = noise.diagonal_variance
    numbers = {
        "parameters": system.parameters,
        "samples": system.samples,
        "reference_loss": float(point.loss[-1]),
        "reference_gradient_norm": float(point.gradient_norm[-1]),
        "directions_without_noise": int(silent.sum()),
        "flat_growth": growth,
        "comparisons": {name: found._asdict() for name, found in summary.comparisons.items()},
        "regimes": dict(
            zip(REGIMES, np.bincount(summary.regimes, minlength=len(REGIMES)).tolist(), strict=True)
        ),
    }
    return Findings(
        curvature, noise.gradient_variance, np.zeros_like(d) if gamma is None else gamma,
        ensemble.steps, ensemble.variance,
        {"P2": summary.finite_time, "P1": summary.stationary},
        numbers, summary_table(summary), _verdict(config, summary, growth),
    )  # fmt: skip


def _verdict(config: SgdConfig, summary: Summary, growth: float) -> str:
    found = summary.comparisons[f"{config.predictor}, all"]
    assert config.replicas
    ratio = max(found.median_ratio, 1 / found.median_ratio)
    sampling = (2 / (config.replicas - 1)) ** 0.5
    holds = found.log_scatter <= SCATTER * sampling and ratio <= MEDIAN_RATIO
    return (
        f"The prediction {config.predictor} {'holds' if holds else 'DOES NOT HOLD'}: over "
        f"{found.directions} directions ln(measured / predicted) scatters by "
        f"{found.log_scatter:.3f} (wanted at most {SCATTER:g} times {sampling:.3f}, the error of "
        f"sampling), and the median of measured / predicted is {found.median_ratio:.3f} (wanted "
        f"within a factor {MEDIAN_RATIO}). Flat directions grow as {growth:.3f} η² d n."
    )
