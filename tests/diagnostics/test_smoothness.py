"""Local smoothness against NumPy and exact cases, the recorder, points and fits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab.core.dual_norms import DUAL_NORMS
from jaxopt_lab.diagnostics import (
    Every,
    Smoothness,
    Snapshot,
    fit_smoothness,
    local_smoothness,
    smoothness_points,
)

SHAPES = {"stack": (3, 4, 8), "kernel": (8, 8), "embedding": (16, 4), "bias": (8,), "gains": (2, 8)}
AXES = {
    "stack": MuonDimensionNumbers(reduction_axis=1, output_axis=2),
    "kernel": MuonDimensionNumbers(),
    "embedding": None,
    "bias": None,
    "gains": None,
}


def draw(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=s).astype(np.float32) for name, s in SHAPES.items()}


def draws():
    """Gradients before and after, parameters before and after."""
    return [draw(seed) for seed in range(4)]


def reference(grads_before, grads_after, params_before, params_after):
    """Numbers of three pairs from matrices given one by one, in float64."""

    def differences(before, after):
        return [np.float64(y) - np.float64(x) for x, y in zip(before, after, strict=True)]

    turned = differences(grads_before, grads_after)
    moved = differences(params_before, params_after)
    rows = {
        "spectral": (
            sum(np.linalg.norm(x, "nuc") for x in turned),
            max(np.linalg.norm(x, 2) for x in moved),
        ),
        "sign": (sum(np.abs(x).sum() for x in turned), max(np.abs(x).max() for x in moved)),
        "frobenius": (
            sum(np.linalg.norm(x) for x in turned),
            max(np.linalg.norm(x) for x in moved),
        ),
    }
    return {pair: (d, s, d / s) for pair, (d, s) in rows.items()}


def assert_close(got, wanted, rtol=5e-6):
    assert set(got) == set(wanted)
    for pair in wanted:
        np.testing.assert_allclose(got[pair], wanted[pair], rtol=rtol, err_msg=pair)


def test_equals_numpy_on_every_matrix_of_the_model_and_no_vector():
    trees = draws()
    matrices = [[*tree["stack"], tree["kernel"], tree["embedding"]] for tree in trees]
    got = local_smoothness(*trees, matrix_axes=AXES)
    assert list(got) == list(DUAL_NORMS)
    assert_close(got, reference(*matrices))
    # A table counts once, whether or not the optimizer sees a matrix in it.
    covered = {**AXES, "embedding": MuonDimensionNumbers()}
    assert_close(local_smoothness(*trees, matrix_axes=covered), got, rtol=0)


def test_a_stacked_leaf_is_as_good_as_separate_ones():
    trees = [{"stack": tree["stack"], "kernel": tree["kernel"]} for tree in draws()]
    separate = [{**dict(enumerate(t["stack"])), 3: t["kernel"]} for t in trees]
    axes = {name: AXES[name] for name in ("stack", "kernel")}
    assert_close(local_smoothness(*trees, matrix_axes=axes), local_smoothness(*separate), rtol=1e-6)


@pytest.mark.parametrize("sizes", [(8, 1), (2, 4)], ids=str)
def test_sharded_parameters_give_the_same_numbers(sizes):
    mesh = jax.make_mesh(sizes, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    specs = {
        "stack": P(None, "tensor", "fsdp"),
        "kernel": P("fsdp", "tensor"),
        "embedding": P("fsdp"),
        "bias": P(),
        "gains": P(None, "fsdp"),
    }
    at = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    if sizes[1] == 1:
        at["stack"] = NamedSharding(mesh, P(None, None, "fsdp"))
    sharded = [jax.device_put(tree, at) for tree in draws()]
    got = local_smoothness(*sharded, matrix_axes=AXES)
    assert_close(got, local_smoothness(*draws(), matrix_axes=AXES), rtol=2e-6)


def test_differences_of_bfloat16_leaves_are_not_rounded():
    before, after = ({"w": jnp.full((2, 2), x, jnp.bfloat16)} for x in (1.0, 1.0078125))
    got = local_smoothness(before, after, before, after)
    assert got["sign"].gradient_difference.dtype == jnp.float32
    np.testing.assert_array_equal(got["sign"], (4 * 0.0078125, 0.0078125, 4.0))


def test_a_step_that_does_not_move_the_matrices_has_no_ratio():
    g0, g1, w, _ = draws()
    moved = {**w, "bias": w["bias"] + 1}
    for found in local_smoothness(g0, g1, w, moved, matrix_axes=AXES).values():
        assert found.step_norm == 0 and found.gradient_difference > 0 and np.isnan(found.ratio)


def test_trees_that_do_not_match_are_named():
    g0, g1, w0, w1 = draws()
    with pytest.raises(ValueError, match="^grads_after is not a tree like params_before"):
        local_smoothness(g0, {**g1, "more": g1["bias"]}, w0, w1)
    with pytest.raises(ValueError, match=r"^params_after\['kernel'\] has shape \(1, 8\), expected"):
        local_smoothness(g0, g1, w0, {**w1, "kernel": w1["kernel"][:1]})
    with pytest.raises(ValueError, match="none of its leaves is a matrix"):
        local_smoothness(*({"bias": tree["bias"]} for tree in (g0, g1, w0, w1)))


def run(recorder, loss, params, tx, steps):
    """A loop as a trainer would write it, whose optimizer sees clipped gradients."""
    value_and_grad = jax.jit(jax.value_and_grad(loss))
    state, records = tx.init(params), {}
    for step in range(1, steps + 1):
        value, grads = value_and_grad(params)
        clipped = jax.tree.map(lambda g: 1e-2 * g, grads)
        updates, new_state = tx.update(clipped, state, params)
        if recorder.due(step):
            records[step] = recorder.record(
                Snapshot(step, params, clipped, state, updates, value, value_and_grad)
            )
        params, state = optax.apply_updates(params, updates), new_state
    return records


@pytest.mark.parametrize("tx", [optax.sgd(0.1), optax.adam(0.02)], ids=["sgd", "adam"])
def test_on_a_quadratic_with_one_matrix_the_ratio_is_its_curvature(tx):
    def loss(params):
        return 1.5 * jnp.sum(params["w"] ** 2) + jnp.sum(params["bias"] ** 2)

    with jax.enable_x64(True):
        params = {"w": jnp.asarray(draw(0)["kernel"], "float64"), "bias": jnp.ones(8)}
        records = run(Smoothness(Every(3, (0, 1))), loss, params, tx, 9)
    assert list(records) == [1, 3, 4, 6, 7, 9]
    ratios = [record["frobenius/ratio"] for record in records.values()]
    np.testing.assert_allclose(ratios, 3.0, rtol=1e-11)
    losses = [record["loss_after"] for record in records.values()]
    assert losses == sorted(losses, reverse=True)
    names = {f"{p}/{w}" for p in DUAL_NORMS for w in ("gradient_difference", "step_norm", "ratio")}
    assert set(records[1]) == {"loss_after", *names}
    assert all(type(value) is float for value in records[1].values())


def test_without_a_minibatch_to_evaluate_nothing_is_recorded():
    w = {"w": jnp.eye(2)}
    with pytest.raises(ValueError, match="^value_and_grad: the snapshot has none"):
        Smoothness(Every(1)).record(Snapshot(1, w, w, (), w))


GAP = np.random.default_rng(0).uniform(0.2, 4.0, 40)


@pytest.mark.parametrize("k", [(3.0, 0.5, 2.0), (1e8, -3e7, 2e6), (0.0, -1.0, 1.0)], ids=str)
def test_a_planted_parabola_is_recovered(k):
    fit = fit_smoothness(GAP, k[0] + k[1] * GAP + k[2] * GAP**2)
    np.testing.assert_allclose(fit[:3], k, rtol=1e-11, atol=1e-11 * max(map(abs, k)))
    assert fit.rho == 2 and fit.points == 40
    np.testing.assert_allclose(fit.r2, 1.0, rtol=1e-12)
    np.testing.assert_allclose(fit.curve(GAP), k[0] + k[1] * GAP + k[2] * GAP**2, rtol=1e-10)


@pytest.mark.parametrize("rho", np.linspace(1.05, 50, 100)[[0, 4, 40, 99]], ids=str)
def test_a_planted_power_is_recovered(rho):
    wanted = (3.0, -0.5, 2.0 / 4.0**rho, rho)
    fit = fit_smoothness(GAP, wanted[0] + wanted[1] * GAP + wanted[2] * GAP**rho, None)
    np.testing.assert_allclose(fit[:4], wanted, rtol=1e-9)


def test_r2_and_the_share_above_are_those_of_the_residuals():
    rng = np.random.default_rng(1)
    # A noise that a parabola cannot follow: its least-squares fit to it is zero.
    design = np.stack([np.ones_like(GAP), GAP, GAP**2], axis=1)
    noise = rng.exponential(size=40)
    noise -= design @ np.linalg.lstsq(design, noise, rcond=None)[0]
    ratio = 5.0 - GAP + noise
    fit = fit_smoothness(GAP, ratio)
    np.testing.assert_allclose(fit[:3], (5.0, -1.0, 0.0), atol=1e-12)
    np.testing.assert_allclose(fit.r2, 1 - noise.var() / ratio.var(), rtol=1e-10)
    assert fit.share_above == (noise > 0).mean() != 0.5


def test_equal_ratios_have_no_r2():
    fit = fit_smoothness(GAP, np.full(40, 2.0), None)
    assert np.isnan(fit.r2)
    np.testing.assert_allclose(fit.curve(GAP), 2.0, rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((GAP[:9], GAP[:9]), "gap: got 9 points, expected at least 10"),
        ((GAP, GAP[1:]), r"ratio: got shape \(39,\), expected one axis, like \(40,\)"),
        ((GAP - 1, GAP), "gap, ratio: expected finite values and gaps of at least 0"),
        ((GAP, np.full(40, np.nan)), "gap, ratio: expected finite values"),
        ((GAP, GAP, 1.0), "rho: got 1.0, expected a power above 1, or None"),
    ],
)
def test_what_cannot_be_fitted_is_named(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        fit_smoothness(*arguments)


def test_points_of_a_fit_are_the_usable_records_of_the_window():
    step = np.arange(1, 10)
    gap = [1.0, 1.0, -0.1, 1.0, np.nan, 0.0, 2.0, 1.0, 1.0]
    difference = [4.0, 0.0, 4.0, 4.0, 4.0, 6.0, 8.0, np.inf, 4.0]
    norm = [2.0, 2.0, 2.0, 1e-13, 2.0, 2.0, 2.0, 2.0, np.nan]
    points = smoothness_points(step, gap, difference, norm)
    assert points.step.tolist() == [1, 6, 7] and points.ratio.tolist() == [2.0, 3.0, 4.0]
    window = smoothness_points(step, gap, difference, norm, start=6, end=7)
    assert window.step.tolist() == [6] and window.gap.tolist() == [0.0]
    assert not len(smoothness_points(step, gap, difference, norm, start=10, drop_outliers=True).gap)
    with pytest.raises(ValueError, match=r"step_norm: got shape \(8,\)"):
        smoothness_points(step, gap, difference, norm[1:])


def test_outliers_are_the_lowest_and_the_highest_percent():
    n = 201
    ratio = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    points = smoothness_points(np.arange(n), ratio, ratio, np.ones(n), drop_outliers=True)
    # The percentiles are 3 and 199; what equals them stays.
    assert sorted(points.ratio) == list(range(3, 200))
    np.testing.assert_array_equal(points.gap, points.ratio)
    np.testing.assert_array_equal(ratio[points.step], points.ratio)
