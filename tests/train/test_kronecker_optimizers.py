"""SOAP, DyKAF and Shampoo inside the trainer."""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab.report.tracker import read_metrics
from jaxopt_lab.train.config.optimizers import OPTIMIZERS, DyKAFConfig, ModelInfo, ShampooConfig
from jaxopt_lab.train.config.sections import DiagnosticsConfig, MeshConfig
from jaxopt_lab.train.diagnostics import make_recorders
from jaxopt_lab.train.dist.mesh import make_mesh, to_global
from jaxopt_lab.train.errors import ConfigError
from jaxopt_lab.train.run import pretrain
from jaxopt_lab.train.step import make_step
from tests.train import stand_in
from tests.train.tiny_run import MODEL, losses_of, restored, tiny_config

NAMES = ("soap", "dykaf", "shampoo")


def each_optimizer(slow):
    """SOAP and DyKAF are one program but for the factors: not every test pays for both."""
    marks = {name: pytest.mark.slow for name in slow}
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=marks.get(name, ())) for name in NAMES]
    )


def stopped_and_resumed(text, tmp_path, **changes):
    """A straight run, and one that died between steps 3 and 6 and went on."""
    model = replace(MODEL, hidden=16)  # one shape of matrices is compiled sooner
    straight = tiny_config(text, tmp_path / "straight", model=model, **changes)
    assert 0.01 < pretrain(straight).summary["optimizer_share_of_flops"] < 1
    shutil.copytree(tmp_path / "straight", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped/checkpoints/6")
    pretrain(replace(straight, run_directory=str(tmp_path / "stopped"), resume=True))
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "straight")
    _, leaves = restored(straight, tmp_path / "straight")
    _, others = restored(straight, tmp_path / "stopped")
    jax.tree.map(np.testing.assert_array_equal, leaves, others)
    return straight


@each_optimizer(slow=["soap"])
def test_a_resumed_run_is_bitwise_the_straight_one(text, tmp_path, name):
    # The bases or roots in the checkpoint of step 3 are not yet those of the end.
    optimizer = OPTIMIZERS[name](precondition_frequency=2)
    stopped_and_resumed(text, tmp_path, optimizer=optimizer)
    rows = read_metrics(tmp_path / "straight")
    losses = losses_of(tmp_path / "straight")
    assert len(losses) == 6 and np.isfinite(list(losses.values())).all()
    assert rows[-1]["optimizer_flops"] > 0


@each_optimizer(slow=NAMES)
def test_a_resumed_sharded_run_with_staggered_refreshes(text, tmp_path, name):
    stopped_and_resumed(
        text, tmp_path, optimizer=OPTIMIZERS[name](precondition_frequency=2, stagger=True),
        mesh=MeshConfig(2, 2),
    )  # fmt: skip


@pytest.mark.slow
def test_errors_of_the_factors_along_a_run(text, tmp_path):
    diagnostics = DiagnosticsConfig(
        record=("fisher",), every=4, window=2, layers=("layers/mlp/down/kernel",)
    )
    config = tiny_config(
        text, tmp_path / "run", optimizer=DyKAFConfig(), diagnostics=diagnostics, steps=5
    )
    pretrain(config)
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    name = "fisher/layers/mlp/down/kernel/distance_rescaled"
    assert [row["step"] for row in rows if name in row] == [4]
    assert 0 < rows[3][name] < 1
    plain = replace(config, run_directory=str(tmp_path / "plain"), diagnostics=DiagnosticsConfig())
    pretrain(plain)
    assert losses_of(tmp_path / "plain") == losses_of(tmp_path / "run")


def test_when_errors_of_the_factors_are_recorded():
    axes = {"a": {"kernel": MuonDimensionNumbers()}, "bias": None}
    config = DiagnosticsConfig(record=("fisher",), every=5, window=2)
    config.validate(DyKAFConfig())
    recorders = make_recorders(config, DyKAFConfig(), ModelInfo(axes), None)
    assert [recorders.due(step) for step in range(6)] == [True, False, False, True, True, True]
    make_recorders(replace(config, layers=("a/kernel",)), DyKAFConfig(), ModelInfo(axes), None)
    with pytest.raises(ConfigError, match="diagnostics.layers: got 'bias', expected some of a/k"):
        make_recorders(replace(config, layers=("bias",)), DyKAFConfig(), ModelInfo(axes), None)
    with pytest.raises(ConfigError, match="diagnostics.window: got 5, expected 1 to 4 gradients"):
        replace(config, window=5).validate(DyKAFConfig())
    with pytest.raises(ConfigError, match="expected SOAP or DyKAF, not ShampooConfig"):
        config.validate(ShampooConfig())


def nan_in_one_leaf(params, batch, key):
    """In a marked batch the gradient of `bias` is NaN, and the loss and all others are finite."""
    loss, weight, metrics = stand_in.loss_fn(params, {"tokens": batch["tokens"]})
    zero = params["bias"] - jax.lax.stop_gradient(params["bias"])
    flat = 1 - jnp.max(batch["marked"])
    return loss + jnp.sqrt(flat + jnp.sum(jnp.square(zero))), weight, metrics


