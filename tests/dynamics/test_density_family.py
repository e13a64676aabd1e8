"""The theorems about scaling operators, evaluated by quadrature."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_lab.dynamics.loop import density_checks as checks
from jaxopt_lab.dynamics.loop import density_family as family

NORMAL, NORMAL_SUPPORT = family.normal_density(5.0), (-60.0, 60.0)
UNIFORM, UNIFORM_SUPPORT = family.uniform_density(2.5), (-2.5, 2.5)
SCALES = st.floats(0.02, 50.0)


def skewed(x):
    """Triangular density of mean 1/3 on [-1, 1]."""
    return np.where(np.abs(x) <= 1.0, (1.0 + x) / 2.0, 0.0)


def plane(x):
    """A density on the unit square around zero that is not a product."""
    inside = np.all(np.abs(x) <= 0.5, -1)
    return np.where(inside, 1.0 + 4.0 * x[..., 0] * x[..., 1], 0.0)


@given(psi=SCALES)
def test_scaling_operators_map_densities_to_densities(psi):
    for density, support in ((NORMAL, NORMAL_SUPPORT), (UNIFORM, UNIFORM_SUPPORT)):
        check = checks.check_transformation(density, psi, support=support)
        assert check.mass_error < 1e-12 and check.inverse_norm_error < 1e-12
        assert check.minimum >= 0.0
        assert check.round_trip_error <= 1e-12
    check = checks.check_transformation(plane, psi, support=(-0.5, 0.5), dimension=2)
    assert check.mass_error < 1e-12 and check.inverse_norm_error < 1e-12


def test_something_that_is_no_density_is_seen():
    check = checks.check_transformation(lambda x: 1.1 * NORMAL(x), 2.0, support=NORMAL_SUPPORT)
    assert check.mass_error == pytest.approx(0.1)
    check = checks.check_transformation(lambda x: x / 4, 2.0, support=(-2.0, 2.0))
    assert check.minimum < 0


def test_limits_of_the_family_of_the_paper():
    growing = checks.check_limit_set(
        NORMAL, [1, 10, 50, 100, 200, 300, 3000], support=NORMAL_SUPPORT
    )
    assert np.all(np.diff(growing.distance_to_delta) < 0)
    assert growing.distance_to_delta[-1] < 1e-5
    uniform = checks.check_limit_set(UNIFORM, [1, 5, 10, 15, 25, 40], support=UNIFORM_SUPPORT)
    assert np.all(np.diff(uniform.distance_to_delta) < 0)
    # phi(x) = 1 - x^2 + O(x^4) and the variance is (2.5 / 40)^2 / 3.
    assert uniform.distance_to_delta[-1] == pytest.approx((2.5 / 40) ** 2 / 3, rel=0.01)


@pytest.mark.parametrize("dimension", [1, 2])
def test_mass_that_escapes_is_invisible(dimension):
    density = UNIFORM if dimension == 1 else plane
    support = UNIFORM_SUPPORT if dimension == 1 else (-0.5, 0.5)
    check = checks.check_limit_set(density, [1.0, 0.1, 0.01], support=support, dimension=dimension)
    assert check.distance_to_zero[-1] < 0.03 and np.all(np.diff(check.distance_to_zero) < 0)


def test_envelopes():
    above = lambda x: 1.5 * NORMAL(x)  # noqa: E731
    check = checks.check_limit_set(NORMAL, [0.5, 2.0], support=NORMAL_SUPPORT, envelope=above)
    assert check.envelope_margin >= 0.0 and check.envelope_norm == pytest.approx(1.5)
    # A function of norm below one cannot be an envelope of densities.
    below = lambda x: 0.9 * NORMAL(x)  # noqa: E731
    check = checks.check_limit_set(NORMAL, [0.5, 2.0], support=NORMAL_SUPPORT, envelope=below)
    assert check.envelope_margin < 0.0 and check.envelope_norm < 1.0


@given(psi=SCALES)
def test_moments_scale_in_odd_and_even_orders(psi):
    check = checks.check_moments(skewed, [psi], support=(-1.0, 1.0), orders=8)
    assert check.scaling_error < 1e-12
    assert abs(check.envelope_margin) < 1e-9 * max(1.0, psi**-8)


@given(psi=st.floats(1.001, 50.0), q=st.sampled_from([1.0, 1.5, 2.0, 7.0, np.inf]))
def test_the_sum_of_moments_is_bounded(psi, q):
    unit = family.uniform_density(0.5)
    check = checks.check_moments(unit, [psi], support=(-0.5, 0.5), orders=40, q=q)
    assert check.margin > 0.0 and np.isfinite(check.bounds[0])
    k = np.arange(2, 41, 2)
    assert check.sums[0] == pytest.approx(np.sum((2 * psi) ** -k / (k + 1.0)))


def test_no_bound_without_growth_and_no_norm_below_one():
    check = checks.check_moments(UNIFORM, [1.0], support=UNIFORM_SUPPORT)
    assert check.bounds[0] == np.inf
    with pytest.raises(ValueError, match="q: got 0.5"):
        checks.check_moments(UNIFORM, [2.0], support=UNIFORM_SUPPORT, q=0.5)


@given(psi=SCALES)
def test_norms_of_the_operator(psi):
    for dimension, density, support in ((1, NORMAL, NORMAL_SUPPORT), (2, plane, (-0.5, 0.5))):
        check = checks.check_norms(
            density, [psi], support=support, q=[1.0, 2.0, 5.0, np.inf], dimension=dimension
        )
        assert check.norm_error < 1e-11
        assert check.margin > -1e-12
        assert check.kept[0] == pytest.approx(min(1.0, psi**dimension))
        if psi > 1.0:  # a positive loop contracts no norm
            assert np.all(check.operator_norms >= 1.0)
        else:  # mass that escapes makes every norm but the first shrink
            assert np.all(check.operator_norms[:, 1:] <= 1.0)


def test_autonomous_families_are_the_powers():
    power = checks.check_autonomy(lambda t: 0.98**t, 60, dimension=3)
    assert power.r2 == pytest.approx(1.0, abs=1e-12)
    assert power.slope == pytest.approx(3 * math.log(0.98))
    assert power.semigroup_error < 1e-12
    linear = checks.check_autonomy(lambda t: t, 60)
    assert linear.r2 < 0.9 and linear.semigroup_error > 1.0
    frozen = checks.check_autonomy(np.ones_like, 5)
    assert (frozen.r2, frozen.slope) == (1.0, pytest.approx(0.0))
    with pytest.raises(ValueError, match="steps: got 2"):
        checks.check_autonomy(np.ones_like, 2)


@pytest.mark.parametrize("psi", [0.98, 1.0, 40.0])
def test_statistics_of_the_family_have_closed_forms(psi):
    normal = family.family_statistics(NORMAL, psi, support=NORMAL_SUPPORT)
    deviation = 5.0 / psi
    assert normal.center == pytest.approx(1 / (deviation * math.sqrt(2 * math.pi)), rel=1e-12)
    assert normal.mass == pytest.approx(math.erf(0.5 / deviation / math.sqrt(2)), rel=1e-12)
    np.testing.assert_allclose(normal.moments, [deviation**2, 3 * deviation**4], rtol=1e-10)
    uniform = family.family_statistics(UNIFORM, psi, support=UNIFORM_SUPPORT, orders=(2, 3))
    half = 2.5 / psi
    assert uniform.mass == pytest.approx(min(1.0, 0.5 / half), rel=1e-12)
    np.testing.assert_allclose(uniform.moments, [half**2 / 3, 0.0], atol=1e-15)
    assert family.psi_from_center(normal.center, NORMAL(0.0)) == pytest.approx(psi)


def test_mass_far_from_zero():
    away = lambda x: np.where((x >= 2.0) & (x <= 3.0), 1.0, 0.0)  # noqa: E731
    assert family.family_statistics(away, 1.0, support=(2.0, 3.0)).mass == 0.0
    assert family.family_statistics(away, 5.0, support=(2.0, 3.0)).mass == pytest.approx(0.5)


def test_mass_and_moments_from_those_of_the_start():
    def distribution(x):
        return jax.scipy.stats.norm.cdf(jnp.asarray(x) / 5.0)

    for psi in (0.3, 20.0):
        numbers = family.family_statistics(NORMAL, psi, support=NORMAL_SUPPORT)
        mass = family.scaled_mass(distribution, psi, 0.5)
        assert mass == pytest.approx(numbers.mass, rel=1e-10)
        moments = family.scaled_moment(np.array([25.0, 1875.0]), psi, np.array([2, 4]))
        np.testing.assert_allclose(moments, numbers.moments, rtol=1e-10)


def test_densities_may_be_written_in_jax():
    check = checks.check_transformation(jax.scipy.stats.norm.pdf, 3.0, support=(-12.0, 12.0))
    assert check.mass_error < 1e-12  # float32 would leave 1e-7


@pytest.mark.parametrize("psi", [0.0, -1.0, np.inf, np.nan])
def test_bad_scales(psi):
    with pytest.raises(ValueError, match="psi"):
        family.scale_density(NORMAL, psi)


def test_bad_intervals():
    with pytest.raises(ValueError, match="low, high"):
        family.quadrature(1.0, 1.0)
