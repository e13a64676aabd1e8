"""Runs of `adaptive_warmup` over given losses, and a scalar form of what it promises."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.schedules import adaptive_warmup

PEAK, STEPS, TARGET = 0.1, 40, 2.0
PARAMS = jnp.ones((2, 3))

# Most tests are not about the search: the peak gap is a share of the first gap.
make = functools.partial(
    adaptive_warmup, PEAK, STEPS, TARGET, 10.0, norm="frobenius", delta_star_rule=0.25
)
# Falls from 6 above the target to 0.2 above it, with noise.
NOISY = TARGET + 6 * 0.9 ** np.arange(STEPS) * (1 + 0.2 * np.sin(7.0 * np.arange(STEPS)))


def scan(tx, state, losses):
    """(final state, (update of a one at every step, state after it))."""
    ones = jnp.ones((2, 3))

    def step(state, loss):
        updates, state = tx.update(ones, state, ones, value=loss)
        return state, (updates[0, 0], state)

    return jax.lax.scan(step, state, losses)


@functools.cache
def compiled(tx):
    # Compiled fast, not to be fast.
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(lambda losses: scan(tx, tx.init(PARAMS), losses)[1], compiler_options=options)


def run(tx, losses):
    """(rate of every step, state after every step) of one compiled run."""
    updates, states = compiled(tx)(jnp.asarray(losses, jnp.result_type(float)))
    return -np.asarray(updates), jax.tree.map(np.asarray, states)


def reference(losses, *, share=0.25, div=10.0, total=STEPS, first=PEAK / 10.0, final=1e-4):
    """(rates, step of the switch) of the published algorithm, for a peak gap that is a share."""
    initial = losses[0] - TARGET
    peak, switch, rates = share * initial, -1, [first]
    for t, loss in enumerate(losses):
        gap = max(loss - TARGET, 1e-8)
        if switch < 0 and gap <= peak:
            switch = t
        if switch < 0:
            bent = (div - 1) * initial / gap * ((gap - peak) / (initial - peak)) ** 2
            rates.append(PEAK / (1 + bent))
        else:
            share_done = (t - switch + 2) / (total - switch)
            wave = (1 + math.cos(math.pi * share_done)) / 2
            rates.append(PEAK * (final + (1 - final) * wave))
    return np.array(rates), switch
