"""Exact properties of the LionMuon family, and its descent inequalities, in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_lab.optim import (
    NewtonSchulz,
    branch_rate,
    scale_by_lion_muon,
    scale_by_stable_rank,
)
from tests.quick_compile import NEW_EMITTERS
from tests.reference.spectral import polar

SHAPES = {"wide": (3, 5), "tall": (5, 3), "square": (4, 4)}
STEPS = 6
# Enough convergent iterations for the polar factor in double precision.
EXACT = NewtonSchulz(steps=24, coefficients="polar_express", dtype="float64")
PLAIN = NewtonSchulz(dtype="float64")
# Largest singular value that five quintic iterations can return.
LARGEST_QUINTIC = 1.2024
NUMBERS = {
    "period": 2.0,
    "b1": 0.9,
    "b2": 0.99,
    "weight_decay": 0.0,
    "spectral_rate": 0.02,
    "sign_rate": 0.01,
}

seeds = st.integers(0, 2**32 - 1)
periods = st.sampled_from([1.0, 2.0, 3.0, 5.0, math.inf])
betas = st.floats(0.0, 0.99)
decays = st.floats(0.0, 2.0)


def draw(seed, *lead):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(*lead, *shape)) for name, shape in SHAPES.items()}


def assembled(iteration, *, spectral_rate, sign_rate, weight_decay, threshold=None, **numbers):
    """Rates and decay of the branch: what `lion_muon` puts behind the direction."""
    if threshold is not None:
        del numbers["period"]
        rates = {"spectral_rate": spectral_rate, "sign_rate": sign_rate}
        return scale_by_stable_rank(
            threshold, newton_schulz=iteration, weight_decay=weight_decay, **rates, **numbers
        )
    return optax.chain(
        scale_by_lion_muon(newton_schulz=iteration, **numbers),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_schedule(branch_rate(numbers["period"], spectral_rate, sign_rate)),
    )


@functools.partial(jax.jit, static_argnums=0, compiler_options=NEW_EMITTERS)
def _scan(iteration, numbers, params, grads, draws):
    tx = optax.with_extra_args_support(assembled(iteration, **numbers))

    def step(carry, given):
        params, state = carry
        grad, start = given
        updates, state = tx.update(grad, state, params, draws=start)
        params = jax.tree.map(jnp.subtract, params, updates)
        momentum = optax.tree.get(state, "mu")
        return (params, state), (params, momentum, updates)

    return jax.lax.scan(step, (params, tx.init(params)), (grads, draws))[1]


def run(params, grads, iteration=PLAIN, draws=None, **numbers):
    """Parameters, momenta and updates (rate included) after each step."""
    with jax.enable_x64(True):
        out = _scan(iteration, NUMBERS | numbers, params, grads, draws)
        return jax.tree.map(np.asarray, out)


def assert_trees_close(ours, wanted, atol=1e-12):
    assert ours.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(ours[name], wanted[name], rtol=0, atol=atol, err_msg=name)


def mapped(function, *trees):
    return {name: function(*(tree[name] for tree in trees)) for name in trees[0]}


@given(seeds, betas, betas, decays)
def test_infinite_period_is_lion(seed, b1, b2, decay):
    params, grads = draw(seed), draw(seed + 1, STEPS)
    ours, _, _ = run(params, grads, period=math.inf, b1=b1, b2=b2, weight_decay=decay)
    with jax.enable_x64(True):
        lion = optax.lion(NUMBERS["sign_rate"], b1=b1, b2=b2, weight_decay=decay)
        w, state = params, lion.init(mapped(jnp.asarray, params))
        for t in range(STEPS):
            updates, state = lion.update(mapped(lambda g, t=t: g[t], grads), state, w)
            w = mapped(np.asarray, optax.apply_updates(w, updates))
            assert_trees_close(mapped(lambda x, t=t: x[t], ours), w)


def test_a_python_infinity_never_traces_the_spectral_branch():
    tx = scale_by_lion_muon(period=math.inf)
    params = {"w": jnp.ones((3, 4))}
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    assert "dot_general" not in str(jaxpr) and "cond" not in str(jaxpr)


@given(seeds)
def test_without_momentum_and_spectral_steps_it_is_sign_descent(seed):
    params, grads = draw(seed), draw(seed + 1, STEPS)
    ours, _, _ = run(params, grads, period=math.inf, b1=0.0, b2=0.0)
    assert_trees_close(
        ours, mapped(lambda w, g: w - 0.01 * np.cumsum(np.sign(g), 0), params, grads)
    )


@given(seeds)
def test_without_momentum_at_period_one_it_is_spectral_descent(seed):
    params, grads = draw(seed), draw(seed + 1, STEPS)
    ours, _, _ = run(params, grads, EXACT, period=1.0, b1=0.0, b2=0.0)

    def steepest(w, g):
        scale = 0.2 * np.sqrt(max(w.shape))
        return w - 0.02 * scale * np.cumsum([polar(x) for x in g], 0)

    assert_trees_close(ours, mapped(steepest, params, grads), atol=1e-10)


@given(seeds, betas)
def test_equal_betas_make_the_direction_the_momentum(seed, b):
    params, grads = draw(seed), draw(seed + 1, STEPS)
    _, momenta, updates = run(params, grads, EXACT, b1=b, b2=b)

    def steps(m):
        scale = 0.02 * 0.2 * np.sqrt(max(m.shape[1:]))
        # Period 2: even steps are spectral.
        return np.stack([0.01 * np.sign(x) if t % 2 else scale * polar(x) for t, x in enumerate(m)])

    assert_trees_close(updates, mapped(steps, momenta), atol=1e-10)


@given(seeds, periods, st.floats(1e-30, 1e18))
def test_gradient_scale_does_not_matter(seed, period, c):
    params, grads = draw(seed), draw(seed + 1, STEPS)
    _, _, plain = run(params, grads, period=period)
    _, _, scaled = run(params, mapped(lambda g: c * g, grads), period=period)
    # Up to the rounding of c times the gradient.
    assert_trees_close(scaled, plain, atol=1e-9 * 0.02)


@given(seeds, periods, decays)
def test_odd_symmetry(seed, period, decay):
    params, grads = draw(seed), draw(seed + 1, STEPS)
    plain, momenta, _ = run(params, grads, period=period, weight_decay=decay)
    negated, negated_momenta, _ = run(
        mapped(np.negative, params),
        mapped(np.negative, grads),
        period=period,
        weight_decay=decay,
    )
    assert_trees_close(negated, mapped(np.negative, plain), atol=0)
    assert_trees_close(negated_momenta, mapped(np.negative, momenta), atol=0)


def rotated(seed, tree, make):
    """Q x R for every matrix, Q and R from `make(rng, size)`."""
    rng = np.random.default_rng(seed)
    sides = {name: (make(rng, shape[0]), make(rng, shape[1])) for name, shape in SHAPES.items()}
    return [{name: sides[name][0] @ x @ sides[name][1] for name, x in t.items()} for t in tree]


def orthogonal(rng, size):
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def signed_permutation(rng, size):
    return np.eye(size)[rng.permutation(size)] * rng.choice([-1.0, 1.0], size)


@given(seeds, decays)
def test_spectral_steps_are_orthogonally_equivariant(seed, decay):
    params, grads = draw(seed), draw(seed + 1, STEPS)
    plain, _, _ = run(params, grads, period=1.0, weight_decay=decay)
    turned, _, _ = run(
        *rotated(seed + 2, (params, grads), orthogonal), period=1.0, weight_decay=decay
    )
    (wanted,) = rotated(seed + 2, (plain,), orthogonal)
    assert_trees_close(turned, wanted, atol=1e-11)


@given(seeds, periods)
def test_all_steps_are_equivariant_under_signed_permutations(seed, period):
    params, grads = draw(seed), draw(seed + 1, STEPS)
    plain, _, _ = run(params, grads, period=period)
    turned, _, _ = run(*rotated(seed + 2, (params, grads), signed_permutation), period=period)
    (wanted,) = rotated(seed + 2, (plain,), signed_permutation)
    assert_trees_close(turned, wanted)


def test_sign_steps_are_not_orthogonally_equivariant():
    params, grads = draw(0), draw(1, STEPS)
    plain, _, _ = run(params, grads, period=math.inf)
    turned, _, _ = run(*rotated(2, (params, grads), orthogonal), period=math.inf)
    (wanted,) = rotated(2, (plain,), orthogonal)
    assert np.abs(turned["square"] - wanted["square"]).max() > 1e-3


@given(seeds, periods, decays)
def test_transposition(seed, period, decay):
    params, grads = draw(seed), draw(seed + 1, STEPS)
    # Wide and tall change places, so that the compiled shapes stay the same.
    swap = {"wide": "tall", "tall": "wide", "square": "square"}
    flipped = [{swap[n]: np.swapaxes(x, -1, -2) for n, x in t.items()} for t in (params, grads)]
    plain, _, _ = run(params, grads, period=period, weight_decay=decay)
    turned, _, _ = run(*flipped, period=period, weight_decay=decay)
    assert_trees_close(turned, {swap[n]: np.swapaxes(x, -1, -2) for n, x in plain.items()}, 1e-11)


@given(seeds, periods, betas, betas)
def test_momentum_does_not_depend_on_the_branch(seed, period, b1, b2):
    params, grads = draw(seed), draw(seed + 1, STEPS)
    rng = np.random.default_rng(seed)
    starts = {name: rng.normal(size=(STEPS, shape[0])) for name, shape in SHAPES.items()}
    _, wanted, _ = run(params, grads, period=7.0, b1=b1, b2=b2)
    _, periodic, _ = run(params, grads, period=period, b1=b1, b2=b2)
    _, triggered, _ = run(params, grads, draws=starts, threshold=0.6, period=period, b1=b1, b2=b2)
    assert_trees_close(periodic, wanted, atol=0)
    assert_trees_close(triggered, wanted, atol=1e-15)


@given(seeds, periods, st.floats(0.01, 100.0))
def test_displacement_is_linear_in_the_rates(seed, period, c):
    params, grads = draw(seed), draw(seed + 1, STEPS)
    rates = {"spectral_rate": 0.02, "sign_rate": 0.01}
    _, _, plain = run(params, grads, period=period, **rates)
    faster = {name: c * rate for name, rate in rates.items()}
    _, _, scaled = run(params, grads, period=period, **faster)
    assert_trees_close(scaled, mapped(lambda u: c * u, plain), atol=1e-14 * max(c, 1.0))


@given(seeds)
def test_root_mean_squares(seed):
    params, grads = draw(seed), draw(seed + 1, STEPS)
    _, _, updates = run(params, grads, EXACT, spectral_rate=1.0, sign_rate=0.05)
    for u in updates.values():
        rms = np.sqrt(np.mean(u**2, axis=(1, 2)))
        np.testing.assert_allclose(rms[::2], 0.2, rtol=1e-10)
        # The default ratio of the rates: a spectral step is four times a sign step.
        np.testing.assert_allclose(rms[::2] / rms[1::2], 4.0, rtol=1e-10)


@given(seeds, periods, decays)
def test_zero_gradients_leave_only_the_decay(seed, period, decay):
    params = draw(seed)
    zeros = mapped(lambda w: np.zeros((STEPS, *w.shape)), params)
    ours, momenta, _ = run(params, zeros, period=period, weight_decay=decay)
    finite = math.isfinite(period)
    rates = [0.02 if finite and t % period == 0 else 0.01 for t in range(STEPS)]
    left = np.cumprod(1 - decay * np.array(rates)).reshape(-1, 1, 1)
    assert_trees_close(ours, mapped(lambda w: left * w, params))
    assert all(not m.any() for m in momenta.values())


@given(seeds, st.floats(0.1, 10.0), st.floats(0.01, 1.0), st.floats(0.1, 5.0))
def test_sign_steps_contract_into_the_box(seed, decay, share, size):
    params = mapped(lambda w: size * w / decay, draw(seed))
    grads = draw(seed + 1, STEPS)
    rate = share / decay
    ours, _, _ = run(params, grads, period=math.inf, weight_decay=decay, sign_rate=rate)
    for name, w in ours.items():
        # The part outside [-1/decay, 1/decay] shrinks by 1 - rate decay; the inside is invariant.
        outside = max(np.abs(params[name]).max() - 1 / decay, 0.0)
        bound = 1 / decay + outside * (1 - share) ** np.arange(1, STEPS + 1)
        assert np.all(np.abs(w).max(axis=(1, 2)) <= bound * (1 + 1e-12))


@given(seeds, st.floats(0.1, 10.0), st.floats(0.01, 1.0))
def test_spectral_steps_stay_in_the_ball(seed, decay, share):
    radii = mapped(lambda w: 0.2 * np.sqrt(max(w.shape)) * LARGEST_QUINTIC / decay, draw(0))
    params = mapped(lambda w, r: r * w / np.linalg.norm(w, 2), draw(seed), radii)
    rate = share / decay
    ours, _, _ = run(
        params, draw(seed + 1, STEPS), period=1.0, weight_decay=decay, spectral_rate=rate
    )
    for name, w in ours.items():
        assert np.all(np.linalg.norm(w, 2, axis=(1, 2)) <= radii[name] * (1 + 1e-12))


@given(seeds, periods, betas, betas)
def test_first_step_does_not_depend_on_the_betas(seed, period, b1, b2):
    params, grads = draw(seed), draw(seed + 1, STEPS)
    plain, _, _ = run(params, grads, period=period)
    other, _, _ = run(params, grads, period=period, b1=b1, b2=b2)
    first = [mapped(lambda w: w[0], tree) for tree in (plain, other)]
    assert_trees_close(first[1], first[0], atol=1e-9 * 0.02)


@functools.partial(jax.jit, static_argnums=0, compiler_options=NEW_EMITTERS)
def _descend(period, hessian, w, rate):
    """Closed loop on <W, H W> / 2 without scale, momentum or decay: W and gradients visited."""
    tx = scale_by_lion_muon(
        newton_schulz=EXACT, spectral_scale="none", period=period, b1=0.0, b2=0.0
    )

    def step(carry, _):
        w, state = carry
        grad = hessian @ w
        updates, state = tx.update({"w": grad}, state)
        return (w - rate * updates["w"], state), (w, grad)

    (last, _), (ws, grads) = jax.lax.scan(step, (w, tx.init({"w": w})), None, length=STEPS)
    return jnp.concatenate([ws, last[None]]), grads


@pytest.mark.parametrize("period", [1, 2, math.inf])
@given(seed=seeds, rate=st.floats(1e-4, 0.3))
def test_descent_inequalities_on_a_quadratic(period, seed, rate):
    rng = np.random.default_rng(seed)
    factor, w = rng.normal(size=(3, 3)), rng.normal(size=(3, 5))
    hessian = factor @ factor.T
    with jax.enable_x64(True):
        ws, grads = map(np.asarray, _descend(period, hessian, w, rate))
    # ||H X||_nuc <= tr(H) ||X||_2 and ||H X||_1 <= n sum |H_ij| ||X||_inf.
    smoothness = np.trace(hessian), w.shape[1] * np.abs(hessian).sum()
    losses = 0.5 * np.einsum("tij,ik,tkj->t", ws, hessian, ws)
    promised = []
    for t, g in enumerate(grads):
        spectral = math.isfinite(period) and t % period == 0
        dual = np.linalg.svd(g, compute_uv=False).sum() if spectral else np.abs(g).sum()
        promised.append(rate * dual - smoothness[0 if spectral else 1] * rate**2 / 2)
    decrease = losses[:-1] - losses[1:]
    # An exact polar factor of a nearly singular gradient is only approximated.
    slack = 1e-6 * rate * np.linalg.norm(grads[0])
    assert np.all(decrease >= np.array(promised) - slack)
    assert losses[0] - losses[-1] >= np.sum(promised) - STEPS * slack


def test_the_spectral_descent_inequality_is_tight():
    # H = h I: tr(H) is the smoothness constant itself, and the inequality an equality.
    with jax.enable_x64(True):
        w = np.random.default_rng(0).normal(size=(3, 5))
        ws, grads = map(np.asarray, _descend(1, 2.0 * np.eye(3), w, 0.01))
    nuclear = np.linalg.svd(grads[0], compute_uv=False).sum()
    decrease = np.sum(ws[0] ** 2) - np.sum(ws[1] ** 2)
    np.testing.assert_allclose(decrease, 0.01 * nuclear - 6.0 * 0.01**2 / 2, rtol=1e-9)
