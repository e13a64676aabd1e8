r"""The study of a finite sum of quadratics, where the exact moments are known.

Simulation, exact recursion, the recursion of independent fluctuations with all of $\Gamma_{ij}$,
and the closed form with its diagonal alone stand side by side: the first two must agree within the
sampling error, and the others show what their assumptions cost.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxopt_lab.dynamics.landscape.closed_forms import variance_at
from jaxopt_lab.dynamics.landscape.independent import coupled_variances
from jaxopt_lab.dynamics.landscape.quadratics import (
    FiniteSum,
    batch_factor,
    finite_sum,
    moments,
    sample_ensemble,
)
from jaxopt_lab.dynamics.landscape.study_config import SgdConfig, record_interval
from jaxopt_lab.dynamics.landscape.study_findings import Findings
from jaxopt_lab.report.tables import format_table

# From a saddle over flat directions to steep ones: with the default rate and horizon all regimes.
CURVATURES = (-0.02, 0.0, 1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0)
# Of one sample: spread of a curvature over the curvature, on the diagonal and off it.
_DIAGONAL_SPREAD, _MIXED_SPREAD = 2.0, 0.4
_LARGEST_DEVIATION = 4.0  # standard errors


def quadratic_problem(key: Key[Array, ""], samples: int) -> FiniteSum:
    """Random quadratics with a critical point at 0 and the mean curvatures above, not aligned.

    Args:
      key: Typed key.
      samples: Number of quadratics, at least 2.
    """
    basis_key, mixed_key, diagonal_key, slope_key = jax.random.split(key, 4)
    curvature = jnp.asarray(CURVATURES)
    size = len(CURVATURES)
    basis = jnp.linalg.qr(jax.random.normal(basis_key, (size, size)))[0]
    mixed = jax.random.normal(mixed_key, (samples, size, size))
    spread = _MIXED_SPREAD * jnp.triu(mixed, 1)
    spread = spread + spread.mT
    diagonal = _DIAGONAL_SPREAD * jax.random.normal(diagonal_key, (samples, size))
    spread = spread + diagonal[:, :, None] * jnp.eye(size)
    root = jnp.sqrt(jnp.abs(curvature))
    spread = root[:, None] * (spread - spread.mean(0)) * root
    slopes = jax.random.normal(slope_key, (samples, size))
    return finite_sum(
        basis @ (jnp.diag(curvature) + spread) @ basis.T, (slopes - slopes.mean(0)) @ basis.T
    )


def quadratic_findings(config: SgdConfig, say: Callable[[str], None]) -> Findings:
    """Measures and predicts; call it with float64 enabled.

    Args:
      config: The study, resolved.
      say: Called with a line of text before each stage.
    """
    assert config.learning_rate and config.steps and config.replicas  # resolved
    assert config.batch_size and config.samples
    problem_key, run_key = jax.random.split(jax.random.key(config.seed))
    problem = quadratic_problem(problem_key, config.samples)
    curvature, vectors = jnp.linalg.eigh(problem.hessians.mean(0))
    factor = batch_factor(config.samples, config.batch_size)
    d = factor * jnp.var(problem.gradients @ vectors, axis=0)
    gamma = factor * jnp.var(vectors.T @ problem.hessians @ vectors, axis=0)
    say(f"simulating {config.replicas:,} replicas of {config.steps:,} steps")
    run = {"learning_rate": config.learning_rate, "steps": config.steps}
    every = record_interval(config.steps)
    weights = sample_ensemble(
        run_key, problem, replicas=config.replicas, batch_size=config.batch_size,
        record_every=every, **run,
    )  # fmt: skip
    y = np.asarray(weights[:, 1:] @ vectors)
    say("exact recursion and closed forms")
    exact = moments(problem, batch_size=config.batch_size, **run).covariance[-1]
    local = {"curvature": curvature, "gradient_variance": d}
    coupled = coupled_variances(curvature_variance=gamma, **local, **run).variance[-1]
    closed = variance_at(
        config.steps, learning_rate=config.learning_rate,
        curvature_variance=jnp.diag(gamma), **local,
    )  # fmt: skip
    predicted = {
        "exact": jnp.diag(vectors.T @ exact @ vectors), "coupled": coupled, "P2": closed,
        "P1": config.learning_rate * d / (2 * jnp.abs(curvature) + 1e-6),
    }  # fmt: skip
    return _findings(
        config, y, np.arange(every, config.steps + 1, every), np.asarray(curvature), np.asarray(d),
        np.asarray(jnp.diag(gamma)), {name: np.asarray(x) for name, x in predicted.items()},
    )  # fmt: skip


def _findings(
    config: SgdConfig,
    y: Float[np.ndarray, "R records D"],
    steps: np.ndarray,
    curvature: np.ndarray,
    d: np.ndarray,
    gamma: np.ndarray,
    predicted: dict[str, np.ndarray],
) -> Findings:
    measured = y.var(axis=0, ddof=1)
    deviations = (measured[-1] - predicted["exact"]) / variance_error(y[:, -1])
    worst = float(np.abs(deviations).max())
    largest = {
        name: float(np.abs(predicted[name] / predicted["exact"] - 1).max())
        for name in ("coupled", config.predictor)
    }
    agrees = worst < _LARGEST_DEVIATION
    verdict = (
        f"The simulation {'agrees' if agrees else 'DISAGREES'} with the exact recursion: the "
        f"largest of {len(curvature)} deviations is {worst:.1f} standard errors. "
        f"Independent fluctuations with all of Γ are off by at most {largest['coupled']:.1%}, "
        f"the prediction {config.predictor} by at most {largest[config.predictor]:.1%}."
    )
    findings = Findings(
        curvature, d, gamma, steps, measured, predicted,
        {"deviations": deviations.tolist(), "largest_deviation": worst, "agrees": agrees,
         "largest_relative_error": largest},
        "", verdict,
    )  # fmt: skip
    assert config.learning_rate
    regimes = findings.regimes(config.learning_rate)
    rows = [
        [f"{lam:.1e}", regime, m, *(predicted[name][i] for name in predicted), deviations[i]]
        for i, (lam, regime, m) in enumerate(zip(curvature, regimes, measured[-1], strict=True))
    ]
    headers = [
        "curvature",
        "regime",
        "measured",
        "exact",
        "coupled",
        "P2",
        "P1",
        "deviation [s.e.]",
    ]
    return findings._replace(table=format_table(headers, _floats(rows)))


def variance_error(y: Float[np.ndarray, "R D"]) -> Float[np.ndarray, " D"]:
    """Standard error of the variance over replicas, from their fourth moment.

    Curvature noise makes tails heavy, where the Gaussian rule is too small.

    >>> y = np.asarray([[-1.0], [1.0], [-3.0], [3.0]])
    >>> variance_error(y).round(3).tolist()
    [2.0]
    """
    squares = np.square(y - y.mean(0))
    return squares.std(axis=0) / np.sqrt(len(y))


def _floats(rows: list[list]) -> list[list]:
    return [[float(x) if isinstance(x, np.floating) else x for x in row] for row in rows]
