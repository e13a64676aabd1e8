"""Closed forms of the gap's rate: conditions, invariances and special cases, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab.core.dual_norms import DUAL_NORMS, dual_norm, matrix_norm
from jaxopt_lab.schedules.gap_rate import (
    Curvature,
    fit_curvature,
    gap_rate,
    peak_gap_of,
    relative_rate,
    warmup_kappa,
)

peaks = st.floats(1e-5, 1.0)
divisors = st.floats(1.0, 1e4)
initial_gaps = st.floats(0.05, 50.0)
shares = st.floats(0.005, 0.99)  # of the peak gap in the initial one
SHAPES = ((64, 32), (32, 32), (100, 16), (16, 100))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@given(peaks, divisors, initial_gaps, shares)
def test_fit_meets_its_three_conditions(peak_lr, div, initial, share):
    peak = share * initial
    curvature = fit_curvature(peak_lr, div, initial, peak)
    # The coefficients cancel in the denominator: what is left of the precision there.
    lost = 1 + div * initial * peak / (initial - peak) ** 2
    np.testing.assert_allclose(gap_rate(peak, curvature), peak_lr, rtol=1e-14 * lost)
    np.testing.assert_allclose(gap_rate(initial, curvature), peak_lr / div, rtol=1e-14 * lost)
    slope = jax.grad(lambda gap: relative_rate(gap, initial, peak, div))(peak)
    assert abs(slope) <= 1e-12
    assert relative_rate(peak, initial, peak, div) == 1.0
    np.testing.assert_allclose(relative_rate(initial, initial, peak, div), 1 / div, rtol=1e-12)
    if div > 1:
        np.testing.assert_allclose(peak_gap_of(curvature), peak, rtol=1e-12)


@given(peaks, divisors, initial_gaps, shares, st.floats(1e-6, 3.0))
def test_both_forms_agree_and_stay_below_the_peak(peak_lr, div, initial, share, at):
    peak, gap = share * initial, at * initial
    relative = relative_rate(gap, initial, peak, div)
    assert 0 < relative <= 1
    curvature = fit_curvature(peak_lr, div, initial, peak)
    terms = peak_lr * sum(abs(k) * gap**i for i, k in enumerate(curvature[:3]))
    np.testing.assert_allclose(
        gap_rate(gap, curvature), peak_lr * relative, rtol=1e-14 * (1 + terms * relative / gap)
    )


@given(divisors, initial_gaps, shares, st.floats(0.01, 2.0), st.floats(1e-3, 1e3))
def test_relative_rate_depends_on_shares_of_gaps_alone(div, initial, share, at, scale):
    gaps = np.array([at * initial, initial, share * initial])
    np.testing.assert_allclose(
        relative_rate(*(scale * gaps), div), relative_rate(*gaps, div), rtol=1e-10
    )


@given(peaks, st.floats(1e-3, 1e3), divisors, initial_gaps, shares)
def test_rate_scales_with_its_peak(peak_lr, scale, div, initial, share):
    a = fit_curvature(peak_lr, div, initial, share * initial)
    b = fit_curvature(scale * peak_lr, div, initial, share * initial)
    for small, large in zip(b[:3], a[:3], strict=True):
        np.testing.assert_allclose(scale * small, large, rtol=1e-9, atol=1e-12 / peak_lr)


@given(st.floats(1.001, 1e4), initial_gaps, st.floats(0.01, 0.95))
def test_rises_to_the_peak_and_falls_beyond(div, initial, share):
    peak = share * initial
    below = relative_rate(np.linspace(0, peak, 50)[1:], initial, peak, div)
    above = relative_rate(np.linspace(peak, initial, 50), initial, peak, div)
    assert np.all(np.diff(below) > 0) and np.all(np.diff(above) < 0)


def test_special_cases():
    gaps = np.array([0.1, 1.0, 7.0])
    flat = fit_curvature(1e-3, 1.0, 7.78, 2.0)
    assert (flat.k0, flat.k2 if hasattr(flat, "k2") else flat.k_rho) == (0.0, 0.0)
    np.testing.assert_allclose(flat.k1, 1e3)
    np.testing.assert_allclose(gap_rate(gaps, flat), 1e-3)
    np.testing.assert_allclose(gap_rate(gaps, Curvature(4.0, 0.0, 0.0)), gaps / 4)
    np.testing.assert_allclose(gap_rate(gaps, Curvature(0.0, 4.0, 0.0)), 0.25)


@given(st.floats(0.1, 10), st.floats(0, 10), st.floats(0.1, 10), st.floats(1.2, 6))
def test_peak_of_any_exponent(k0, k1, k_rho, rho):
    curvature = Curvature(k0, k1, k_rho, rho)
    peak = peak_gap_of(curvature)
    assert abs(jax.grad(gap_rate)(peak, curvature)) < 1e-12
    beside = gap_rate(peak * jnp.array([0.98, 1.02]), curvature)
    assert np.all(beside < gap_rate(peak, curvature))


def test_kappa_of_models():
    params = [jnp.zeros(shape) for shape in SHAPES] + [jnp.zeros(7)]
    assert [warmup_kappa(params, norm) for norm in DUAL_NORMS] == [96, 6272, 4]
    mixed = warmup_kappa(params, {"spectral": 0.5, "sign": 0.5})
    assert mixed == (96 + 6272) / 2
    stacked = {"w": jax.ShapeDtypeStruct((3, 8, 4), jnp.float32), "embedding": jnp.zeros((9, 4))}
    assert warmup_kappa(stacked) == 4  # three axes without a layout are no matrices
    layouts = {"w": MuonDimensionNumbers(1, 2), "embedding": None}
    assert warmup_kappa(stacked, "spectral", layouts) == 3 * 4 + 4
    with pytest.raises(ValueError, match="norm: got 'nuclear'"):
        warmup_kappa(params, "nuclear")


@pytest.mark.parametrize("pair", DUAL_NORMS)
def test_kappa_is_the_largest_dual_norm(pair):
    rng = np.random.default_rng(0)

    def ratio(matrices):
        dual = sum(float(dual_norm(x, pair)) for x in matrices)
        return dual / max(float(matrix_norm(x, pair)) for x in matrices)

    drawn = [jnp.asarray(rng.normal(size=shape)) for shape in SHAPES]
    kappa = warmup_kappa(drawn, pair)
    assert ratio(drawn) < kappa
    extreme = {
        "spectral": lambda x: (
            jnp.linalg.svd(x, full_matrices=False)[0] @ jnp.eye(*x.shape)[: min(x.shape)]
        ),
        "sign": jnp.sign,
        "frobenius": lambda x: x / jnp.linalg.norm(x),
    }[pair]
    np.testing.assert_allclose(ratio([extreme(x) for x in drawn]), kappa, rtol=1e-12)
