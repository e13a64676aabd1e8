"""The search for the peak gap: published values, both rules, both precisions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from jaxopt_lab.schedules.peak_gap import (
    OBJECTIVES,
    SMOOTH_OBJECTIVES,
    exact_peak_gap,
    peak_gap_candidates,
    peak_gap_scores,
)
from jaxopt_lab.schedules.quadrature_peak_gap import quadrature_peak_gap
from tests.examples import examples

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
    static_argnames=("objective", "target", "chunk"),
    compiler_options={"xla_backend_optimization_level": 0},
)
search, scores = fast_jit(exact_peak_gap), fast_jit(peak_gap_scores)
WITH_TARGET = ("func_prime", "func_prime_0xs", "double_prime")


def grid_step(initial_gap):
    return (initial_gap - 0.02) / 499


@pytest.mark.parametrize("x64", [False, True])
def test_accurate_minimum_of_the_published_settings(x64):
    with jax.enable_x64(x64):
        found = [float(search(gap, k * SIGMA, div)) for gap, k, div, *_ in TABLE]
    for got, (gap, *_, wanted) in zip(found, TABLE, strict=True):
        # The table has three decimals: the nearest candidate, in both precisions.
        assert abs(got - wanted) < 0.1 * grid_step(gap)


@pytest.mark.parametrize("objective", SMOOTH_OBJECTIVES)
def test_scored_all_at_once_the_best_candidate_is_the_same(objective):
    for gap, kappa, div in [row[:3] for row in TABLE[::5]]:
        in_turn, at_once = (
            search(gap, kappa * SIGMA, div, objective=objective, chunk=c) for c in (50, None)
        )
        np.testing.assert_allclose(at_once, in_turn, rtol=1e-6)


@pytest.mark.parametrize(("gap", "kappa", "div", "rates", "wanted"), [row[:5] for row in TABLE])
def test_official_rule_repeats_the_published_luck(gap, kappa, div, rates, wanted):
    found = [quadrature_peak_gap(gap, kappa * SIGMA, div, rate) for rate in rates]
    np.testing.assert_allclose(found, wanted, atol=6e-4)


@pytest.mark.parametrize(
    ("objective", "target"),
    [(o, "linear") for o in OBJECTIVES] + [(o, "cos") for o in WITH_TARGET],
)
def test_both_rules_agree_for_wide_weights(objective, target):
    # Peak rate 1: the absolute tolerance of the official rule then means what it says.
    with jax.enable_x64(True):
        exact = float(search(6.98, 0.004, 10.0, objective=objective, target=target))
    official = quadrature_peak_gap(6.98, 0.004, 10.0, 1.0, objective, target)
    np.testing.assert_allclose(exact, official, rtol=1e-12)


@examples(6)
@given(st.floats(1.0, 10.0), st.floats(1e-4, 0.1), st.floats(2.0, 200.0))
def test_published_objective_agrees_for_wide_weights(gap, kappa_sigma, div):
    with jax.enable_x64(True):
        exact = float(search(gap, kappa_sigma, div))
    official = quadrature_peak_gap(gap, kappa_sigma, div, 1.0)
    # Two neighbours may score equally to the official tolerance.
    assert abs(exact - official) < 1.01 * grid_step(gap)


@pytest.mark.parametrize("objective", ["linear_and_cos", "integral_0_x0", "func_prime"])
def test_single_precision_finds_the_same_candidate(objective):
    published = [(7.78, 46848, 100.0), (6.98, 4, 10.0), (3.0, 1.2e8, 30.0)]
    # Under a narrow weight the integral of the rate alone is the same for all candidates.
    for gap, kappa, div in published[: 2 if objective == "integral_0_x0" else 3]:
        found = []
        for x64 in (False, True):
            with jax.enable_x64(x64):
                found.append(float(search(gap, kappa * SIGMA, div, objective=objective)))
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


def test_unknown_names():
    for rule in (lambda *names: exact_peak_gap(3.0, 1.0, 10.0, *names),
                 lambda *names: quadrature_peak_gap(3.0, 1.0, 10.0, 1e-3, *names)):  # fmt: skip
        with pytest.raises(ValueError, match="objective is 'linear_and_linaer'; choose one of"):
            rule("linear_and_linaer")
        with pytest.raises(ValueError, match="target is 'cosine'; choose one of linear, cos"):
            rule("func_prime", "cosine")
