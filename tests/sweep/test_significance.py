import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_lab.sweep import accuracy_interval, difference, paired_accuracy, seed_noise

losses = st.lists(st.floats(-10, 10), min_size=2, max_size=5)


def test_noise_by_hand():
    # Sums of squares 2 and 6 over 1 + 2 degrees of freedom.
    assert seed_noise([[1.0, 3.0], [5.0, 5.0, 8.0]]) == pytest.approx(math.sqrt(8 / 3))
    assert seed_noise([[1.0], [2.0, 4.0]]) == pytest.approx(math.sqrt(2))


def test_a_difference_by_hand():
    found = difference([4.0, 4.2, 4.4], [4.5], noise=0.1)
    assert found.value == pytest.approx(-0.3)
    assert found.standard_error == pytest.approx(0.1 * math.sqrt(1 / 3 + 1))
    assert found.standard_errors == pytest.approx(-0.3 / 0.11547005383792516)
    assert found.counts
    assert not difference([4.0, 4.2, 4.4], [4.5], noise=0.14).counts


def test_exactly_two_standard_errors_do_not_count():
    assert not difference([1.0, 1.0], [2.0, 2.0], noise=0.5).counts
    assert difference([1.0, 1.0], [2.0, 2.0], noise=0.5 - 1e-9).counts


def test_without_noise_any_difference_counts():
    assert difference([1.0], [2.0], noise=0.0).standard_errors == -math.inf
    assert not difference([1.0], [1.0], noise=0.0).counts
    assert difference([1.0], [1.0], noise=0.0).standard_errors == 0


def test_diverged_seeds_say_nothing_about_noise():
    assert seed_noise([[1.0, 3.0, math.nan], [math.inf, 2.0]]) == pytest.approx(math.sqrt(2))


@given(st.lists(losses, min_size=1, max_size=4), st.floats(-5, 5), st.floats(0.1, 3))
def test_noise_ignores_shifts_of_an_optimizer_and_scales(groups, shift, scale):
    noise = seed_noise(groups)
    moved = [[scale * x + shift * i for x in group] for i, group in enumerate(groups)]
    assert seed_noise(moved) == pytest.approx(scale * noise, abs=1e-9)
    if len({len(group) for group in groups}) == 1:
        assert noise**2 == pytest.approx(np.mean([np.var(g, ddof=1) for g in groups]), abs=1e-9)


@given(losses, losses, st.floats(0.01, 3))
def test_swapping_changes_the_sign_alone(first, second, noise):
    there, back = difference(first, second, noise), difference(second, first, noise)
    assert there.value == -back.value and there.counts == back.counts
    assert there.standard_error == pytest.approx(back.standard_error)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: seed_noise([[1.0], [2.0, math.nan]]), "losses: got .* expected two finite seeds"),
        (lambda: difference([], [1.0], 0.1), r"first: got \[\]"),
        (lambda: difference([1.0], [math.nan], 0.1), r"second: got \[nan\], expected finite"),
        (lambda: difference([1.0], [1.0], -0.1), "noise: got -0.1"),
        (lambda: difference([1.0], [1.0], math.nan), "noise: got nan"),
        (lambda: accuracy_interval([]), "correct: got no row"),
        (lambda: paired_accuracy([True], [True, False]), "second: got 2 rows, wanted those of f"),
        (lambda: paired_accuracy([], []), "second: got 0 rows"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_intervals_of_accuracy_cover_the_true_one_as_often_as_they_say():
    # For one true accuracy the coverage moves with the number of rows; its mean does not.
    rng, rows, covered = np.random.default_rng(0), 200, []
    for p in rng.random(12_000):
        _, low, high = accuracy_interval(rng.random(rows) < p)
        covered.append(low <= p <= high)
    assert 0.942 < np.mean(covered) < 0.958  # four standard errors
    assert accuracy_interval([True] * 20).low < 0.9 and accuracy_interval([True] * 20).high == 1
    assert accuracy_interval([False] * 20).low == 0


def test_intervals_of_a_paired_difference_cover_it_and_are_narrower_than_unpaired_ones():
    rng, rows, runs = np.random.default_rng(1), 300, 3000
    found, apart = [], 0.0
    for _ in range(runs):
        first = rng.random(rows) < 0.85
        second = np.where(rng.random(rows) < 0.05, ~first, first)  # of which 0.05 * 0.7 are lost
        found.append(paired_accuracy(first, second))
        assert found[-1].value == pytest.approx(first.mean() - second.mean())
        apart += accuracy_interval(first).high - accuracy_interval(first).low
    covered = np.mean([low <= 0.05 * 0.7 <= high for _, low, high in found])
    assert 0.935 < covered < 0.975
    assert np.mean([high - low for _, low, high in found]) < 0.7 * apart / runs
    back = paired_accuracy(second, first)
    np.testing.assert_allclose(back, [-found[-1].value, -found[-1].high, -found[-1].low])
    same = paired_accuracy(first, first)
    assert same.value == 0 and -0.02 < same.low < 0 < same.high < 0.02
