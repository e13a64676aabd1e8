"""The recorder inside small training loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import jaxopt_lab as jol
from jaxopt_lab.diagnostics import FisherErrors, Snapshot, find_state
from jaxopt_lab.diagnostics.fisher_recorder import METRICS
from jaxopt_lab.optim.kronecker.transform import EigenbasisAdamState
from tests.reference import kronecker as reference

M, N, DECAY = 3, 4, 0.9


def gradients(steps, shape, seed=0):
    rng = np.random.default_rng(seed)
    return np.float32(rng.standard_normal((steps, *shape)) + rng.standard_normal(shape))


def run(recorder, grads, state, tx=None):
    """Feeds a stream of gradient trees; the records of the due steps and the last state seen."""
    params = jax.tree.map(lambda g: jnp.zeros(g.shape[1:]), grads)
    records, after = {}, state
    update = jax.jit(tx.update) if tx else None
    for step in range(1, len(jax.tree.leaves(grads)[0]) + 1):
        grad, state = jax.tree.map(lambda g, step=step: jnp.asarray(g[step - 1]), grads), after
        if recorder.due(step):
            records[step] = recorder.record(Snapshot(step, params, grad, state, grad))
        if update:
            after = update(grad, state, params)[1]
    return records, state


def any_state(shape, *, one_sided=False, rank_one=False):
    """A state with random contents for the single leaf `w`."""
    rng = np.random.default_rng(1)
    *batch, m, n = shape

    def factor(size):
        x = rng.standard_normal((*batch, size, size))
        return {"w": jnp.asarray(x @ x.swapaxes(-1, -2), jnp.float32)}

    rows, columns = factor(m), factor(n)
    bases = [{"w": np.linalg.eigh(x["w"])[1]} for x in (rows, columns)]
    zero, missing = {"w": np.zeros(batch, np.int32)}, {"w": optax.MaskedNode()}
    positive = {s: {"w": rng.uniform(0, 1, s)} for s in (tuple(shape), (*batch, m), (*batch, n))}
    unused = optax.MaskedNode()
    return EigenbasisAdamState(
        count=np.zeros([], np.int32),
        age=zero,
        notfinite_count=zero,
        mu={"w": np.zeros(shape, np.float32)},
        nu=unused if rank_one else positive[tuple(shape)],
        row_nu=positive[*batch, m] if rank_one else unused,
        column_nu=positive[*batch, n] if rank_one else unused,
        row_factor=rows,
        column_factor=missing if one_sided else columns,
        row_basis=bases[0],
        column_basis=missing if one_sided else bases[1],
    )


def test_all_gradients_of_a_small_layer():
    grads = {"w": gradients(6, (M, N)), "b": gradients(6, (N,))}
    recorder = FisherErrors(6, window=None, decay=DECAY)
    basis = jol.Eigenbasis(orthogonalizer="householder")
    tx = jol.dykaf(0.0, b2=DECAY, precondition_frequency=2, eigenbasis=basis)
    params = jax.tree.map(lambda g: jnp.zeros(g.shape[1:]), grads)
    records, state = run(recorder, grads, tx.init(params), tx)
    assert all(records[step] == {} for step in range(1, 6))
    got = records[6]
    assert set(got) == {f"w/{metric}" for metric in METRICS}
    state = find_state(state, EigenbasisAdamState)
    # The state at step 6 has seen five gradients.
    matrix = recorder_matrix(grads["w"][:5])
    left, right = (np.asarray(x["w"]) for x in (state.row_factor, state.column_factor))
    bases = [np.asarray(x["w"]) for x in (state.row_basis, state.column_basis)]
    best = reference.best(reference.rearranged(matrix, M, N), M, N)
    product, best_product = np.kron(left, right), np.kron(*best)
    errors = reference.errors(matrix, product)
    np.testing.assert_allclose((got["w/kronecker"], got["w/kronecker_rescaled"]), errors, rtol=1e-4)
    np.testing.assert_allclose(got["w/best"], reference.errors(matrix, best_product)[0], rtol=1e-4)
    distances = reference.errors(best_product, product)
    names = ("w/distance", "w/distance_rescaled")
    np.testing.assert_allclose([got[name] for name in names], distances, rtol=1e-3)
    approximation = reference.from_basis(np.asarray(state.nu["w"]), *bases)
    wanted = reference.errors(matrix, approximation)[1]
    np.testing.assert_allclose(got["w/eigenbasis_rescaled"], wanted, rtol=1e-4)
    diagonal = np.diag(reference.in_basis(matrix, *bases))
    wanted = np.linalg.norm(diagonal) / np.linalg.norm(matrix)
    np.testing.assert_allclose(got["w/diagonal_mass"], wanted, rtol=1e-4)
    assert got["w/best"] <= got["w/kronecker_rescaled"] <= got["w/kronecker"]


def test_a_window_of_a_stacked_leaf_is_the_mean_over_its_matrices():
    grads = {"w": gradients(8, (2, M, N))}
    axes = {"w": MuonDimensionNumbers(1, 2)}
    recorder = FisherErrors(8, ["w"], window=3, decay=1.0, matrix_axes=axes)
    assert [recorder.due(step) for step in range(1, 9)] == [False] * 4 + [True] * 4
    state = any_state((2, M, N))
    records, _ = run(recorder, grads, state)
    assert records[5] == records[6] == records[7] == {}
    wanted = []
    for i in range(2):
        # The gradients of steps 5, 6 and 7: the state of step 8 has not seen the eighth.
        matrix = sum(map(reference.second_moment, grads["w"][4:7, i]))
        factors = (np.asarray(x["w"][i]) for x in (state.row_factor, state.column_factor))
        wanted.append(reference.errors(matrix, np.kron(*factors)))
    names = ("w/kronecker", "w/kronecker_rescaled")
    np.testing.assert_allclose([records[8][x] for x in names], np.mean(wanted, 0), rtol=1e-3)


def test_missing_factors_are_identities_and_factored_moments_products():
    grads = {"w": gradients(4, (M, N))}
    matrix = recorder_matrix(grads["w"][:3])
    for state in (any_state((M, N), one_sided=True), any_state((M, N), rank_one=True)):
        got = run(FisherErrors(4, window=None, decay=DECAY), grads, state)[0][4]
        one_sided = isinstance(state.column_basis["w"], optax.MaskedNode)
        bases = state.row_basis["w"], np.eye(N) if one_sided else state.column_basis["w"]
        values = state.nu["w"] if one_sided else np.outer(state.row_nu["w"], state.column_nu["w"])
        wanted = reference.errors(matrix, reference.from_basis(values, *bases))[1]
        np.testing.assert_allclose(got["w/eigenbasis_rescaled"], wanted, rtol=1e-4)
        diagonal = np.diag(reference.in_basis(matrix, *bases))
        wanted = np.linalg.norm(diagonal) / np.linalg.norm(matrix)
        np.testing.assert_allclose(got["w/diagonal_mass"], wanted, rtol=1e-4)


def recorder_matrix(grads):
    matrix = reference.second_moment(grads[0])
    for grad in grads[1:]:
        matrix = DECAY * matrix + (1 - DECAY) * reference.second_moment(grad)
    return matrix


def test_without_gradients_there_is_nothing_to_say():
    grads = {"w": gradients(1, (M, N))}
    records, _ = run(FisherErrors(1, window=None, decay=DECAY), grads, any_state((M, N)))
    assert np.isnan(list(records[1].values())).all()


@pytest.mark.parametrize("factory", [jol.dykaf, jol.scale_by_dykaf])
def test_matrices_without_a_factor_are_left_out(factory):
    """Longer than the limit on both sides: AdamW's in a model, and without a basis alone."""
    grads = {"large": gradients(2, (6, 7)), "one": gradients(2, (6, 4)), "w": gradients(2, (M, N))}
    params = jax.tree.map(lambda g: jnp.zeros(g.shape[1:]), grads)

    def record(layers, limit=5):
        rate = () if factory is jol.scale_by_dykaf else (0.0,)
        state = factory(*rate, eigenbasis=jol.Eigenbasis(max_precond_dim=limit)).init(params)
        return run(FisherErrors(2, layers, window=1, decay=DECAY), grads, state)[0][2]

    assert {name.split("/")[0] for name in record(None)} == {"one", "w"}
    with pytest.raises(ValueError, match="layers: 'large' is not one of .* with factors: one, w$"):
        record(["w", "large"])
    with pytest.raises(ValueError, match="factors of none of the matrices"):
        record(None, limit=2)


def test_bad_choices_are_named():
    with pytest.raises(ValueError, match="window: got 4, expected 1 to 3"):
        FisherErrors(4, window=4, decay=DECAY)
    with pytest.raises(ValueError, match="interval: got 0"):
        FisherErrors(0, window=None, decay=DECAY)
    grads = {"w": gradients(1, (M, N)), "b": gradients(1, (N,))}
    with pytest.raises(ValueError, match="layers: 'b' is not one of .* with factors: w$"):
        run(FisherErrors(2, ["b"], window=None, decay=DECAY), grads, any_state((M, N)))
    wide = {"w": np.zeros((1, 64, 65), np.float32)}
    with pytest.raises(ValueError, match="64 x 65, too large"):
        run(FisherErrors(2, window=None, decay=DECAY), wide, any_state((64, 65)))
