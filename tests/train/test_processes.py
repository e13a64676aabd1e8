"""Two processes on one machine, over loopback, against one process with two devices."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from jaxopt_lab import cli
from jaxopt_lab.data import prepare
from jaxopt_lab.train.config.optimizers import AdamWConfig
from jaxopt_lab.train.config.sections import CheckpointConfig, EvalConfig, MeshConfig
from jaxopt_lab.train.config.serialize import to_json
from jaxopt_lab.train.io.checkpoints import committed_steps
from jaxopt_lab.train.run import pretrain
from tests.quick_compile import FLAGS
from tests.train.tiny_run import losses_of, tiny_config, write_text


def free_port():
    # Below those that the system gives to outgoing connections, or one of them takes it meanwhile.
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = random.SystemRandom().randrange(20_000, 32_000)
            probe.bind(("127.0.0.1", port))
            return port


PRETRAIN = "-m", "jaxopt_lab.cli", "pretrain"


def start_two(settings, run, *flags, of_second=(), program=PRETRAIN):
    command = [
        sys.executable, *program, *(("--config", settings) if settings else ()),
        "--run-directory", str(run),
        "--distributed.num-processes", "2",
        "--distributed.coordinator-address", f"127.0.0.1:{free_port()}", *flags,
    ]  # fmt: skip
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS, "NO_PROXY": "*"}
    return [
        subprocess.Popen(
            [*command, "--distributed.process-id", str(number), *(of_second if number else ())],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for number in range(2)
    ]


def test_two_processes_train_save_and_one_process_resumes(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXOPT_LAB_CACHE", str(tmp_path / "cache"))
    text = write_text(tmp_path / "text")
    config = tiny_config(
        text, None, steps=4, optimizer=AdamWConfig(), mesh=MeshConfig(data=2),
        eval=EvalConfig(every=4, batches=1, sample_tokens=0),
        checkpoint=CheckpointConfig(every_steps=2, keep_newest=5),
    )  # fmt: skip
    prepare(config.corpus, config.tokenizer, validation_fraction=config.validation_fraction)
    (tmp_path / "config.json").write_text(to_json(config))
    run = tmp_path / "run"
    settings = str(tmp_path / "config.json")
    processes = start_two(settings, run)
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert "held-out loss" in outputs[0] and "held-out loss" not in outputs[1]
    assert committed_steps(run / "checkpoints") == [2, 4]

    # The same two devices in one process give the same losses up to reduction order.
    alone = replace(config, run_directory=str(tmp_path / "alone"))
    pretrain(alone)
    together, expected = losses_of(run), losses_of(tmp_path / "alone")
    assert together.keys() == expected.keys()
    for step, loss in expected.items():
        np.testing.assert_allclose(together[step], loss, rtol=1e-5)

    # Another number of processes goes on with the same text.
    shutil.rmtree(run / "checkpoints/4")
    pretrain(replace(config, run_directory=str(run), resume=True))
    resumed = losses_of(run)
    assert resumed.keys() == expected.keys()
    for step, loss in expected.items():
        np.testing.assert_allclose(resumed[step], loss, rtol=1e-5)


# A hook that fails on the second process alone.
HOOKED = """
import jax, sys
from jaxopt_lab.train import Hook, pretrain
from jaxopt_lab.train.arguments import parse_config
from jaxopt_lab.train.errors import TrainingError

def uneven(view):
    if jax.process_index() == 1:
        raise ValueError("only here")

try:
    print(pretrain(parse_config(sys.argv[1:], "pretrain"), hooks=[Hook(uneven, every=2)]).status)
except TrainingError as error:
    print(error)
"""


def test_a_hook_that_fails_on_one_process_ends_both_with_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXOPT_LAB_CACHE", str(tmp_path / "cache"))
    config = tiny_config(
        write_text(tmp_path / "text"), None, steps=50, optimizer=AdamWConfig(),
        mesh=MeshConfig(data=2), eval=EvalConfig(every=10**6, batches=1, sample_tokens=0),
        checkpoint=CheckpointConfig(every_steps=None),
    )  # fmt: skip
    (tmp_path / "config.json").write_text(to_json(config))
    processes = start_two(str(tmp_path / "config.json"), tmp_path / "run", program=("-c", HOOKED))
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    line = "hook uneven failed at step 2: ValueError: only here; saved after step 4"
    assert outputs[0].splitlines()[-1] == f"process 1: {line}", outputs[0]
    assert outputs[1].splitlines()[-1] == line, outputs[1]
    assert committed_steps(tmp_path / "run/checkpoints") == [4]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_is_killed_the_other_ends_and_one_process_resumes(
    tmp_path, monkeypatch, victim, capsys
):
    monkeypatch.setenv("JAXOPT_LAB_CACHE", str(tmp_path / "cache"))
    config = tiny_config(
        write_text(tmp_path / "text"), None, steps=10**6, optimizer=AdamWConfig(),
        mesh=MeshConfig(data=2), eval=EvalConfig(every=10**6, batches=1, sample_tokens=0),
        checkpoint=CheckpointConfig(every_steps=20, keep_newest=2),
    )  # fmt: skip
    (tmp_path / "config.json").write_text(to_json(config))
    run = tmp_path / "run"
    processes = start_two(str(tmp_path / "config.json"), run)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not committed_steps(run / "checkpoints"):
            time.sleep(0.05)
        processes[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        output = processes[1 - victim].communicate(timeout=60)[0]
        print(f"ended after {time.monotonic() - killed:.1f} s")
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert processes[1 - victim].returncode != 0
    resume = f"jaxopt-lab pretrain --resume --run-directory {run}"
    assert f"process {1 - victim} of 2: should another process die" in output and resume in output
    newest = committed_steps(run / "checkpoints")[-1]
    steps = str(newest + 2)
    arguments = [*resume.split()[1:], "--mesh.data", "1", "--steps", steps]
    assert cli.main(arguments) == 0
    assert f"resuming after step {newest} of {steps}" in capsys.readouterr().err
    assert sorted(losses_of(run)) == list(range(1, newest + 3))