@each_optimizer(slow=["dykaf", "shampoo"])
def test_a_dropped_step_is_dropped_for_every_matrix(name):
    mesh = make_mesh(MeshConfig(1))
    optimizer = OPTIMIZERS[name](learning_rate=1e-2, precondition_frequency=100)
    axes = {"table": MuonDimensionNumbers(), "head": MuonDimensionNumbers(), "bias": None}
    tx = optimizer.build(optax.constant_schedule(optimizer.learning_rate), ModelInfo(axes))
    # The AdamW beside Shampoo counts dropped steps, as Optax does: let its leaf move nothing.
    still = optax.masked(optax.set_to_zero(), {"table": False, "head": False, "bias": True})
    step = make_step(
        stand_in.init_params, nan_in_one_leaf, optax.chain(tx, still),
        mesh=mesh, param_specs=stand_in.SPECS_UNSPLIT,
    )  # fmt: skip

    def run(marks):
        state, number = step.init(jax.random.key(0)), 0
        for marked in marks:
            marks_of_rows = np.full(32, float(marked), np.float32)
            batch = {**stand_in.batch_at(number), "marked": marks_of_rows}
            state, metrics = step.update(state, to_global(mesh, batch, 32))
            assert bool(metrics["finite"]) != marked and np.isfinite(metrics["loss"])
            number += not marked
        return jax.device_get(state)

    # The first gradient of all and one between others; no refresh falls into either run.
    clean, disturbed = run([False] * 3), run([True, False, False, True, False])
    assert (int(disturbed.step), int(disturbed.skipped)) == (5, 2)
    leaves = jax.tree_util.tree_leaves_with_path((disturbed.params, disturbed.opt_state))
    others = jax.tree.leaves((clean.params, clean.opt_state))
    for (path, a), b in zip(leaves, others, strict=True):
        where = jax.tree_util.keystr(path)
        if ".count" in where or ".notfinite_count" in where:
            assert a == b + 2, where
        elif "['bias']" not in where:
            np.testing.assert_array_equal(a, b, where)


def test_flops_of_a_step():
    params = {"w": np.zeros((3, 8, 4)), "b": np.zeros(10)}
    axes = {"w": MuonDimensionNumbers(1, 2), "b": None}
    elementwise, rotation = 12 * 106, 3 * 2 * 8 * 4 * (8 + 4)
    power = 3 * 14 / 3 * (8**3 + 4**3)

    def flops(name, **changes):
        return OPTIMIZERS[name](**changes).mean_flops(params, axes) - elementwise

    for name, products in {"soap": 3, "dykaf": 4}.items():
        expected = products * rotation + (power + 2 * rotation) / 10
        np.testing.assert_allclose(flops(name), expected)
    more = flops("dykaf", integrator="parallel") - flops("dykaf")
    np.testing.assert_allclose(more, rotation)
    # Columns alone: one product of (8, 4) with (4, 4), or as many operations for the Gram matrix.
    one = 3 * 2 * 8 * 4 * 4
    expected = 3 * one + (3 * 14 / 3 * 4**3 + 2 * one) / 5
    np.testing.assert_allclose(flops("soap", max_precond_dim=7, precondition_frequency=5), expected)
    assert flops("dykaf", max_precond_dim=3) == 0
    roots = 3 * 10 * 8 * (8**3 + 4**3)
    np.testing.assert_allclose(flops("shampoo"), 2 * rotation + roots / 10)
    # Two blocks of 4 x 4 instead of one of 8 x 4.
    square = 3 * 2 * 2 * 4 * 4 * (4 + 4)
    roots = 3 * 2 * 10 * 8 * (2 * 4**3)
    np.testing.assert_allclose(flops("shampoo", max_precond_dim=4), 2 * square + roots / 10)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (DyKAFConfig(precondition_frequency=0), "optimizer.precondition_frequency: got 0"),
        (DyKAFConfig(b1=1.0), "optimizer.b1: got 1.0"),
        (DyKAFConfig(b2=-0.5), "optimizer.b2: got -0.5"),
        (DyKAFConfig(eps=-1e-8), "optimizer.eps: got -1e-08"),
        (DyKAFConfig(max_precond_dim=-1), "optimizer.max_precond_dim: got -1"),
        (ShampooConfig(b2=0.0), "optimizer.b2: got 0.0, expected above 0 and below 1"),
        (ShampooConfig(eps=-1.0), "optimizer.eps: got -1.0"),
        (ShampooConfig(max_precond_dim=0), "optimizer.max_precond_dim: got 0"),
        (ShampooConfig(precondition_frequency=-1), "optimizer.precondition_frequency: got -1"),
    ],
)
def test_bad_options_are_named(optimizer, message):
    with pytest.raises(ConfigError, match=message):
        optimizer.validate()
