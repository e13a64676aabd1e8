"""A command that its launcher repeats: it finds its run again, and its status says what to do."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jaxopt_lab import cli, verbs
from jaxopt_lab.data import prepare
from jaxopt_lab.train.arguments import parse_config
from jaxopt_lab.train.config.optimizers import AdamWConfig
from jaxopt_lab.train.config.sections import (
    CheckpointConfig,
    DistributedConfig,
    EvalConfig,
    MeshConfig,
)
from jaxopt_lab.train.config.serialize import to_json
from jaxopt_lab.train.errors import ConfigError
from jaxopt_lab.train.io.checkpoints import committed_steps
from jaxopt_lab.train.io.lock import only_writer
from jaxopt_lab.train.io.run_directory import begun_or_new, write_config
from jaxopt_lab.train.run import RunResult
from tests.pages import code_blocks
from tests.quick_compile import FLAGS
from tests.train.test_agreement import wait_for
from tests.train.test_processes import free_port
from tests.train.tiny_run import losses_of, tiny_config, write_text


def test_the_same_command_begins_and_continues(tmp_path):
    run = str(tmp_path / "run")
    words = ["--restartable", "--run-directory", run, "--init-from", "None", "--steps", "9"]
    first = parse_config(words, "pretrain")
    assert begun_or_new(first).resume is False
    (tmp_path / "run").mkdir()
    write_config(tmp_path / "run", replace(first, batch_size=4, seed=3))
    again = begun_or_new(parse_config(words, "pretrain"))
    # What no flag gives is the run's own.
    assert again.resume and (again.steps, again.batch_size, again.seed) == (9, 4, 3)
    assert not parse_config(["--resume", "--run-directory", run], "pretrain").restartable
    with pytest.raises(ConfigError, match="run_directory: got None, expected a directory that the"):
        begun_or_new(parse_config(["--restartable"], "pretrain"))


def test_the_status_says_whether_to_start_again(tmp_path, capsys):
    assert cli.sigterm_exit(["pretrain", "--restartable"]) == 75
    assert verbs._ended(RunResult("terminated", restartable=True)) == 75
    assert verbs._ended(RunResult("terminated")) == 0
    run = str(tmp_path / "run")
    (tmp_path / "run").mkdir()
    words = ["pretrain", "--run-directory", run, "--mesh.data", "1"]
    with only_writer(tmp_path / "run"):
        assert cli.main(words) == 2 and cli.main([*words, "--restartable"]) == 75
    assert "is writing: wait for it or end it" in capsys.readouterr().err
    # A mistake stays one.
    assert cli.main(["pretrain", "--restartable", "--steps", "0"]) == 2


PRETRAIN = (sys.executable, "-m", "jaxopt_lab.cli", "pretrain")


def children(pid):
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_slice_of_which_a_host_is_killed_comes_back_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXOPT_LAB_CACHE", str(tmp_path / "cache"))
    config = tiny_config(
        write_text(tmp_path / "text"), None, steps=600, optimizer=AdamWConfig(),
        mesh=MeshConfig(data=2), eval=EvalConfig(every=10**6, batches=1, sample_tokens=0),
        checkpoint=CheckpointConfig(every_steps=50, keep_newest=2),
        distributed=DistributedConfig(heartbeat_timeout_seconds=10),
    )  # fmt: skip
    prepare(config.corpus, config.tokenizer, validation_fraction=config.validation_fraction)
    (tmp_path / "config.json").write_text(to_json(config))
    (script,) = code_blocks("guide/tpu-pod.md", "# restart.sh")
    (tmp_path / "restart.sh").write_text(script)
    run = tmp_path / "run"
    command = [
        "bash", str(tmp_path / "restart.sh"), *PRETRAIN, "--restartable",
        "--config", str(tmp_path / "config.json"), "--run-directory", str(run),
    ]  # fmt: skip
    usual = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS, "NO_PROXY": "*", "PAUSE": "1"}
    usual |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    usual.pop("JAX_COMPILATION_CACHE_DIR", None)
    hosts = []
    for rank in range(2):
        with (tmp_path / f"log{rank}").open("w") as output:
            own = usual | {"JAX_PROCESS_ID": str(rank)}
            hosts.append(
                subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=own)
            )
    try:
        wait_for(lambda: committed_steps(run / "checkpoints"), 300)
        os.kill(children(hosts[1].pid)[0], signal.SIGKILL)
        killed = time.monotonic()
        codes = [host.wait(timeout=400) for host in hosts]
        print(f"complete {time.monotonic() - killed:.1f} s after the kill")
    finally:
        for host in hosts:
            left = children(host.pid) if host.poll() is None else []
            host.kill()
            for each in left:
                os.kill(each, signal.SIGKILL)
    logs = [(tmp_path / f"log{rank}").read_text() for rank in range(2)]
    assert codes == [0, 0], "\n".join(logs)
    assert "attempt 1 ended with 137, starting again" in logs[1]
    assert "resuming after step" in logs[0] and "held-out loss" in logs[0]
    assert sorted(losses_of(run)) == list(range(1, 601))
    # The second start found the programs of the first one, on both hosts.
    assert list((run / "programs").glob("*-cache"))
    assert "first step after" in logs[0] and "restore" in logs[0]
