import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab.dynamics.loop.autonomy import fit_line, fit_pieces

STEP = np.arange(0.0, 1400.0, 10.0)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def noise(seed, scale=0.2):
    return scale * np.asarray(jax.random.normal(jax.random.key(seed), STEP.shape))


def test_outliers_do_not_move_the_line():
    value = 1.0 - 7e-4 * STEP + noise(0, 0.05)
    spoiled = value.copy()
    spoiled[::9] += 30.0
    fit, clean = fit_line(STEP, spoiled), fit_line(STEP, value)
    ordinary = np.polyfit(STEP, spoiled, 1)[1]
    assert abs(float(fit.intercept) - 1.0) < 0.05 < abs(ordinary - 1.0)
    assert float(fit.slope) == pytest.approx(float(clean.slope), abs=5e-5)


def test_the_fit_minimises_hubers_loss():
    value = 0.3 + 2e-3 * STEP + noise(1) * (1 + 5 * (STEP % 70 == 0))
    fit = fit_line(STEP, value)
    rest = value - np.asarray(fit.fitted)
    scale = 1.4826 * np.median(np.abs(rest))
    influence = np.clip(rest / scale, -1.35, 1.35)
    np.testing.assert_allclose([influence.sum(), (influence * STEP / 1400).sum()], 0, atol=1e-6)
    np.testing.assert_allclose(fit.fitted, fit.intercept + fit.slope * STEP, atol=1e-12)
    assert np.isnan(fit.knot) and fit.slope_after == fit.slope


def test_gaps_have_no_weight():
    value = 0.3 + 2e-3 * STEP + noise(2)
    gaps = np.arange(len(STEP)) % 3 == 0
    holed = np.where(gaps, -np.inf, value)
    fit, without = fit_line(STEP, holed), fit_line(STEP[~gaps], value[~gaps])
    for name in ("intercept", "slope", "r2", "breusch_pagan_p"):
        assert float(getattr(fit, name)) == pytest.approx(float(getattr(without, name)), rel=1e-6)


def test_r2_tells_a_power_from_a_line():
    assert float(fit_line(STEP, 0.5 * STEP).r2) == pytest.approx(1.0)
    assert float(fit_line(STEP[1:], np.log(STEP[1:])).r2) < 0.9
    assert float(fit_line(STEP, np.ones_like(STEP)).r2) == 1.0


def test_two_pieces_meet_at_the_knot():
    true = 1.0 + 5e-3 * np.minimum(STEP, 600.0) + 1e-3 * np.maximum(STEP - 600.0, 0.0)
    value = true + noise(3, 0.05)
    given = fit_pieces(STEP, value, knot=600.0)
    searched = fit_pieces(STEP, value)
    for fit in (given, searched):
        assert float(fit.slope) == pytest.approx(5e-3, rel=0.05)
        assert float(fit.slope_after) == pytest.approx(1e-3, rel=0.2)
        assert float(fit.r2) > 0.99 > float(fit_line(STEP, value).r2)
    assert float(searched.knot) == pytest.approx(600.0, abs=40.0)
    np.testing.assert_allclose(given.fitted, true, atol=0.05)


def test_breusch_pagan_sees_heteroscedasticity():
    quiet = [float(fit_line(STEP, noise(seed)).breusch_pagan_p) for seed in range(10, 30)]
    growing = float(fit_line(STEP, noise(4) * (0.1 + STEP / 500)).breusch_pagan_p)
    assert growing < 1e-4
    assert np.mean(np.array(quiet) < 0.1) < 0.4 and max(quiet) > 0.5


def test_breusch_pagan_is_koenkers_statistic():
    value = noise(5) * (1 + STEP / 2000)
    fit = fit_line(STEP, value)
    squares = (value - np.asarray(fit.fitted)) ** 2
    r2 = np.corrcoef(STEP, squares)[0, 1] ** 2
    wanted = jax.scipy.stats.chi2.sf(len(STEP) * r2, 1)
    assert float(fit.breusch_pagan_p) == pytest.approx(float(wanted), rel=1e-6)


def test_fits_run_under_vmap_and_in_float32():
    values = jnp.stack([0.1 * STEP, 0.2 * STEP]).astype(jnp.float32)
    slopes = jax.vmap(lambda v: fit_line(jnp.asarray(STEP, jnp.float32), v).slope)(values)
    np.testing.assert_allclose(slopes, [0.1, 0.2], rtol=1e-4)
    assert slopes.dtype == jnp.float32


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fit_line([0.0, 1.0], [0.0, 1.0]), "at least 3 times"),
        (lambda: fit_line(STEP, STEP[1:]), "got shapes"),
        (lambda: fit_pieces(STEP, STEP, knot=5000.0), "knot: got 5000.0"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
