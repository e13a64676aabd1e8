"""The real command, killed again and again, ends with the losses of a run left in peace."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from jaxopt_lab.train.config.optimizers import AdamWConfig, LionMuonConfig
from jaxopt_lab.train.config.optimizers_kronecker import DyKAFConfig, ShampooConfig, SoapConfig
from jaxopt_lab.train.config.sections import CheckpointConfig, EvalConfig
from jaxopt_lab.train.config.serialize import to_json
from jaxopt_lab.train.io.checkpoints import committed_steps
from tests.quick_compile import FLAGS
from tests.train.tiny_run import losses_of, tiny_config, write_text

STEPS = 600
KILLS = 40
OPTIMIZERS = {
    "adamw": AdamWConfig(),
    "lion-muon": LionMuonConfig(),
    "soap": SoapConfig(),
    "dykaf": DyKAFConfig(),
    "shampoo": ShampooConfig(),
}


def start(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "jaxopt_lab.cli", "pretrain", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS} | environment,
    )  # fmt: skip


def wait_for_a_step(child, log):
    """Until the child has logged something, or ended."""
    size = log.stat().st_size if log.exists() else 0
    deadline = time.monotonic() + 120
    while child.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.stat().st_size != size:
            return
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.timeout(6000)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pretrain_killed_at_random_moments_ends_as_if_nothing_had_happened(tmp_path, name):
    """200 kills over all optimizers."""
    config = tiny_config(
        write_text(tmp_path / "text"), None, steps=STEPS, optimizer=OPTIMIZERS[name],
        eval=EvalConfig(every=100, batches=1, sample_tokens=0),
        checkpoint=CheckpointConfig(every_steps=10, keep_newest=2),
    )  # fmt: skip
    (tmp_path / "config.json").write_text(to_json(config))
    cache = {"JAXOPT_LAB_CACHE": str(tmp_path / "cache")}
    new = ["--config", str(tmp_path / "config.json"), "--run-directory"]
    straight, run = tmp_path / "straight", tmp_path / "run"
    output, _ = start(*new, str(straight), **cache).communicate(timeout=300)
    assert sorted(losses_of(straight)) == list(range(1, STEPS + 1)), output

    generator = random.Random(time.time_ns())
    for number in range(KILLS):
        # A run that was killed before it wrote anything starts anew.
        resume = ["--resume"] if (run / "config.json").exists() else []
        arguments = [*resume, "--run-directory", str(run)] if resume else [*new, str(run)]
        child = start(*arguments, **cache)
        # Every other kill comes while training, the rest anywhere in the start of the process.
        while_training = number % 2 == 0
        if while_training:
            wait_for_a_step(child, run / "metrics.jsonl")
        moment = generator.uniform(0, 0.5 if while_training else 10)
        print(f"kill {number} after {moment:.3f} s, while training: {while_training}")
        time.sleep(moment)
        before = committed_steps(run / "checkpoints")
        child.send_signal(signal.SIGKILL)
        output, _ = child.communicate(timeout=60)
        assert "damaged" not in output, output
        after = committed_steps(run / "checkpoints")
        assert max(after, default=0) >= max(before, default=0), output
    output, _ = (child := start("--resume", "--run-directory", str(run), **cache)).communicate()
    assert child.returncode == 0 and "damaged" not in output, output
    assert losses_of(run) == losses_of(straight)
