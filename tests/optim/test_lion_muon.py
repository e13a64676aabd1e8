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


def tree(seed, shapes=SHAPES):
    return normal(seed, shapes), normal(seed + 1, shapes, STEPS)


def schedule(step):
    return 0.1 * (step + 1)


@functools.cache
def unit_updates():
    """Updates at rates of one: even steps are spectral."""
    tx = jol.lion_muon(1.0, sign_lr_ratio=1.0, ns_steps=2)
    return jax.device_get(run(tx, *tree(0))[0])


STEP = np.arange(STEPS)
RAMP = 0.1 * (STEP + 1)


@pytest.mark.parametrize(
    ("options", "spectral", "sign", "adamw"),
    [
        ({}, RAMP, 0.05 * RAMP, RAMP),
        ({"sign_lr_ratio": 0.2, "adam_lr_ratio": 3.0}, RAMP, 0.2 * RAMP, 3 * RAMP),
        (
            {"sign_learning_rate": lambda t: 1.0 / (t + 1), "adam_learning_rate": lambda t: 2.0**t},
            RAMP,
            1 / (STEP + 1),
            2.0**STEP,
        ),
        ({"sign_learning_rate": 0.03}, RAMP, np.full(STEPS, 0.03), RAMP),
        ({"adam_learning_rate": 0.02}, RAMP, 0.05 * RAMP, np.full(STEPS, 0.02)),
    ],
    ids=["ratios", "other ratios", "three schedules", "constant sign", "constant adamw"],
)
def test_one_schedule_or_three(options, spectral, sign, adamw):
    updates, _, _ = run(jol.lion_muon(schedule, ns_steps=2, **options), *tree(0))
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
        1.0, period=math.inf, weight_decay=0.5, adam_weight_decay=0.25, sign_lr_ratio=0.5, mask=mask
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = fast_jit(tx.update)(zeros, tx.init(params), params)
    for group, leaves in updates.items():
        for name, u in leaves.items():
            # Decay of a matrix at the rate of its sign steps, of a vector at AdamW's.
            np.testing.assert_array_equal(u, -0.25 if group + name in decayed.split() else 0)


def test_a_mask_that_does_not_fit_is_named():
    params = {"w": jnp.ones((3, 4))}
    tx = jol.scale_by_lion_muon(weight_decay=0.1, mask={"v": True})
    with pytest.raises(ValueError, match=r"mask does not match.*no entry for leaf \['w'\]"):
        jax.eval_shape(tx.update, params, tx.init(params), params)


def test_decay_needs_the_parameters():
    params = {"w": jnp.ones((3, 4))}
    tx = jol.scale_by_lion_muon(weight_decay=0.1)
    with pytest.raises(ValueError, match="weight_decay needs the parameters"):
        tx.update(params, tx.init(params))


def test_mu_dtype_is_that_of_both_first_moments():
    params = {k: jnp.ones(s) for k, s in SHAPES.items()}
    tx = jol.lion_muon(1e-2, mu_dtype="bfloat16")
    updates, state = jax.eval_shape(tx.update, params, tx.init(params), params)
    matrices = state.inner_states["lion_muon"].inner_state[0]
    others = state.inner_states["adamw"].inner_state[0]
    assert matrices.mu["w"].dtype == others.mu["b"].dtype == jnp.bfloat16
    assert others.nu["b"].dtype == updates["w"].dtype == updates["b"].dtype == jnp.float32


def sign_only(**options):
    return jol.scale_by_lion_muon(period=math.inf, sign_rate=1.0, **options)


