"""The average of the weights beside an optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_lab as jol
from tests.optim.runs import normal, run

SHAPES = {"w": (2, 3), "b": (3,)}


def averages(path, start, decay):
    """The recursion over the weights after each step."""
    e = start
    for t, w in enumerate(path):
        d = min(decay, (1 + t) / (10 + t))
        e = d * e + (1 - d) * w
    return e


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
def test_it_averages_the_weights_after_each_step(decay):
    params, grads = normal(0, SHAPES), normal(1, SHAPES, 12)
    updates, _, state = run(optax.chain(optax.sgd(0.1), jol.track_params_ema(decay)), params, grads)
    for name, g in grads.items():
        np.testing.assert_allclose(updates[name], -0.1 * g, rtol=1e-6)  # passed through
        path = np.asarray(params[name], float) - 0.1 * np.cumsum(np.asarray(g, float), 0)
        wanted = averages(path, np.asarray(params[name], float), decay)
        np.testing.assert_allclose(jol.params_ema(state)[name], wanted, rtol=1e-4, atol=1e-5)


def test_bfloat16_weights_are_averaged_in_float32():
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    tx = jol.track_params_ema(0.999)
    state = tx.init(params)._replace(count=jnp.int32(100_000))
    _, state = tx.update({"w": jnp.ones(2, jnp.bfloat16)}, state, params)
    # bfloat16 would round 1.001 back to 1.
    np.testing.assert_allclose(state.ema["w"], 1.001, rtol=1e-6)
    assert jol.track_params_ema(0.9, dtype="bfloat16").init(params).ema["w"].dtype == jnp.bfloat16


def test_it_does_not_share_memory_with_the_weights():
    params = {"w": jnp.ones(3)}
    state = jol.track_params_ema(0.9).init(params)
    jax.jit(lambda p: jax.tree.map(jnp.zeros_like, p), donate_argnums=0)(params)
    np.testing.assert_array_equal(state.ema["w"], 1.0)


def test_it_is_found_in_any_chain():
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    tx = optax.chain(optax.clip(1.0), jol.lion_muon(1e-3), jol.track_params_ema(0.9))
    nested = optax.MultiSteps(tx, 2).gradient_transformation()
    for wrapped in (tx, nested, optax.inject_hyperparams(jol.track_params_ema)(decay=0.9)):
        found = jol.params_ema(wrapped.init(params))
        np.testing.assert_array_equal(found["w"], params["w"])


@pytest.mark.parametrize("copies", [0, 2])
def test_none_or_several_averages_are_an_error(copies):
    tx = optax.chain(optax.sgd(0.1), *[jol.track_params_ema(0.9)] * copies)
    with pytest.raises(ValueError, match=f"holds {copies} weight averages; wanted exactly one"):
        jol.params_ema(tx.init({"w": jnp.ones(2)}))


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_outside_its_range(decay):
    with pytest.raises(ValueError, match=f"decay: got {decay}"):
        jol.track_params_ema(decay)


def test_it_needs_the_parameters():
    tx = jol.track_params_ema(0.9)
    with pytest.raises(ValueError, match="needs update"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
