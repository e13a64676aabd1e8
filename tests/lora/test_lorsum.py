"""LoRSum's optimizers against a reference in NumPy, where no stored trajectory covers them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_lab as jol
from jaxopt_lab import lora
from jaxopt_lab.lora import Tap
from tests.reference.lorsum import Run

N, M, R, ROWS, STEPS = 12, 8, 3, 6, 5


def draw(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape)


def compare(make, reference_step, options, projection, scale=1.0, **arguments):
    """Run both for five steps in float64, with the momentum of ours as the start of both."""
    rng = np.random.default_rng(0)
    a, b, other = rng.normal(size=(N, R)), rng.normal(size=(R, M)), rng.normal(size=(4,))
    with jax.enable_x64(True):
        params = {"up": {"a": jnp.asarray(a), "b": jnp.asarray(b)}, "head": jnp.asarray(other)}
        tx = make(projection=projection, **arguments)
        state = tx.init(params)
        held = optax.tree.get(state, "of_pairs")["momentum"]["up"]
        start = (np.asarray(held["a"]), np.asarray(held["b"]))
        run = Run(a, b, other, start, scale=scale, jitter=projection.jitter, **options)
        update = jax.jit(tx.update)
        for t in range(STEPS):
            x, s, g = draw(ROWS, N, seed=t), draw(ROWS, M, seed=t) / ROWS, draw(4, seed=t)
            taps = {"up": Tap(jnp.asarray(x), jnp.asarray(s), scale)}
            grads = jax.tree.map(jnp.zeros_like, params) | {"head": jnp.asarray(g)}
            updates, state = update(grads, state, params, taps=taps)
            params = optax.apply_updates(params, updates)
            reference_step(run, x, s, g)
            got = (params["up"]["a"], params["up"]["b"], params["head"])
            for mine, theirs in zip(got, (run.a, run.b, run.other), strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-9)
        held = optax.tree.get(state, "of_pairs")["momentum"]["up"]
        np.testing.assert_allclose(held["a"], run.m_a, rtol=1e-9, atol=1e-9)


CASES = {
    "default": ({}, {}, {}),
    "scale": ({}, {}, {"scale": 2.5}),
    "ignore_scale": ({}, {"ignore_scale": True}, {"scale": 2.5}),
    "jacobi": ({"sweeps": 0}, {"sweeps": 0}, {}),
    "start_b": ({"start": "b", "sweeps": 2}, {"start": "b", "sweeps": 2}, {}),
    "bare_rho": ({"scale_rho": False}, {"scale_rho_by_lr": False}, {}),
    "clip": ({"clip": 1.0}, {}, {"clip": 1.0}),
    "clip_gradient": (
        {"clip": 1.0, "clip_scales_stats": False},
        {"clip_scales_stats": False},
        {"clip": 1.0},
    ),
    "decay": ({"decay": 0.3}, {}, {"weight_decay": 0.3}),
}


@pytest.mark.parametrize("case", CASES)
def test_lorsum(case):
    options, projection, more = CASES[case]
    more, scale = dict(more), dict(more).get("scale", 1.0)
    more.pop("scale", None)

    def make(**arguments):
        return lora.lorsum(0.1, rho=0.05, momentum=0.9, dampening=0.25, **arguments)

    def step(run, x, s, g):
        plain_scale = 1.0 if projection.get("ignore_scale") else scale
        run.options["scale"] = plain_scale
        run.plain(x, s, g, 0.1, 0.9, 0.25)

    options = {"rho": 0.05, **options}
    compare(make, step, options, lora.LowRankSum(**projection), scale, **more)


@pytest.mark.parametrize("case", [*CASES, "paper", "floor"])
def test_scaled_lorsum(case):
    options, projection, more = CASES.get(case, ({}, {}, {}))
    more, scale = {"clip": None, **more}, more.get("scale", 1.0)
    more.pop("scale", None)
    rho = 1e-7 if case == "floor" else 0.05
    if case == "paper":
        options, more = {"paper": True}, {**more, "momentum_convention": "paper"}

    def make(**arguments):
        fallback = jol.AdamW(lr_ratio=0.05)
        numbers = {"b1": 0.9, "b2": 0.95, "damping": 1e-3, "rho": rho}
        return lora.scaled_lorsum(0.1, fallback=fallback, **numbers, **arguments)

    def step(run, x, s, g):
        run.options["scale"] = 1.0 if projection.get("ignore_scale") else scale
        run.scaled(x, s, g, 0.1, 0.9, 0.95, 1e-3, 0.5, 0.005)

    options = {"rho": rho, **options}
    compare(make, step, options, lora.LowRankSum(**projection), scale, **more)


def test_a_full_rank_run_is_heavy_ball_on_the_kernel():
    # P3: full rank, and a pull that vanishes. The left factor of the momentum, which is drawn, must
    # span all rows.
    with jax.enable_x64(True):
        a, b = jnp.asarray(draw(M, M)), jnp.asarray(draw(M, N))
        params = {"up": {"a": a, "b": b}}
        tx = lora.lorsum(0.1, rho=1e-9, momentum=0.5, projection=lora.LowRankSum(jitter=0.0))
        state, kernel, trace = tx.init(params), np.asarray(a @ b), np.zeros((M, N))
        step = jax.jit(lambda params, state, taps: tx.update(params, state, params, taps=taps))
        for t in range(6):
            x, s = draw(ROWS, M, seed=t), draw(ROWS, N, seed=t)
            taps = {"up": Tap(jnp.asarray(x), jnp.asarray(s))}
            updates, state = step(params, state, taps)
            params = optax.apply_updates(params, updates)
            trace = 0.5 * trace + x.T @ s
            kernel = kernel - 0.1 * trace
        got = params["up"]["a"] @ params["up"]["b"]
        np.testing.assert_allclose(got, kernel, rtol=1e-6, atol=1e-6)


def stack(layers, share):
    """Adapters of layers whose projections share their inputs, and the same one by one."""
    k = layers * share
    params = {"up": {"a": draw(k, N, R), "b": draw(k, R, M)}}
    x, s = draw(layers, ROWS, N), draw(k, ROWS, M)
    one_by_one = {str(i): {"a": params["up"]["a"][i], "b": params["up"]["b"][i]} for i in range(k)}
    taps = {str(i): Tap(jnp.asarray(x[i // share]), jnp.asarray(s[i])) for i in range(k)}
    return params, {"up": Tap(jnp.asarray(x), jnp.asarray(s))}, one_by_one, taps


@pytest.mark.parametrize("kind", ["plain", "scaled"])
def test_a_stack_moves_like_its_adapters(kind):
    make = {"plain": lambda: lora.lorsum(0.1), "scaled": lambda: lora.scaled_lorsum(b1=None)}[kind]
    params, taps, others, other_taps = stack(2, 3)
    updates, _ = make().update(params, make().init(params), params, taps=taps)
    each, _ = make().update(others, make().init(others), others, taps=other_taps)
    for i in range(6):
        for name in "ab":
            np.testing.assert_allclose(updates["up"][name][i], each[str(i)][name], atol=2e-5)


def test_one_bad_layer_of_a_stack_waits():
    params, taps, _, _ = stack(2, 3)
    params = jax.tree.map(jnp.asarray, params)
    tx = lora.scaled_lorsum(0.2)
    state, update = tx.init(params), jax.jit(tx.update)
    spoilt = {"up": Tap(taps["up"].x, taps["up"].s.at[4, 0, 0].set(jnp.nan))}
    updates, after = update(params, state, params, taps=spoilt)
    moved = np.asarray([bool(jnp.any(u != 0)) for u in updates["up"]["b"]])
    assert moved.tolist() == [True] * 4 + [False, True]
    assert optax.tree.get(after, "notfinite_count")["up"]["a"].tolist() == [0, 0, 0, 0, 1, 0]
    for name, tree in optax.tree.get(after, "of_pairs").items():
        before = optax.tree.get(state, "of_pairs")[name]
        for side in "ab":
            assert np.isfinite(tree["up"][side]).all()
            np.testing.assert_array_equal(tree["up"][side][4], before["up"][side][4])
    updates, _ = update(params, after, params, taps=taps)
    assert bool(jnp.any(updates["up"]["b"][4] != 0))


def test_preconditioned_adamw():
    a, b = draw(N, R), draw(R, M)
    params = {"up": {"a": jnp.asarray(a), "b": jnp.asarray(b)}}
    grads = jax.tree.map(lambda p: jnp.cos(p), params)
    tx = lora.preconditioned(1e-2, rho=0.1, momentum=None, jitter=0.0)
    updates, _ = tx.update(grads, tx.init(params), params)
    # The first step of Adam is the sign.
    for name, direction in (
        ("a", np.cos(a) @ np.linalg.inv(b @ b.T + 0.1 * np.eye(R))),
        ("b", np.linalg.inv(a.T @ a + 0.1 * np.eye(R)) @ np.cos(b)),
    ):
        np.testing.assert_allclose(updates["up"][name], -1e-2 * np.sign(direction), rtol=1e-3)


def test_what_is_missing_is_named():
    adapter = {"up": {"a": jnp.ones((N, R)), "b": jnp.ones((R, M))}}
    tx = lora.lorsum(0.1)
    with pytest.raises(ValueError, match="lorsum moves pairs.*have none"):
        tx.init({"kernel": jnp.ones((N, M))})
    with pytest.raises(ValueError, match="lorsum needs taps="):
        tx.update(adapter, tx.init(adapter), adapter)
    with pytest.raises(ValueError, match="taps has no entry for adapter up"):
        tx.update(adapter, tx.init(adapter), adapter, taps={})
    with pytest.raises(
        ValueError, match=r"adapter up: got factors of shapes \(12, 3\) and \(2, 8\)"
    ):
        tx.init({"up": {"a": jnp.ones((N, R)), "b": jnp.ones((2, M))}})
    with pytest.raises(ValueError, match="LowRankSum.sweeps: got -1"):
        lora.LowRankSum(sweeps=-1)
    with pytest.raises(ValueError, match="momentum: got 1.5, wanted"):
        lora.lorsum(0.1, momentum=1.5)
    for x, s in (((5, N), (4, M)), ((5, 2), (5, M)), ((5, N), (5, 2))):
        taps = {"up": lora.Tap(jnp.ones(x), jnp.ones(s))}
        with pytest.raises(ValueError, match=r"tap of adapter up: got x .* wanted as many rows"):
            tx.update(adapter, tx.init(adapter), adapter, taps=taps)
    with pytest.raises(ValueError, match=r"adapter up: got factors of shapes \(12, 0\)"):
        tx.init({"up": {"a": jnp.ones((N, 0)), "b": jnp.ones((0, M))}})
    for make in (lora.lorsum, lora.scaled_lorsum, lora.projected_lorsum):
        with pytest.raises(ValueError, match="learning_rate: got None"):
            make(None)
    for options in ({"momentum_rank": "2"}, {"jitter": "0"}, {"seed": "0"}):
        with pytest.raises(ValueError, match=f"LowRankSum.{next(iter(options))}: got"):
            lora.LowRankSum(**options)
    with pytest.raises(ValueError, match="FactorMetric.init: got nan"):
        lora.FactorMetric(init=np.nan)
