import numpy as np
import pytest

from jaxopt_lab.report.landscape_figures import (
    growth_figure,
    intervention_figure,
    spectrum_figure,
    stability_figure,
    variance_figure,
)

RATE, STEPS = 0.05, 500
RANDOM = np.random.default_rng(0)


def labels(path, *expected):
    text = path.read_text()
    return [label for label in expected if f"<!-- {label} -->" not in text]


def spectrum(size=200):
    """Curvatures, noise and variances as those of a small network, a fifth without noise."""
    curvature = 10 ** RANDOM.uniform(-7, 1, size) * np.where(RANDOM.random(size) < 0.1, -0.01, 1)
    noise = np.where(np.arange(size) % 5 == 0, 0.0, 1e-3 * np.abs(curvature) + 1e-9)
    return curvature, noise, RATE**2 * noise * memory(curvature)


def memory(curvature):
    x = (1 - RATE * curvature) ** 2 - 1
    return np.expm1(STEPS * np.log1p(x)) / x


def regime(curvature):
    left = (1 - (1 - RATE * curvature) ** 2) * STEPS
    names = ["unstable", "diffusive", "confined"]
    return np.select([left < -1, abs(left) < 0.2, left > 4], names, "transitional")


def test_measured_against_predicted(tmp_path):
    curvature, noise, predicted = spectrum()
    measured = predicted * RANDOM.chisquare(255, len(predicted)) / 255
    path = variance_figure(
        measured, predicted, tmp_path / "figures/variance.svg", regimes=list(regime(curvature)),
        comparison=RATE * noise / (2 * abs(curvature) + 1e-6), title="MLP",
    )  # fmt: skip
    hidden = f"{(noise == 0).sum()} directions without noise left out"
    assert not labels(path, "MLP", "stationary proxy", "equal", hidden)
    confined = ((regime(curvature) == "confined") & (noise > 0)).sum()
    assert not labels(path, f"confined ({confined})")


def test_variance_against_curvature(tmp_path):
    curvature, noise, predicted = spectrum()
    with np.errstate(invalid="ignore"):
        remembered = predicted / (RATE**2 * noise)
    grid = np.concatenate([-np.geomspace(1e-1, 1e-9, 80), np.geomspace(1e-9, 10, 160)])
    edge = 1 / (RATE * STEPS)
    path = spectrum_figure(
        curvature, remembered, tmp_path / "spectrum.svg", theory=(grid, memory(grid)),
        bands={
            "unstable": (-np.inf, -edge / 2), "transitional": (-edge / 2, -edge / 10),
            "diffusive": (-edge / 10, edge / 10), "transitional 2": (edge / 10, 2 * edge),
            "confined": (2 * edge, np.inf),
        },
        linear_below=edge / 10, title="regimes",
    )  # fmt: skip
    assert not labels(path, "regimes", "unstable", "diffusive", "confined", "transitional")
    assert labels(path, "transitional 2")


def test_growth(tmp_path):
    curvature = np.array([0.0, 0.1, 1.0])
    steps, grid = np.array([1, 5, 25, 125, 500]), np.arange(1, 501)
    curve = np.array(
        [[np.sum((1 - RATE * c) ** (2 * np.arange(n))) for c in curvature] for n in grid]
    )
    path = growth_figure(
        steps, curve[steps - 1] * 1.05, tmp_path / "growth.svg", theory_steps=grid, theory=curve,
        labels=["flat", "middle", "sharp"], relative_error=0.06, title="growth",
    )  # fmt: skip
    assert not labels(path, "flat", "middle", "sharp", "theory", "growth", "SGD step")


def test_stability(tmp_path):
    rate = np.linspace(0.1, 1.9, 100)
    at, variance = (x.ravel() for x in np.meshgrid([0.2, 0.6, 0.8, 1.2], [0.5, 1.0, 2.0, 3.0]))
    grows = at * variance > 2 - at
    path = stability_figure(
        rate, (2 - rate) / rate, 2 / rate, tmp_path / "stability.svg", points=(at, variance, grows)
    )
    assert not labels(path, "bound of SGD", "bound of Langevin", "exact recursion: grows")


def test_interventions(tmp_path):
    kinds = ("flat", "sharp", "theory", "random")
    path = intervention_figure(
        {
            "noise suppressed": dict(zip(kinds, (1e-9, 0.02, 0.004, 0.4), strict=True)),
            "noise times 3": dict(zip(kinds, (9.1, 9.6, 8.8, 4.0), strict=True)),
        },
        tmp_path / "interventions.svg",
        expected={"noise suppressed": 0.0, "noise times 3": 9.0},
        alpha=([0.0, 0.1, 0.5, 1.0], [0.0, 0.011, 0.26, 1.0]),
        title="MLP",
    )
    assert not labels(path, *kinds, "noise times 3", "square law", "1e-09", "9.6")


def test_bad_input_is_named(tmp_path):
    out = tmp_path / "f.png"
    with pytest.raises(ValueError, match="predicted: 2 values, expected 3"):
        variance_figure(np.ones(3), np.ones(2), out, regimes=["confined"] * 3)
    with pytest.raises(ValueError, match="no direction has both"):
        variance_figure(np.ones(3), np.zeros(3), out, regimes=["confined"] * 3)
    with pytest.raises(ValueError, match="memory: no direction"):
        spectrum_figure(
            np.ones(2), np.full(2, np.nan), out, theory=([1], [1]), bands={}, linear_below=1.0
        )
    with pytest.raises(ValueError, match=r"theory: got shape \(3, 1\), expected \(3, 2\)"):
        growth_figure(
            [1, 2], np.ones((2, 2)), out, theory_steps=[1, 2, 3], theory=np.ones((3, 1)),
            labels=["a", "b"],
        )  # fmt: skip
    with pytest.raises(ValueError, match="ratios: empty"):
        intervention_figure({}, out, expected={}, alpha=([0.0], [0.0]))
    assert not out.exists()
