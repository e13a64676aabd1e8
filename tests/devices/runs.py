"""Runs of the real trainer on the devices present: another mesh after a resume, and SIGTERM."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from jaxopt_lab.train.config.optimizers import AdamWConfig
from jaxopt_lab.train.config.schedules import ConstantConfig
from jaxopt_lab.train.config.sections import CheckpointConfig, EvalConfig, MeshConfig
from jaxopt_lab.train.config.serialize import to_json
from jaxopt_lab.train.io.checkpoints import committed_steps
from jaxopt_lab.train.run import pretrain
from tests.train.tiny_run import losses_of, tiny_config, write_text

# Divided by any usual number of devices.
ROWS = 48
# How far losses may be apart after a few steps whose sums have another order.
TOLERANCE = 1e-3
PATIENCE_SECONDS = 300


def sigterm(directory: Path) -> str:
    """A run on all devices is asked to stop; returns what went wrong, or nothing.

    In a process of its own, which must come before this one touches the devices: some belong to
    one process at a time.
    """
    config = tiny_config(
        write_text(directory / "text"), None, steps=10**6, batch_size=ROWS,
        optimizer=AdamWConfig(), mesh=MeshConfig(),
        eval=EvalConfig(every=10**6, batches=1, sample_tokens=0),
        checkpoint=CheckpointConfig(every_steps=None),
    )  # fmt: skip
    settings, run = directory / "config.json", directory / "stopped"
    settings.write_text(to_json(config))
    command = ["pretrain", "--config", str(settings), "--run-directory", str(run)]
    child = subprocess.Popen(
        [sys.executable, "-m", "jaxopt_lab.cli", *command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"JAXOPT_LAB_CACHE": str(directory / "cache")},
    )  # fmt: skip
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not _has_logged(run) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    try:
        output, _ = child.communicate(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        return "did not stop"
    if child.returncode != 0:
        return f"exit status {child.returncode}: {output[-400:]}"
    return "" if committed_steps(run / "checkpoints") else "no checkpoint was committed"


def resume_on_another_mesh(directory: Path, first: MeshConfig, second: MeshConfig) -> str:
    """Two steps on one mesh and two on another, against four on the first."""
    config = tiny_config(
        write_text(directory / "text"), None, steps=4, batch_size=ROWS, optimizer=AdamWConfig(),
        schedule=ConstantConfig(), mesh=first, eval=EvalConfig(every=4, batches=1, sample_tokens=0),
        checkpoint=CheckpointConfig(every_steps=2),
    )  # fmt: skip
    straight, resumed = directory / "straight", directory / "resumed"
    pretrain(replace(config, run_directory=str(straight)))
    pretrain(replace(config, run_directory=str(resumed), steps=2))
    pretrain(replace(config, run_directory=str(resumed), mesh=second, resume=True, steps=4))
    wanted, got = losses_of(straight), losses_of(resumed)
    if wanted.keys() != got.keys():
        return f"steps {sorted(got)} instead of {sorted(wanted)}"
    apart = max(abs(got[step] - wanted[step]) for step in wanted)
    return "" if apart <= TOLERANCE else f"losses differ by {apart:.1e}"


def resumes(devices: int) -> dict[str, tuple[MeshConfig, MeshConfig]]:
    """What is tried on so many devices."""
    alone, data, fsdp = MeshConfig(1), MeshConfig(devices), MeshConfig(1, devices)
    pairs = {"fsdp to data": (fsdp, data), "data to fsdp": (data, fsdp)}
    return {**pairs, "fsdp to one device": (fsdp, alone)}


def _has_logged(run: Path) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.exists() and '"loss"' in metrics.read_text()
