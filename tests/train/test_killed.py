"""A process killed at any instruction, also during a save, loses nothing that was committed."""

import os
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab.train.io.checkpoints import Checkpoints, committed_steps
from tests.quick_compile import FLAGS

# State k is a function of k alone, so that what is restored can be checked against its label.
CHILD = """
import sys
from jaxopt_lab.train.io.checkpoints import Checkpoints
from tests.train.test_killed import state_at

with Checkpoints(sys.argv[1], keep_newest=2) as checkpoints:
    for step in range(1, 10**6):
        checkpoints.save(step, state_at(step), {"step": step})
        checkpoints.verify(step, finite=True)
        print(step - 1, flush=True)  # save waits for the one before
"""


def state_at(step):
    return {
        "w": jnp.arange(20_000, dtype=jnp.float32) * step,
        "b": jnp.full((64, 64), float(step), jnp.bfloat16),
        "key": jax.random.key(step),
        "step": jnp.int32(step),
    }


def start(directory):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(directory)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    )  # fmt: skip


def kill_and_check(child, directory, after_seconds):
    assert child.stdout.readline() and child.stdout.readline()  # the first one is committed
    time.sleep(after_seconds)
    child.send_signal(signal.SIGKILL)
    reported = [1, *(int(line) for line in child.stdout.read().split())]
    child.wait(timeout=30)
    newest = committed_steps(directory / "checkpoints")[-1]
    assert newest >= max(reported)
    notes = []
    with Checkpoints(directory, message=notes.append) as checkpoints:
        wanted = state_at(newest)
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted
        )
        restored = checkpoints.restore(target)
        assert restored.step == restored.data["step"] == newest
        # At most the one whose files were complete and whose digests were not is given up.
        assert all("it was not committed" in note for note in notes), notes
        for name, value in wanted.items():
            found = restored.state[name]
            if name == "key":
                value, found = jax.random.key_data(value), jax.random.key_data(found)
            np.testing.assert_array_equal(np.asarray(value), np.asarray(found))
        # What the kill interrupted is cleared away and does not hinder the next save.
        checkpoints.save(newest + 1, state_at(newest + 1), {})
        checkpoints.wait()
        names = {path.name for path in (directory / "checkpoints").iterdir()}
        assert all(name.isdecimal() for name in names)


def killed_at(moments, tmp_path):
    directories = [tmp_path / str(number) for number in range(len(moments))]
    children = [start(directory) for directory in directories]
    try:
        for child, directory, moment in zip(children, directories, moments, strict=True):
            kill_and_check(child, directory, moment)
    finally:
        for child in children:
            child.kill()
            child.communicate()


def test_killed_at_five_random_moments(tmp_path):
    generator = random.Random(0)  # the slow test below searches
    moments = [generator.uniform(0.0, 0.4) for _ in range(5)]
    print(f"moments: {moments}")  # shown when the test fails
    killed_at(moments, tmp_path)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path):
    generator = random.Random(time.time_ns())
    for batch in range(10):
        moments = [generator.uniform(0.0, 0.8) for _ in range(2)]
        print(f"moments: {moments}")
        killed_at(moments, tmp_path / str(batch))
