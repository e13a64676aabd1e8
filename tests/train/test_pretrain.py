import json
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxopt_lab import cli, models
from jaxopt_lab.data import TextFiles, Tokenizer
from jaxopt_lab.optim import params_ema
from jaxopt_lab.report.tracker import read_metrics
from jaxopt_lab.train import loop
from jaxopt_lab.train.config.optimizers import AdamWConfig, LionMuonConfig, OptaxMuonConfig
from jaxopt_lab.train.config.schedules import ConstantConfig
from jaxopt_lab.train.config.sections import (
    CheckpointConfig,
    DiagnosticsConfig,
    EvalConfig,
    MeshConfig,
)
from jaxopt_lab.train.config.serialize import from_json, to_json
from jaxopt_lab.train.errors import CheckpointError, ConfigError, TrainingError
from jaxopt_lab.train.io.checkpoints import committed_steps
from jaxopt_lab.train.io.stored import select_step
from jaxopt_lab.train.run import pretrain
from jaxopt_lab.train.trained import load_params
from tests.train.tiny_run import Killed, losses_of, restored, tiny_config, write_text


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """One ordinary run of six steps, with checkpoints after three and six."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    notes = []
    config = tiny_config(text, directory, eval=EvalConfig(every=3, batches=2, sample_tokens=5))
    return config, pretrain(config, message=notes.append), notes


def test_a_run_leaves_a_complete_directory(finished):
    config, result, notes = finished
    assert result.status == "finished"
    present = {path.name for path in result.directory.iterdir()}
    assert present >= {
        "config.json", "manifest.json", "metrics.jsonl", "summary.json", "tokenizer.json",
        "checkpoints", "figures",
    }  # fmt: skip
    assert (result.directory / "figures/loss.png").stat().st_size > 1000
    assert committed_steps(result.directory / "checkpoints") == [3, 6]
    summary = json.loads((result.directory / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["skipped"] == 0
    assert summary["validation_loss"] > 0 and summary["sample"]["continuation"] is not None
    # Bytes: one token is one byte, except end-of-text.
    assert 0.9 < summary["bits_per_byte"] * np.log(2) / summary["validation_loss"] < 1.1
    assert any("unigram" in note for note in notes)
    start = summary["start_seconds"]
    assert list(start) == [
        "devices", "data", "program", "initial state", "compile", "evaluation", "first step",
    ]  # fmt: skip
    assert all(seconds >= 0 for seconds in start.values()) and start["compile"] > 0
    session = json.loads((result.directory / "manifest.json").read_text())["sessions"][0]
    assert session["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    assert session["versions"]["jax"] == jax.__version__ and session["corpus"]["hash"]
    assert session["devices"]["platform"] == "cpu" and "determinism" in session


def test_a_last_step_between_evaluations_ranks_all_the_same(text, tmp_path):
    config = tiny_config(text, tmp_path / "run", eval=EvalConfig(every=4, batches=1))
    pretrain(config, message=lambda line: None)
    assert committed_steps(tmp_path / "run/checkpoints") == [3, 6]
    assert select_step(tmp_path / "run", "best") == 6


def test_the_log_has_every_step_once_and_the_evaluations(finished):
    rows = read_metrics(finished[1].directory)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "validation_loss" in row] == [0, 3, 6]
    first = next(row for row in rows if "loss" in row)
    assert first["tokens"] == 64 and rows[-1]["optimizer_flops"] == 6 * first["optimizer_flops"] > 0
    assert {"grad_norm", "rate", "sign_rate", "skipped"} <= first.keys()


def test_a_run_becomes_a_hugging_face_directory(finished, tmp_path, capsys):
    config, result, _ = finished
    run, out = str(result.directory), tmp_path / "exported"
    before = contents(result.directory)
    assert cli.main(["export", run, str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    exported, params = models.load_huggingface(out)
    assert exported == config.model
    trained = restored(config, result.directory)[1].params
    jax.tree.map(np.testing.assert_array_equal, params, trained)
    assert Tokenizer.load(out).encode("def").tolist() == [100, 101, 102]
    assert cli.main(["export", run, str(out)]) == 2
    assert "already holds a model" in capsys.readouterr().err
    assert contents(result.directory) == before


def test_the_best_checkpoint_and_the_average_of_the_weights(averaged):
    config, directory = averaged
    losses = {row["step"]: row["validation_loss_ema"] for row in read_metrics(directory)
              if "validation_loss_ema" in row and row["step"] in (3, 6)}  # fmt: skip
    best = min(losses, key=losses.get)
    _, expected, _ = load_params(directory, step=best, average=True)
    _, params, _ = load_params(directory, step="best", average=True)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    average = restored(config, directory)[1].opt_state
    _, params, tokenizer = load_params(directory, average=True)
    jax.tree.map(np.testing.assert_array_equal, params, params_ema(average))
    _, newest, _ = load_params(directory)
    assert np.any(newest["embedding"]["tokens"] != params["embedding"]["tokens"])
    assert tokenizer.vocab_size == 257


def test_sample_continues_a_text(finished, capsys):
    run = str(finished[1].directory)
    assert cli.main(["sample", run, "--prompt", "import", "--tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("import") and len(out) > len("import\n")
    assert cli.main(["sample", run, "--tokens", "-1"]) == 2
    assert "tokens: got -1" in capsys.readouterr().err


def test_export_of_what_is_not_there(finished, tmp_path, capsys):
    out = str(tmp_path / "exported")
    shutil.copytree(finished[1].directory, tmp_path / "run")
    run = str(tmp_path / "run")

    def error_of(*arguments):
        assert cli.main(["export", *arguments]) in (1, 2)
        return capsys.readouterr().err

    assert "there is no run there" in error_of(str(tmp_path), out)
    assert "has no checkpoint 4, only [3, 6]" in error_of(run, out, "--step", "4")
    assert "kept no average" in error_of(run, out, "--average")
    largest = max((tmp_path / "run/checkpoints/6").rglob("*"), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    assert "6 is damaged" in (text := error_of(run, out)) and "other checkpoints: [3]" in text
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert "has no checkpoint" in error_of(run, out)
    assert not (tmp_path / "exported").exists()


def test_the_saved_configuration_runs_again(finished):
    config, result, _ = finished
    saved = from_json((result.directory / "config.json").read_text())
    assert saved == replace(config, run_directory=None)


@pytest.fixture(scope="module")
def averaged(text, tmp_path_factory):
    """A run that keeps an average of its weights."""
    directory = tmp_path_factory.mktemp("runs") / "averaged"
    config = tiny_config(text, directory, **RESUMED["adamw, average"])
    pretrain(config)
    return config, directory


# LionMuon on one device without accumulation is the run that SIGTERM stops below.
RESUMED = {
    "lion-muon, sharded": {
        "optimizer": LionMuonConfig(period=2),
        "mesh": MeshConfig(1, 2),
        "accumulation": 2,
        # Another seed, of nothing that this run draws.
        "seed": 7,
        "init_seed": 0,
        "data_seed": 0,
    },
    "adamw, average": {"optimizer": AdamWConfig(), "ema": 0.9, "accumulation": 4},
    "optax-muon": {"optimizer": OptaxMuonConfig()},
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "optax-muon" else ())
        for name in RESUMED
    ],
)
def test_stopped_and_resumed_is_bitwise_the_straight_run(
    text, tmp_path, name, request, monkeypatch
):
    # Losses of two steps, of windows that are all new.
    monkeypatch.setattr(loop, "FRESH_WINDOWS", 8)
    straight = tiny_config(text, tmp_path / "straight", **RESUMED[name])
    if straight.ema is None:
        pretrain(straight)
    else:
        shutil.copytree(request.getfixturevalue("averaged")[1], tmp_path / "straight")
    # What a run that died between steps 3 and 6 leaves behind.
    shutil.copytree(tmp_path / "straight", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped/checkpoints/6")
    stopped = replace(straight, run_directory=str(tmp_path / "stopped"), resume=True)
    notes = []
    pretrain(stopped, message=notes.append)
    assert any("resuming after step 3 of 6" in note for note in notes)
    losses = losses_of(tmp_path / "straight")
    assert losses_of(tmp_path / "stopped") == losses
    fresh = {row["step"]: row["fresh_loss"] for row in read_metrics(tmp_path / "stopped")
             if "fresh_loss" in row}  # fmt: skip
    assert fresh[6] == np.mean([losses[5], losses[6]]) and fresh.keys() <= {3, 6}
    if "data_seed" in RESUMED[name]:
        first = losses_of(request.getfixturevalue("finished")[1].directory)[1]
        assert losses[1] == pytest.approx(first, rel=1e-6)
        with pytest.raises(ConfigError, match="data_seed: got 1, but the run to resume"):
            pretrain(replace(stopped, data_seed=1))
    step, leaves = restored(straight, tmp_path / "straight")
    again, others = restored(straight, tmp_path / "stopped")
    assert step == again == int(leaves.step) == 6
    jax.tree.map(np.testing.assert_array_equal, leaves, others)


def send(number, at_step):
    def callback(step, state, metrics, batch):
        if step == at_step:
            os.kill(os.getpid(), number)

    return callback


def test_sigterm_finishes_the_step_saves_and_the_run_goes_on_bitwise(finished, tmp_path):
    config = replace(finished[0], run_directory=str(tmp_path / "run"))
    result = pretrain(config, callbacks=[send(signal.SIGTERM, 1)])
    assert result.status == "terminated"
    saved = committed_steps(tmp_path / "run/checkpoints")
    assert len(saved) == 1 and 1 <= saved[0] <= 3
    step, state = restored(config, tmp_path / "run")
    assert int(state.step) == step == saved[0]
    pretrain(replace(config, resume=True))
    assert losses_of(tmp_path / "run") == losses_of(finished[1].directory)
    leaves, others = restored(config, finished[1].directory), restored(config, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, leaves, others)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_exit_codes_of_the_command_line(text, tmp_path, number, code, capsys):
    path = tmp_path / "config.json"
    evaluation = EvalConfig(every=10**6, batches=1)
    config = tiny_config(text, None, steps=10**5, optimizer=AdamWConfig(), eval=evaluation)
    path.write_text(to_json(config))

    def stop_when_it_runs():
        log, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 300
        while time.monotonic() < deadline and not (log.exists() and '"loss"' in log.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop_when_it_runs, daemon=True).start()
    run = str(tmp_path / "run")
    assert cli.main(["pretrain", "--config", str(path), "--run-directory", run]) == code
    err = capsys.readouterr().err
    assert f"jaxopt-lab pretrain --resume --run-directory {run}" in err
    assert committed_steps(tmp_path / "run/checkpoints")


@pytest.mark.parametrize("moment", ["prepare_text", "compiled_step"])
def test_ctrl_c_before_the_first_step_leaves_nothing_behind(
    text, tmp_path, monkeypatch, capsys, moment
):
    def interrupted(*arguments):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            pass  # as when a callback from native code loses it
        return None, None

    monkeypatch.setattr(sys.modules["jaxopt_lab.train.run"], moment, interrupted)
    path, run = tmp_path / "config.json", tmp_path / "run"
    path.write_text(to_json(tiny_config(text, None, optimizer=AdamWConfig())))
    assert cli.main(["pretrain", "--config", str(path), "--run-directory", str(run)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "jaxopt-lab: error: interrupted"
    assert not run.exists()


def test_resume_reads_the_configuration_of_the_run(finished, tmp_path):
    from jaxopt_lab.train.arguments import parse_config

    config, result, _ = finished
    found = parse_config(
        ["--resume", "--run-directory", str(result.directory), "--steps", "9"], "pretrain"
    )
    assert found == replace(config, resume=True, steps=9)


def test_a_finished_run_can_be_resumed_and_does_nothing(finished, tmp_path):
    shutil.copytree(finished[1].directory, tmp_path / "run")
    config = replace(finished[0], run_directory=str(tmp_path / "run"), resume=True)
    result = pretrain(config)
    assert result.status == "finished" and result.summary["steps"] == 6
    assert losses_of(tmp_path / "run") == losses_of(finished[1].directory)


def contents(directory):
    return {str(p): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_an_existing_run_is_never_overwritten(finished):
    config, result, _ = finished
    before = contents(result.directory)
    with pytest.raises(ConfigError, match="run_directory.*not empty.*--resume"):
        pretrain(config)
    assert contents(result.directory) == before


def test_resume_of_nothing_is_refused(finished, tmp_path):
    config = replace(finished[0], resume=True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/notes.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"name": "someone else\'s"}')
    for name, message in {
        "missing": "which is empty: there is no run there",
        "empty": "which is empty: there is no run there",
        "foreign": "has no config.json: there is no run there",
        "other": "name: got .* no such setting",
    }.items():
        with pytest.raises(ConfigError, match=message):
            pretrain(replace(config, run_directory=str(tmp_path / name)))
    with pytest.raises(ConfigError, match="expected the directory of the run to resume"):
        pretrain(replace(config, run_directory=None))
    assert contents(tmp_path / "foreign") == {str(tmp_path / "foreign/notes.txt"): b"mine"}


def copy_of(finished, tmp_path, **changes):
    shutil.copytree(finished[1].directory, tmp_path / "run")
    return replace(finished[0], run_directory=str(tmp_path / "run"), resume=True, **changes)


def test_a_checkpoint_of_another_model_or_optimizer_names_the_leaf(finished, tmp_path):
    model = replace(finished[0].model, hidden=32)
    config = copy_of(finished, tmp_path, model=model)
    with pytest.raises(CheckpointError, match=r"params/layers/mlp/down/kernel is float32\(1,64,16"):
        pretrain(config)
    with pytest.raises(CheckpointError, match="opt_state/.* in the checkpoint"):
        pretrain(replace(config, model=finished[0].model, optimizer=AdamWConfig()))
    assert committed_steps(tmp_path / "run/checkpoints") == [3, 6]


def test_another_seed_or_corpus_is_refused(finished, tmp_path):
    config = copy_of(finished, tmp_path, seed=1)
    with pytest.raises(ConfigError, match="seed: got 1, but the run to resume was trained with 0"):
        pretrain(config)
    half = TextFiles((write_text(tmp_path / "text").replace("*", "1*"),))
    with pytest.raises(ConfigError, match="corpus: got .* was trained with"):
        pretrain(replace(config, seed=0, corpus=half))


def test_a_truncated_newest_checkpoint_falls_back_and_says_so(finished, tmp_path):
    config = copy_of(finished, tmp_path)
    largest = max((tmp_path / "run/checkpoints/6").rglob("*"), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    notes = []
    pretrain(config, message=notes.append)
    assert any("checkpoint 6 is damaged" in n and "checkpoint 3" in n for n in notes)
    assert losses_of(tmp_path / "run") == losses_of(finished[1].directory)
    assert committed_steps(tmp_path / "run/checkpoints") == [3, 6]


def test_no_usable_checkpoint(finished, tmp_path):
    config = copy_of(finished, tmp_path)
    for step in (3, 6):
        (tmp_path / f"run/checkpoints/{step}/_CHECKPOINT_METADATA").unlink()
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        pretrain(config)
    shutil.rmtree(tmp_path / "run/checkpoints/damaged")
    notes = []
    pretrain(config, message=notes.append)
    assert any("no checkpoint was saved yet" in note for note in notes)


def test_a_corpus_smaller_than_a_batch_is_refused(text, tmp_path):
    config = tiny_config(text, tmp_path / "run", batch_size=4096)
    with pytest.raises(ConfigError, match="corpus: .*fewer than one batch"):
        pretrain(config)


def test_a_vocabulary_that_is_too_small_is_refused(text, tmp_path):
    config = tiny_config(text, tmp_path / "run")
    config = replace(config, model=replace(config.model, vocab_size=200))
    with pytest.raises(ConfigError, match="model.vocab_size: got 200, expected at least the 257"):
        pretrain(config)


def test_a_diverged_run_stops_and_saves_nothing_bad(text, tmp_path):
    config = tiny_config(
        text, tmp_path / "run", steps=50, max_skipped=2,
        optimizer=AdamWConfig(learning_rate=1e38), checkpoint=CheckpointConfig(every_steps=None),
    )  # fmt: skip
    with pytest.raises(TrainingError, match="3 steps with a non-finite.*max_skipped = 2"):
        pretrain(config)
    assert committed_steps(tmp_path / "run/checkpoints") == []
    assert [row["skipped"] for row in read_metrics(tmp_path / "run") if "loss" in row][-1] == 3


def test_parameters_that_overflow_are_never_saved(text, tmp_path):
    # Loss and gradient of this step are finite; the update is not.
    config = tiny_config(
        text, tmp_path / "run", schedule=ConstantConfig(),
        optimizer=AdamWConfig(learning_rate=3e38, weight_decay=10.0),
        checkpoint=CheckpointConfig(every_steps=1),
    )  # fmt: skip
    with pytest.raises(TrainingError, match="parameters are not finite after step 1"):
        pretrain(config)
    assert committed_steps(tmp_path / "run/checkpoints") == []


def test_divergence_leaves_the_last_good_checkpoints(finished, tmp_path):
    config = copy_of(finished, tmp_path, steps=16)
    good = config.optimizer
    config = replace(config, checkpoint=CheckpointConfig(every_steps=3, keep_newest=2))
    pretrain(replace(config, optimizer=replace(good, learning_rate=1e30)))
    assert [row["skipped"] for row in read_metrics(tmp_path / "run") if "loss" in row][-1] > 5
    # 16 is the last, and nothing newer than 6 displaces anything.
    assert committed_steps(tmp_path / "run/checkpoints") == [3, 6, 16]
    notes = []
    pretrain(replace(config, optimizer=good, steps=7), message=notes.append)
    assert any("resuming after step 6 of 7" in note for note in notes)
    assert any("checkpoint 16 is deleted (the loss was not finite" in note for note in notes)
    assert all(np.isfinite(loss) for loss in losses_of(tmp_path / "run").values())


def test_doubt_survives_a_kill(finished, tmp_path):
    """One bad step is enough, and it concerns every checkpoint that no step has verified."""
    config = copy_of(finished, tmp_path, steps=16)
    good = config.optimizer

    def die(step, state, metrics, batch):
        if step == 9:
            raise Killed

    with pytest.raises(Killed):
        pretrain(
            replace(
                config, optimizer=replace(good, learning_rate=1e30),
                checkpoint=CheckpointConfig(every_steps=1, keep_newest=2),
            ),
            callbacks=[die],
        )  # fmt: skip
    rows = read_metrics(tmp_path / "run")
    assert [row["skipped"] for row in rows if "loss" in row][6:] == [0, 1]
    assert max(committed_steps(tmp_path / "run/checkpoints")) > 6
    with pytest.warns(match="checkpoint 6 is taken, the last before a loss that was not finite"):
        _, params, _ = load_params(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, params, load_params(finished[1].directory)[1])
    notes = []
    pretrain(replace(config, steps=7), message=notes.append)
    assert any("resuming after step 6 of 7" in note for note in notes)


def test_options_together_on_a_mesh(text, tmp_path):
    seen = []

    def callback(step, state, metrics, batch):
        seen.append((step, int(state.step), sorted(batch)))
        return {"twice": 2.0 * step}

    config = tiny_config(
        text, tmp_path / "run", steps=7, batch_size=8, accumulation=2, mesh=MeshConfig(1, 1, 2),
        optimizer=AdamWConfig(), ema=0.5, z_loss=1e-4, head_chunks=2, profile="4:3",
        tensorboard=True,
        checkpoint=CheckpointConfig(every_steps=None, every_minutes=1e-9, keep_newest=20),
    )  # fmt: skip
    config = replace(
        config, model=replace(config.model, document_mask=True, compute_dtype="bfloat16")
    )
    result = pretrain(config, callbacks=[callback])
    assert result.status == "finished"
    assert "validation_loss_ema" in result.summary
    assert seen[0] == (1, 1, ["segment_ids", "signals", "tokens"]) and len(seen) == 7
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert [row["twice"] for row in rows] == [2.0 * row["step"] for row in rows]
    # The clock's wish to save is read one step later, with the metrics.
    assert len(committed_steps(tmp_path / "run/checkpoints")) >= 3
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))
    assert list((tmp_path / "run/tensorboard").iterdir())


def test_norm_ratios_of_both_kinds_of_steps_and_the_run_is_unchanged(finished, tmp_path):
    diagnostics = DiagnosticsConfig(record=("norms",), every=4)
    config = replace(finished[0], run_directory=str(tmp_path / "run"), diagnostics=diagnostics)
    pretrain(config)
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    ratios = "grad_nuc_over_1", "update_2_over_inf", "errmom_F_over_1", "smooth_1_over_inf"
    names = {r: [f"norm_ratios/residue_{r}/{name}" for name in ratios] for r in (0, 1)}
    assert [row["step"] for row in rows if names[0][0] in row] == [4]
    assert [row["step"] for row in rows if names[1][0] in row] == [1, 5]
    spectral, sign = rows[4], rows[3]
    assert all(spectral[name] > 0 for name in names[1])
    # A matrix of signs has a spectral norm of at least the root of its longer side, here 16 or 64;
    # an orthogonal one of 1, with entries of about the root's inverse.
    assert sign[names[0][1]] >= 4 > spectral[names[1][1]]
    assert losses_of(tmp_path / "run") == losses_of(finished[1].directory)


def test_dry_run_prints_costs_and_writes_nothing(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.json"
    # It allocates nothing: that there is too little memory to train is said, no more.
    rows = {"batch_size": 10**8}
    config = tiny_config(text, None, mesh=MeshConfig(1, 2), optimizer=AdamWConfig(), **rows)
    path.write_text(to_json(config))
    assert cli.main(["pretrain", "--config", str(path), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "this machine could not train it: batch_size: got 100000000" in err
    for word in ("arguments", "temporaries", "output", "FLOPs of the model", "all-reduce"):
        assert word in out
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    # What no machine can train is refused as without a dry run, with the bytes that it needs.
    flags = ("--batch-size", "1000000000", "--dry-run")
    assert cli.main(["pretrain", "--config", str(path), *flags]) == 2
    err = capsys.readouterr().err
    assert "batch_size: got 1000000000" in err and "(4,656,000,000,000 bytes)" in err
