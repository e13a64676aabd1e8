"""A run directory and signals in every phase, two writers, damaged and missing files."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

import pytest

from jaxopt_lab import cli
from jaxopt_lab.data import prepare
from jaxopt_lab.report.tracker import read_metrics
from jaxopt_lab.train.config.optimizers import AdamWConfig
from jaxopt_lab.train.config.sections import EvalConfig
from jaxopt_lab.train.config.serialize import to_json
from jaxopt_lab.train.errors import CheckpointError, ConfigError, TrainingError
from jaxopt_lab.train.io.checkpoints import committed_steps
from jaxopt_lab.train.io.lock import only_writer
from jaxopt_lab.train.run import pretrain
from tests.train.tiny_run import losses_of, tiny_config, write_text

MODULE = "jaxopt_lab.train.run"
SIGNALS = pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGTERM, 0, "jaxopt-lab: stopped by SIGTERM"),
        (signal.SIGINT, 130, "jaxopt-lab: error: interrupted"),
    ],
    ids=["SIGTERM", "SIGINT"],
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A configuration, and a file with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXOPT_LAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        config = tiny_config(
            write_text(tmp_path_factory.mktemp("text")), None, optimizer=AdamWConfig(),
            eval=EvalConfig(every=3, batches=1, sample_tokens=0),
        )  # fmt: skip
        path = tmp_path_factory.mktemp("settings") / "config.json"
        path.write_text(to_json(config))
        yield config, path


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "finished"
    pretrain(replace(settings[0], run_directory=str(run)))
    return run


def command(path, run):
    return ["pretrain", "--config", str(path), "--run-directory", str(run)]


def resume(run, *flags):
    return ["pretrain", "--resume", "--run-directory", str(run), *flags]


def nothing_is_compiled(monkeypatch):
    def compiled(*arguments):
        raise AssertionError("compiled")

    monkeypatch.setattr(sys.modules[MODULE], "compiled_step", compiled)


# Sends a signal to itself when a certain module is about to be imported.
IMPORTING = """
import os, sys

class Sender:
    def find_spec(self, name, *rest):
        if name == module:
            os.kill(os.getpid(), number)

number, module = int(sys.argv[1]), sys.argv[2]
del sys.argv[1:3]
sys.meta_path.insert(0, Sender())
from jaxopt_lab import cli
sys.exit(cli.main())
"""


@SIGNALS
@pytest.mark.parametrize("module", ["jaxopt_lab.verbs", "jax", "orbax.checkpoint"])
def test_a_signal_while_packages_are_imported(settings, tmp_path, number, code, line, module):
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING, str(int(number)), module,
         *command(settings[1], tmp_path / "run")],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, line + "\n")
    assert not (tmp_path / "run").exists()


def test_the_entry_module_imports_nothing_heavy():
    code = "import sys, jaxopt_lab.cli; print({'jax', 'numpy', 'argparse'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n"


@SIGNALS
@pytest.mark.parametrize("moment", ["prepare_text", "compiled_step"])
def test_a_signal_before_the_first_step_and_the_same_command_again(
    settings, tmp_path, monkeypatch, capsys, number, code, line, moment
):
    def signalled(*arguments):
        try:
            os.kill(os.getpid(), number)
            time.sleep(1)
        except KeyboardInterrupt:
            pass  # as when a callback from native code loses it
        return None, None

    again = command(settings[1], tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[MODULE], moment, signalled)
        assert cli.main(again) == code
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert not (tmp_path / "run").exists()
    if (moment, number) == ("compiled_step", signal.SIGTERM):
        assert cli.main(again) == 0


@SIGNALS
def test_a_signal_during_the_report_finishes_it(
    settings, finished, tmp_path, monkeypatch, capsys, number, code, line
):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "summary.json").unlink()
    report = sys.modules[MODULE].write_report

    def signalled(*arguments):
        os.kill(os.getpid(), number)
        report(*arguments)

    monkeypatch.setattr(sys.modules[MODULE], "write_report", signalled)
    assert cli.main(resume(run)) == code
    error = capsys.readouterr().err.splitlines()
    assert error[-1] == line and any("as soon as the report is written" in e for e in error)
    assert json.loads((run / "summary.json").read_text())["steps"] == 6
    monkeypatch.undo()


def test_a_directory_with_checkpoints_is_never_removed(settings, tmp_path, capsys):
    run = tmp_path / "run"

    def lose_the_log(step, state, metrics, batch):
        if step == 5:
            (run / "metrics.jsonl").rename(run / "renamed.jsonl")

    config = replace(settings[0], run_directory=str(run))
    with pytest.raises(TrainingError, match="no metrics.jsonl.*finished and saved"):
        pretrain(config, callbacks=[lose_the_log])
    assert committed_steps(run / "checkpoints") == [3, 6]

    def fail(step, state, metrics, batch):
        if step == 5:
            (run / "metrics.jsonl").unlink()
            raise RuntimeError("a mistake of ours")

    shutil.rmtree(run)
    with pytest.raises(TrainingError, match="fail failed at step 5: RuntimeError: a mistake"):
        pretrain(config, callbacks=[fail])
    assert committed_steps(run / "checkpoints") == [3, 6]


def test_one_process_writes_at_a_time(settings, finished, tmp_path, monkeypatch, capsys):
    nothing_is_compiled(monkeypatch)
    shutil.copytree(finished, tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with only_writer(tmp_path / "run"):
        assert cli.main(resume(tmp_path / "run")) == 2
        error = capsys.readouterr().err
    assert f"process {os.getpid()} on " in error and error.count("\n") == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


HOLDER = """
import pathlib, sys, time
from jaxopt_lab.train.io.lock import only_writer
with only_writer(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(ConfigError, match=f"process {holder.pid} on .* is writing"):
                with only_writer(tmp_path):
                    pass
        finally:
            holder.kill()
    with only_writer(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("manifest.json", b'{"sessions": [', "manifest.json: not JSON"),
        ("manifest.json", b"[]", "manifest.json: expected an object"),
        ("config.json", b"\xff\xfe{}", "config.json: not UTF-8"),
        ("config.json", b"{", "config.json: .*expected JSON"),
        ("metrics.jsonl", b'{"step": 1}\n{"st\xff\n{"step": 3}\n', "metrics.jsonl, line 2"),
        ("metrics.jsonl", b'{"step": null}\n', "metrics.jsonl, line 1: not a metrics row"),
        ("metrics.jsonl", b'{"step": 1, "loss": "abc"}\n', "line 1: not a metrics row"),
    ],
)
def test_a_damaged_file_is_named_before_anything_is_compiled(
    settings, finished, tmp_path, monkeypatch, capsys, name, content, named
):
    nothing_is_compiled(monkeypatch)
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises((CheckpointError, ConfigError), match=named):
        pretrain(replace(settings[0], run_directory=str(tmp_path / "run"), resume=True))
    assert cli.main(resume(tmp_path / "run")) in (1, 2)
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and name in error[0]


