"""Closed forms against recursions, limits and published numbers; regimes."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_lab.dynamics import sgd


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):
        yield


@jax.jit
def recursion_and_closed_forms(numbers, drift):
    """Pairs of paths, each of shape (steps + 1, cases)."""
    steps = jnp.arange(101)[:, None]
    pairs = [
        (
            sgd.direction_moments(**numbers, steps=100, truncated=truncated).variance,
            sgd.variance_at(steps, **numbers, truncated=truncated),
        )
        for truncated in (False, True)
    ]
    path = sgd.direction_moments(**numbers, drift=drift, steps=100)
    shared = {name: numbers[name] for name in ("learning_rate", "curvature", "mean")}
    return *pairs, (path.mean, sgd.mean_at(steps, **shared, drift=drift))


@given(st.integers(0, 2**32 - 1))
def test_closed_form_is_the_recursion(seed):
    draw = np.random.default_rng(seed)

    def some_zeros(high):
        return draw.uniform(0, high, 16) * (draw.uniform(size=16) > 0.3)

    numbers = {
        "learning_rate": draw.uniform(0.01, 1, 16),
        "curvature": draw.uniform(-0.5, 2.5, 16),
        "gradient_variance": some_zeros(3),
        "curvature_variance": some_zeros(3),
        "variance": some_zeros(3),
        "mean": some_zeros(2),
    }
    # This one lands on the critical point in one step.
    numbers["curvature"][0] = 1 / numbers["learning_rate"][0]
    pairs = recursion_and_closed_forms(numbers, some_zeros(1))
    for i, (path, closed) in enumerate(pairs):
        # Terms of alternating sign, which only the first pair lacks, cancel; and near 0 the growth
        # has fewer digits than its excess, so that high powers are right on the scale of the first.
        scale = path if i == 0 else jax.lax.cummax(jnp.abs(path))
        tolerance = 1e-12 * scale + 1e-15 * jnp.abs(path[:2]).max(0) + 1e-300
        np.testing.assert_array_less(jnp.abs(closed - path), tolerance)


@given(
    st.one_of(st.sampled_from([0.0, -1.0, -2.0, 1e-300, -1e-17]), st.floats(-2.5, 0.1)),
    st.integers(0, 40),
)
def test_geometric_sum_against_exact_fractions(excess, steps):
    if 0 < abs(excess) < 1e-12:
        steps *= 1000
    growth = 1 + Fraction(excess)
    if abs(excess) < 1e-12:
        total = steps + Fraction(steps * (steps - 1), 2) * Fraction(excess)
    else:
        total = sum((growth**k for k in range(steps)), Fraction(0))
    # Where the alternating sum cancels, the error is that of its largest term.
    size = float(max(abs(total), abs(growth) ** max(steps - 1, 0) if excess < -1 else 0))
    assert float(sgd.geometric_sum(excess, steps)) == pytest.approx(
        float(total), rel=1e-13, abs=1e-13 * size
    )


def test_flat_direction_without_curvature_noise_is_linear():
    steps = jnp.array([0, 1, 7, 1_000_000])
    got = sgd.variance_at(steps, learning_rate=0.5, curvature=0.0, gradient_variance=3.0)
    assert (got == 0.25 * 3.0 * steps).all()
    assert float(2 * sgd.diffusion_coefficient(0.5, 3.0) * 0.5 * 7) == 0.25 * 3 * 7


def test_nearly_flat_direction_keeps_its_digits():
    # 1 - (1 - eta lambda)^2 in float64 would have four digits here.
    steps = 1000.0
    got = sgd.variance_at(steps, learning_rate=0.1, curvature=1e-12, gradient_variance=1.0)
    assert float(got) == pytest.approx(0.01 * steps * (1 - 2e-13 * (steps - 1) / 2), rel=1e-15)


def test_flat_direction_with_curvature_noise_grows_exponentially():
    steps, gamma, d = jnp.arange(2000), 0.8, 0.3
    got = sgd.variance_at(
        steps, learning_rate=0.1, curvature=0.0, gradient_variance=d, curvature_variance=gamma
    )
    np.testing.assert_allclose(got, d / gamma * ((1 + 0.01 * gamma) ** steps - 1), rtol=1e-11)
    assert not sgd.is_stable(0.1, 0.0, gamma)


@given(st.floats(0.01, 1.0), st.floats(0.05, 1.9), st.floats(0.2, 3.0))
def test_the_bound_is_where_growth_is_one_and_the_stationary_variance_ends(rate, curvature, d):
    for truncated in (False, True):
        bound = float(sgd.stability_bound(rate, curvature, truncated=truncated))
        assert abs(float(sgd.growth_excess(rate, curvature, bound, truncated=truncated))) < 1e-14
        for gamma, stable in ((0.99 * bound, True), (1.01 * bound, False)):
            options = {"truncated": truncated}
            assert sgd.is_stable(rate, curvature, gamma, **options) == stable
            limit = sgd.stationary_variance(
                learning_rate=rate,
                curvature=curvature,
                gradient_variance=d,
                curvature_variance=gamma,
                **options,
            )
            assert bool(jnp.isfinite(limit)) == stable and limit > 0


def test_variance_reaches_the_stationary_one():
    numbers = {"learning_rate": 0.3, "curvature": 1.0, "curvature_variance": 2.0}
    numbers["gradient_variance"] = 0.2
    limit = sgd.stationary_variance(**numbers)
    np.testing.assert_allclose(sgd.variance_at(200, **numbers), limit, rtol=1e-14)
    np.testing.assert_allclose(sgd.variance_at(17, **numbers, variance=limit), limit, rtol=1e-13)


def test_saddles_grow_at_the_rate_of_log_rho():
    numbers = {"learning_rate": 0.05, "curvature": -0.3, "curvature_variance": 0.1}
    late = sgd.variance_at(jnp.array([900, 901]), **numbers, gradient_variance=0.5)
    rate = jnp.log1p(sgd.growth_excess(*numbers.values()))
    np.testing.assert_allclose(jnp.log(late[1] / late[0]), rate, rtol=1e-9)
    assert rate > 0


def test_small_rates_give_the_ornstein_uhlenbeck_variance():
    rates = jnp.array([1e-2, 1e-4, 1e-6])
    got = sgd.stationary_variance(
        learning_rate=rates, curvature=0.7, gradient_variance=2.0, curvature_variance=1.5
    )
    np.testing.assert_array_less(jnp.abs(got / rates * 0.7 - 1), 3 * rates)


def test_at_unit_step_the_memory_is_one_step():
    numbers = {"learning_rate": 0.5, "curvature": 2.0, "gradient_variance": 0.3}
    assert len(set(sgd.variance_at(jnp.arange(1, 9), **numbers, variance=5.0).tolist())) == 1
    gamma = 0.2
    limit = sgd.stationary_variance(**numbers, curvature_variance=gamma)
    assert float(limit) == pytest.approx(0.25 * 0.3 / (1 - 0.25 * gamma), rel=1e-14)


def test_ratio_to_langevin_diverges_at_the_edge():
    rates = jnp.array([0.1, 1.0, 1.999])
    sgd_limit, langevin = (
        sgd.stationary_variance(
            learning_rate=rates, curvature=1.0, gradient_variance=1.0, truncated=truncated
        )
        for truncated in (False, True)
    )
    np.testing.assert_allclose(sgd_limit / langevin, 2 / (2 - rates), rtol=1e-12)


def test_truncated_recursion_can_diverge_inside_its_bound():
    numbers = {"learning_rate": 1.9, "curvature": 1.0, "gradient_variance": 0.1}
    assert sgd.is_stable(1.9, 1.0, truncated=True)
    assert jnp.isfinite(sgd.stationary_variance(**numbers, truncated=True))
    path = sgd.variance_at(jnp.arange(40), **numbers, truncated=True)
    assert abs(path[-1]) > 1e15 and path[-1] * path[-2] < 0


def test_noise_that_tracks_curvature():
    curvature = jnp.array([1e-9, 0.01, 1.0, 3.0])
    got = sgd.proportional_noise_variance(
        50, learning_rate=0.3, curvature=curvature, noise_ratio=0.4
    )
    full = sgd.variance_at(
        50, learning_rate=0.3, curvature=curvature, gradient_variance=0.4 * curvature
    )
    np.testing.assert_allclose(got, full * (2 - 0.3 * curvature) / 2, rtol=1e-12)
    assert float(got[-1]) == pytest.approx(0.3 * 0.4 / 2)


def test_published_covariance_traces():
    # Experiment 17: ten directions, the standard Langevin trace and that of SGD.
    numbers = {"learning_rate": 0.15, "curvature": jnp.linspace(0.3, 3.0, 10)}
    traces = [
        float(sgd.stationary_variance(**numbers, gradient_variance=0.25, truncated=t).sum())
        for t in (True, False)
    ]
    assert traces == [pytest.approx(0.1831, abs=5e-5), pytest.approx(0.1992, abs=1e-4)]


def test_published_mismatch_region():
    # Experiment 27 on its grid; simulated variances had flagged 6 of the 7 points.
    rates, gammas = jnp.array([0.2, 0.6, 0.7, 0.8]), jnp.array([0.5, 1, 2, 2.4, 3, 5, 8])
    table = sgd.phase_table(rates, gammas)
    mismatch = sgd.in_mismatch_region(rates[:, None], 1.0, gammas)
    assert (mismatch == (table.langevin_stable & (table.growth > 1))).all()
    path = sgd.direction_moments(
        learning_rate=rates[:, None],
        steps=500,
        curvature=1.0,
        gradient_variance=0.2,
        curvature_variance=gammas,
    ).variance
    growing = path[-1] > 1.01 * path[-2]
    assert growing[mismatch].all() and not growing[table.stable].any()
    # The tame-looking one: the typical path contracts while the variance explodes.
    assert 3e5 < float(path[-1, 1, 3]) < 5e5
    assert sgd.gaussian_lyapunov(0.6, 1.0, 2.4) < -0.5 < 0 < table.growth[1, 3] - 1


def test_published_drift_driven_spreading():
    # Experiment 29: diffusion alone .0072, with the drift 7.77, and with its feedback 8.36.
    numbers = {"learning_rate": 0.02, "gradient_variance": 0.02, "drift": 0.5}
    law = sgd.drift_spreading(jnp.array([450, 900]), **numbers, curvature_variance=0.8)
    full = sgd.direction_moments(**numbers, curvature_variance=0.8, curvature=0.0, steps=900)
    assert float(law[1]) == pytest.approx(7.77, abs=0.015)
    assert float(law[1]) == pytest.approx(0.02**2 * 0.02 * 900 + 7.776, rel=1e-9)
    assert float(full.variance[-1]) == pytest.approx(8.362, abs=5e-4)
    late = full.variance[300:]
    exponent = np.polyfit(np.log(np.arange(300, 901)), np.log(late), 1)[0]
    assert exponent == pytest.approx(3.04, abs=0.05)


def test_lyapunov_exponent():
    assert float(sgd.gaussian_lyapunov(0.1, 0.5)) == pytest.approx(float(jnp.log(0.95)))
    # E log |z| of a standard normal number.
    got = float(sgd.gaussian_lyapunov(1.0, 1.0, 1.0))
    assert got == pytest.approx(-(np.euler_gamma + np.log(2)) / 2, abs=1e-3)


def test_regimes_follow_the_thresholds():
    n = 1000
    for change, name in (
        (1.01, "unstable"),
        (0.99, "transitional"),
        (0.21, "transitional"),
        (0.19, "diffusive"),
        (-0.19, "diffusive"),
        (-0.21, "transitional"),
        (-3.99, "transitional"),
        (-4.01, "confined"),
    ):
        # The curvature with rho - 1 = change / n at this rate.
        curvature = (1 - np.sqrt(1 + change / n)) / 0.1
        code = sgd.regime_codes(n, learning_rate=0.1, curvature=curvature)
        assert sgd.regime_names(code) == [name]


def test_regimes_of_a_spectrum():
    codes = sgd.regime_codes(
        500,
        learning_rate=0.1,
        curvature=jnp.array([[1.0, 1e-6], [-0.5, 0.01]]),
        curvature_variance=jnp.array([[0.0, 0.0], [0.0, 3.0]]),
    )
    assert codes.shape == (2, 2)
    assert sgd.regime_names(codes) == ["confined", "diffusive", "unstable", "unstable"]
