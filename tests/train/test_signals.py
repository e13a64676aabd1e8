"""Signals where they used to be lost: closed pipes, the end of a run, inherited handlers, verbs."""

import contextlib
import os
import signal
import sys
import threading
from dataclasses import replace

import pytest

from jaxopt_lab import cli
from jaxopt_lab.models import huggingface
from jaxopt_lab.report.progress import Progress, to_stderr
from jaxopt_lab.train.config.optimizers import AdamWConfig
from jaxopt_lab.train.config.sections import EvalConfig
from jaxopt_lab.train.config.serialize import to_json
from jaxopt_lab.train.errors import ConfigError, Terminated
from jaxopt_lab.train.interrupts import (
    INTERRUPTED,
    TERMINATED,
    StopRequests,
    interrupt_by_the_end,
)
from jaxopt_lab.train.io.checkpoints import committed_steps
from jaxopt_lab.train.io.run_directory import open_run
from jaxopt_lab.train.loop import Loop
from jaxopt_lab.train.run import pretrain
from tests.train.tiny_run import tiny_config, write_text


class ClosedPipe:
    """A stream whose reader has gone."""

    def isatty(self):
        return False

    def write(self, text):
        raise BrokenPipeError

    flush = write


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXOPT_LAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tiny_config(
            write_text(tmp_path_factory.mktemp("text")), None, optimizer=AdamWConfig(), steps=2,
            eval=EvalConfig(every=10, batches=1, sample_tokens=0),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("number", "status", "code"),
    [(signal.SIGTERM, "terminated", 0), (signal.SIGINT, "interrupted", 130)],
    ids=["SIGTERM", "SIGINT"],
)
@pytest.mark.parametrize("moment", ["evaluate", "save"])
def test_a_signal_at_the_end_of_a_run_is_not_lost_though_nobody_reads(
    config, tmp_path, monkeypatch, number, status, code, moment
):
    usual = getattr(Loop, moment)

    def signalled(loop, step, state):
        result = usual(loop, step, state)
        if step == config.steps:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(Loop, moment, signalled)
    monkeypatch.setattr(sys, "stderr", ClosedPipe())
    run = tmp_path / "run"
    if moment == "save":
        path = tmp_path / "config.json"
        path.write_text(to_json(config))
        words = ["pretrain", "--config", str(path), "--run-directory", str(run)]
        assert cli.main(words) == code
    else:
        assert pretrain(replace(config, run_directory=str(run))).status == status
    assert committed_steps(run / "checkpoints") == [config.steps]


def test_the_progress_of_a_run_that_nobody_reads(monkeypatch):
    with Progress(2, stream=ClosedPipe(), interval=0.0) as progress:
        progress.update(1, loss=1.0)
        progress.evaluation(1, {"validation_loss": 1.0})
        progress.message("saved")
    monkeypatch.setattr(sys, "stderr", ClosedPipe())
    to_stderr("stopped")


def test_a_handler_does_not_write_itself():
    def message(text):
        told.append((text, threading.current_thread() is threading.main_thread()))

    told = []
    with pytest.raises(KeyboardInterrupt), interrupt_by_the_end(message, "done"):
        with StopRequests(message) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.requested == INTERRUPTED
        os.kill(os.getpid(), signal.SIGINT)
    assert sorted(told) == [
        ("SIGINT: finishing this step and saving a checkpoint", False),
        ("SIGINT: stopping as soon as done", False),
    ]


@pytest.fixture
def handlers():
    """Puts the handlers back that a test replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_terminal_that_closes_is_like_sigterm(handlers, monkeypatch):
    def close(*arguments):
        signal.raise_signal(signal.SIGHUP)

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has ignored
    with StopRequests(print) as stop:
        close()
        assert stop.requested == TERMINATED
    with pytest.raises(Terminated, match="SIGHUP"), interrupt_by_the_end():
        close()
    monkeypatch.setattr("jaxopt_lab.verbs.main", close)
    monkeypatch.setattr(os, "_exit", sys.exit)
    for verb, code in (("pretrain", 0), ("plot", 143)):
        with pytest.raises(SystemExit) as end:
            cli.main([verb])
        assert end.value.code == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("handled", ["loop", "phase", "command line"])
def test_a_signal_that_is_ignored_stays_so(handlers, handled, number, monkeypatch):
    def alive(*arguments):
        os.kill(os.getpid(), number)
        return 0

    signal.signal(number, signal.SIG_IGN)
    if handled == "loop":
        with StopRequests(print) as stop:
            alive()
            assert not stop.requested
    elif handled == "phase":
        with contextlib.suppress(KeyboardInterrupt), interrupt_by_the_end():
            alive()
            handled = ""
        assert not handled
    else:
        monkeypatch.setattr(os, "_exit", sys.exit)
        monkeypatch.setattr("jaxopt_lab.verbs.main", alive)
        assert cli.main(["plot"]) == 0
    assert signal.getsignal(number) is signal.SIG_IGN


@pytest.mark.parametrize("handled", [lambda: StopRequests(print), interrupt_by_the_end])
def test_a_handler_from_outside_python_can_be_replaced(handlers, handled, monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    with handled():
        pass
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize(
    ("verb", "code"), [("export", 143), ("sample", 143), ("plot", 143), ("bench", 143),
                       ("pretrain", 0), ("compare", 0)],
)  # fmt: skip
def test_sigterm_is_a_success_only_where_the_next_start_continues(verb, code, monkeypatch):
    def terminated(words, sigterm_exit):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("jaxopt_lab.verbs.main", terminated)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        cli.main([verb])
    assert end.value.code == code


def test_an_interrupted_export_leaves_nothing_that_looks_whole(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt), huggingface._appearing_whole(target) as partial:
        (partial / "config.json").write_text("{}")
        raise KeyboardInterrupt
    assert not target.exists()
    with huggingface._appearing_whole(target) as partial:
        (partial / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (target / "config.json").rename(target / "README.md")
    with huggingface._appearing_whole(target) as partial:
        (partial / "config.json").write_text("{}")
    assert sorted(path.name for path in target.iterdir()) == ["README.md", "config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("made", [True, False])
def test_a_refused_run_leaves_the_directory_of_the_user(config, tmp_path, made):
    run = tmp_path / "run"
    if made:
        run.mkdir()
    with pytest.raises(ConfigError), open_run(replace(config, run_directory=str(run))):
        raise ConfigError("batch_size", 3, "expected less")
    assert run.exists() == made
    assert not made or not list(run.iterdir())


def test_a_configuration_that_is_missing_is_one_plain_line(tmp_path, capsys):
    assert cli.main(["pretrain", "--config", str(tmp_path / "none.json")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No such file" in error and "Errno" not in error
