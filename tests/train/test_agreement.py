"""Two processes that are asked to stop, to save, or that were started in different ways."""

import json
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import jax
import pytest

from jaxopt_lab import cli
from jaxopt_lab.data import prepare
from jaxopt_lab.train.config.optimizers import AdamWConfig
from jaxopt_lab.train.config.sections import CheckpointConfig, EvalConfig, MeshConfig
from jaxopt_lab.train.config.serialize import to_json
from jaxopt_lab.train.dist import agreement
from jaxopt_lab.train.errors import CheckpointError, ConfigError, NotReadyError, TrainingError
from jaxopt_lab.train.io.checkpoints import committed_steps
from tests.train.test_processes import free_port, start_two
from tests.train.tiny_run import tiny_config, write_text


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Writes the configuration of a run that does not end by itself."""
    monkeypatch.setenv("JAXOPT_LAB_CACHE", str(tmp_path / "cache"))
    config = tiny_config(
        write_text(tmp_path / "text"), None, steps=10**6, optimizer=AdamWConfig(),
        eval=EvalConfig(every=10**6, batches=1, sample_tokens=0),
    )  # fmt: skip
    prepare(config.corpus, config.tokenizer, validation_fraction=config.validation_fraction)

    def write(**changes):
        path = tmp_path / "config.json"
        path.write_text(to_json(replace(config, **changes)))
        return str(path)

    return write


def ended(processes, seconds=120):
    try:
        return [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not condition():
        time.sleep(0.05)
    assert condition()


MESHES = {"data": MeshConfig(2), "fsdp": MeshConfig(1, 2), "tensor": MeshConfig(1, 1, 2)}


@pytest.mark.parametrize(
    ("mesh", "asked"),
    [pytest.param(mesh, asked, marks=[] if (mesh, asked) == ("tensor", 1) else pytest.mark.slow)
     for mesh in MESHES for asked in (0, 1)],
)  # fmt: skip
def test_both_save_by_the_clock_and_stop_where_one_is_asked_to(tmp_path, settings, mesh, asked):
    run, every = tmp_path / "run", CheckpointConfig(every_minutes=0.01, every_steps=None)
    processes = start_two(settings(mesh=MESHES[mesh], checkpoint=every), run)
    wait_for(lambda: committed_steps(run / "checkpoints"))
    processes[asked].send_signal(signal.SIGTERM)
    outputs = ended(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    steps = committed_steps(run / "checkpoints")
    assert len(steps) >= 2 and "stopped and saved" in outputs[0]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (("--steps", "7"), "steps: got 7, on process 1, expected 1000000"),
        pytest.param(
            ("--optimizer.learning-rate", "0.5"), "optimizer.learning_rate: got 0.5, on process 1",
            marks=pytest.mark.slow,
        ),
        pytest.param(("--dry-run",), "dry_run: got True", marks=pytest.mark.slow),
        pytest.param(("--batch-size", "3"), "batch_size: got 3", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_what_one_process_was_told_otherwise_ends_both(tmp_path, settings, changes, named):
    path = settings(mesh=MESHES["data"])
    first, second = start_two(path, tmp_path / "run", of_second=changes)
    outputs = ended([first, second])
    assert [first.returncode, second.returncode] == [2, 2], "\n".join(outputs)
    assert all(named in output for output in outputs)
    assert not (tmp_path / "run").exists()


def test_hosts_with_other_text_are_named(monkeypatch):
    told = ["host-a", {"corpus.hash": "abc", "corpus.splits.train.tokens": 7}]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(agreement, "gather", lambda text: [json.dumps(told), text])
    monkeypatch.setattr(socket, "gethostname", lambda: "host-b")
    mine = {"hash": "abc", "splits": {"train": {"tokens": 7}}}
    agreement.same_everywhere({"corpus": mine})
    mine["splits"]["train"]["tokens"] = 6
    with pytest.raises(ConfigError) as error:
        agreement.same_everywhere({"corpus": mine})
    assert str(error.value) == (
        "corpus.splits.train.tokens: got 6, on process 1, expected 7, which process 0 has "
        "(on the hosts host-b and host-a)"
    )


_OF_ITS_OWN = """
import os, sys
number = sys.argv[sys.argv.index("--distributed.process-id") + 1]
os.chdir("host" + number)
os.environ["JAXOPT_LAB_CACHE"] = "cache"
from jaxopt_lab import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_processes_with_other_text_end_with_one_line_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        write_text(tmp_path / f"host{number}" / "text")
    (tmp_path / "host1" / "text" / "more.txt").write_text("what the other host does not have")
    config = tiny_config("text", None, steps=2, mesh=MESHES["data"])
    (tmp_path / "config.json").write_text(to_json(config))
    program = "-c", _OF_ITS_OWN, "pretrain"
    processes = start_two(str(tmp_path / "config.json"), tmp_path / "run", program=program)
    outputs = ended(processes)
    assert [process.returncode for process in processes] == [2, 2], "\n".join(outputs)
    for output in outputs:
        (line,) = (line for line in output.splitlines() if "corpus.hash: got" in line)
        assert "on process 1, expected" in line and f"on the hosts {socket.gethostname()}" in line
        assert "Traceback" not in output


@pytest.mark.slow
def test_a_refusal_of_the_first_process_ends_the_second(tmp_path, settings):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    processes = start_two(settings(mesh=MESHES["data"]), tmp_path / "run")
    outputs = ended(processes)
    assert [process.returncode for process in processes] == [2, 2], "\n".join(outputs)
    assert "process 0: run_directory: got" in outputs[1] and "which is not empty" in outputs[1]


def test_a_process_that_waits_in_vain_says_so(tmp_path):
    command = [
        sys.executable, "-m", "jaxopt_lab.cli", "pretrain", "--run-directory",
        str(tmp_path / "run"), "--distributed.num-processes", "2", "--distributed.process-id", "1",
        "--distributed.coordinator-address", f"127.0.0.1:{free_port()}",
        "--distributed.start-timeout-seconds", "1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "distributed.start_timeout_seconds: got 1, but in this time not 2" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("address", ["nonsense", "host:", "host:port", ":1", "host:99999"])
def test_an_address_without_host_or_port_is_refused(address, capsys):
    flags = ("--distributed.num-processes", "2", "--distributed.process-id", "0")
    assert cli.main(["pretrain", "--distributed.coordinator-address", address, *flags]) == 2
    wanted = f"distributed.coordinator_address: got {address!r}, expected host:port"
    assert wanted in capsys.readouterr().err


@pytest.mark.parametrize("kind", [ConfigError, NotReadyError, CheckpointError, TrainingError])
def test_what_another_process_refuses_is_refused_for_the_same_reason(kind):
    assert type(agreement._KINDS[kind.__name__]("process 0: no")) is kind
