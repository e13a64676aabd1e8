"""What the warm-up does with losses: the published algorithm, its options and its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_lab.schedules import Curvature, adaptive_warmup, exact_peak_gap, gap_rate, peak_gap_of
from tests.schedules.warmup_runs import NOISY, PARAMS, PEAK, STEPS, TARGET, make, reference, run

OFFICIAL = make(fallback_after=None)
losses_above = st.lists(st.floats(0.001, 20.0), min_size=STEPS, max_size=STEPS).map(
    lambda gaps: TARGET + np.array(gaps)
)


@given(losses_above)
def test_rates_are_the_published_ones(losses):
    with jax.enable_x64(True):
        rates, states = run(OFFICIAL, losses)
    wanted, switch = reference(losses)
    np.testing.assert_allclose(rates, wanted[:-1], rtol=1e-12)
    np.testing.assert_allclose(states.rate, wanted[1:], rtol=1e-11)
    assert states.switch_step[-1] == switch
    assert states.gap[-1] == losses[-1] - TARGET and states.loss[-1] == losses[-1]


def test_float32_is_close_to_float64():
    rates, states = run(OFFICIAL, NOISY)
    wanted, switch = reference(NOISY)
    assert rates.dtype == states.rate.dtype == np.float32
    assert states.switch_step[-1] == switch > 0
    np.testing.assert_allclose(rates, wanted[:-1], rtol=3e-5)


def test_a_monotone_loss_gives_a_rate_that_rises_to_the_switch():
    rates, states = run(make(), TARGET + 6 * 0.9 ** np.arange(STEPS))
    switch = states.switch_step[-1]
    assert 5 < switch < STEPS / 2
    assert np.all(np.diff(rates[: switch + 1]) >= 0) and np.all(np.diff(rates[switch + 1 :]) < 0)
    assert np.all(rates <= PEAK)
    # One switch: from -1 to its step and never again.
    np.testing.assert_array_equal(
        states.switch_step, np.where(np.arange(STEPS) < switch, -1, switch)
    )
    np.testing.assert_array_equal(states.count, np.arange(1, STEPS + 1))


def test_losses_after_the_switch_do_not_matter():
    rates, states = run(make(), NOISY)
    switch = int(states.switch_step[-1])
    spiked = NOISY.copy()
    spiked[switch + 1 :] = np.where(np.arange(STEPS - switch - 1) % 2, 50.0, np.nan)
    other, after = run(make(), spiked)
    np.testing.assert_array_equal(rates, other)
    assert after.ignored[-1] == np.isnan(spiked).sum() > 0


def test_spikes_lower_the_rate_and_a_loss_above_the_first_one_is_below_the_start():
    losses = np.full(6, 8.0)
    losses[[1, 2, 3, 4]] = [5.0, 7.5, 8.5, 5.0]
    rates, _ = run(make(), losses)
    assert rates[3] < rates[2] == rates[5] and rates[4] < rates[0] < rates[3]


def test_search_by_the_exact_rule_uses_the_kappa_of_the_model():
    tx = adaptive_warmup(PEAK, STEPS, TARGET, 100.0, norm={"spectral": 5e3, "sign": 5e3})
    _, states = run(tx, NOISY)
    kappa = 5e3 * (2 + 6)
    wanted = exact_peak_gap(NOISY[0] - TARGET, kappa * 1e-3, 100.0)
    np.testing.assert_allclose(states.peak_gap, float(wanted), rtol=1e-6)
    direct = adaptive_warmup(PEAK, STEPS, TARGET, 100.0, kappa=kappa)
    assert direct.update(PARAMS, direct.init(PARAMS), value=NOISY[0])[1].peak_gap == wanted


def test_exact_rule_does_not_depend_on_the_peak_rate():
    def peak_gap(rate):
        tx = adaptive_warmup(rate, STEPS, TARGET, kappa=1000.0)
        return tx.update(PARAMS, tx.init(PARAMS), value=8.0)[1].peak_gap

    assert peak_gap(1e-5) == peak_gap(0.1) == peak_gap(10.0) > 0


def test_the_first_step_is_at_the_start_of_the_warm_up():
    rates, _ = run(make(), NOISY)
    np.testing.assert_allclose(rates[0], PEAK / 10, rtol=1e-6)


def test_smoothing_is_an_average_that_starts_at_the_first_loss():
    with jax.enable_x64(True):
        _, states = run(make(smoothing=0.8), NOISY)
        averages = [NOISY[0]]
        for loss in NOISY[1:]:
            averages.append(0.8 * averages[-1] + 0.2 * loss)
        np.testing.assert_allclose(states.loss, averages, rtol=1e-14)
        rates, _ = run(make(), averages)
        smoothed, _ = run(make(smoothing=0.8), NOISY)
    np.testing.assert_allclose(smoothed, rates, rtol=1e-12)


def test_fallback_decays_from_the_rate_held():
    stuck = np.linspace(8.0, 5.0, STEPS)
    rates, states = run(make(fallback_after=0.5), stuck)
    never, free = run(make(fallback_after=None), stuck)
    assert free.switch_step[-1] == -1 and np.all(np.diff(never[1:]) > 0)
    switch = states.switch_step[-1]
    assert switch == STEPS / 2 - 1
    np.testing.assert_array_equal(rates[: switch + 1], never[: switch + 1])
    assert states.decay_from[-1] == rates[switch] < PEAK
    assert np.all(np.diff(rates[switch:]) < 0)
    np.testing.assert_allclose(rates[-1], PEAK * 1e-4, rtol=1e-4)


def test_a_floor_above_the_rate_held_is_not_climbed_to():
    rates, states = run(make(fallback_after=0.1, final_div_factor=2.0), np.full(STEPS, 8.0))
    np.testing.assert_allclose(rates, PEAK / 10, rtol=1e-6)
    assert states.switch_step[-1] == 3


@pytest.mark.parametrize("gap", [-1.0, 0.0, 0.015])
@pytest.mark.parametrize("rule", ["exact", 0.25])
def test_first_loss_at_the_target_decays_at_once(gap, rule):
    losses = np.full(STEPS, TARGET + gap)
    rates, states = run(make(delta_star_rule=rule, kappa=1.0), losses)
    assert np.isfinite(rates).all() and np.all(rates <= PEAK)
    np.testing.assert_allclose(states.initial_gap, gap, atol=1e-6)
    if gap > 0 and rule == 0.25:  # a share needs no room for candidates
        assert states.switch_step[STEPS // 2 - 2] == -1 and states.peak_gap[0] > 0
    else:
        assert np.all(states.switch_step == 0) and np.all(states.peak_gap == 0)
        np.testing.assert_allclose(rates[1], PEAK, rtol=0.02)
        assert np.all(np.diff(rates[1:]) < 0)


def test_a_loss_that_is_not_finite_changes_nothing_but_the_counters():
    clean, states = run(make(), NOISY[:12])
    broken = np.insert(NOISY[:12], [3, 3, 7], [np.nan, np.inf, -np.inf])
    rates, after = run(make(), broken)
    held = np.isfinite(broken)
    np.testing.assert_array_equal(rates[1:][held[:-1]], clean[1:])
    np.testing.assert_array_equal(rates[1:][~held[:-1]], rates[:-1][~held[:-1]])
    assert after.ignored[-1] == 3 and after.count[-1] == 15
    for field in ("rate", "gap", "initial_gap", "peak_gap", "loss", "switch_step"):
        assert getattr(after, field)[-1] == getattr(states, field)[-1]


def test_a_first_loss_that_is_not_finite_is_waited_for():
    rates, states = run(make(), [np.nan, np.inf, 8.0, 6.0, 5.0])
    later, _ = run(make(), [8.0, 6.0, 5.0])
    np.testing.assert_array_equal(rates[2:], later)
    np.testing.assert_array_equal(rates[:2], later[0])
    assert states.initial_gap[1] == np.inf and states.initial_gap[2] == 6.0


@pytest.mark.parametrize("rho", [2.0, 3.5])
def test_curvature_by_hand(rho):
    by_hand = Curvature(20.0, 5.0, 4.0, rho)
    with jax.enable_x64(True):
        rates, states = run(make(curvature=by_hand), NOISY)
        peak = float(peak_gap_of(by_hand))
        switch = int(np.argmax(NOISY - TARGET <= peak))
        assert states.switch_step[-1] == switch > 1
        np.testing.assert_array_equal(states.peak_gap, peak)
        wanted = np.minimum(gap_rate(NOISY - TARGET, by_hand), PEAK)
        np.testing.assert_allclose(rates[1 : switch + 1], wanted[:switch], rtol=1e-13)
        # The decay starts where the rate stands, not at a peak rate that it never reached.
        top = float(gap_rate(peak, by_hand))
        np.testing.assert_allclose(states.decay_from[-1], min(top, PEAK), rtol=1e-13)
    assert rates[0] == PEAK / 10 and top < PEAK


def test_decay_of_ones_own():
    def line(horizon):
        return lambda step: 1 - step / horizon

    rates, states = run(make(decay=line, final_div_factor=np.inf), NOISY)
    switch = int(states.switch_step[-1])
    left = np.arange(STEPS - switch - 1, 0, -1) / (STEPS - switch)
    np.testing.assert_allclose(rates[switch + 1 :], PEAK * left, rtol=1e-5)
    optaxs = make(
        decay=lambda n: lambda k: optax.linear_schedule(1.0, 0.0, 1)(k / n), final_div_factor=np.inf
    )
    np.testing.assert_allclose(run(optaxs, NOISY)[0], rates, rtol=1e-5)


def test_training_beyond_the_last_step_keeps_a_small_rate():
    longer = np.concatenate([NOISY, np.full(20, 2.1)])
    rates, _ = run(make(), longer)
    assert np.all(rates[STEPS:] < PEAK * 0.02) and np.all(rates[STEPS + 1 :] == rates[-1])


def test_no_warmup_without_a_divisor():
    rates, states = run(adaptive_warmup(PEAK, STEPS, TARGET, 1.0, delta_star_rule=0.25), NOISY)
    switch = int(states.switch_step[-1])
    np.testing.assert_allclose(rates[: switch + 1], PEAK, rtol=1e-6)


def test_normalized_descent_on_a_quadratic_contracts_as_derived():
    # f = L/2 |x|^2, eta = D / (R L): D falls by at least D^2 / (2 R^2 L) in every step.
    smoothness, x = 3.0, np.random.default_rng(0).normal(size=(4, 5))
    radius = np.linalg.norm(x)
    by_hand = Curvature(radius * smoothness, 0.0, 0.0)

    def step(x, _):
        gap = smoothness / 2 * jnp.sum(x * x)
        return x - gap_rate(gap, by_hand) * x / jnp.linalg.norm(x), gap

    with jax.enable_x64(True):
        gaps = np.asarray(jax.lax.scan(step, jnp.asarray(x), length=60)[1])
    assert np.all(gaps[1:] <= gaps[:-1] - gaps[:-1] ** 2 / (2 * radius**2 * smoothness) + 1e-12)


def test_curvature_of_a_hyperbolic_cosine():
    # f = cosh(x) - 1 has the curvature 1 + D exactly, and sign descent with D / (R K(D)) contracts.
    def step(x, _):
        gap = jnp.cosh(x) - 1
        return x - gap_rate(gap, Curvature(2.5, 2.5, 0.0)) * jnp.sign(x), gap

    with jax.enable_x64(True):
        gaps = np.asarray(jax.lax.scan(step, jnp.asarray(2.5), length=60)[1])
    assert np.all(gaps[1:] <= gaps[:-1] - gaps[:-1] ** 2 / (2 * 2.5**2 * (1 + gaps[:-1])) + 1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peak_lr": 0.0}, "peak_lr: got 0.0, wanted a finite number > 0"),
        ({"peak_lr": "fast"}, "peak_lr: got 'fast'"),
        ({"total_steps": 0}, "total_steps: got 0, wanted an integer >= 1"),
        ({"total_steps": 10.5}, "total_steps: got 10.5"),
        ({"target_loss": float("nan")}, "target_loss: got nan, wanted a finite number"),
        ({"target_loss": "lowest"}, "target_loss: got 'lowest'"),
        ({"div_factor": 0.5}, "div_factor: got 0.5, wanted a finite number >= 1"),
        ({"norm": "nuclear"}, "norm: got 'nuclear', wanted one of"),
        ({"norm": {"sign": -1.0}}, r"norm\['sign'\]: got -1.0"),
        ({"kappa": 0.0}, "kappa: got 0.0"),
        ({"delta_star_rule": "fast"}, "delta_star_rule: got 'fast', wanted 'exact' or a share"),
        (
            {"delta_star_rule": "official"},
            "delta_star_rule: got 'official', which is jaxopt_lab.parity.warmup.off",
        ),
        ({"delta_star_rule": 1.0}, "delta_star_rule: got 1.0"),
        ({"curvature": Curvature(-1.0, 0.0, 1.0)}, "curvature.k0: got -1.0"),
        ({"curvature": Curvature(1.0, 0.0, 0.0)}, "curvature.k_rho: got 0.0"),
        ({"curvature": Curvature(1.0, 0.0, 1.0, 1.0)}, "curvature.rho: got 1.0"),
        ({"decay": "line"}, "decay: got 'line', wanted 'cosine' or a function"),
        ({"decay": lambda n: lambda k: jnp.ones(2)}, r"decay: got a schedule of shape \(2,\)"),
        (
            {"decay": lambda n: optax.linear_schedule(1.0, 0.0, n)},
            "decay looks at the value of its number of steps",
        ),
        ({"final_div_factor": 0.5}, "final_div_factor: got 0.5"),
        ({"smoothing": 1.0}, r"smoothing: got 1.0, wanted a number in \[0, 1\)"),
        ({"fallback_after": 0.0}, r"fallback_after: got 0.0, wanted a number in \(0, 1\]"),
    ],
)
def test_bad_arguments_are_named(change, message):
    good = {"peak_lr": 0.1, "total_steps": 10, "target_loss": 2.0}
    with pytest.raises(ValueError, match=f"^{message}"):
        adaptive_warmup(**(good | change))


@pytest.mark.parametrize(
    "keyword", ["objective", "target", "sigma", "official_first_step", "use_current_loss"]
)
def test_a_keyword_of_the_released_code_is_told_its_place(keyword):
    place = rf"parity\.warmup\.official_warmup\({keyword}=\.\.\.\)"
    with pytest.raises(TypeError, match=f"no argument '{keyword}'; write .*{place}"):
        adaptive_warmup(0.1, 10, 2.0, **{keyword: True})


def test_a_missing_loss_shows_the_call():
    tx = make()
    with pytest.raises(ValueError, match=r"tx\.update\(grads, state, params, value=loss\)"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=r"value: got shape \(2,\), wanted one scalar"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=jnp.ones(2))


def test_a_model_without_matrices_is_refused_where_its_kappa_is_needed():
    vector = {"bias": jnp.ones(3)}
    with pytest.raises(ValueError, match="found no matrix among the parameters"):
        adaptive_warmup(0.1, 10, 2.0).init(vector)
    for options in ({"kappa": 3.0}, {"delta_star_rule": 0.5}, {"curvature": Curvature(1.0, 0, 1)}):
        adaptive_warmup(0.1, 10, 2.0, **options).init(vector)


def test_an_estimated_target_needs_no_guess():
    """Losses that end at a third of the first one; the estimate comes near it in the end."""
    steps = np.arange(400)
    losses = 3.0 + 6.0 * (1 + np.maximum(steps - 20, 0) / 10) ** -0.5
    tx = adaptive_warmup(1.0, 400, "auto", 100.0, norm="frobenius")
    params = jnp.ones((4, 4))

    def step(state, loss):
        _, state = tx.update(params, state, params, value=loss)
        return state, (state.rate, state.loss - state.gap, state.peak_gap / state.initial_gap)

    final, (rates, targets, shares) = jax.jit(lambda x: jax.lax.scan(step, tx.init(params), x))(
        jnp.asarray(losses, jnp.float32)
    )
    np.testing.assert_allclose(rates[0], 0.01, rtol=1e-4)
    assert 3.1 < targets[0] < 3.8, "the expectation, before there is anything to go by"
    assert targets[20] > targets[0], "losses that stand still promise less"
    assert abs(targets[-1] - losses[-1]) < 0.6
    np.testing.assert_allclose(shares, shares[0], rtol=1e-4)
    assert 20 < final.switch_step < 200 and float(rates.max()) > 0.9
    assert int(final.ignored) == 0


def test_an_estimated_target_bears_bad_losses_and_hopeless_ones():
    tx = adaptive_warmup(1.0, 50, "auto", 100.0, norm="frobenius", fallback_after=None)
    params = jnp.ones((4, 4))
    state = tx.init(params)
    for loss in (jnp.nan, 9.0, 9.5, jnp.inf, 12.0, 30.0):
        _, state = tx.update(params, state, params, value=jnp.asarray(loss))
        assert np.isfinite(float(state.rate)) and 0 < float(state.rate) <= 1
    assert int(state.ignored) == 2 and int(state.switch_step) == -1
    np.testing.assert_allclose(state.initial_gap, 0.9, rtol=1e-5)  # a tenth of the first loss


def test_an_estimated_target_and_curvature_by_hand_exclude_each_other():
    with pytest.raises(ValueError, match="target_loss: got 'auto' beside curvature"):
        adaptive_warmup(1.0, 50, "auto", curvature=Curvature(1.0, 0.0, 1.0))
