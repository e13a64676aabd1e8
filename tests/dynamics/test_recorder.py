import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab.dynamics.landscape.recorder import (
    FluctuationState,
    fluctuation_mean,
    fluctuation_variance,
    record_fluctuations,
)

REFERENCE = {"kernel": jnp.arange(6.0).reshape(3, 2), "bias": jnp.array([0.5, -0.5])}
DIRECTIONS = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (8, 3)))[0]


def walk(steps, scale=0.1, seed=1):
    """Weights of a random walk around the reference: a tree with a leading axis of steps."""
    leaves, structure = jax.tree.flatten(REFERENCE)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moves = [jax.random.normal(k, (steps, *x.shape)) for k, x in zip(keys, leaves, strict=True)]
    offsets = [scale * jnp.cumsum(m, axis=0) for m in moves]
    return structure.unflatten([x + o for x, o in zip(leaves, offsets, strict=True)])


def recorded(tx, weights):
    first = jax.tree.map(lambda w: w[0], weights)

    def step(state, w):
        updates, state = tx.update(w, state, w)
        return state, updates

    return jax.jit(lambda: jax.lax.scan(step, tx.init(first), weights))()


def projections(weights):
    offsets = jax.tree.map(lambda w, r: np.asarray(w, np.float64) - r, weights, REFERENCE)
    steps = offsets["bias"].shape[0]
    flat = [np.asarray(offsets[name]).reshape(steps, -1) for name in ("bias", "kernel")]
    return np.concatenate(flat, axis=1) @ np.asarray(DIRECTIONS, np.float64)


def test_mean_and_variance_are_those_of_the_trajectory():
    weights = walk(50)
    state, updates = recorded(record_fluctuations(REFERENCE, DIRECTIONS), weights)
    chex.assert_trees_all_equal(updates, weights)  # passed through
    assert state.count == 50
    y = projections(weights)
    np.testing.assert_allclose(fluctuation_mean(state), y.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(fluctuation_variance(state), y.var(0, ddof=1), rtol=1e-5)


def test_small_variances_around_a_large_mean_survive():
    # In float32 the mean of squares minus the square of the mean would be all rounding here.
    with jax.enable_x64(True):
        reference = jnp.full(4, 1e3)
        noise = 1e-7 * jax.random.normal(jax.random.key(2), (100, 4))
        weights = reference + 0.5 + noise
        state, _ = recorded(record_fluctuations(reference, jnp.eye(4)), weights)
        np.testing.assert_allclose(
            fluctuation_variance(state), np.var(weights - reference, axis=0, ddof=1), rtol=1e-5
        )


def test_below_two_steps_there_is_no_variance():
    tx = record_fluctuations(REFERENCE, DIRECTIONS)
    assert jnp.isnan(fluctuation_variance(tx.init(REFERENCE))).all()
    state, _ = recorded(tx, walk(1))
    assert jnp.isnan(fluctuation_variance(state)).all()


def test_the_state_is_found_in_a_chain_and_has_one_row_per_run():
    tx = optax.chain(optax.sgd(0.1), record_fluctuations(REFERENCE, DIRECTIONS))
    runs = [walk(20, seed=seed) for seed in (1, 2)]
    together = jax.vmap(lambda w: recorded(tx, w)[0])(jax.tree.map(lambda *x: jnp.stack(x), *runs))
    variance = fluctuation_variance(together)
    for i, weights in enumerate(runs):
        np.testing.assert_allclose(variance[i], projections(weights).var(0, ddof=1), rtol=1e-4)
    with pytest.raises(ValueError, match="no FluctuationState"):
        fluctuation_variance(optax.sgd(0.1).init(REFERENCE))


def test_state_contract():
    tx = record_fluctuations(REFERENCE, DIRECTIONS)
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), REFERENCE)
    assert isinstance(tx.init(abstract), FluctuationState)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), REFERENCE)
    _, state = tx.update(half, tx.init(half), half)
    assert state.mean.dtype == state.m2.dtype == jnp.float32 and state.count.dtype == jnp.int32
    step = jax.jit(chex.assert_max_traces(lambda s: tx.update(half, s, half)[1], n=1))
    step(step(state))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"directions: got shape \(7, 2\), expected \(8, k\)"):
        record_fluctuations(REFERENCE, jnp.ones((7, 2)))
    tx = record_fluctuations(REFERENCE, DIRECTIONS)
    with pytest.raises(ValueError, match="params: missing"):
        tx.update(REFERENCE, tx.init(REFERENCE))
    with pytest.raises(ValueError, match="params: other leaves"):
        tx.init({"kernel": jnp.ones((3, 2))})