def test_heavy_ball_directions():
    params, grads = tree(3, MATRIX)
    buffer, wanted = np.zeros((3, 5)), {"nesterov": [], "buffer": [], "gradient": []}
    for g in np.asarray(grads["w"], float):
        buffer = 0.8 * buffer + g
        wanted["nesterov"].append(g + 0.8 * buffer)
        wanted["buffer"].append(buffer)
        wanted["gradient"].append(g)
    for name, directions in wanted.items():
        # b2 is not read.
        tx = sign_only(b1=0.8, b2=0.1, momentum="heavy_ball", heavy_ball_direction=name)
        updates, _, state = run(tx, params, grads)
        np.testing.assert_array_equal(updates["w"], np.sign(directions))
        np.testing.assert_allclose(state.mu["w"], buffer, rtol=1e-5)


def expected_cheap(mode, scaling, d):
    m, n = d.shape
    fan = math.sqrt(max(1, n / m))
    if mode == "sign":
        frob = 1 / math.sqrt(max(m, n))
        return np.sign(d) * {"none": 1, "frob": frob, "muon": fan * frob}[scaling]
    if mode == "cheap_ns":
        return 0.2 * math.sqrt(max(m, n)) * newton_schulz(d, steps=3)
    # Nothing was ever cached: "cached" is "norm".
    return d / np.linalg.norm(d) * math.sqrt(min(m, n)) * fan


@pytest.mark.parametrize(
    ("mode", "scaling"),
    [
        *(("sign", scaling) for scaling in ("none", "frob", "muon")),
        *((mode, "none") for mode in ("norm", "cheap_ns", "cached")),
    ],
)
def test_cheap_steps(mode, scaling):
    shapes = {"wide": (3, 5), "tall": (5, 3)}
    grads = normal(4, shapes)
    tx = sign_only(
        cheap_mode=mode, sign_scaling=scaling, cheap_ns_steps=3, ns_dtype="float32", b1=0.0
    )
    updates, _ = fast_jit(tx.update)(grads, tx.init(grads))
    for name, g in grads.items():
        wanted = expected_cheap(mode, scaling, g)
        np.testing.assert_allclose(updates[name], wanted, rtol=1e-4, atol=1e-5)


def test_cached_steps_repeat_the_last_spectral_one():
    params, grads = tree(5, MATRIX)
    options = {"period": 3, "ns_steps": 2, "spectral_rate": 1.0, "sign_rate": 0.25}
    cached, _, state = run(jol.scale_by_lion_muon(cheap_mode="cached", **options), params, grads)
    plain, _, _ = run(jol.scale_by_lion_muon(**options), params, grads)
    first, last = np.asarray(plain["w"][0]), np.asarray(plain["w"][3])
    wanted = [first, 0.25 * first, 0.25 * first, last]
    np.testing.assert_allclose(cached["w"], wanted, rtol=1e-6)
    np.testing.assert_allclose(state.cached["w"], last, rtol=1e-6)


@pytest.mark.parametrize("mode", ["sign", "cached"])
@pytest.mark.parametrize("period", [1.0, 2.0, math.inf])
def test_a_traced_period_is_a_period(period, mode):
    params, grads = tree(6, MATRIX)
    fixed = {"ns_steps": 1, "sign_rate": 1.0, "ns_dtype": "float32", "cheap_mode": mode}
    static, _, _ = run(jol.scale_by_lion_muon(period=period, **fixed), params, grads)
    make = optax.inject_hyperparams(
        jol.scale_by_lion_muon, static_args=("ns_steps", "cheap_ns_steps")
    )
    injected, _, state = run(make(period=period, **fixed), params, grads)
    assert state.hyperparams["period"] == period  # it really was traced
    np.testing.assert_allclose(injected["w"], static["w"], rtol=1e-4, atol=1e-5)


def is_sign(update):
    return bool(np.isin(update, (-1.0, 1.0)).all())


@pytest.mark.parametrize("traced", [False, True])
def test_first_step_spectral_with_an_infinite_period(traced):
    params, grads = tree(7, MATRIX)
    factory = jol.scale_by_lion_muon
    if traced:
        factory = optax.inject_hyperparams(factory, static_args=("ns_steps", "cheap_ns_steps"))
    tx = factory(period=math.inf, first_step_spectral=True, ns_steps=2, sign_rate=1.0)
    updates, _, _ = run(tx, params, grads)
    assert [is_sign(u) for u in updates["w"]] == [False, True, True, True]


