"""Predictors against the recursions, and measured against predicted variances."""

import jax
import numpy as np
import pytest

from jaxopt_lab.dynamics import sgd
from tests.dynamics.landscapes import tiny_network

LAW = {
    "learning_rate": 0.2,
    "curvature": np.asarray([0.0, 0.5, -0.3, 2.0]),
    "gradient_variance": np.asarray([1.0, 2.0, 0.5, 0.0]),
}


def recursion(steps, gamma, drift):
    eta, curvature, d = LAW.values()
    variance, mean = np.zeros(4), np.zeros(4)
    for _ in range(steps):
        source = d + gamma @ (variance + mean**2)
        variance = (1 - eta * curvature) ** 2 * variance + eta**2 * source
        mean = (1 - eta * curvature) * mean - eta * drift
    return variance


@pytest.mark.parametrize("kind", ["none", "diagonal", "matrix"])
@pytest.mark.parametrize("drift", [None, np.asarray([0.5, -1.0, 0.2, 0.0])])
def test_finite_time_variance_is_the_recursion(kind, drift):
    root = np.random.default_rng(0).random((4, 4))
    gamma = {"none": np.zeros((4, 4)), "diagonal": np.diag(root[0]), "matrix": root + root.T}[kind]
    given = {"none": None, "diagonal": root[0], "matrix": gamma}[kind]
    found = sgd.finite_time_variance(
        np.asarray([0, 1, 9]), **LAW, curvature_variance=given, drift=drift
    )
    slope = np.zeros(4) if drift is None else drift
    for row, steps in zip(found, (0, 1, 9), strict=True):
        np.testing.assert_allclose(row, recursion(steps, gamma, slope), rtol=1e-12, atol=1e-300)
    single = sgd.finite_time_variance(9, **LAW, curvature_variance=given, drift=drift)
    np.testing.assert_allclose(single, found[-1], rtol=1e-14)


def test_the_proxy_is_the_late_limit_of_sharp_directions():
    law = {"learning_rate": 1e-3, "curvature": [1.0, 3.0], "gradient_variance": [2.0, 0.3]}
    late = sgd.finite_time_variance(100_000, **law)
    np.testing.assert_allclose(sgd.stationary_proxy(**law), late, rtol=2e-3)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"steps": -1}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"curvature": np.zeros(3)}, "expected one length"),
        ({"curvature_variance": np.zeros(3)}, r"curvature_variance: got shape \(3,\)"),
    ],
)
def test_predictions_that_cannot_be(changes, named):
    arguments = {**LAW, "steps": 3, **changes}
    with pytest.raises(ValueError, match=named):
        sgd.finite_time_variance(arguments.pop("steps"), **arguments)


def test_perfect_and_scaled_predictions():
    m = np.exp(np.random.default_rng(0).standard_normal(60))
    found = sgd.compare(m, m)
    assert np.isclose(found.log_correlation, 1) and found.relative_error == 0
    assert found.p_value == 1 / 201
    scaled = sgd.compare(m, 4 * m)
    assert np.isclose(scaled.best_scalar, 0.25) and np.isclose(scaled.median_ratio, 0.25)
    assert np.isclose(scaled.relative_error, 3) and scaled.held_out_relative_error < 1e-12
    assert scaled.log_scatter < 1e-12
    # What spreads the ratios is seen whatever spreads the variances.
    ratios = np.tile([0.5, 2.0], 30)
    assert np.isclose(sgd.compare(m * ratios, m).log_scatter, np.log(2))


def test_unrelated_predictions_are_not_significant():
    draws = np.random.default_rng(1)
    found = sgd.compare(*np.exp(draws.standard_normal((2, 60))))
    assert abs(found.log_correlation) < 0.4 and found.p_value > 0.05
    assert found.held_out_relative_error > 0.3


def test_directions_without_noise_are_counted_not_compared():
    m = np.asarray([1.0, 2.0, 3.0, 4.0, 0.0, 1e-5])
    p = np.asarray([1.0, 2.0, 3.0, 4.0, 1e-9, 0.0])
    found = sgd.compare(m, p)
    assert (found.directions, found.excluded) == (4, 2)
    assert np.isclose(found.log_correlation, 1)
    # The released code adds a constant instead, for which the zeros count.
    assert sgd.compare(m[:4], p[:4][::-1], offset=1e-12).log_correlation < 0
    with pytest.raises(ValueError, match="got 2 directions"):
        sgd.compare(m[3:5].repeat(2), p[3:5].repeat(2))


def test_late_slope_is_the_fit_of_the_last_third():
    steps = np.arange(10, 130, 10)
    curves = np.stack([2.0 * steps, np.where(steps > 80, -1.0 * steps, 1e3)], axis=1)
    np.testing.assert_allclose(sgd.late_slope(steps, curves), [2, -1], rtol=1e-12)
    draws = np.random.default_rng(0).random(12)
    wanted = np.polyfit(steps[-4:], draws[-4:], 1)[0]
    assert np.isclose(sgd.late_slope(steps, draws), wanted)
    with pytest.raises(ValueError, match="at least 6"):
        sgd.late_slope(steps[:5], draws[:5])


@pytest.fixture(scope="module")
def measured():
    """A trained network, its noise, and the spread around it."""
    system = tiny_network(samples=200)
    point = sgd.reference_point(
        jax.random.key(0), system, sgd_steps=200, sgd_rate=0.3, batch_size=8, gd_steps=3000,
        gd_rate=0.3, records=1,
    )  # fmt: skip
    basis = sgd.eigenbasis(sgd.mean_hessian(system.loss, point.params, system.data))
    noise = sgd.noise_statistics(
        system.loss, point.params, system.data, directions=basis.directions, batch_size=8,
        curvature="all",
    )  # fmt: skip
    ensemble = sgd.run_ensemble(
        jax.random.key(1), system.loss, point.params, system.data, directions=basis.directions,
        learning_rate=0.01, batch_size=8, steps=200, replicas=400, record_every=20,
    )  # fmt: skip
    return basis, noise, ensemble


def test_the_finite_time_prediction_beats_the_proxy(measured):
    basis, noise, ensemble = measured
    found = sgd.summarise(ensemble, basis.eigenvalues, noise, learning_rate=0.01)
    finite_time, stationary = found.comparisons["P2, all"], found.comparisons["P1, all"]
    assert finite_time.log_correlation > 0.995 > stationary.log_correlation + 0.01
    assert 0.8 < finite_time.median_ratio < 1.25 < 1 / stationary.median_ratio
    assert np.nanmedian(found.flat_growth) == pytest.approx(1, abs=0.15)
    # A softmax does not see a shift of all logits: three weights and a bias.
    assert np.sum(~found.noisy) == 4


def test_the_summary_as_a_table(measured):
    basis, noise, ensemble = measured
    found = sgd.summarise(
        ensemble, basis.eigenvalues, noise, learning_rate=0.01, with_curvature_noise=True,
        with_drift=True,
    )  # fmt: skip
    table = sgd.summary_table(found)
    assert "P2, sharp" in table and "diffusive" in table and "4 directions without noise" in table
    assert found.regimes.shape == (23,) and found.finite_time.shape == (23,)
    with pytest.raises(ValueError, match="shapes"):
        sgd.summarise(ensemble, basis.eigenvalues[1:], noise, learning_rate=0.01)
    with pytest.raises(ValueError, match="with_curvature_noise"):
        sgd.summarise(
            ensemble, basis.eigenvalues, noise._replace(curvature_variance=None),
            learning_rate=0.01, with_curvature_noise=True,
        )  # fmt: skip
