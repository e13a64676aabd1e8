"""One study of SGD in a fluctuating landscape, from configuration to verdict and figures.

Everything runs in float64.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxopt_lab.dynamics.landscape.closed_forms import geometric_sum, growth_excess, stability_bound
from jaxopt_lab.dynamics.landscape.independent import direction_moments
from jaxopt_lab.dynamics.landscape.regimes import (
    CONFINED_ABOVE,
    DIFFUSIVE_BELOW,
    REGIMES,
    UNSTABLE_ABOVE,
)
from jaxopt_lab.dynamics.landscape.study_config import SgdConfig
from jaxopt_lab.dynamics.landscape.study_findings import Findings
from jaxopt_lab.dynamics.landscape.study_network import network_findings
from jaxopt_lab.dynamics.landscape.study_quadratic import quadratic_findings
from jaxopt_lab.dynamics.landscape.systems import System
from jaxopt_lab.report import landscape_figures
from jaxopt_lab.report.storage import local

_PREDICTOR_LABELS = {"P2": "after finitely many steps (P2)", "P1": "stationary proxy (P1)"}


class SgdStudy(NamedTuple):
    """Result of `run_study`."""

    config: SgdConfig  # with the defaults of the system
    directory: Path
    findings: Findings
    table: str
    verdict: str
    seconds: float


def run_study(
    config: SgdConfig,
    on_progress: Callable[[str], None] = lambda text: None,
    *,
    system: System | None = None,
) -> SgdStudy:
    """Reference point, Hessian, eigenbasis, noise, ensemble, comparison; writes a directory.

    It holds `config.json`, `results.json` (numbers and one row a direction) and `figures/`:
    measured against predicted variance, variance against curvature, growth over the steps, and for
    the quadratic system the phase diagram.

    Args:
      config: What to study.
      on_progress: Called with a line of text before each stage.
      system: A network of one's own; `config.system` then only names defaults and the title, and
        must not be "quadratic".

    Raises:
      ValueError: A setting that cannot work, missing data, or a reference run that diverges.
    """
    config = config.resolved()
    assert config.out is not None and config.learning_rate is not None  # resolved
    directory = local(config.out)
    start = time.monotonic()
    if system is not None and config.system == "quadratic":
        raise ValueError("system: a network is given, expected config.system to be a network's")
    with jax.enable_x64(True):
        if config.system == "quadratic":
            findings = quadratic_findings(config, on_progress)
        else:
            findings = network_findings(config, on_progress, system)
        on_progress("figures")
        directory.mkdir(parents=True, exist_ok=True)
        _draw(config, findings, directory / "figures")
    seconds = time.monotonic() - start
    _write(directory / "config.json", asdict(config))
    _write(directory / "results.json", _results(config, findings, seconds))
    return SgdStudy(config, directory, findings, findings.table, findings.verdict, seconds)


def _results(config: SgdConfig, findings: Findings, seconds: float) -> dict[str, Any]:
    assert config.learning_rate is not None
    columns = {
        "curvature": findings.curvature.tolist(),
        "gradient_variance": findings.gradient_variance.tolist(),
        "curvature_variance": findings.curvature_variance.tolist(),
        "regime": findings.regimes(config.learning_rate),
        "measured": findings.measured[-1].tolist(),
        "predicted": {name: values.tolist() for name, values in findings.predicted.items()},
    }
    return {
        "verdict": findings.verdict,
        "seconds": round(seconds, 1),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        **findings.summary,
        "directions": columns,
    }


def _draw(config: SgdConfig, findings: Findings, directory: Path) -> None:
    assert config.learning_rate is not None and config.replicas is not None
    eta, n = config.learning_rate, int(findings.steps[-1])
    regimes = findings.regimes(eta)
    d, title = findings.gradient_variance, f"{config.system}, learning rate {eta:g}, {n:,} steps"
    other = "P1" if config.predictor == "P2" else "P2"
    landscape_figures.variance_figure(
        findings.measured[-1], findings.predicted[config.predictor], directory / "variance.png",
        regimes=regimes, comparison=findings.predicted[other], title=title,
        predicted_label=_PREDICTOR_LABELS[config.predictor],
        comparison_label=_PREDICTOR_LABELS[other],
    )  # fmt: skip
    memory = np.divide(findings.measured[-1], eta**2 * d, out=np.full_like(d, np.nan), where=d > 0)
    grid, edges = _curvature_grid(findings.curvature, eta, n), _band_edges(eta, n)
    landscape_figures.spectrum_figure(
        findings.curvature, memory, directory / "spectrum.png", bands=edges, title=title,
        theory=(grid, geometric_sum(growth_excess(eta, grid), n)),
        linear_below=edges["diffusive"][1],
    )  # fmt: skip
    chosen = _typical_directions(regimes, d)
    steps = np.unique(np.geomspace(1, n, 200).round().astype(int))
    landscape_figures.growth_figure(
        findings.steps, findings.measured[:, chosen], directory / "growth.png",
        theory_steps=steps, theory=findings.theory(eta, steps, chosen), title=title,
        labels=[f"{regimes[i]}, curvature {findings.curvature[i]:.1e}" for i in chosen],
        regimes=[regimes[i] for i in chosen], relative_error=np.sqrt(2 / (config.replicas - 1)),
    )  # fmt: skip
    if config.system == "quadratic":
        _draw_stability(directory / "stability.png")


def _band_edges(eta: float, n: int) -> dict[str, tuple[float, float]]:
    """Curvatures between the regimes without curvature noise, to first order in the rate."""
    unit = 1 / (2 * eta * n)
    unstable, flat, confined = (
        limit * unit for limit in (UNSTABLE_ABOVE, DIFFUSIVE_BELOW, CONFINED_ABOVE)
    )
    return {
        "unstable": (-np.inf, -unstable),
        "transitional": (-unstable, -flat),
        "diffusive": (-flat, flat),
        "transitional (positive)": (flat, confined),
        "confined": (confined, np.inf),
    }


def _curvature_grid(curvature: np.ndarray, eta: float, n: int) -> np.ndarray:
    """Curvatures for the theory curve: dense on the scales of the symmetric logarithmic axis."""
    flat = DIFFUSIVE_BELOW / (2 * eta * n)
    inner = np.linspace(-flat, flat, 40)
    outer = np.geomspace(flat, max(1.6 * float(np.abs(curvature).max()), 2 * flat), 200)
    left = min(float(curvature.min()), 0.0) * 1.6
    return np.concatenate([-outer[outer < -left][::-1], inner, outer])


def _typical_directions(regimes: list[str], d: np.ndarray) -> list[int]:
    """The noisiest direction of every regime that there is."""
    found = []
    for name in REGIMES:
        members = [i for i, regime in enumerate(regimes) if regime == name and d[i] > 0]
        if members:
            found.append(max(members, key=lambda i: d[i]))
    return found


def _draw_stability(path: Path) -> None:
    """The phase diagram at curvature 1, with the fate of the exact recursion over a grid."""
    rate = np.linspace(0.05, 1.95, 200)
    at, gamma = (x.ravel() for x in np.meshgrid(np.arange(0.1, 2, 0.1), np.arange(0.25, 5, 0.25)))
    later = direction_moments(
        learning_rate=at, steps=4000, curvature=1.0, gradient_variance=0.2, curvature_variance=gamma
    ).variance
    # A recursion that converges has stopped moving by then, except within 1e-3 of the bound.
    last, middle = np.asarray(later[-1]), np.asarray(later[len(later) // 2])
    grows = ~np.isfinite(last) | (last > 1.01 * middle)
    exact, langevin = (np.asarray(stability_bound(rate, 1.0, truncated=t)) for t in (False, True))
    landscape_figures.stability_figure(
        rate, exact, langevin, path, points=(at, gamma, grows),
        title="second moment at curvature 1",
    )  # fmt: skip


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=True) + "\n", encoding="utf-8")
