"""Local smoothness along runs of the trainer: its programs, its records, its fits."""

import json
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

from jaxopt_lab.diagnostics import Every, Recorders, Smoothness
from jaxopt_lab.report.tracker import Tracker, read_metrics
from jaxopt_lab.step import accumulated
from jaxopt_lab.train import fit_run
from jaxopt_lab.train.config.optimizers import OPTIMIZERS, AdamWConfig, LionMuonConfig, ModelInfo
from jaxopt_lab.train.config.optimizers_zeroth_order import ZEROTH_ORDER
from jaxopt_lab.train.config.sections import DiagnosticsConfig, EvalConfig, MeshConfig
from jaxopt_lab.train.config.serialize import to_json
from jaxopt_lab.train.diagnostics import make_recorders, take_record
from jaxopt_lab.train.dist.mesh import flags, make_mesh, to_global
from jaxopt_lab.train.errors import ConfigError
from jaxopt_lab.train.program import build_program
from jaxopt_lab.train.run import pretrain
from jaxopt_lab.train.step import make_step
from tests.train import stand_in
from tests.train.tiny_run import losses_of, restored, tiny_config

ON = DiagnosticsConfig(record=("smoothness",), every=1, target_loss=1.0)


def built(config, tx=None, **options):
    mesh = make_mesh(config)
    step = make_step(
        stand_in.init_params, stand_in.loss_fn, tx or optax.sgd(0.1), mesh=mesh,
        param_specs=stand_in.SPECS, **options,
    )  # fmt: skip
    return mesh, step


@pytest.mark.parametrize("config", [MeshConfig(1), MeshConfig(2, 2, 2)], ids=str)
def test_gradients_of_the_whole_step_are_neither_clipped_nor_moved(config):
    mesh, step = built(config, clip=1e-3, gradient=accumulated(2))
    state = step.init(jax.random.key(0))
    params = state.params
    batch = to_global(mesh, stand_in.batch_at(0), 32) | {"signals": flags(mesh, [0, 0])}
    loss, grads = step.value_and_grad(state, batch)
    jax.tree.map(
        lambda g, p: g.sharding.is_equivalent_to(p.sharding, p.ndim) or 1 / 0, grads, params
    )
    reference = jax.jit(jax.value_and_grad(lambda *args: stand_in.loss_fn(*args)[0]))
    wanted, expected = reference(jax.device_get(params), stand_in.batch_at(0))
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, expected)
    assert optax.tree.norm(grads) > 1e-2


def test_a_record_of_a_step_does_not_depend_on_the_mesh_or_the_clipping():
    # Steps of one length: clipped gradients must not change them.
    tx = optax.chain(optax.normalize_by_update_norm(eps=1e-12), optax.sgd(0.5))
    records = []
    for config, options in [
        (MeshConfig(1), {}),
        (MeshConfig(2, 2, 2), {"gradient": accumulated(2), "clip": 1e-3}),
    ]:
        mesh, step = built(config, tx, **options)
        state, batch = step.init(jax.random.key(0)), to_global(mesh, stand_in.batch_at(0), 32)
        recorders = Recorders([Smoothness(Every(1))])
        records.append(take_record(recorders, step, 1, state, batch))
    assert len(records[0]) == 10 and np.isfinite(list(records[0].values())).all()
    for name, value in records[0].items():
        np.testing.assert_allclose(records[1][name], value, rtol=2e-4, err_msg=name)


def test_the_gradient_at_other_parameters_is_compiled_for_those_who_ask():
    class Plain:
        name, due = "plain", Every(1).due

        def record(self, snapshot):
            return {"loss": float(snapshot.loss)}

    mesh, step = built(MeshConfig(1))
    state, batch = step.init(jax.random.key(0)), to_global(mesh, stand_in.batch_at(0), 32)
    take_record(Recorders([Plain()]), step, 1, state, batch)
    assert step.value_and_grad._cache_size() == 0
    for number in (1, 2):
        take_record(Recorders([Plain(), Smoothness(Every(1))]), step, number, state, batch)
    assert step.value_and_grad._cache_size() == 1


def test_the_compiled_step_is_the_same_with_and_without():
    config = tiny_config("unused", None)
    off, on = (build_program(replace(config, diagnostics=d)) for d in (DiagnosticsConfig(), ON))
    assert not off.hooks and len(on.hooks) == 1
    batch = {"tokens": jax.ShapeDtypeStruct((4, 17), np.int32)}
    lowered = [p.step.update.lower(p.step.abstract_state, batch).as_text() for p in (off, on)]
    assert lowered[0] == lowered[1]


def test_every_optimizer_with_gradients_can_be_recorded():
    config = DiagnosticsConfig(record=("smoothness",), every=10)
    for name, optimizer in OPTIMIZERS.items():
        if name in ZEROTH_ORDER:
            with pytest.raises(ConfigError, match="diagnostics.record: .* has no gradient"):
                config.validate(optimizer())
            continue
        config.validate(optimizer())
        recorders = make_recorders(config, optimizer(), ModelInfo({}), None)
        assert [step for step in range(1, 22) if recorders.due(step)] == [1, 10, 11, 20, 21]
    with pytest.raises(ConfigError, match="diagnostics.target_loss: got inf, expected a finite"):
        replace(config, target_loss=float("inf")).validate(AdamWConfig())


