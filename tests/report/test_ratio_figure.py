import numpy as np
import pytest
from matplotlib.figure import Figure

from jaxopt_lab.report.ratio_figure import RatioPanel, ratio_figure


def test_points_lie_where_they_belong(tmp_path, monkeypatch):
    drawn, keep = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a: (drawn.append(self), keep(self, *a)))
    panels = [
        RatioPanel("small", [-2.0, 1.0, 0.5], {"theory": [1.1, 0.9, np.nan]}, 0.05),
        RatioPanel("large", [1e-3, 1.0], {"theory": [1, 1], "walk": [0.0, 30.0]}, 0.1),
    ]
    assert ratio_figure(panels, tmp_path / "r.png", title="all").stat().st_size > 5000
    first, second = drawn[0].axes
    assert first.get_xlim() == second.get_xlim() and first.get_ylim() == second.get_ylim()
    points = first.collections[0].get_offsets().data.tolist()
    assert points == [[2.0, 1.1], [1.0, 0.9]]  # by size of the curvature; no ratio, no point
    band = first.patches[0].get_bbox()
    assert np.allclose([band.y0, band.y1], np.exp([-0.1, 0.1]))
    assert second.collections[1].get_offsets().data.tolist() == [[1.0, 30.0]]


def test_what_cannot_be_drawn(tmp_path):
    with pytest.raises(ValueError, match="panels: empty"):
        ratio_figure([], tmp_path / "r.png")
    with pytest.raises(ValueError, match=r"ratios\['theory'\]: got shape \(2,\), wanted \(1,\)"):
        ratio_figure([RatioPanel("x", [1.0], {"theory": [1, 2]})], tmp_path / "r.png")