def test_a_directory_in_place_of_the_log_is_named_before_anything_is_compiled(
    settings, finished, tmp_path, monkeypatch
):
    nothing_is_compiled(monkeypatch)
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").unlink()
    (tmp_path / "run/metrics.jsonl").mkdir()
    with pytest.raises((CheckpointError, OSError), match="metrics.jsonl"):
        pretrain(replace(settings[0], run_directory=str(tmp_path / "run"), resume=True))


def test_a_damaged_tokenizer_is_named(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/tokenizer.json").write_text("{}")
    assert cli.main(["sample", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert "run/tokenizer.json: not a tokenizer file" in error and error.count("\n") == 1


def test_a_full_disk_is_one_line_that_names_the_file(settings, tmp_path, monkeypatch, capsys):
    # A limit on file size makes writes fail in the same places as a full disk.
    nothing_is_compiled(monkeypatch)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        code = cli.main(command(settings[1], tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err.splitlines()
    assert code == 1 and error == [f"jaxopt-lab: error: {tmp_path}/run/config.json: File too large"]
    assert not (tmp_path / "run").exists()


def test_a_directory_that_cannot_be_made_is_one_line(settings, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert cli.main(command(settings[1], tmp_path / "file/run")) == 1
    assert capsys.readouterr().err == f"jaxopt-lab: error: {tmp_path}/file/run: Not a directory\n"


def test_a_finished_run_resumed_twice_has_no_row_twice(settings, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = (run / "metrics.jsonl").read_bytes()
    summary = json.loads((run / "summary.json").read_text())
    for _ in range(2):
        result = pretrain(replace(settings[0], run_directory=str(run), resume=True))
    assert (run / "metrics.jsonl").read_bytes() == before
    for name in ("training_loss", "validation_loss", "bits_per_byte", "steps"):
        assert result.summary[name] == summary[name]


def test_a_run_that_starts_again_from_the_beginning_evaluates_once(settings, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints")
    pretrain(replace(settings[0], run_directory=str(run), resume=True))
    evaluated = [row["step"] for row in read_metrics(run) if "validation_loss" in row]
    assert evaluated == [0, 3, 6] and losses_of(run) == losses_of(finished)


def test_nothing_is_left_in_the_temporary_directory(settings, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    config = settings[0]
    prepare(
        config.corpus, config.tokenizer, cache_dir=tmp_path / "cache",
        validation_fraction=config.validation_fraction,
    )  # fmt: skip
    assert not list(temporary.iterdir())
