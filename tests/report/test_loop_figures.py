import numpy as np
import pytest

from jaxopt_lab.report import loop_figures as figures

STEP = np.arange(0, 50, 10)


def band(values):
    values = np.asarray(values, float)
    return np.stack([values, 0.9 * values, 1.1 * values])


def series(**changes):
    fields = dict(
        label="window, p = 1, s = 0", name="p = 1", step=STEP, deviation=band(0.9**STEP),
        density=band(1.1**STEP), mass={"0.5": band([0.4, 0.5, 0.7, 0.9, 1.0])},
        normality=np.array([[0.5] * 5, [0.2] * 5, [0.8] * 5]), moments={"k = 2": 1.0 / (1 + STEP)},
        fits={"line": 0.1 * STEP}, theory_deviation=np.array([1.0, 0.5, 0.1, 0.0, 0.0]),
        theory_density=1.1**STEP, theory_mass={"0.5": np.linspace(0.4, 1.0, 5)},
    )  # fmt: skip
    return figures.LoopSeries(**(fields | changes))


def is_png(path):
    return path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000


def test_views_of_a_loop(tmp_path):
    assert is_png(figures.loop_figure(series(), tmp_path / "new" / "loop.png"))


def test_densities_that_are_zero_and_no_theory(tmp_path):
    bare = series(
        density=np.zeros((3, 5)),
        fits={},
        theory_deviation=None,
        theory_density=None,
        theory_mass={},
    )
    assert is_png(figures.loop_figure(bare, tmp_path / "loop.png"))
    assert is_png(figures.comparison_figure([bare, series()], tmp_path / "both.png", title="both"))


def test_surfaces(tmp_path):
    p, s = np.array([0.1, 0.5, 1.0]), np.array([0.5, 1.0, 1.5, 2.0])
    ratio = np.exp(np.outer(s - 1.25, p))
    path = figures.surface_figure(
        {"window": (p, s, ratio), "sampling": (p, s, ratio)}, tmp_path / "surface.png",
        critical={"window": 1.25, "sampling": 1.25},
    )  # fmt: skip
    assert is_png(path)


@pytest.mark.parametrize("count", [1, 4])
def test_critical_laws(tmp_path, count):
    s = np.linspace(1.0, 1.5, 4)
    law = figures.CriticalLaw("sampling", s, {"1": band(s)}, {"1": s - 1.25}, 1.25)
    assert is_png(figures.critical_law_figure([law] * count, tmp_path / "law.png"))
