"""AdamW whose epsilon stands beside the uncorrected root."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_lab as jol
from tests.optim.runs import normal, run

B1, B2, EPS = 0.8, 0.999, 1e-2  # an epsilon large enough to be seen


def test_it_is_adam_with_a_decaying_epsilon():
    shapes = {"a": (3, 4), "b": (5,)}
    params, grads = normal(0, shapes), normal(1, shapes, 5)
    ours, _, state = run(jol.scale_by_adamw_fallback(b1=B1, b2=B2, eps=EPS), params, grads)
    adam = optax.inject_hyperparams(optax.scale_by_adam)(
        b1=B1, b2=B2, eps=lambda step: EPS / jnp.sqrt(1 - B2 ** (step + 1.0))
    )
    theirs, _, reference = run(adam, params, grads)
    for name in shapes:
        # Optax's 1 - b2**t is a difference of float32 numbers close to one.
        np.testing.assert_allclose(ours[name], theirs[name], rtol=3e-4)
        for moment in ("mu", "nu"):
            np.testing.assert_allclose(
                getattr(state, moment)[name],
                getattr(reference.inner_state, moment)[name],
                rtol=1e-4,
            )
    plain, _, _ = run(optax.scale_by_adam(b1=B1, b2=B2, eps=EPS), params, grads)
    assert np.abs(plain["b"] - ours["b"]).max() > 0.05, "the epsilon is not where Adam has it"


@pytest.mark.parametrize("b2", [0.9, 0.999, 0.99999])
def test_the_first_step_is_the_sign_to_the_last_digits(b2):
    g = jnp.array([3.0, -0.5, 1e3])
    tx = jol.scale_by_adamw_fallback(b1=0.8, b2=b2, eps=0.0)
    step, _ = tx.update(g, tx.init(g))
    np.testing.assert_allclose(step, np.sign(g), rtol=5e-7)


def test_dtypes_of_moments_and_update():
    g = jnp.ones(3, jnp.bfloat16)
    tx = jol.scale_by_adamw_fallback(mu_dtype="float32")
    step, state = tx.update(g, tx.init(g))
    assert (state.mu.dtype, state.nu.dtype, step.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)


def test_extreme_decays_and_zero_gradients_are_finite():
    for b1, b2 in ((0.0, 0.0), (0.0, 0.999)):
        tx = jol.scale_by_adamw_fallback(b1=b1, b2=b2)
        g = jnp.array([2.0, 0.0])
        state = tx.init(g)
        for _ in range(2):
            step, state = tx.update(g, state)
            np.testing.assert_allclose(step, [1.0, 0.0], rtol=1e-5)
