"""The closed forms against the equations they solve, and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_lab.dynamics.loop import mean_field as mf
from jaxopt_lab.dynamics.loop import mean_field_window as mw


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("rule", ["mae", "var"])
@pytest.mark.parametrize("adherence", [0.0, 0.6266570686577502, 0.9, 1.2533141373155001, 3.0])
def test_sampling_solves_its_equations(rule, adherence):
    # m' = s c m - m, V' = s^2 m^2 - V under "mae"; m' = c sqrt(s V) - m, V' = s V - V under "var".
    # The second adherence is where the denominator 2 a + 1 vanishes, the fourth the critical one.
    def scale(tau):
        return mf.sampling_scale(tau, adherence=adherence, rule=rule, mae=0.7, variance=1.1)

    tau = jnp.array([0.0, 0.3, 2.5])
    value = scale(tau)
    slope = jax.vmap(jax.jacfwd(scale))(tau)
    if rule == "mae":
        noise_mae = adherence * mf.MEAN_ABSOLUTE_NORMAL * value.mae
        noise_variance = (adherence * value.mae) ** 2
    else:
        noise_mae = mf.MEAN_ABSOLUTE_NORMAL * jnp.sqrt(adherence * value.variance)
        noise_variance = adherence * value.variance
    np.testing.assert_allclose(slope.mae, noise_mae - value.mae, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(
        slope.variance, noise_variance - value.variance, rtol=1e-10, atol=1e-12
    )
    assert (value.mae[0], value.variance[0]) == (0.7, pytest.approx(1.1))


def test_published_sampling_numbers():
    # Linear data, (p, s) = (1, 3), t = 10000 of N = 2000.
    # The published values start from a measured scale, half a percent above one.
    assert mf.sampling_scale(5.0, adherence=3.0, rule="mae").mae == pytest.approx(852, rel=0.01)
    deviation = np.sqrt(mf.sampling_scale(5.0, adherence=3.0, rule="var").variance)
    assert deviation == pytest.approx(147.2, rel=0.01)
    slope = mf.sampling_slope(usage=1.0, adherence=3.0, items=2000, rule="mae")
    assert float(slope) == pytest.approx(-6.97e-4, abs=1e-6)


def test_window_recursion_is_the_recursion():
    usage, gain, window, start = 0.7, 1.6, 7, 2.0
    path = np.asarray(mw.window_scale(40, window=window, usage=usage, gain=gain, start=start))

    def label(u):
        return start if u < 0 else (1 - usage) * start + usage * gain * path[u]

    for t in range(40):
        step = (label(t) - label(t - window)) / window
        assert path[t + 1] - path[t] == pytest.approx(step, abs=1e-13)


@given(p=st.floats(0.0, 1.0), g=st.floats(0.0, 3.0))
def test_window_forms_agree(p, g):
    # Integral against closed form on the first pass; recursion within O(1/W) of the integral.
    integral, recursion = (
        mw.window_scale(1000, window=500, usage=p, gain=g, form=form)
        for form in ("integral", "recursion")
    )
    first = mw.window_first_pass(np.arange(501), window=500, usage=p, gain=g)
    np.testing.assert_allclose(integral[:501], first, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(recursion, integral, rtol=0.02, atol=1e-3)


def test_published_window_numbers():
    mae = mw.window_scale(1400, window=600, usage=1.0, gain=mf.gain(3.0, "mae"))
    assert mae[-1] * mf.MEAN_ABSOLUTE_NORMAL == pytest.approx(88.5, rel=0.015)
    variance = mw.window_scale(1400, window=600, usage=1.0, gain=3.0)
    assert variance[-1] == pytest.approx(580.5, rel=0.01)


@pytest.mark.parametrize("usage, gain", [(0.6, 0.5), (0.5, 1.4), (1.0, 1.0), (0.2, 0.0)])
def test_window_goes_to_its_stationary_value(usage, gain):
    path = mw.window_scale(4000, window=100, usage=usage, gain=gain, start=3.0)
    wanted = mw.window_stationary(usage=usage, gain=gain, start=3.0)
    np.testing.assert_allclose(path[-1], wanted, rtol=1e-6)


@pytest.mark.parametrize("usage, gain", [(0.6, 0.5), (1.0, 2.4), (0.9, 2.0), (1.0, 0.4)])
def test_window_growth_rate_is_that_of_the_path(usage, gain):
    path = mw.window_scale(5000, window=500, usage=usage, gain=gain, form="integral")
    stationary = mw.window_stationary(usage=usage, gain=gain)
    rest = np.asarray(path - (stationary if usage * gain < 1 else 0.0))
    times = (1500, 2000) if usage * gain < 1 else (4000, 5000)
    measured = np.log(rest[times[1]] / rest[times[0]]) / (times[1] - times[0])
    rate = mw.window_growth_rate(usage=usage, gain=gain, window=500)
    assert float(rate) == pytest.approx(measured, rel=0.02)


@given(g=st.floats(1e-6, 50.0))
def test_growth_rate_solves_its_equation(g):
    z = float(mw.window_growth_rate(gain=g, window=1))
    assert z == pytest.approx(g * -np.expm1(-z), abs=1e-9 * max(1.0, 1.0 / g))
    assert np.sign(z) == np.sign(round(g - 1.0, 12))


def test_without_feedback_the_transient_ends_with_the_first_pass():
    assert float(mw.window_growth_rate(gain=0.0, window=5)) == -np.inf


@pytest.mark.parametrize("rule, wanted", [("mae", np.sqrt(np.pi / 2)), ("var", 1.0)])
def test_critical_adherence_is_where_the_scale_turns(rule, wanted):
    for setup in ("sampling", "window"):
        critical = mf.critical_adherence(rule, setup=setup, usage=0.4)
        assert critical == pytest.approx(wanted)
        around = critical + np.array([-0.01, 0.0, 0.01])
        end = mf.relative_scale(300, setup=setup, size=100, usage=0.4, adherence=around, rule=rule)[
            -1
        ]
        assert end[0] < 1.0 < end[2] and end[1] == pytest.approx(1.0)


def test_divergence_in_the_window_depends_on_the_usage():
    critical = mf.critical_adherence("var", setup="window", usage=0.4, kind="divergence")
    assert critical == pytest.approx(2.5)
    path = mw.window_scale(6000, window=50, usage=0.4, gain=np.array([2.3, 2.7]))
    assert path[-1, 0] == pytest.approx(0.6 / (1 - 0.92), rel=0.01) and path[-1, 1] > 100
    assert mf.critical_adherence("mae", setup="sampling", usage=0.0) == np.inf


def test_obedient_mass():
    t = np.array([0, 300, 600, 900])
    window = mf.obedient_mass(t, setup="window", size=600, initial=0.4)
    np.testing.assert_allclose(window, [0.4, 0.7, 1.0, 1.0])
    sampling = mf.obedient_mass(t, setup="sampling", size=600, initial=0.4, usage=0.5)
    np.testing.assert_allclose(sampling, 1 - 0.6 * np.exp(-0.5 * t / 600))


def test_relative_scale_is_a_length_under_both_rules():
    common = dict(size=50, usage=np.array([0.5, 1.0]), adherence=2.0)
    for setup in ("sampling", "window"):
        path = mf.relative_scale(100, setup=setup, rule="var", **common)
        assert path.shape == (101, 2) and path.dtype == jnp.float64
        if setup == "window":
            square = mw.window_scale(100, window=50, usage=common["usage"], gain=2.0)
        else:
            tau = np.arange(101)[:, None] * common["usage"] / 50
            square = mf.sampling_scale(tau, adherence=2.0, rule="var").variance
        np.testing.assert_allclose(path**2, square, rtol=1e-12)


@pytest.mark.parametrize("setup", ["sampling", "window"])
def test_relative_deviation_is_that_of_a_simulated_mixture(setup):
    # Items as (scale of their label, age): variances without any sampling error.
    usage, adherence, size, steps = 0.6, 1.7, 40, 100
    common = dict(setup=setup, size=size, usage=usage, adherence=adherence, rule="mae")
    mae = mf.MEAN_ABSOLUTE_NORMAL * np.asarray(mf.relative_scale(steps, **common))
    labels = (1 - usage) + usage * (adherence * mae[:-1]) ** 2
    variance = [1.0]
    for t in range(1, steps + 1):
        if setup == "window":
            entered = labels[max(0, t - size) : t]
            variance.append((entered.sum() + size - len(entered)) / size)
        else:
            new = (adherence * mae[t - 1 : t + 1]).mean() ** 2
            variance.append(variance[-1] + usage / size * (new - variance[-1]))
    path = mf.relative_deviation(steps, **common)
    np.testing.assert_allclose(path, np.sqrt(variance), rtol=1e-12 if setup == "window" else 0.02)


def test_inputs_decide_the_precision():
    one = jnp.float32(1.0)
    assert mw.window_scale(3, window=2, usage=one, gain=one, start=one).dtype == jnp.float32
    assert mw.window_scale(3, window=2, usage=1, gain=1).dtype == jnp.float64


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: mf.gain(1.0, "mse"), "rule: got 'mse'"),
        (lambda: mf.critical_adherence("mae", setup="windows"), "setup: got 'windows'"),
        (lambda: mf.critical_adherence("mae", setup="window", usage=1.2), "usage: got 1.2"),
        (lambda: mf.critical_adherence("mae", setup="window", kind="end"), "kind: got 'end'"),
        (lambda: mw.window_scale(-1, window=3, usage=1.0, gain=1.0), "steps: got -1"),
        (lambda: mw.window_scale(3, window=0, usage=1.0, gain=1.0), "window: got 0"),
        (lambda: mw.window_scale(3, window=3, usage=1.0, gain=1.0, form="x"), "form: got 'x'"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
