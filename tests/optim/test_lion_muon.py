"""Rates, masks, modes and options of the LionMuon family."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_lab as jol
from jaxopt_lab.core.newton_schulz import newton_schulz
from tests.optim.runs import fast_jit, normal, run, scan

SHAPES = {"w": (3, 5), "b": (4,)}
STEPS = 4
MATRIX = {"w": (3, 5)}
TWO_STEPS = jol.NewtonSchulz(steps=2)
ONE_STEP = jol.NewtonSchulz(steps=1)


def tree(seed, shapes=SHAPES):
    return normal(seed, shapes), normal(seed + 1, shapes, STEPS)


def schedule(step):
    return 0.1 * (step + 1)


@functools.cache
def unit_updates():
    """Updates at rates of one: even steps are spectral."""
    tx = jol.lion_muon(1.0, sign_learning_rate=1.0, newton_schulz=TWO_STEPS)
    return jax.device_get(run(tx, *tree(0))[0])


STEP = np.arange(STEPS)
RAMP = 0.1 * (STEP + 1)


@pytest.mark.parametrize(
    ("options", "spectral", "sign", "adamw"),
    [
        ({}, RAMP, 0.05 * RAMP, RAMP),
        ({"fallback": jol.AdamW(lr_ratio=3.0)}, RAMP, 0.05 * RAMP, 3 * RAMP),
        (
            {
                "sign_learning_rate": lambda t: 1.0 / (t + 1),
                "fallback": jol.AdamW(learning_rate=lambda t: 2.0**t),
            },
            RAMP,
            1 / (STEP + 1),
            2.0**STEP,
        ),
        ({"sign_learning_rate": 0.03}, RAMP, np.full(STEPS, 0.03), RAMP),
        ({"fallback": jol.AdamW(learning_rate=0.02)}, RAMP, 0.05 * RAMP, np.full(STEPS, 0.02)),
    ],
    ids=["one rate", "another ratio", "three schedules", "constant sign", "constant adamw"],
)
def test_one_schedule_or_three(options, spectral, sign, adamw):
    updates, _, _ = run(jol.lion_muon(schedule, newton_schulz=TWO_STEPS, **options), *tree(0))
    matrix = np.where(STEP % 2 == 0, spectral, sign)
    wanted = {"w": matrix[:, None, None], "b": adamw[:, None]}
    for name, rate in wanted.items():
        np.testing.assert_allclose(updates[name], rate * unit_updates()[name], rtol=1e-5, atol=1e-6)


MASKED = {"a": {"w": (3, 4), "b": (4,)}, "c": {"w": (3, 4), "b": (4,)}}


@pytest.mark.parametrize(
    ("mask", "decayed"),
    [
        (None, "aw ab cw cb"),
        ({"a": {"w": True, "b": False}, "c": {"w": False, "b": True}}, "aw cb"),
        ({"a": False, "c": True}, "cw cb"),
        (lambda params: jax.tree.map(lambda p: p.ndim > 1, params), "aw cw"),
    ],
    ids=["none", "tree", "prefix", "function"],
)
def test_mask_reaches_both_groups(mask, decayed):
    params = jax.tree.map(jnp.ones, MASKED, is_leaf=lambda x: isinstance(x, tuple))
    tx = jol.lion_muon(
        1.0,
        period=math.inf,
        weight_decay=0.5,
        sign_learning_rate=0.5,
        mask=mask,
        fallback=jol.AdamW(weight_decay=0.25),
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = fast_jit(tx.update)(zeros, tx.init(params), params)
    for group, leaves in updates.items():
        for name, u in leaves.items():
            # Decay of a matrix at the rate of its sign steps, of a vector at AdamW's.
            np.testing.assert_array_equal(u, -0.25 if group + name in decayed.split() else 0)


def test_mu_dtype_is_that_of_both_first_moments():
    params = {k: jnp.ones(s) for k, s in SHAPES.items()}
    tx = jol.lion_muon(1e-2, mu_dtype="bfloat16")
    updates, state = jax.eval_shape(tx.update, params, tx.init(params), params)
    matrices = state.inner_states["lion_muon"].inner_state[0]
    others = state.inner_states["adamw"].inner_state[0]
    assert matrices.mu["w"].dtype == others.mu["b"].dtype == jnp.bfloat16
    assert others.nu["b"].dtype == updates["w"].dtype == updates["b"].dtype == jnp.float32


@pytest.mark.parametrize("period", [1.0, 2.0, math.inf])
def test_a_traced_period_is_a_period(period):
    params, grads = tree(6, MATRIX)
    fixed = {"newton_schulz": jol.NewtonSchulz(steps=1, dtype="float32")}
    static, _, _ = run(jol.scale_by_lion_muon(period=period, **fixed), params, grads)
    make = optax.inject_hyperparams(jol.scale_by_lion_muon)
    injected, _, state = run(make(period=period, **fixed), params, grads)
    assert state.hyperparams["period"] == period  # it really was traced
    np.testing.assert_allclose(injected["w"], static["w"], rtol=1e-4, atol=1e-5)


def is_sign(update):
    return bool(np.isin(update, (-1.0, 1.0)).all())


def test_a_period_that_no_run_reaches_has_a_spectral_first_step():
    params, grads = tree(7, MATRIX)
    for period in (2**30, 2**40):
        tx = jol.scale_by_lion_muon(period=period, newton_schulz=TWO_STEPS)
        updates, _, _ = run(tx, params, grads)
        assert [is_sign(u) for u in updates["w"]] == [False, True, True, True]


@pytest.mark.parametrize("coefficients", ["quintic", "polar_express", "you_jiacheng"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_coefficients_and_dtype_of_the_iteration(coefficients, dtype):
    grads = normal(8, {"w": (4, 6)})
    options = jol.NewtonSchulz(steps=2, coefficients=coefficients, dtype=dtype)
    tx = jol.scale_by_lion_muon(period=1, b1=0.0, newton_schulz=options)
    direct = newton_schulz(grads["w"], steps=2, coefficients=coefficients, compute_dtype=dtype)
    updates, _ = fast_jit(tx.update)(grads, tx.init(grads))
    assert direct.dtype == dtype and updates["w"].dtype == jnp.float32
    wanted = 0.2 * math.sqrt(6) * direct.astype(jnp.float32)
    np.testing.assert_allclose(updates["w"], wanted, rtol=1e-5)


def test_spectral_scales():
    # Orthogonal matrices stay what they are under enough convergent iterations.
    params = {"wide": jnp.eye(2, 4), "tall": jnp.eye(3, 1)}
    exact = jol.NewtonSchulz(steps=9, coefficients="polar_express", dtype="float32")
    factors = {"match_rms": (0.2 * 4**0.5, 0.2 * 3**0.5), "fan": (2**0.5, 1.0), "none": (1.0, 1.0)}
    scaled = {
        k: jol.scale_by_lion_muon(period=1, spectral_scale=k, newton_schulz=exact) for k in factors
    }
    updates = fast_jit(lambda p: {k: tx.update(p, tx.init(p))[0] for k, tx in scaled.items()})(
        params
    )
    for kind, (wide, tall) in factors.items():
        np.testing.assert_allclose(updates[kind]["wide"], wide * params["wide"], atol=1e-4)
        np.testing.assert_allclose(updates[kind]["tall"], tall * params["tall"], atol=1e-4)


def test_the_branches_stay_a_conditional_when_compiled():
    params, _ = tree(9)
    for period, kept in ((2, True), (1, False), (math.inf, False)):
        tx = jol.lion_muon(1e-2, period=period, newton_schulz=ONE_STEP)
        text = jax.jit(tx.update).lower(params, tx.init(params), params).compile().as_text()
        assert ("conditional(" in text) == kept


def sweep(params, grads):
    """Members with different rates, each with its own `init`."""

    def member(rate):
        return scan(jol.lion_muon(rate, newton_schulz=ONE_STEP), params, grads)[1]

    return jax.vmap(member)


def test_a_vmapped_sweep_of_rates_keeps_the_conditional():
    params, grads = tree(10)
    rates = jnp.array([0.1, 0.2])
    # JAX turns a `cond` whose predicate is batched into `select_n` of both branches.
    assert str(jax.make_jaxpr(sweep(params, grads))(rates)).count("cond[") == 1
    compiled = jax.jit(sweep(params, grads)).lower(rates).compile()
    assert "conditional(" in compiled.as_text()
    together = compiled(rates)
    alone = run(jol.lion_muon(0.2, newton_schulz=ONE_STEP), params, grads)[1]
    for name in SHAPES:
        np.testing.assert_allclose(together[name][1], alone[name], rtol=1e-2, atol=1e-3)


def test_a_batched_counter_would_run_both_branches():
    # The reason for the advice in the docs: `init` belongs inside the `vmap`.
    params, _ = tree(11)
    tx = jol.lion_muon(1e-2, newton_schulz=ONE_STEP)
    batched = jax.tree.map(lambda x: jnp.stack([x, x]), tx.init(params))
    jaxpr = jax.make_jaxpr(jax.vmap(tx.update, in_axes=(None, 0, None)))(params, batched, params)
    assert "cond[" not in str(jaxpr)
