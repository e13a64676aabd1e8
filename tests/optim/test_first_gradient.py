"""The wrapper that hides the first gradient, and decay after the step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab.optim.first_gradient import add_decay_after_step, skip_first_gradient
from tests.optim.runs import normal, run

SHAPES = {"a": (3, 4), "b": (5,)}


def test_the_inner_rule_never_sees_the_first_gradient():
    params, grads = normal(0, SHAPES), normal(1, SHAPES, 4)
    grads["a"] = grads["a"].at[0, 0, 0].set(jnp.nan)
    ours, _, state = run(skip_first_gradient(optax.adam(0.1)), params, grads)
    late = jax.tree.map(lambda g: g[1:], grads)
    theirs, _, reference = run(optax.adam(0.1), params, late)
    for name in SHAPES:
        np.testing.assert_array_equal(ours[name][0], 0)
        np.testing.assert_allclose(ours[name][1:], theirs[name], rtol=1e-5, atol=1e-7)
    assert state.count == 4 and state.inner_state[0].count == reference[0].count == 3


def test_the_decay_acts_on_the_moved_weights():
    params, grads = normal(0, SHAPES), normal(1, SHAPES, 3)
    rates, decay = jnp.array([0.3, 0.2, 0.1]), 0.5
    tx = optax.chain(
        add_decay_after_step(decay, lambda t: rates[t], {"a": True, "b": False}),
        optax.scale_by_learning_rate(lambda t: rates[t]),
    )
    _, last, _ = run(tx, params, grads)
    for name, w in params.items():
        for rate, g in zip(rates, grads[name], strict=True):
            w = w - rate * g
            w = w - (rate * decay * w if name == "a" else 0)
        np.testing.assert_allclose(last[name], w, rtol=0, atol=1e-6)


@pytest.mark.parametrize("skip", [False, True])
def test_the_first_step_may_be_exempt(skip):
    w = jnp.ones(3, jnp.bfloat16)
    tx = add_decay_after_step(0.5, 0.25, skip_first_step=skip)
    update, state = tx.update(0 * w, tx.init(w), w)
    assert update.dtype == jnp.bfloat16 and np.all(update == (0 if skip else 0.5))
    update, _ = tx.update(0 * w, state, w)
    assert np.all(update == 0.5)


def test_decay_needs_the_parameters():
    tx = add_decay_after_step(0.5, 0.25)
    with pytest.raises(ValueError, match="weight_decay needs the parameters"):
        tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
