"""The warm-up as released: its search, objectives, first step."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_lab.parity.warmup import OBJECTIVES, official_warmup, quadrature_peak_gap
from jaxopt_lab.schedules import Curvature, adaptive_warmup
from tests.examples import examples
from tests.schedules.test_peak_gap import SIGMA, TABLE, grid_step, search
from tests.schedules.warmup_runs import NOISY, PARAMS, PEAK, STEPS, TARGET, run, scan

WITH_TARGET = ("func_prime", "func_prime_0xs", "double_prime")
# No search, so that rates can be compared bit for bit.
BY_HAND = Curvature(20.0, 5.0, 4.0)
by_hand = functools.partial(official_warmup, PEAK, STEPS, TARGET, 10.0, curvature=BY_HAND)


@pytest.mark.parametrize(("gap", "kappa", "div", "rates", "wanted"), [row[:5] for row in TABLE])
def test_the_published_luck(gap, kappa, div, rates, wanted):
    found = [quadrature_peak_gap(gap, kappa * SIGMA, div, rate) for rate in rates]
    np.testing.assert_allclose(found, wanted, atol=6e-4)


@examples(6)
@given(st.floats(1.0, 10.0), st.floats(1e-4, 0.1), st.floats(2.0, 200.0))
def test_agrees_with_the_accurate_search_for_wide_weights(gap, kappa_sigma, div):
    # Peak rate 1: the absolute tolerance then means what it says.
    with jax.enable_x64(True):
        exact = float(search(gap, kappa_sigma, div))
    official = quadrature_peak_gap(gap, kappa_sigma, div, 1.0)
    # Two neighbours may score equally to the official tolerance.
    assert abs(exact - official) < 1.01 * grid_step(gap)


def dense_score(objective, target, gap, kappa_sigma, div, d):
    """The objective by the trapezoidal rule, with derivatives by automatic differentiation."""
    c = gap * (div - 1) / (gap - d) ** 2

    def rate(x):
        return x / (x + c * (x - d) ** 2)

    def form(shape, low, high, a, b):
        def value(x):
            z = (x - low) / (high - low)
            return a + (b - a) * (z if shape == "linear" else (1 - jnp.cos(math.pi * z)) / 2)

        return value

    def mean(function, low, high):
        x = jnp.linspace(low, high, 4001)
        values = jnp.exp(-kappa_sigma / 2 * (x - d) ** 2) * jax.vmap(function)(x)
        return jnp.trapezoid(values, x) / (high - low)

    def mean_of_both(function, rise, fall):
        whole = [(rise, 0.0, d), (fall, d, gap)]
        return sum(
            mean(lambda x, f=f: function(rate(x) - f(x)), low, high) * (high - low) / gap
            for f, low, high in whole
        )

    def with_slopes(wanted):
        difference = lambda x: rate(x) - wanted(x)  # noqa: E731
        return lambda x: jnp.abs(difference(x)) + jnp.abs(jax.grad(difference)(x))

    def rise(shape):
        return form(shape, 0.0, d, 0.0, 1.0)

    def fall(shape):
        return form(shape, d, gap, 1.0, 1 / div)

    if objective == "linear_and_cos":
        return mean_of_both(jnp.square, rise("cos"), fall("linear"))
    if objective == "max_linear_and_cos":
        square = lambda f: lambda x: jnp.square(rate(x) - f(x))  # noqa: E731
        return mean(square(rise("cos")), 0.0, d) + mean(square(fall("linear")), d, gap)
    if objective == "linear_and_linear":
        return mean_of_both(jnp.abs, rise("linear"), fall("linear"))
    if objective == "integral_0_x0":
        return -mean(rate, 0.0, gap)
    if objective == "func_prime":
        return mean(with_slopes(fall(target)), d, gap)
    if objective == "func_prime_0xs":
        return mean(with_slopes(rise(target)), 0.0, d)
    bend = jax.grad(jax.grad(lambda x: rate(x) - fall(target)(x)))
    return mean(lambda x: jnp.abs(bend(x)), d, gap)


@pytest.mark.parametrize(
    ("objective", "target"),
    [(o, "linear") for o in OBJECTIVES] + [(o, "cos") for o in WITH_TARGET],
)
def test_objectives_against_a_dense_grid(objective, target):
    gap, kappa_sigma, div = 6.98, 0.004, 10.0
    candidates = np.linspace(0.01, gap - 0.01, 500)
    score = functools.partial(dense_score, objective, target, gap, kappa_sigma, div)
    with jax.enable_x64(True):
        scores = np.asarray(jax.jit(lambda ds: jax.lax.map(score, ds))(candidates))
    found = quadrature_peak_gap(gap, kappa_sigma, div, 1.0, objective, target)
    # A neighbour may score equally to the error of the trapezoidal rule.
    assert abs(candidates[np.argmin(scores)] - found) < 1.01 * grid_step(gap)


def test_official_rule_is_the_same_in_a_program():
    # Its integrals hang on denormal numbers, which XLA flushes to zero.
    sharpness = 123568128 * 1e-3
    tx = official_warmup(1e-3, STEPS, 3.5, kappa=123568128.0)
    with jax.enable_x64(True):
        _, states = run(tx, np.linspace(10.98, 9.0, STEPS))
    wanted = quadrature_peak_gap(10.98 - 3.5, sharpness, 100.0, 1e-3)
    np.testing.assert_array_equal(states.peak_gap, wanted)


@pytest.mark.parametrize("members", [None, 2])
def test_the_search_runs_only_where_it_is_needed(monkeypatch, members):
    calls = []

    def counted(*args):
        calls.append(args)
        return 1.0

    monkeypatch.setattr("jaxopt_lab.parity.warmup.quadrature_peak_gap", counted)
    # A number that no other test compiles for.
    tx = official_warmup(0.125, STEPS, TARGET, kappa=7.0)
    one = lambda losses: scan(tx, tx.init(PARAMS), losses)[1]  # noqa: E731
    losses = jnp.asarray(NOISY[:6], jnp.float32)
    if members is None:
        jax.block_until_ready(jax.jit(one)(losses))
        assert len(calls) == 1
    else:
        # The second run sees its first finite loss a step later: two searches of two members.
        together = jnp.stack([losses, losses.at[0].set(jnp.nan)])
        jax.block_until_ready(jax.jit(jax.vmap(one))(together))
        assert len(calls) == 4


def test_members_with_their_own_peak_rates():
    def peak_gap(rate):
        tx = official_warmup(rate, STEPS, TARGET, kappa=46848.0)
        return tx.update(PARAMS, tx.init(PARAMS), value=9.78)[1].peak_gap

    rates = jnp.array([1e-3, 1.0])
    wanted = [quadrature_peak_gap(7.78, 46.848, 100.0, float(rate)) for rate in rates]
    np.testing.assert_allclose(jax.jit(jax.vmap(peak_gap))(rates), wanted, rtol=1e-5)
    assert wanted[0] != wanted[1]


@pytest.mark.parametrize("gap", [-1.0, 0.0, 0.015])
def test_first_loss_at_the_target_decays_at_once(gap):
    rates, states = run(
        official_warmup(PEAK, STEPS, TARGET, kappa=1.0), np.full(STEPS, TARGET + gap)
    )
    assert np.isfinite(rates).all() and np.all(states.switch_step == 0)
    assert np.all(states.peak_gap == 0) and np.all(np.diff(rates[1:]) < 0)


def test_the_first_step_is_at_the_peak_and_nothing_ends_the_warm_up():
    stuck = np.linspace(80.0, 50.0, STEPS)
    rates, states = run(by_hand(), stuck)
    plain, _ = run(
        adaptive_warmup(PEAK, STEPS, TARGET, 10.0, curvature=BY_HAND, fallback_after=None), stuck
    )
    np.testing.assert_allclose([rates[0], plain[0]], [PEAK, PEAK / 10], rtol=1e-6)
    np.testing.assert_array_equal(rates[1:], plain[1:])
    assert states.switch_step[-1] == -1


def test_a_loss_may_set_the_rate_of_its_own_step():
    plain, _ = run(by_hand(official_first_step=False), NOISY)
    rates, states = run(by_hand(official_first_step=False, use_current_loss=True), NOISY)
    np.testing.assert_array_equal(rates, states.rate)
    switch = int(states.switch_step[-1])
    assert switch > 1
    np.testing.assert_array_equal(rates[:switch], plain[1 : switch + 1])
    assert rates[-1] == plain[-1]  # both decays end with the last step


def test_sigma_multiplies_kappa():
    tx = official_warmup(1.0, STEPS, TARGET, kappa=4.0, sigma=9e-3)
    found = tx.update(PARAMS, tx.init(PARAMS), value=8.98)[1].peak_gap
    np.testing.assert_allclose(found, quadrature_peak_gap(6.98, 0.036, 100.0, 1.0), rtol=1e-5)
    assert abs(found - search(6.98, 0.036, 100.0)) < 1.01 * grid_step(6.98)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "linear_and_linaer"}, "objective: got 'linear_and_linaer', wanted one of"),
        ({"target": "cosine"}, "target: got 'cosine', wanted one of linear, cos"),
        ({"sigma": -1.0}, "sigma: got -1.0"),
        ({"decay": "line"}, "decay: got 'line', wanted 'cosine' or a function"),
        ({"kappa": 0.0}, "kappa: got 0.0"),
        ({"use_current_loss": True}, "official_first_step and use_current_loss are both True"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        official_warmup(0.1, 10, 2.0, **change)


def test_unknown_names_of_the_search():
    with pytest.raises(ValueError, match="objective: got 'linear_and_linaer', wanted one of"):
        quadrature_peak_gap(3.0, 1.0, 10.0, 1e-3, "linear_and_linaer")
    with pytest.raises(ValueError, match="target: got 'cosine', wanted one of linear, cos"):
        quadrature_peak_gap(3.0, 1.0, 10.0, 1e-3, "func_prime", "cosine")
