"""Differences of losses that share their seeds."""

import math

import numpy as np
import pytest
from scipy import stats

from jaxopt_lab.sweep import paired_differences, paired_noise, seed_noise


def test_what_a_seed_does_to_all_optimizers_is_no_noise():
    rng = np.random.default_rng(0)
    own = 0.01 * rng.standard_normal((5, 4))
    losses = own + np.arange(5)[:, None] + 3.0 * rng.standard_normal(4)
    found = paired_noise(losses.tolist())
    assert found.freedom == 12
    assert found.deviation == pytest.approx(paired_noise(own.tolist()).deviation)
    assert found.deviation < 0.02 < 0.5 < seed_noise(losses.tolist())


def test_two_optimizers_are_compared_by_the_paired_t_test():
    rng = np.random.default_rng(1)
    for shift in (0.0, 0.3, 0.9, 2.0):
        a, b = rng.standard_normal((2, 6)) * 0.5 + [[0.0], [shift]]
        found = paired_differences({"a": a.tolist(), "b": b.tolist()})["a", "b"]
        test = stats.ttest_rel(a, b)
        assert found.standard_errors == pytest.approx(test.statistic)
        assert found.counts == (test.pvalue < 0.05 and abs(test.statistic) > 2)


def test_holm_by_hand():
    # Steps of 1, 2 and 3 standard errors between four optimizers whose residuals have 9 degrees.
    contrast = np.asarray([[1, -1, 1, -1], [1, 1, -1, -1], [-1, 1, 1, -1], [-1, -1, -1, 3]]) / 2.0
    contrast = contrast - contrast.mean(0) - contrast.mean(1, keepdims=True) + contrast.mean()
    error = paired_noise(contrast.tolist()).deviation * math.sqrt(2 / 4)
    losses = contrast + error * np.asarray([0.0, 1.0, 3.0, 6.0])[:, None]
    found = paired_differences(dict(zip("abcd", losses.tolist(), strict=True)))
    sizes = {"ad": 6, "bd": 5, "cd": 3, "ac": 3, "bc": 2, "ab": 1}
    assert {a + b: round(abs(found[a, b].standard_errors), 6) for a, b in sizes} == sizes
    # p = 0.0002, 0.0007, 0.015, ...: the third smallest of six has to be below 0.05 / 4.
    assert {a + b for a, b in sizes if found[a, b].counts} == {"ad", "bd"}
    assert found["d", "a"].value == -found["a", "d"].value


def test_equal_optimizers_rarely_differ():
    rng = np.random.default_rng(2)
    drawn = rng.standard_normal((400, 5, 4))
    wrong = [
        any(found.counts for found in paired_differences(dict(enumerate(x.tolist()))).values())
        for x in drawn
    ]
    assert np.mean(wrong) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / len(wrong))


def test_without_noise_any_difference_counts():
    found = paired_differences({"a": [1.0, 2.0], "b": [1.5, 2.5], "c": [1.0, 2.0]})
    assert found["a", "b"].counts and found["a", "b"].standard_errors < -1e6
    assert not found["a", "c"].counts


@pytest.mark.parametrize(
    "losses", [[[1.0, 2.0]], [[1.0], [2.0]], [[1.0, 2.0], [1.0, math.nan]], [[1.0, 2.0], []], []]
)
def test_bad_losses(losses):
    with pytest.raises(ValueError, match="losses: got .* wanted finite losses"):
        paired_noise(losses)
