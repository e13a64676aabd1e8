"""The stable-rank trigger: its start vectors, its keys, and decisions matrix by matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers as Axes

import jaxopt_lab as jol
from tests.optim.runs import fast_jit


def triggered(threshold=0.5, **options):
    one_step = jol.NewtonSchulz(steps=1)
    fixed = {"b1": 0.0, "b2": 0.0, "newton_schulz": one_step, "sign_rate": 1.0}
    return jol.scale_by_stable_rank(threshold, **(fixed | options))


def by_sign(update):
    return np.isin(update, (-1.0, 0.0, 1.0)).all(axis=(-2, -1)).tolist()


@pytest.mark.parametrize("batched", [False, True])
def test_supplied_draws_replace_sampling(batched):
    # Stable rank 1.02; seen from the second axis alone it looks like 102.
    grads = {"a": jnp.diag(jnp.array([10.0, 1.0, 1.0])), "b": jnp.diag(jnp.array([10.0, 1.0, 1.0]))}
    draws = {"a": jnp.eye(3)[0], "b": jnp.eye(3)[1]}
    if batched:
        draws = jax.tree.map(lambda v: v[None], draws)
    tx = triggered()
    updates, _ = fast_jit(tx.update)(grads, tx.init(grads), grads, draws=draws)
    assert not np.array_equal(updates["a"], np.sign(grads["a"]))
    np.testing.assert_array_equal(updates["b"], np.sign(grads["b"]))


def test_draws_start_on_the_reduction_side_and_are_checked():
    grads = {"w": jnp.ones((3, 5))}
    tx = triggered()
    state = tx.init(grads)
    jax.eval_shape(tx.update, grads, state, grads, draws={"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"draws of leaf \['w'\] has shape \(5,\).*\(1, 3\)"):
        tx.update(grads, state, grads, draws={"w": jnp.ones(5)})
    with pytest.raises(ValueError, match="draws has 0 leaves; the tree has 1"):
        tx.update(grads, state, grads, draws={})


# Singular values close together: where the power iteration ends depends on where it starts.
MARGINAL = jnp.broadcast_to(jnp.diag(jnp.array([1.0, 0.9, 0.8])), (24, 3, 3))
THRESHOLD = 0.86
TWINS = {"x": MARGINAL, "y": MARGINAL}


def keyed(seed):
    return triggered(THRESHOLD, matrix_axes=Axes(1, 2), key=jax.random.key(seed))


@functools.cache
def update_twins():
    return fast_jit(keyed(0).update)


def decisions(state, update=None):
    """Which matrices took the sign step, and the next state."""
    updates, state = (update or update_twins())(TWINS, state, TWINS)
    return {k: by_sign(u) for k, u in updates.items()}, state


def test_decisions_depend_on_key_and_step_alone():
    first, state = decisions(keyed(1).init(TWINS))
    assert 0.2 < np.mean(first["x"]) < 0.8
    second, _ = decisions(state)
    assert second != first, "every step draws afresh"
    assert decisions(keyed(1).init(TWINS))[0] == first
    assert decisions(keyed(2).init(TWINS))[0] != first


def test_a_leaf_decides_alike_when_others_are_masked():
    together, _ = decisions(keyed(1).init(TWINS))
    assert together["x"] != together["y"], "every leaf draws for itself"
    masked = optax.masked(keyed(1), {"x": False, "y": True})
    alone, _ = decisions(masked.init(TWINS), fast_jit(masked.update))
    assert alone["y"] == together["y"]


def test_rate_and_decay_follow_each_matrix():
    tx = triggered(THRESHOLD, matrix_axes=Axes(1, 2), spectral_rate=0.0, weight_decay=0.5)
    params = jnp.full_like(MARGINAL, 4.0)
    updates, _ = fast_jit(tx.update)(MARGINAL, tx.init(MARGINAL), params)
    moved = np.abs(updates).max(axis=(1, 2)) > 0
    assert 0 < moved.sum() < 24
    np.testing.assert_array_equal(updates[moved], np.sign(MARGINAL[moved]) + 2.0)
