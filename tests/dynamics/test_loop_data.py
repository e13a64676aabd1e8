"""Data of the repeated-learning loop."""

import jax
import numpy as np
import pytest

from jaxopt_lab.dynamics.loop.data import check_data, friedman_data, linear_data

KEY = jax.random.key(3)


def linear_fit(data):
    x, y = (np.asarray(array, np.float64) for array in data)
    design = np.column_stack([x, np.ones(len(x))])
    weights = np.linalg.lstsq(design, y, rcond=None)[0]
    return weights, y - design @ weights


def test_linear_data_have_positive_weights_and_no_intercept():
    data = linear_data(KEY, num_items=4000, num_features=3, noise=0.5)
    weights, residuals = linear_fit(data)
    assert data.features.shape == (4000, 3) and data.targets.shape == (4000,)
    np.testing.assert_allclose(residuals.std(), 0.5, rtol=0.05)
    assert (weights[:-1] > 0).all() and (weights[:-1] < 100).all() and abs(weights[-1]) < 0.05
    np.testing.assert_allclose(np.asarray(data.features).std(), 1.0, rtol=0.03)


@pytest.mark.parametrize(("noise", "std", "mae"), [(0.0, 2.424, 1.863), (1.0, 2.625, 2.037)])
def test_no_line_fits_friedman_data_better_than_known(noise, std, mae):
    data = friedman_data(KEY, num_items=60_000, noise=noise)
    weights, residuals = linear_fit(data)
    np.testing.assert_allclose(residuals.std(), std, rtol=0.01)
    np.testing.assert_allclose(np.abs(residuals).mean(), mae, rtol=0.01)
    assert np.abs(weights[5:10]).max() < 0.2  # irrelevant features
    assert np.asarray(data.features).min() >= 0 and np.asarray(data.features).max() < 1


def test_every_key_has_data_of_its_own():
    one, other = (linear_data(key, num_items=5) for key in jax.random.split(KEY))
    assert not np.allclose(one.features, other.features)
    np.testing.assert_array_equal(linear_data(KEY).targets, linear_data(KEY).targets)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (
            np.ones((3, 2)),
            np.arange(4.0),
            r"features of shape \(3, 2\) and targets of shape \(4,\)",
        ),
        (np.ones(3), np.arange(3.0), r"wanted \(items, features\)"),
        (np.array([[1.0], [2.0], [np.nan]]), np.arange(3.0), r"features: row 2 .* holds nan"),
        (np.ones((3, 1)), np.array([0.0, np.inf, 1.0]), r"targets: row 1 .* holds inf"),
        (np.ones((3, 1)), np.full(3, 7.0), "all 3 values are 7.0"),
        (np.array([["a"]]), np.ones(1), "wanted numbers"),
    ],
)
def test_data_without_meaning_are_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        check_data(x, y)


def test_friedman_needs_five_features():
    with pytest.raises(ValueError, match="num_features is 4"):
        friedman_data(KEY, num_features=4)
