"""Random trees, and runs of an optimizer on given gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tests.quick_compile import NEW_EMITTERS


def normal(seed, shapes, *lead):
    """Float32 arrays of these shapes, `lead` axes before each."""
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=(*lead, *s)), "float32") for k, s in shapes.items()}


def scan(tx, params, grads):
    """Updates of each step (stacked), the last parameters and the last state.

    Args:
      tx: The transformation.
      params: Initial parameters.
      grads: Gradients with a leading axis of steps.
    """

    def step(carry, grad):
        params, state = carry
        updates, state = tx.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), updates

    (params, state), updates = jax.lax.scan(step, (params, tx.init(params)), grads)
    return updates, params, state


def fast_jit(fn):
    """For tiny programs that run once: compiled fast, not to be fast."""
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0, **NEW_EMITTERS})


def run(tx, params, grads):
    """`scan` as one compiled program."""
    return fast_jit(functools.partial(scan, tx))(params, grads)
