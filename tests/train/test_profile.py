import json
import os
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jaxopt_lab import cli
from jaxopt_lab.train.config.run import PretrainConfig, validate
from jaxopt_lab.train.config.sections import CheckpointConfig
from jaxopt_lab.train.config.serialize import from_json
from jaxopt_lab.train.errors import ConfigError
from jaxopt_lab.train.profile import Trace, profiled_steps
from jaxopt_lab.train.run import pretrain
from tests.train.tiny_run import tiny_config, write_text

STATE = {"w": jnp.zeros(3)}


def traced(directory):
    return list(directory.rglob("*.xplane.pb"))


def take(trace, steps):
    for step in steps:
        trace.before(step, STATE)
        trace.after(step, STATE)


def assert_closed(tmp_path):
    """A second trace can only start where no other one is open."""
    jax.profiler.start_trace(str(tmp_path / "second"))
    jax.profiler.stop_trace()


@pytest.mark.parametrize(
    ("steps", "files"),
    [
        (range(1, 7), 1),
        (range(1, 4), 1),  # the run ends before the window does
        (range(5, 7), 1),  # resumed inside of the window
        (range(1, 3), 0),  # ends before the window begins
        (range(6, 9), 0),  # resumed behind the window
    ],
)
def test_a_trace_of_the_steps_of_the_window_that_are_taken(tmp_path, steps, files):
    told = []
    with Trace(range(3, 6), tmp_path / "profile", told.append) as trace:
        take(trace, steps)
    assert len(traced(tmp_path / "profile")) == files
    assert_closed(tmp_path)
    if files:
        assert told == [f"profile: {tmp_path / 'profile'}"]
    elif 6 in steps:
        assert told == ["profile: nothing was traced, step 5 was taken before"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_closes_the_trace(tmp_path, error):
    with pytest.raises(error), Trace(range(3, 6), tmp_path / "profile", lambda _: None) as trace:
        take(trace, range(1, 4))
        raise error
    assert traced(tmp_path / "profile")
    assert_closed(tmp_path)


def test_a_profiler_that_fails_is_reported_and_training_goes_on(tmp_path):
    told = []
    (tmp_path / "file").write_text("")
    with Trace(range(1, 3), tmp_path / "file/profile", told.append) as trace:
        take(trace, range(1, 5))
    assert len(told) == 1 and "could not be written" in told[0] and "\n" not in told[0]
    jax.profiler.start_trace(str(tmp_path / "other"))  # somebody else's
    try:
        with Trace(range(1, 3), tmp_path / "profile", told.append) as trace:
            take(trace, range(1, 5))
    finally:
        jax.profiler.stop_trace()
    assert len(told) == 2 and traced(tmp_path / "other")


@pytest.mark.parametrize("value", ["5", "-1:3", "0:3", "3:0", "a:b", "3:", "1:2:3", "²:1", ""])
def test_other_values_are_one_line_that_names_the_field(value, capsys):
    with pytest.raises(ConfigError, match=r"profile: got .*expected START:STEPS"):
        validate(replace(PretrainConfig(), profile=value), 1)
    assert cli.main(["pretrain", f"--profile={value}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxopt-lab: error: profile: got") and error.count("\n") == 1


def test_a_window_beyond_the_run_is_refused():
    assert list(profiled_steps("4:3", 6)) == [4, 5, 6]
    with pytest.raises(ConfigError, match="profile: got '4:3', expected steps between 1 and 5"):
        profiled_steps("4:3", 5)


def test_the_switch_of_earlier_files_is_read():
    for value, steps, wanted in ((True, 6, "4:3"), (True, 5, None), (False, 6, None)):
        stored = json.dumps({"version": 2, "profile": value, "steps": steps})
        assert from_json(stored).profile == wanted
    assert from_json(json.dumps({"profile": "1:2"})).profile == "1:2"


def test_a_run_that_is_stopped_inside_the_window_has_its_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXOPT_LAB_CACHE", str(tmp_path / "cache"))

    def stop(step, state, metrics, batch):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    config = tiny_config(
        write_text(tmp_path / "text"), tmp_path / "run", profile="2:5",
        checkpoint=CheckpointConfig(every_steps=None),
    )  # fmt: skip
    assert pretrain(config, callbacks=[stop]).status == "terminated"
    assert traced(tmp_path / "run/profile")
    assert_closed(tmp_path)
