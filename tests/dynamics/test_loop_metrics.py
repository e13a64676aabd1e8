"""Statistics of residuals against NumPy and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxopt_lab.dynamics.loop import metrics

# name -> residuals of different shapes of distribution and sides of zero.
SAMPLES = {
    "normal": np.random.default_rng(0).normal(0.3, 2.0, 400),
    "heavy": np.random.default_rng(1).standard_t(3, 120),
    "mixture": np.random.default_rng(2).normal(size=400) * np.repeat([1e-6, 1.0], 200),
    "positive": np.random.default_rng(3).uniform(0.1, 1.0, 50),
    "negative": -np.random.default_rng(4).uniform(0.1, 1.0, 50),
    "last edge": np.append(-np.random.default_rng(5).uniform(0.0, 1.0, 50), 1e-9),
    "ties": np.repeat([-1.0, -0.5, 0.0, 0.5, 1.0], (4, 4, 5, 3, 2)),
    "few": np.random.default_rng(6).normal(size=9),
}


@pytest.fixture(params=SAMPLES)
def residuals(request):
    return SAMPLES[request.param]


def evaluate(function, residuals):
    with jax.enable_x64(True):
        return jax.device_get(function(jnp.asarray(residuals)))


@pytest.mark.parametrize("method", ["left", "centre"])
def test_density_is_the_interpolated_histogram(residuals, method):
    got = evaluate(lambda e: metrics.density_at_zero(e, method=method), residuals)
    heights, edges = np.histogram(residuals, bins=200, density=True)
    points = edges[:-1] if method == "left" else (edges[:-1] + edges[1:]) / 2
    np.testing.assert_allclose(got, np.interp(0.0, points, heights, left=0, right=0), rtol=1e-10)


def test_kernel_density(residuals):
    got = evaluate(lambda e: metrics.density_at_zero(e, method="kernel"), residuals)
    np.testing.assert_allclose(got, scipy.stats.gaussian_kde(residuals)(0.0)[0], rtol=1e-10)


def test_normality_is_the_omnibus_test(residuals):
    got = evaluate(metrics.normality, residuals)
    np.testing.assert_allclose(
        got, scipy.stats.normaltest(residuals).pvalue, rtol=1e-9, atol=1e-300
    )


def test_no_skewness_has_no_score():
    symmetric = np.repeat([-1.0, -0.5, 0.0, 0.5, 1.0], 4)
    score = scipy.stats.kurtosistest(symmetric).statistic
    wanted = scipy.stats.chi2.sf(score**2, 2)
    np.testing.assert_allclose(evaluate(metrics.normality, symmetric), wanted, rtol=1e-9)


def test_deviation_error_mass_and_moments(residuals):
    got = evaluate(lambda e: metrics.statistics(e, kappas=(0.5, 1.0)), residuals)
    np.testing.assert_allclose(got.dev, np.std(residuals), rtol=1e-12)
    np.testing.assert_allclose(got.mae, np.abs(residuals).mean(), rtol=1e-12)
    below = lambda kappa: np.mean(residuals <= kappa)  # noqa: E731
    np.testing.assert_allclose(got.mass, [below(k) - below(-k) for k in (0.5, 1.0)], atol=1e-15)
    wanted = [np.mean(residuals**k) for k in range(1, 7)]
    np.testing.assert_allclose(got.moments, wanted, rtol=1e-9, atol=1e-16)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 8.5])
def test_sum_of_moments_beyond_the_floating_range(residuals, scale):
    residuals = residuals * scale
    got = evaluate(metrics.log_moment_sum, residuals)
    # Extended precision reaches 10^4932.
    wide = residuals.astype(np.longdouble)
    wanted = np.log(sum(abs(np.mean(wide**k)) for k in range(1, 301)))
    np.testing.assert_allclose(got, float(wanted), rtol=1e-9, atol=1e-9)


def test_equal_residuals():
    constant = evaluate(metrics.statistics, np.full(20, 0.25))
    assert constant.dev == 0 and np.isnan(constant.normality)
    heights, edges = np.histogram(np.full(20, 0.25), bins=200, density=True)
    wanted = np.interp(0.0, edges[:-1], heights, left=0, right=0)
    assert constant.density_at_zero == wanted
    assert evaluate(metrics.log_moment_sum, np.zeros(20)) == -np.inf


def test_dtype_follows_the_residuals():
    for value in jax.tree.leaves(metrics.statistics(jnp.linspace(-1, 1, 30, dtype=jnp.float32))):
        assert value.dtype == jnp.float32


def test_unknown_density():
    with pytest.raises(ValueError, match="method is 'middle'; one of left, centre, kernel"):
        metrics.density_at_zero(jnp.ones(3), method="middle")  # pyright: ignore[reportArgumentType]