@pytest.mark.parametrize("coefficients", ["quintic", "polar_express", "dion"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_coefficients_and_dtype_of_the_iteration(coefficients, dtype):
    grads = normal(8, {"w": (4, 6)})
    tx = jol.scale_by_lion_muon(
        period=1, b1=0.0, ns_steps=2, ns_coefficients=coefficients, ns_dtype=dtype
    )
    direct = newton_schulz(grads["w"], steps=2, coefficients=coefficients, compute_dtype=dtype)
    updates, _ = fast_jit(tx.update)(grads, tx.init(grads))
    assert direct.dtype == dtype and updates["w"].dtype == jnp.float32
    wanted = 0.2 * math.sqrt(6) * direct.astype(jnp.float32)
    np.testing.assert_allclose(updates["w"], wanted, rtol=1e-5)


def test_spectral_scales():
    # Orthogonal matrices stay what they are under enough convergent iterations.
    params = {"wide": jnp.eye(2, 4), "tall": jnp.eye(3, 1)}
    exact = {"ns_dtype": "float32", "ns_steps": 9, "ns_coefficients": "polar_express"}
    factors = {"match_rms": (0.2 * 4**0.5, 0.2 * 3**0.5), "fan": (2**0.5, 1.0), "none": (1.0, 1.0)}
    scaled = {k: jol.scale_by_lion_muon(period=1, spectral_scale=k, **exact) for k in factors}
    updates = fast_jit(lambda p: {k: tx.update(p, tx.init(p))[0] for k, tx in scaled.items()})(
        params
    )
    for kind, (wide, tall) in factors.items():
        np.testing.assert_allclose(updates[kind]["wide"], wide * params["wide"], atol=1e-4)
        np.testing.assert_allclose(updates[kind]["tall"], tall * params["tall"], atol=1e-4)


def test_the_branches_stay_a_conditional_when_compiled():
    params, _ = tree(9)
    for period, kept in ((2, True), (1, False), (math.inf, False)):
        tx = jol.lion_muon(1e-2, period=period, ns_steps=1)
        text = jax.jit(tx.update).lower(params, tx.init(params), params).compile().as_text()
        assert ("conditional(" in text) == kept


def sweep(params, grads):
    """Members with different rates, each with its own `init`."""

    def member(rate):
        return scan(jol.lion_muon(rate, ns_steps=1), params, grads)[1]

    return jax.vmap(member)


def test_a_vmapped_sweep_of_rates_keeps_the_conditional():
    params, grads = tree(10)
    rates = jnp.array([0.1, 0.2])
    # JAX turns a `cond` whose predicate is batched into `select_n` of both branches.
    assert str(jax.make_jaxpr(sweep(params, grads))(rates)).count("cond[") == 1
    compiled = jax.jit(sweep(params, grads)).lower(rates).compile()
    assert "conditional(" in compiled.as_text()
    together = compiled(rates)
    alone = run(jol.lion_muon(0.2, ns_steps=1), params, grads)[1]
    for name in SHAPES:
        np.testing.assert_allclose(together[name][1], alone[name], rtol=1e-2, atol=1e-3)


def test_a_batched_counter_would_run_both_branches():
    # The reason for the advice in the docs: `init` belongs inside the `vmap`.
    params, _ = tree(11)
    tx = jol.lion_muon(1e-2, ns_steps=1)
    batched = jax.tree.map(lambda x: jnp.stack([x, x]), tx.init(params))
    jaxpr = jax.make_jaxpr(jax.vmap(tx.update, in_axes=(None, 0, None)))(params, batched, params)
    assert "cond[" not in str(jaxpr)
