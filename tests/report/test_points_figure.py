import numpy as np
import pytest
from matplotlib.figure import Figure

from jaxopt_lab.report.points_figure import Method, points_figure


def test_means_errors_and_labels(tmp_path, monkeypatch):
    drawn, keep = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a: (drawn.append(self), keep(self, *a)))
    methods = [Method("near", 10.0, [1.0, 3.0]), Method("beside it", 10.5, [1.9, 2.11])]
    methods.append(Method("far away", 1000.0, [2.0, 2.02]))
    path = points_figure(methods, tmp_path / "p.png", x_label="s", y_label="loss", log_x=True)
    assert path.stat().st_size > 5000
    (axes,) = drawn[0].axes
    bars = [bar.get_segments()[0][:, 1] for each in axes.containers for bar in each[2]]
    # Two standard errors of the mean: the deviation of 1 and 3 is the root of 2.
    assert np.allclose(bars[0], [0, 4]) and np.allclose(bars[1].mean(), 2.005)
    heights = {text.get_text(): text.xy[1] for text in axes.texts}
    # Labels do not cover each other; one that has the room stays at its point.
    assert heights["beside it"] - heights["near"] > 0.03 * np.diff(axes.get_ylim())[0]
    assert np.isclose(heights["far away"], 2.01)


def test_what_cannot_be_drawn(tmp_path):
    with pytest.raises(ValueError, match="methods: empty"):
        points_figure([], tmp_path / "p.png", x_label="", y_label="")
    with pytest.raises(ValueError, match="one: got 1 losses, wanted two seeds"):
        points_figure([Method("one", 1.0, [2.0])], tmp_path / "p.png", x_label="", y_label="")
