import numpy as np
import pytest

from jaxopt_lab.report import SmoothnessSeries, smoothness_figure

STEP = np.arange(1, 21)
GAP = np.linspace(2.0, 0.1, 20)


def test_panels_have_titles_labels_and_readable_axes(tmp_path):
    narrow = SmoothnessSeries("all steps: fit", STEP, GAP, 1 + GAP, lambda gap: 1 + gap)
    wide = SmoothnessSeries("too few", STEP, GAP, np.geomspace(1, 30, 20))
    wider = SmoothnessSeries("sign steps", STEP, GAP, 2e3 * 10**GAP, lambda gap: 1e5 - 1e6 * gap)
    panels = {"narrow": [narrow], "wide": [wide], "wider": [wider, wide], "none": []}
    path = smoothness_figure(panels, tmp_path / "figures/f.svg", target_loss=3.2, title="run")
    text = path.read_text()
    below = "loss after the step \N{MINUS SIGN} 3.2 [nats/token]"
    labels = "all steps: fit", "too few", "sign steps", "run", "no points", "optimizer step"
    for expected in (*panels, *labels, below):
        assert f"<!-- {expected} -->" in text
    # Labels at 20 and 1.5 show a logarithmic and a linear axis.
    assert "<!-- 20 -->" in text and "<!-- 1.5 -->" in text


def test_a_figure_of_no_points_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none of them has a point"):
        smoothness_figure({"empty": []}, tmp_path / "f.png", target_loss=1.0)


def test_panels_may_have_their_own_targets(tmp_path):
    series = SmoothnessSeries("", STEP, GAP, 1 + GAP)
    targets = {"one": 2.5, "other": 3.5}
    path = smoothness_figure(
        {name: [series] for name in targets}, tmp_path / "f.svg", target_loss=targets
    )
    text = path.read_text()
    assert all(f"\N{MINUS SIGN} {target} [nats/token]" in text for target in targets.values())
