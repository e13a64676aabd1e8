"""The study that the command line runs, at its smallest."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import cli
from jaxopt_lab.dynamics.loop.learners import LEARNERS, Learner
from jaxopt_lab.dynamics.loop.study import LoopStudyConfig, run_seeds, run_study

TINY = "--items 60 --steps 40 --seeds 3 --usage 1 --adherence 0 3"


def test_a_study_writes_one_directory(tmp_path, capsys):
    out = tmp_path / "study"
    code = cli.main(f"dynamics loop --setup window {TINY} --surface-seeds 2 --out {out}".split())
    printed = capsys.readouterr()
    assert code == 0
    assert "100%" in printed.err and "s left" in printed.err and "surface" in printed.err
    assert "positive loop" in printed.out and str(out) in printed.out

    config = json.loads((out / "config.json").read_text())
    assert LoopStudyConfig(**config) == LoopStudyConfig(
        setup="window", items=60, steps=40, seeds=3, usage=[1.0], adherence=[0.0, 3.0],
        surface_seeds=2, out=str(out),
    )  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert [row["adherence"] for row in results["settings"]] == [0.0, 3.0]
    for row in results["settings"]:
        assert row["verdict"] in printed.out
        mean, low, high = np.array(row["curves"]["deviation"])
        assert np.all((low <= mean) & (mean <= high)) and row["curves"]["step"][-1] == 40
    assert np.shape(results["surface"]["end"]) == (15, 11)
    names = {path.name for path in (out / "figures").iterdir()}
    assert names == {"loop-1.png", "loop-2.png", "deviation.png", "surface.png"}
    assert all((out / "figures" / name).read_bytes()[:4] == b"\x89PNG" for name in names)

    # The same study again, from its configuration.
    again = ["--config", str(out / "config.json"), "--surface-seeds", "0"]
    assert cli.main(["dynamics", "loop", *again, "--out", str(tmp_path / "again")]) == 0
    repeated = json.loads((tmp_path / "again" / "results.json").read_text())
    assert repeated["settings"] == results["settings"] and repeated["surface"] is None


def test_ones_own_learner_and_file(tmp_path):
    path = tmp_path / "data.csv"
    x = np.linspace(-1.0, 1.0, 50)
    rows = zip(x, np.sin(50 * x), strict=True)
    path.write_text("x,y\n" + "".join(f"{a},{2 * a + b}\n" for a, b in rows))

    def fit(key, features, targets):
        return jnp.mean(targets)

    # Who always predicts the mean and is believed makes everyone equal.
    learner = Learner(fit, lambda mean, features: jnp.full(features.shape[0], mean))
    config = LoopStudyConfig(
        data=str(path), usage=(1.0,), adherence=(0.0,), seeds=3, steps=400, out=str(tmp_path / "o")
    )
    study = run_study(config, learner=learner)
    (verdict,) = study.verdicts
    assert verdict.label == "positive loop" and verdict.seeds == 3
    assert verdict.mass_end.mean > verdict.mass_start.mean


def test_seeds_do_not_depend_on_how_many_run(tmp_path):
    config = LoopStudyConfig(items=60, steps=40, seeds=3)
    runs = [
        run_seeds(
            jax.random.key(0), config.make_data(), LEARNERS["ridge0"], usage=1.0, adherence=3.0,
            loop=config.loop(), seeds=seeds,
        )
        for seeds in (8, 11)
    ]  # fmt: skip
    eight, eleven = (np.asarray(run.statistics.dev) for run in runs)
    assert eight.shape == (8, 5) and eleven.shape == (11, 5)
    np.testing.assert_array_equal(eleven[:8], eight)
    assert len(np.unique(eleven[:, 0])) == 11
    assert runs[1].step.tolist() == [0, 10, 20, 30, 40]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--usage 1.2", "usage is (1.2,); wanted a probability"),
        ("--adherence -1", "adherence is (-1.0,)"),
        ("--usage 1 0.5 --adherence 1 2 3", "expected equally many, or one of either"),
        ("--setup window --window 5000", "but the data have 2000"),
        ("--setup window --steps 1500", "the pool outside the window has 1400 items"),
        ("--steps 5", "steps: got 5, expected at least one round"),
        ("--seeds 1", "seeds: got 1, expected at least 2"),
        ("--learner forest", "learner: got 'forest', expected one of ridge0"),
        ("--data nonsense", "data: got 'nonsense', expected linear, friedman or a CSV file"),
        ("--data nowhere.csv", "nowhere.csv"),
        ("--setup circle", "circle"),
        ("--noise -1", "noise: got -1.0"),
    ],
)
def test_mistakes_are_found_before_anything_runs(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["dynamics", "loop", *flags.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_mistakes_in_a_file_are_named(tmp_path, capsys):
    path = tmp_path / "data.csv"
    path.write_text("a,b\n1,2\n3,nan\n")
    assert cli.main(["dynamics", "loop", "--data", str(path)]) == 2
    assert "row 3, column 'b'" in capsys.readouterr().err


def test_the_verb_needs_a_system(capsys):
    assert cli.main(["dynamics"]) == 2 and "sgd or loop" in capsys.readouterr().err
    assert cli.main(["dynamics", "--help"]) == 0


# A process that was started in the background ignores Ctrl-C, and so do its children.
MAIN = """
import signal, sys
from jaxopt_lab import cli
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(cli.main(["dynamics", "loop", *sys.argv[1:]]))
"""


def test_ctrl_c_ends_with_130(tmp_path):
    """Also in the middle of a compiled program, which here would run for minutes."""
    flags = f"--items 200 --steps 1000000 --seeds 2 --out {tmp_path / 'o'}"
    with subprocess.Popen(
        [sys.executable, "-c", MAIN, *flags.split()],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"JAX_LOG_COMPILES": "1"},
    ) as process:  # fmt: skip
        assert process.stderr is not None
        assert any("Finished XLA compilation of jit(_run_lanes)" in x for x in process.stderr)
        time.sleep(0.5)  # it runs
        process.send_signal(signal.SIGINT)
        try:
            _, error = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130 and "interrupted" in error
