"""The search for the peak gap: published values, both precisions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from jaxopt_lab.schedules.peak_gap import exact_peak_gap, peak_gap_candidates, peak_gap_scores

# Loss at the start less the target, kappa, div_factor, peak rates, what the released code finds for
# each of them, accurate minimum of the same objective.
TABLE = [
    (7.78, 46848, 100, (1e-3, 2e-3), (5.515, 5.515), 2.498),
    (7.78, 92928, 100, (1e-3, 3e-3), (1.954, 2.405), 2.560),
    (7.78, 1.236e8, 100, (1e-3,), (0.383,), 0.772),
    (7.48, 1.236e8, 100, (1e-3,), (0.384,), 0.787),
    (7.78, 2.085e8, 100, (1e-3,), (0.368,), 0.477),
    (7.48, 2.085e8, 100, (1e-3,), (0.354,), 0.503),
    (6.68, 61, 5, (1e-2,), (2.226,), 2.226),
    (6.78, 61, 2, (1e-2,), (3.451,), 3.451),
]
SIGMA = 1e-3
# Compiled fast, not to be fast.
fast_jit = functools.partial(
    jax.jit,
    static_argnames="chunk",
    compiler_options={"xla_backend_optimization_level": 0},
)
search, scores = fast_jit(exact_peak_gap), fast_jit(peak_gap_scores)


def grid_step(initial_gap):
    return (initial_gap - 0.02) / 499


@pytest.mark.parametrize("x64", [False, True])
def test_accurate_minimum_of_the_published_settings(x64):
    with jax.enable_x64(x64):
        found = [float(search(gap, k * SIGMA, div)) for gap, k, div, *_ in TABLE]
    for got, (gap, *_, wanted) in zip(found, TABLE, strict=True):
        # The table has three decimals: the nearest candidate, in both precisions.
        assert abs(got - wanted) < 0.1 * grid_step(gap)


def test_scored_all_at_once_the_best_candidate_is_the_same():
    for gap, kappa, div in [row[:3] for row in TABLE[::5]]:
        in_turn, at_once = (search(gap, kappa * SIGMA, div, chunk=c) for c in (50, None))
        np.testing.assert_allclose(at_once, in_turn, rtol=1e-6)


def test_single_precision_finds_the_same_candidate():
    for gap, kappa, div in [(7.78, 46848, 100.0), (6.98, 4, 10.0), (3.0, 1.2e8, 30.0)]:
        found = []
        for x64 in (False, True):
            with jax.enable_x64(x64):
                found.append(float(search(gap, kappa * SIGMA, div)))
        assert abs(found[0] - found[1]) < 0.1 * grid_step(gap)


@pytest.mark.parametrize("kappa_sigma", [0.0, 0.004, 46.8, 2e5])
def test_scores_against_adaptive_quadrature_with_break_points(kappa_sigma):
    gap, div = 7.0, 30.0
    chosen = np.array([0.01, 0.3, 2.0, 5.0, 6.99])
    with jax.enable_x64(True):
        got = np.asarray(scores(jnp.asarray(chosen), gap, kappa_sigma, div))
    for d, score in zip(chosen, got, strict=True):
        c = (div - 1) * gap / (gap - d) ** 2

        def integrand(x, d=d, c=c):
            wanted = (1 - np.cos(np.pi * x / d)) / 2 if x < d else None
            if wanted is None:
                wanted = 1 - (1 - 1 / div) * (x - d) / (gap - d)
            rate = x / (x + c * (x - d) ** 2)
            return np.exp(-kappa_sigma / 2 * (x - d) ** 2) * (rate - wanted) ** 2

        width = min(kappa_sigma**-0.5 if kappa_sigma else np.inf, np.sqrt(d / c))
        near = d + width * np.array([-30, -10, -3, -1, 0, 1, 3, 10, 30])
        edges = np.unique(np.clip(np.concatenate([near, np.linspace(0, gap, 40)]), 0, gap))
        pieces = [
            quad(integrand, a, b, epsabs=0, epsrel=1e-10, limit=200, full_output=1)[0]
            for a, b in zip(edges[:-1], edges[1:], strict=True)
        ]
        np.testing.assert_allclose(score, sum(pieces) / gap, rtol=1e-9)


def test_candidates():
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            peak_gap_candidates(7.78), np.linspace(0.01, 7.77, 500), rtol=1e-15
        )


def test_vmapped_search_is_the_search():
    gaps, sharpness = jnp.array([7.78, 3.0]), jnp.array([46.8, 0.004])
    together = jax.vmap(lambda g, s: search(g, s, 100.0))(gaps, sharpness)
    alone = [search(g, s, 100.0) for g, s in zip(gaps, sharpness, strict=True)]
    np.testing.assert_allclose(together, alone, rtol=1e-6)
