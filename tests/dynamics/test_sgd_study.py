"""The study that `jaxopt-lab dynamics sgd` runs."""

import dataclasses
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import cli
from jaxopt_lab.dynamics.landscape.quadratics import moments
from jaxopt_lab.dynamics.landscape.study import run_study
from jaxopt_lab.dynamics.landscape.study_config import DEFAULTS, SgdConfig, record_interval
from jaxopt_lab.dynamics.landscape.study_quadratic import (
    CURVATURES,
    quadratic_problem,
    variance_error,
)
from jaxopt_lab.dynamics.landscape.systems import System


@pytest.fixture
def digits(tmp_path):
    """A directory with images of two bars in the format of MNIST."""
    random = np.random.default_rng(0)
    labels = np.arange(64, dtype=np.uint8) % 10
    images = random.integers(0, 80, (64, 28, 28)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 3] += 150
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
        (tmp_path / f"train-{name}-ubyte").write_bytes(header + array.tobytes())
    return str(tmp_path)


def test_the_quadratic_study_agrees_with_the_exact_recursion(tmp_path):
    lines = []
    config = SgdConfig(replicas=256, steps=60, out=str(tmp_path / "run"))
    study = run_study(config, lines.append)
    results = json.loads((study.directory / "results.json").read_text())
    assert results["agrees"] and results["largest_deviation"] < 4 and "agrees" in study.verdict
    assert "figures" in lines and len(study.table.splitlines()) == 2 + len(CURVATURES)
    written = {path.name for path in (study.directory / "figures").iterdir()}
    assert written == {"variance.png", "spectrum.png", "growth.png", "stability.png"}
    columns = results["directions"]
    np.testing.assert_allclose(columns["curvature"], CURVATURES, atol=1e-12)
    # The closed form leaves out what other directions feed: it is below, and near.
    exact, closed = (np.asarray(columns["predicted"][name]) for name in ("exact", "P2"))
    assert (closed <= exact * (1 + 1e-9)).all()
    np.testing.assert_allclose(closed, exact, rtol=0.1)


def test_the_problem_is_critical_and_has_the_wanted_spectrum():
    with jax.enable_x64(True):
        problem = quadratic_problem(jax.random.key(3), 8)
        np.testing.assert_allclose(problem.gradients.mean(0), 0, atol=1e-14)
        spectrum = jnp.linalg.eigvalsh(problem.hessians.mean(0))
        np.testing.assert_allclose(spectrum, CURVATURES, atol=1e-13)
        # At a critical point the mean stays.
        later = moments(problem, learning_rate=0.1, steps=5, batch_size=2)
        np.testing.assert_allclose(later.mean, 0, atol=1e-13)


def test_the_error_of_a_variance_sees_heavy_tails():
    random = np.random.default_rng(0)
    for draw, excess in ((random.normal, 2.0), (random.laplace, 5.0)):
        y = draw(size=(200_000, 1))
        expected = np.sqrt(excess / len(y)) * y.var()
        np.testing.assert_allclose(variance_error(y), expected, rtol=0.05)


def test_a_network_study(tmp_path, digits):
    config = SgdConfig(
        system="mlp", digits=digits, samples=64, batch_size=8, reference_sgd_steps=20,
        reference_gd_steps=10, replicas=16, steps=8, curvature_noise=True,
        out=str(tmp_path / "run"),
    )  # fmt: skip
    study = run_study(config)
    results = json.loads((study.directory / "results.json").read_text())
    assert results["parameters"] == 386 and results["reference_loss"] < 2.4
    assert len(results["directions"]["measured"]) == 386
    assert min(results["directions"]["curvature_variance"]) >= 0
    assert max(results["directions"]["curvature_variance"]) > 0
    found = results["comparisons"]["P2, all"]
    assert found["log_correlation"] > 0.9 and 0.8 < found["median_ratio"] < 1.25
    assert 0.8 < results["flat_growth"] < 1.25
    assert sum(results["regimes"].values()) == 386
    assert "P2" in study.verdict and "P1, all" in study.table


