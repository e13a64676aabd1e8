"""Norm ratios against the NumPy reference, and the recorder inside a small training loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab.diagnostics import Every, NormRatios, Snapshot, direction_of, norm_ratios
from jaxopt_lab.diagnostics.norms import RATIOS
from jaxopt_lab.optim import NewtonSchulz, lion_muon
from tests.reference import norm_ratios as reference

FLOAT32 = NewtonSchulz(dtype="float32")
PARAMS = {"stack": (3, 4, 5), "kernel": (5, 5), "bias": (5,)}
AXES = {
    "stack": MuonDimensionNumbers(reduction_axis=1, output_axis=2),
    "kernel": MuonDimensionNumbers(),
    "bias": None,
}


def draw(rng):
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in PARAMS.items()}


def matrices(tree):
    return [*np.float64(tree["stack"]), np.float64(tree["kernel"])]


def measure(trees, previous=None):
    values, record = norm_ratios(*trees, previous, matrix_axes=AXES)
    return {name: float(value) for name, value in values.items()}, record


def test_equals_the_reference_over_two_records():
    rng = np.random.default_rng(0)
    previous_ours = previous = None
    for _ in range(2):
        trees = [draw(rng) for _ in range(4)]
        ours, previous_ours = measure(trees, previous_ours)
        grads, params, direction, momentum = map(matrices, trees)
        wanted = reference.norm_ratios(grads, params, direction, momentum, previous)
        previous = grads, params
        assert set(ours) == set(wanted) == set(RATIOS)
        for name in RATIOS:
            np.testing.assert_allclose(ours[name], wanted[name], rtol=5e-6, err_msg=name)
    assert all(np.isfinite(list(ours.values())))


def test_first_record_has_no_differences():
    ours, _ = measure([draw(np.random.default_rng(i)) for i in range(4)])
    undefined = {name for name, value in ours.items() if np.isnan(value)}
    assert undefined == {"smooth_nuc_over_2", "smooth_1_over_inf"}


def test_undefined_ratios_leave_the_median():
    trees = [draw(np.random.default_rng(i)) for i in range(4)]
    expected, _ = measure(trees)
    dead = [dict(tree, kernel=np.zeros_like(tree["kernel"])) for tree in trees]
    stack_only = {**AXES, "kernel": None}
    alone, _ = norm_ratios(*trees, matrix_axes=stack_only)
    ours, _ = measure(dead)
    for name in RATIOS[:5]:
        np.testing.assert_allclose(ours[name], alone[name], rtol=1e-6)
        assert ours[name] != expected[name]
    nothing, _ = measure([jax.tree.map(np.zeros_like, tree) for tree in trees])
    assert np.isnan(list(nothing.values())).all()


def test_ratios_do_not_see_the_rate_or_its_sign():
    trees = [draw(np.random.default_rng(i)) for i in range(4)]
    plain, _ = measure(trees)
    trees[2] = jax.tree.map(lambda u: -1e-3 * u, trees[2])
    scaled, _ = measure(trees)
    np.testing.assert_allclose(list(scaled.values()), list(plain.values()), rtol=1e-6)


def test_the_record_is_float32_and_differences_start_from_the_unrounded_value():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        trees = [jax.tree.map(np.float64, draw(rng)) for _ in range(4)]
        trees = [jax.tree.map(lambda x: jnp.asarray(x + 1e-9), tree) for tree in trees]
        _, record = measure(trees)
        assert {x.dtype for x in jax.tree.leaves(record)} == {jnp.dtype(jnp.float32)}
        # Nothing moved: what is left is what the record lost by rounding.
        ours, _ = measure(trees, record)
        lost = [np.abs(np.float32(x) - x).max() for x in map(np.asarray, trees[1].values())]
        assert 0 < max(lost) and np.isfinite(ours["smooth_1_over_inf"])


def test_a_missing_matrix_is_named():
    trees = [draw(np.random.default_rng(i)) for i in range(4)]
    del trees[3]["kernel"]
    with pytest.raises(ValueError, match=r"momentum has no leaf \['kernel'\]"):
        norm_ratios(*trees, matrix_axes=AXES)


def train(recorder, steps, period=2, decay=0.5):
    """A loop as a trainer would write it: a snapshot is made on recorded steps alone."""
    options = {"period": period, "matrix_axes": AXES, "newton_schulz": FLOAT32}
    tx = lion_muon(0.01, weight_decay=decay, **options)
    params = draw(np.random.default_rng(0))
    grads = draw(np.random.default_rng(1))
    state = tx.init(params)
    update = jax.jit(tx.update)
    metrics = {}
    for step in range(1, steps + 1):
        updates, new_state = update(grads, state, params)
        if recorder.due(step):
            metrics[step] = recorder.record(Snapshot(step, params, grads, state, updates))
        params, state = optax.apply_updates(params, updates), new_state
    return metrics


def recorder_of(every, period=2):
    undecayed = lion_muon(0.01, period=period, matrix_axes=AXES, newton_schulz=FLOAT32)
    return NormRatios(every, direction_of(undecayed), matrix_axes=AXES)


def test_an_even_interval_sees_sign_steps_alone_and_residues_see_both():
    metrics = train(recorder_of(Every(2)), 8)
    # A matrix of signs whose gradients never change: the ratio of every sign step is the same.
    signs = {m["update_2_over_inf"] for m in metrics.values()}
    assert list(metrics) == [2, 4, 6, 8] and len(signs) == 1
    both = train(recorder_of(Every(2, residues=(0, 1))), 8)
    assert list(both) == list(range(1, 9))
    assert {both[s]["residue_0/update_2_over_inf"] for s in (2, 4, 6, 8)} == signs
    assert both[1]["residue_1/update_2_over_inf"] not in signs


def test_each_residue_takes_differences_over_one_interval():
    metrics = train(recorder_of(Every(3, residues=(0, 1)), period=1), 7)
    names = {s: f"residue_{s % 3}/smooth_1_over_inf" for s in metrics}
    assert [s for s in metrics if np.isnan(metrics[s][names[s]])] == [1, 3]
    # Constant gradients: their difference is zero, whatever the weights did.
    assert {metrics[s][names[s]] for s in (4, 6, 7)} == {0.0}


def test_results_are_plain_floats():
    metrics = train(recorder_of(Every(1)), 1)[1]
    assert set(metrics) == set(RATIOS) and all(type(v) is float for v in metrics.values())
