"""Weak Fokker-Planck steps on quadratic losses, and moments of one increment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_lab.dynamics import sgd
from tests.dynamics.problems import random_problem


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):
        yield


POINTS, PROBABILITIES = np.array([[-1.0], [0.4], [1.5]]), np.array([0.2, 0.5, 0.3])


@jax.jit
def powers(problem, rate):
    """Four powers of w after a step: exact, raw, centred."""
    law = jnp.asarray(POINTS), jnp.asarray(PROBABILITIES), problem
    steps = [sgd.weak_step(lambda w, k=k: w[0] ** k, *law, learning_rate=rate) for k in range(1, 5)]
    return jnp.array(steps)


@given(st.integers(0, 10_000), st.floats(0.01, 2.0))
def test_raw_form_is_exact_for_first_and_second_powers(seed, rate):
    problem = random_problem(seed, dimension=1)
    exact, raw, centred = powers(problem, rate)[:2].T
    scale = 1 + jnp.abs(exact).max()
    np.testing.assert_allclose(raw, exact, atol=1e-13 * scale)
    np.testing.assert_allclose(centred[0], exact[0], atol=1e-13 * scale)
    mean_slope = POINTS[:, 0] * problem.hessians.mean() + problem.gradients.mean()
    missing = rate**2 * np.dot(PROBABILITIES, mean_slope**2)
    np.testing.assert_allclose(exact[1] - centred[1], missing, atol=1e-13 * scale)


def test_higher_powers_are_off_by_the_cube_of_the_rate():
    problem, rates = random_problem(0, dimension=1), np.array([1e-3, 2e-3, 4e-3])
    errors = np.array([jnp.abs(jnp.diff(powers(problem, rate)[2:, :2])) for rate in rates])
    slopes = np.polyfit(np.log(rates), np.log(errors[..., 0]), 1)[0]
    np.testing.assert_allclose(slopes, 3, atol=0.05)
    centred = np.array([jnp.abs(powers(problem, r)[2:, 0] - powers(problem, r)[2:, 2])
                        for r in rates])  # fmt: skip
    np.testing.assert_allclose(np.polyfit(np.log(rates), np.log(centred), 1)[0], 2, atol=0.05)


def test_quadratics_of_several_dimensions_and_larger_batches():
    problem = random_problem(1, num_samples=4, dimension=3)
    points = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))
    bend = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3)))
    batches = sgd.all_batches(problem, 2)
    step = sgd.weak_step(
        lambda w: w @ bend @ w + w[0], points, jnp.full(5, 0.2), batches, learning_rate=0.7
    )
    np.testing.assert_allclose(step.raw, step.exact, rtol=1e-13)
    assert abs(step.centred - step.exact) > 1e-3
    # The same second moments by the exact recursion, from the law's own mean and covariance.
    moments = sgd.moments(
        problem,
        learning_rate=0.7,
        steps=1,
        batch_size=2,
        mean=points.mean(0),
        covariance=jnp.cov(points.T, bias=True),
    )
    mean, second = moments.mean[1], moments.covariance[1] + jnp.outer(*[moments.mean[1]] * 2)
    np.testing.assert_allclose(step.exact, jnp.sum(bend * second) + mean[0], rtol=1e-12)


@pytest.mark.parametrize("replace", [True, False])
def test_increment_traces_are_those_of_all_batches(replace):
    gradients = random_problem(2, num_samples=5).gradients
    flat = sgd.FiniteSum(jnp.zeros((5, 2, 2)), gradients)
    for batch_size in (1, 2, 3):
        got = sgd.increment_traces(
            gradients, learning_rate=0.3, batch_size=batch_size, replace=replace
        )
        increments = -0.3 * sgd.all_batches(flat, batch_size, replace).gradients
        np.testing.assert_allclose(got.centred, increments.var(0).sum(), rtol=1e-12)
        np.testing.assert_allclose(got.raw, (increments**2).sum(1).mean(), rtol=1e-12)


def test_increment_traces_scale_with_rate_and_batch():
    gradients = random_problem(3, num_samples=8).gradients
    rates = np.array([1e-4, 1e-2, 1.0])
    traces = np.array([sgd.increment_traces(gradients, learning_rate=r) for r in rates])
    np.testing.assert_allclose(np.polyfit(np.log(rates), np.log(traces), 1)[0], 2, rtol=1e-12)
    one, many = (
        sgd.increment_traces(gradients, learning_rate=0.1, batch_size=b) for b in (1, 10**9)
    )
    np.testing.assert_allclose(many.centred * 10**9, one.centred, rtol=1e-12)
    np.testing.assert_allclose(many.raw, 0.01 * jnp.sum(gradients.mean(0) ** 2), rtol=1e-6)
