"""LoRA+ and LoRA-FA: what they do to each factor, over several steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxopt_lab import lora

N, M, R = 10, 6, 3


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape))


def run(tx, params, steps=4):
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(steps):
        grads = jax.tree.map(lambda p, t=t: draw(*p.shape, seed=t), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def tree():
    return {"up": {"a": draw(N, R), "b": draw(R, M)}, "head": draw(5)}


def test_lora_plus_is_adamw_with_two_rates():
    def rule(rate):
        return optax.adamw(rate, eps=0.0, weight_decay=0.1)

    tx = lora.lora_plus(1e-2, ratio=4.0, eps=0.0, weight_decay=0.1)
    got, _ = run(tx, tree())
    for name, side, rate in (("a", "a", 1e-2), ("b", "b", 4e-2)):
        wanted, _ = run(rule(rate), {side: tree()["up"][side]})
        np.testing.assert_allclose(got["up"][name], wanted[side], rtol=1e-10)
    # The other leaves do not decay unless the fallback says so.
    wanted, _ = run(optax.adam(1e-2, eps=0.0), {"head": tree()["head"]})
    np.testing.assert_allclose(got["head"], wanted["head"], rtol=1e-10)


def test_lora_fa_moves_b_by_adam_on_the_preconditioned_gradient():
    params = tree()
    got, state = run(lora.lora_fa(1e-2, eps=0.0), params)
    np.testing.assert_array_equal(got["up"]["a"], params["up"]["a"])
    a = np.asarray(params["up"]["a"])
    inverse = np.linalg.inv(a.T @ a + 1e-8 * np.eye(R))
    b, adam = params["up"]["b"], optax.adam(1e-2, eps=0.0)
    inner = adam.init(b)
    for t in range(4):
        direction = inverse @ np.asarray(draw(R, M, seed=t))
        updates, inner = adam.update(jnp.asarray(direction), inner, b)
        b = optax.apply_updates(b, updates)
    np.testing.assert_allclose(got["up"]["b"], b, rtol=1e-9)
    moments = sum(x.size for x in jax.tree.leaves(state) if x.ndim > 1)
    assert moments == 2 * R * M  # none for a


def test_factors_of_other_libraries():
    module = nnx.LoRA(N, R, M, rngs=nnx.Rngs(0))
    qwix = {"layer": {"kernel_lora_a": draw(N, R), "kernel_lora_b": draw(R, M), "bias": draw(M)}}
    for params, moved in ((nnx.state(module), 2), (qwix, 3)):
        tx = lora.preconditioned(1e-2)
        grads = jax.tree.map(lambda p: draw(*p.shape, seed=7).astype(p.dtype), params)
        updates, _ = tx.update(grads, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        leaves = jax.tree.leaves(updates)
        assert len(leaves) == moved and all(np.isfinite(u).all() and u.any() for u in leaves)
