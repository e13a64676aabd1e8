import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot
from matplotlib.image import imread

from jaxopt_lab.report import Curve, Tracker, curves_figure, loss_figure
from jaxopt_lab.report.figures import moving_average


@pytest.fixture
def runs(tmp_path):
    directories = []
    for offset, parent in enumerate(["a", "b"]):
        directory = tmp_path / parent / "run"
        directories.append(directory)
        with Tracker(directory, tensorboard=False) as tracker:
            for step in range(1, 31):
                loss = math.nan if step == 7 else 3.0 + offset + 5.0 / step
                tracker.log(step, {"loss": loss, "tokens": 32_000 * step})
                if step % 10 == 0:
                    tracker.log(step, {"validation_loss": loss, "tokens": 32_000 * step})
    return directories


def svg_text(path):
    # matplotlib writes each text as a comment beside its glyph outlines.
    return path.read_text()


@pytest.mark.parametrize("x", ["step", "tokens", "time"])
def test_one_run(runs, tmp_path, x):
    if x == "time":
        with pytest.raises(ValueError, match="x: 'epoch' is not one of step"):
            loss_figure(runs[0], tmp_path / "f.png", x="epoch")
    path = loss_figure(runs[0], tmp_path / "figures" / "loss.svg", x=x, levels={"unigram": 6.0})
    text = svg_text(path)
    for expected in ("training", "held-out", "unigram 6.000", "loss [nats/token]", "3.167"):
        assert f"<!-- {expected} -->" in text


def test_runs_of_the_same_name_are_told_apart_by_their_paths(runs, tmp_path):
    text = svg_text(loss_figure(runs, tmp_path / "loss.svg"))
    for run, final in zip(runs, ["3.167", "4.167"], strict=True):
        assert f"<!-- {run}: held-out -->" in text
        assert f"<!-- {final} -->" in text


def test_pixels_are_drawn_and_pyplot_is_left_alone(runs, tmp_path):
    before = pyplot.get_fignums()
    image = imread(loss_figure(runs, tmp_path / "loss.png", labels=["P = 1", "P = 2"]))
    blue = np.array([0x00, 0x72, 0xB2]) / 255
    assert (np.abs(image[..., :3] - blue).max(axis=-1) < 0.02).sum() > 200
    assert pyplot.get_fignums() == before


def test_bands_and_logarithmic_axes(tmp_path):
    x = np.array([1.0, 10.0, 100.0])
    curve = Curve("P = 2", x, 1 / x, low=0.5 / x, high=2 / x)
    path = curves_figure(
        [curve], tmp_path / "f.svg", x_label="step", y_label="error", log_x=True, log_y=True
    )
    assert "<!-- 0.010 -->" in svg_text(path)


def test_a_missing_metric_is_named(runs, tmp_path):
    with pytest.raises(ValueError, match="both 'optimizer_flops' and 'loss'"):
        loss_figure(runs[0], tmp_path / "f.png", x="optimizer_flops")


@given(
    st.lists(st.floats(-1e3, 1e3) | st.just(math.nan), min_size=1, max_size=40),
    st.integers(1, 12),
)
def test_moving_average_is_the_mean_of_the_finite_neighbours(values, window):
    result = moving_average(values, window)
    for i, average in enumerate(result):
        near = [
            v
            for j, v in enumerate(values)
            if i - (window - 1) // 2 <= j <= i + window // 2 and math.isfinite(v)
        ]
        if near:
            assert average == pytest.approx(sum(near) / len(near), abs=1e-8)
        else:
            assert math.isnan(average)


def test_a_killed_process_leaves_the_figure_that_was_there(runs, tmp_path, monkeypatch):
    path = loss_figure(runs[0], tmp_path / "figures/loss.png")
    before = path.read_bytes()

    def killed(figure, file, **options):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", killed)
    with pytest.raises(KeyboardInterrupt):
        loss_figure(runs[0], path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]
