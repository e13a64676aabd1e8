"""Properties of JAGUAR's coordinate momentum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import zeroth_order as zo
from tests.zeroth_order.problems import (
    AXES,
    FEW_AXES,
    KEY,
    entries,
    few,
    quadratic,
    rough,
    run,
    tree,
)

PROBES = zo.Probes(matrix_axes=AXES)
HALF = zo.Probes(zo.blocks(rows_ratio=0.5, cols_ratio=0.5), matrix_axes=AXES)


def with_momentum(tx, x, m):
    state = tx.init(x)
    return state._replace(momentum=zo.CoordinateMomentumState(m))


def test_the_average_over_single_coordinates():
    # Over all i: mean m' = (1 - (1 - b)/d) m + (1 - b)/d grad, and the squared error contracts.
    with jax.enable_x64(True):
        d, b = 6, 0.7
        hessian = jax.random.normal(jax.random.key(1), (d, d))
        hessian = hessian @ hessian.T
        x, m = jax.random.normal(jax.random.key(2), (2, d))
        tx = zo.scale_by_jaguar(eps=0.1, b1=b, key=KEY, probes=zo.Probes(zo.single_coordinate()))

        def refreshed(one_hot):
            loss = {"value_fn": lambda x: x @ hessian @ x / 2, "draws": one_hot[None]}
            return tx.update(None, with_momentum(tx, x, m), x, **loss)[0]

        new = jax.jit(jax.vmap(refreshed))(jnp.eye(d))
        slope = hessian @ x
        wanted = (1 - (1 - b) / d) * m + (1 - b) / d * slope
        np.testing.assert_allclose(new.mean(0), wanted, rtol=1e-9)
        error = jnp.mean(jnp.sum((new - slope) ** 2, 1))
        wanted = (1 - (1 - b**2) / d) * jnp.sum((m - slope) ** 2)
        np.testing.assert_allclose(error, wanted, rtol=1e-9)
        # Every coordinate in turn, nothing kept: the gradient.
        tx = zo.scale_by_jaguar(eps=0.1, b1=0.0, key=KEY, probes=zo.Probes(zo.single_coordinate()))
        state, loss = tx.init(x), lambda x: x @ hessian @ x / 2
        step = jax.jit(lambda state, z: tx.update(None, state, x, value_fn=loss, draws=z))
        for one_hot in jnp.eye(d):
            m, state = step(state, one_hot[None])
        np.testing.assert_allclose(m, slope, rtol=1e-9)


@pytest.mark.parametrize("random_signs", [False, True], ids=["ones", "signs"])
def test_a_block_gets_one_number_and_the_rest_stays(random_signs):
    params = tree()
    sampler = zo.blocks(rows_ratio=0.5, cols_ratio=0.5, random_signs=random_signs)
    tx = zo.scale_by_jaguar(b1=0.9, key=KEY, probes=zo.Probes(sampler, matrix_axes=AXES))
    before = tree(5)
    _, state, _ = run(tx, params, rough, 1, state=with_momentum(tx, params, before))
    old, new = entries(before), entries(state.momentum.mu)
    difference = (state.probes.losses[0] - state.probes.losses[1]) / 2e-3
    touched = np.flatnonzero(new != old)
    assert len(touched) == 6 * 3 * 2 + 2 + 3 + 2 * 2 * 3 + 1
    numbers = (new[touched] - 0.9 * old[touched]) / 0.1
    if random_signs:
        numbers = np.abs(numbers) * np.sign(difference)
    np.testing.assert_allclose(numbers, difference, rtol=1e-3, atol=1e-3)


def test_every_touched_entry_moves_by_the_rate_and_keeps_moving():
    params = tree()
    tx = zo.jaguar_signsgd(0.25, key=KEY, probes=HALF)
    first, state, updates = run(tx, params, rough, 1)
    moved = np.abs(entries(updates))
    assert set(np.unique(moved)) == {0.0, 0.25}
    later = np.abs(entries(run(tx, first, rough, 1, state=state)[2]))
    assert (later[moved > 0] == 0.25).all() and later.sum() > moved.sum()


def test_several_directions_add_up_where_they_overlap():
    params = {"w": jnp.array([1.0, 2.0, 3.0])}
    draws = {"w": jnp.array([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])}
    probes = zo.Probes(num_directions=2)
    tx = zo.scale_by_jaguar(eps=0.1, b1=0.5, key=KEY, probes=probes)
    start = with_momentum(tx, params, {"w": jnp.array([8.0, 8.0, 8.0])})
    _, state, _ = run(tx, params, quadratic, 1, state=start, draws=draws)
    # D is 3 and 2; half of each, and half of the old momentum where something was drawn.
    wanted = [4 + 0.5 * 1.5, 4 + 0.5 * 2.5, 8]
    np.testing.assert_allclose(state.momentum.mu["w"], wanted, rtol=1e-3)
    same = {"w": jnp.array([[1.0, 1.0, 0.0]] * 2)}
    twice = run(tx, params, quadratic, 1, draws=same)[1].momentum.mu
    tx = zo.scale_by_jaguar(eps=0.1, b1=0.5, key=KEY)
    once = run(tx, params, quadratic, 1, draws={"w": same["w"][:1]})[1].momentum.mu
    np.testing.assert_allclose(twice["w"], once["w"], rtol=1e-5)


def test_all_matrices_of_a_sparse_step_are_sign_descent_with_an_average():
    params = tree()
    probes = zo.Probes(zo.sparse(params_ratio=1.0), matrix_axes=AXES)
    sparse = zo.jaguar_signsgd(0.1, b1=0.9, key=KEY, probes=probes)
    dense = zo.zo_signsgd(0.1, b1=0.9, key=KEY, probes=PROBES)
    ours, theirs = (run(tx, params, rough)[0] for tx in (sparse, dense))
    np.testing.assert_array_equal(entries(ours), entries(theirs))


def test_a_sparse_step_leaves_the_momentum_of_the_others():
    params = few()
    probes = zo.Probes(zo.sparse(params_ratio=0.2), num_directions=3, matrix_axes=FEW_AXES)
    tx = zo.scale_by_jaguar(b1=0.9, key=KEY, probes=probes)
    before = few(5)
    _, state, _ = run(tx, params, rough, 1, state=with_momentum(tx, params, before))
    same = entries(before) == entries(state.momentum.mu)
    assert 0 < (~same).sum() < same.sum()


def test_matrix_steps_are_bounded_and_scaled():
    params = tree()
    tx = zo.jaguar_muon(1.0, matrix_scale=0.5, key=KEY, probes=HALF)
    updates = run(tx, params, rough, 4)[2]
    norms = np.linalg.norm(np.asarray(updates["kernel"]), 2, axis=(1, 2))
    assert (0.25 < norms).all() and (norms <= 0.5 * 1.203).all()
    assert set(np.abs(np.asarray(updates["bias"]))) <= {0.0, 1.0}


def test_blocks_of_everything_run():
    probes = zo.Probes(zo.blocks(rows_ratio=1.0, cols_ratio=1.0))
    _, state, _ = run(zo.scale_by_jaguar(key=KEY, probes=probes), {"w": jnp.ones((3, 4))}, rough, 1)
    assert np.ptp(state.momentum.mu["w"]) == 0


def test_directions_whose_loss_is_not_finite_leave_the_momentum():
    x, m = jnp.zeros(3), jnp.array([1.0, -1.0, 1.0])
    tx = zo.scale_by_jaguar(b1=0.5, key=KEY, probes=zo.Probes(num_directions=2))

    def loss(x):
        return 4 * x[0] + jnp.where(x[1] > 0, jnp.nan, 0.0)

    new, _ = tx.update(None, with_momentum(tx, x, m), x, value_fn=loss, draws=jnp.eye(3)[:2])
    np.testing.assert_allclose(new, [0.5 + 0.5 * 4 / 2, -1, 1], rtol=1e-3)