def linear_loss(params, batch):
    return jnp.mean(jnp.square(batch["x"] @ params["w"] + params["b"] - batch["y"])) / 2


def test_a_system_of_ones_own(tmp_path):
    random = np.random.default_rng(1)
    x = random.normal(size=(40, 15)) * np.append(np.geomspace(2.0, 0.02, 14), 0.0)
    data = {"x": x, "y": x.sum(1) + random.normal(size=40)}
    system = System(
        "least squares", linear_loss, lambda key: {"w": jnp.zeros(15), "b": jnp.zeros(())}, data
    )
    settings = {
        "reference_rate": 0.1,
        "reference_gd_rate": 0.1,
        "reference_sgd_steps": 100,
        "reference_gd_steps": 400,
    }
    config = SgdConfig(
        system="mlp", learning_rate=0.02, batch_size=8, replicas=200, steps=50,
        curvature_noise=True, out=str(tmp_path / "run"), **settings,
    )  # fmt: skip
    study = run_study(config, system=system)
    # A feature that is always zero: no curvature and no noise, so nothing to spread.
    assert study.findings.summary["directions_without_noise"] == 1
    found = study.findings.summary["comparisons"]["P2, all"]
    assert found["directions"] == 15 and found["log_correlation"] > 0.99
    assert "P2 holds" in study.verdict and "of sampling" in study.verdict
    # No direction is at its stationary variance after 50 steps.
    config = dataclasses.replace(config, predictor="P1", out=str(tmp_path / "P1"))
    assert "P1 DOES NOT HOLD" in run_study(config, system=system).verdict
    with pytest.raises(ValueError, match="system: a network is given"):
        run_study(SgdConfig(out=str(tmp_path)), system=system)


def test_every_system_has_all_defaults():
    names = {field.name for field in dataclasses.fields(SgdConfig)}
    for name, defaults in DEFAULTS.items():
        assert set(defaults) <= names
        config = SgdConfig(system=name).resolved()
        assert None not in {k: v for k, v in vars(config).items() if k != "text"}.values()
        assert config.resolved() == config
        assert SgdConfig(system=name, steps=7).resolved().steps == 7


@pytest.mark.parametrize("steps", [1, 7, 25, 500, 1111])
def test_records_fill_the_horizon(steps):
    every = record_interval(steps)
    assert steps % every == 0 and steps // every >= min(steps, 25)


BAD = {
    "--system resnet": "system",
    "--learning-rate -1": "learning_rate: got -1.0, expected a positive number",
    "--replicas 1": "replicas: got 1, expected at least 2",
    "--steps 0": "steps: got 0, expected at least 1",
    "--predictor P3": "predictor",
    "--system mlp --digits /nowhere": "digits: /nowhere is neither 'mnist5k' nor a directory",
    "--system nanogpt --text /nowhere.txt": "/nowhere.txt",
    "--system nanogpt --samples 999999": "samples",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_on_the_command_line_is_named(arguments, capsys, tmp_path):
    words = ["dynamics", "sgd", *arguments.split(), "--out", str(tmp_path / "run")]
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert not out and BAD[arguments] in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_the_command_line_and_its_directory(capsys, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    words = f"dynamics sgd --replicas 16 --steps 20 --predictor P1 --seed 3 --out {first}"
    assert cli.main(words.split()) == 0
    out, err = capsys.readouterr()
    assert str(first) in out and "the prediction P1" in out and "curvature" in out
    assert "simulating 16 replicas of 20 steps" in err
    saved = json.loads((first / "config.json").read_text())
    assert saved["learning_rate"] == 0.1 and saved["seed"] == 3
    # The directory runs again.
    words = f"dynamics sgd --config {first}/config.json --out {again}"
    assert cli.main(words.split()) == 0
    results = [json.loads((path / "results.json").read_text()) for path in (first, again)]
    assert results[0]["directions"] == results[1]["directions"]