def test_a_run_ends_with_fits_and_a_figure_and_trains_as_without(text, tmp_path):
    config = tiny_config(
        text, tmp_path / "on", steps=12, optimizer=AdamWConfig(),
        eval=EvalConfig(every=12, batches=2, sample_tokens=0), diagnostics=ON,
    )  # fmt: skip
    notes = []
    result = pretrain(config, message=notes.append)
    rows = [row for row in read_metrics(tmp_path / "on") if "smoothness/loss_after" in row]
    assert [row["step"] for row in rows] == list(range(1, 13))
    # The schedule is at its peak in the middle; there a step lowers the loss of its minibatch.
    assert rows[5]["smoothness/loss_after"] < rows[5]["loss"]
    assert all(row["smoothness/spectral/ratio"] > 0 for row in rows if row["rate"] > 0)
    summary = json.loads((tmp_path / "on/summary.json").read_text())["smoothness"]
    assert summary == result.summary["smoothness"] and summary["target_loss"] == 1.0
    fits = summary["fits"]["all_steps"]
    assert set(fits) == {"spectral", "sign", "frobenius"}
    assert all(10 <= fit["points"] <= 12 and fit["rho"] == 2 for fit in fits.values())
    assert (tmp_path / "on/figures/smoothness.png").stat().st_size > 10_000
    assert any("smoothness against the gap to 1.0000" in note for note in notes)

    off = replace(config, run_directory=str(tmp_path / "off"), diagnostics=DiagnosticsConfig())
    assert "smoothness" not in pretrain(off).summary
    assert losses_of(tmp_path / "on") == losses_of(tmp_path / "off")
    states = restored(off, tmp_path / "on"), restored(off, tmp_path / "off")
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert not (tmp_path / "off/figures/smoothness.png").exists()

    # A target that the run never reached from above is no reason to fail at its end.
    above = replace(config, resume=True, diagnostics=replace(ON, target_loss=99.0))
    assert pretrain(above, message=notes.append).summary["smoothness"] is None
    assert any("smoothness was not fitted: target_loss: got 99" in note for note in notes)
    free = fit_run(tmp_path / "on", rho=None, start=2, target_loss=0.5)
    assert free["target_loss"] == 0.5 and free["fits"]["all_steps"]["sign"]["points"] <= 11


def written_run(directory, optimizer, steps, held_out=(2.0, 1.5, 1.75)):
    """A log as of a run whose ratios follow one parabola on odd steps and another on even ones."""
    with Tracker(directory, tensorboard=False) as tracker:
        for step in steps:
            gap = 4.0 - 0.1 * step
            ratio = 7.0 - gap + gap**2 if step % 2 else 50.0 + gap
            row = {"loss": 1.6 + gap, "smoothness/loss_after": 1.5 + gap}
            for pair in ("spectral", "sign", "frobenius"):
                row[f"smoothness/{pair}/gradient_difference"] = 0.1 * ratio
                row[f"smoothness/{pair}/step_norm"] = 0.1
            tracker.log(step, row)
        for step, loss in enumerate(held_out):
            tracker.log(step, {"validation_loss": loss})
    (directory / "config.json").write_text(
        to_json(tiny_config("unused", None, optimizer=optimizer))
    )
    return directory


def test_spectral_and_sign_steps_are_fitted_apart(tmp_path):
    run = written_run(tmp_path, LionMuonConfig(period=2), range(1, 31))
    fitted = fit_run(run, figure=tmp_path / "f.svg")
    assert fitted["target_loss"] == 1.5
    assert set(fitted["fits"]) == {"spectral_steps", "sign_steps"}
    for kind, wanted in {"spectral_steps": (7.0, -1.0, 1.0), "sign_steps": (50, 1, 0)}.items():
        for fit in fitted["fits"][kind].values():
            got = [fit[name] for name in ("k0", "k1", "k_rho", "rho", "r2", "points")]
            np.testing.assert_allclose(got, [*wanted, 2, 1, 15], atol=1e-8)
    text = (tmp_path / "f.svg").read_text()
    assert "<!-- sign: sum / largest of the entries -->" in text and "spectral steps" in text


def test_few_points_are_shown_without_a_fit(tmp_path):
    run = written_run(tmp_path, LionMuonConfig(period=2), [*range(1, 21, 2), 2, 4])
    fitted = fit_run(run, figure=tmp_path / "f.svg", rho=3.0)
    assert fitted["fits"]["sign_steps"]["frobenius"] is None
    assert fitted["fits"]["spectral_steps"]["frobenius"]["points"] == 10
    assert "too few for a fit" in (tmp_path / "f.svg").read_text()


def test_a_run_that_cannot_be_fitted_says_why(tmp_path):
    run = written_run(tmp_path / "one", AdamWConfig(), range(1, 5))
    with pytest.raises(ValueError, match="target_loss: got 9, but no record of smoothness"):
        fit_run(run, target_loss=9.0)
    run = written_run(tmp_path / "two", AdamWConfig(), range(1, 5), held_out=(float("nan"),))
    with pytest.raises(ValueError, match="no held-out loss to take the target from"):
        fit_run(run)
    run = written_run(tmp_path / "three", AdamWConfig(), ())
    with pytest.raises(ValueError, match="written with --diagnostics smoothness"):
        fit_run(run)
