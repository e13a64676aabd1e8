"""Exact moments of finite sums against enumeration, ensembles and the independent reduction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_lab.dynamics import sgd
from tests.dynamics.problems import all_sequences, independent_problem, random_problem


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):
        yield


def enumerated(problem, steps, learning_rate, mean):
    """Mean and covariance after the steps over every sequence of single samples."""
    sequences = jnp.asarray(all_sequences(len(problem.gradients), steps))
    runs = jax.vmap(lambda i: sgd.simulate(problem, jnp.asarray(mean), i, learning_rate))
    final = runs(sequences)[:, -1]
    return final.mean(0), jnp.cov(final.T, bias=True).reshape((len(mean),) * 2)


def in_standard_errors(got, wanted, error):
    return float(jnp.max(jnp.abs(got - wanted) / error))


@pytest.mark.parametrize("dimension", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 3])
@given(seed=st.integers(0, 10_000), rate=st.floats(0.01, 1.5))
def test_all_sequences_of_single_samples(dimension, steps, seed, rate):
    problem = random_problem(seed, num_samples=4, dimension=dimension)
    start = np.linspace(-1, 2, dimension)
    mean, covariance = enumerated(problem, steps, rate, start)
    got = sgd.moments(problem, learning_rate=rate, steps=steps, mean=start)
    scale = 1 + float(jnp.abs(covariance).max()) + float(jnp.abs(mean).max()) ** 2
    np.testing.assert_allclose(got.mean[-1], mean, atol=1e-12 * scale)
    np.testing.assert_allclose(got.covariance[-1], covariance, atol=1e-12 * scale)


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("batch_size", [2, 3])
def test_all_batches_with_both_factors(replace, batch_size):
    problem = random_problem(1, num_samples=4)
    start = np.array([1.0, -2.0])
    batches = sgd.all_batches(problem, batch_size, replace)
    for steps in (1, 2) if batch_size == 2 else (1,):
        mean, covariance = enumerated(batches, steps, 0.3, start)
        got = sgd.moments(
            problem,
            learning_rate=0.3,
            steps=steps,
            batch_size=batch_size,
            replace=replace,
            mean=start,
        )
        np.testing.assert_allclose(got.mean[-1], mean, rtol=1e-12)
        np.testing.assert_allclose(got.covariance[-1], covariance, rtol=1e-12)


def test_a_start_with_spread():
    problem = random_problem(2)
    first = sgd.moments(problem, learning_rate=0.2, steps=5, mean=np.ones(2))
    second = sgd.moments(
        problem, learning_rate=0.2, steps=2, mean=first.mean[3], covariance=first.covariance[3]
    )
    np.testing.assert_allclose(second.covariance, first.covariance[3:], rtol=1e-13)


@pytest.mark.parametrize("sampling", ["with_replacement", "without_replacement"])
def test_ensemble_agrees_with_the_recursion(sampling):
    problem, start = random_problem(3), np.array([1.0, 0.5])
    options = {"learning_rate": 0.1, "steps": 12, "batch_size": 3}
    exact = sgd.moments(problem, **options, replace=sampling == "with_replacement", mean=start)
    runs = sgd.sample_ensemble(
        jax.random.key(0),
        problem,
        **options,
        replicas=4000,
        sampling=sampling,
        start=start,
        record_every=4,
    )
    assert runs.shape == (4000, 4, 2)
    deviations = runs - runs.mean(0)
    products = deviations[..., :, None] * deviations[..., None, :]
    root = np.sqrt(len(runs))
    at = slice(4, None, 4)
    assert in_standard_errors(runs.mean(0)[1:], exact.mean[at], runs.std(0)[1:] / root) < 4
    error = products.std(0)[1:] / root
    assert in_standard_errors(products.mean(0)[1:], exact.covariance[at], error) < 4


def test_replicas_do_not_depend_on_each_other_or_on_sharding():
    problem = random_problem(4)
    options = {"learning_rate": 0.1, "steps": 3, "batch_size": 2}
    few = sgd.sample_ensemble(jax.random.key(1), problem, **options, replicas=2)
    mesh = jax.make_mesh((8,), ("replicas",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("replicas"))
    many = sgd.sample_ensemble(
        jax.random.key(1), problem, **options, replicas=16, sharding=sharding
    )
    assert many.sharding.is_equivalent_to(sharding, many.ndim)
    np.testing.assert_allclose(many[:2], few, rtol=1e-14)
    assert len(np.unique(np.asarray(many)[:, -1, 0])) > 8


def test_correlation_of_curvature_and_slope_counts_off_the_critical_point_alone():
    problem = random_problem(5, critical=True)
    shuffled = problem._replace(gradients=jnp.roll(problem.gradients, 1, 0))
    options = {"learning_rate": 0.2, "steps": 6}
    for start, same in ((np.zeros(2), True), (np.ones(2), False)):
        paths = [sgd.moments(p, **options, mean=start).covariance for p in (problem, shuffled)]
        assert np.allclose(*paths, rtol=1e-12, atol=1e-15) == same


def test_full_batches_leave_no_variance():
    problem, start = random_problem(6), np.ones(2)
    options = {"learning_rate": 0.2, "steps": 4, "batch_size": 6}
    without = sgd.moments(problem, **options, replace=False, mean=start)
    assert not without.covariance.any()
    assert sgd.moments(problem, **options, mean=start).covariance[1:].any((1, 2)).all()
    for sampling, spread in (("without_replacement", 0.0), ("with_replacement", 0.1)):
        runs = sgd.sample_ensemble(
            jax.random.key(0), problem, **options, replicas=8, sampling=sampling, start=start
        )
        assert float(runs[:, -1].std(0).max()) == pytest.approx(spread, abs=1e-12 + spread)
        assert (float(runs[:, -1].std(0).max()) > 1e-3) == (spread > 0)


def test_noise_of_whole_epochs_nearly_cancels():
    problem = random_problem(7, num_samples=12, critical=True)
    finals = [
        sgd.sample_ensemble(
            jax.random.key(0),
            problem,
            learning_rate=0.01,
            steps=9,
            batch_size=4,
            replicas=300,
            sampling=sampling,
        )[:, -1]
        for sampling in ("with_replacement", "epochs")
    ]
    independent, epochs = (float(final.var(0).sum()) for final in finals)
    assert 0 < epochs < 0.01 * independent


def test_a_null_feature_does_not_diffuse():
    draw = np.random.default_rng(8)
    x = draw.normal(size=(8, 3)) * [1.0, 0.5, 0.0]
    residual = draw.normal(size=8)
    problem = sgd.finite_sum(x[:, :, None] * x[:, None], x * residual[:, None])
    path = sgd.moments(problem, learning_rate=0.1, steps=50, mean=np.ones(3))
    assert not path.covariance[:, 2].any()
    assert (path.mean[:, 2] == 1).all()
    assert (path.covariance[1:, [0, 1], [0, 1]] > 0).all()


def test_rotation_changes_nothing():
    problem = random_problem(9, num_samples=5, dimension=3)
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    rotated = sgd.finite_sum(q.T @ problem.hessians @ q, problem.gradients @ q)
    start = np.array([1.0, -1.0, 0.5])
    options = {"learning_rate": 0.2, "batch_size": 2}
    one = sgd.moments(problem, **options, steps=8, mean=start)
    two = sgd.moments(rotated, **options, steps=8, mean=q.T @ start)
    np.testing.assert_allclose(two.mean @ q.T, one.mean, atol=1e-13)
    np.testing.assert_allclose(q @ two.covariance @ q.T, one.covariance, atol=1e-13)
    radii = [sgd.second_moment_radius(p, **options) for p in (problem, rotated)]
    np.testing.assert_allclose(*radii, rtol=1e-13)


def test_radius_is_the_growth_of_the_variance():
    problem = random_problem(10, critical=True)
    for rate in (0.1, 0.9):
        radius = sgd.second_moment_radius(problem, learning_rate=rate)
        path = sgd.moments(problem._replace(gradients=0 * problem.gradients),
                           learning_rate=rate, steps=200, covariance=np.eye(2))  # fmt: skip
        traces = jnp.trace(path.covariance, axis1=1, axis2=2)
        np.testing.assert_allclose(traces[-1] / traces[-2], radius, rtol=1e-10)


def test_radius_in_one_dimension():
    problem = sgd.finite_sum([0.5, 1.5, 2.5], [1.0, 0.0, -1.0])
    for replace in (True, False):
        got = sgd.second_moment_radius(problem, learning_rate=0.4, batch_size=2, replace=replace)
        gamma = sgd.batch_factor(3, 2, replace) * 2 / 3
        assert float(got) == pytest.approx(1 + float(sgd.growth_excess(0.4, 1.5, gamma)))


CURVATURE, GAMMA, NOISE = (1.2, 0.3), ((0.5, 0.2), (0.2, 0.8)), (0.4, 0.1)


def test_independent_reduction_is_exact_for_independent_entries():
    problem = independent_problem(CURVATURE, GAMMA, NOISE)
    start, spread = jnp.array([1.0, -0.5]), jnp.array([[0.3, 0.1], [0.1, 0.2]])
    directions = {
        "learning_rate": 0.3,
        "steps": 20,
        "curvature": jnp.array(CURVATURE),
        "curvature_variance": jnp.array(GAMMA),
    }
    exact = sgd.moments(problem, learning_rate=0.3, steps=20, mean=start, covariance=spread)
    full = sgd.coupled_covariance(
        **directions, gradient_covariance=jnp.diag(jnp.array(NOISE)), mean=start, covariance=spread
    )
    alone = sgd.coupled_variances(
        **directions, gradient_variance=jnp.array(NOISE), mean=start, variance=jnp.diag(spread)
    )
    np.testing.assert_allclose(full.mean, exact.mean, rtol=1e-12)
    np.testing.assert_allclose(full.covariance, exact.covariance, rtol=1e-12)
    np.testing.assert_allclose(
        alone.variance, jnp.diagonal(exact.covariance, axis1=1, axis2=2), rtol=1e-12
    )
    radius = sgd.coupled_radius(
        learning_rate=0.3, curvature=jnp.array(CURVATURE), curvature_variance=jnp.array(GAMMA)
    )
    # The diagonal is closed under the map, and the entry off it grows by less.
    np.testing.assert_allclose(
        radius, sgd.second_moment_radius(problem, learning_rate=0.3), rtol=1e-12
    )


def test_diagonal_curvature_noise_leaves_each_direction_alone():
    gamma, drift = jnp.array([0.5, 0.0]), jnp.array([0.2, 0.3])
    shared = {"learning_rate": 0.2, "steps": 30, "curvature": jnp.array([1.0, 0.0])}
    shared |= {"gradient_variance": jnp.array(NOISE), "drift": drift}
    for truncated in (False, True):
        coupled = sgd.coupled_variances(
            **shared, curvature_variance=jnp.diag(gamma), truncated=truncated
        )
        alone = sgd.direction_moments(**shared, curvature_variance=gamma, truncated=truncated)
        np.testing.assert_allclose(coupled.variance, alone.variance, rtol=1e-13)
        np.testing.assert_allclose(coupled.mean, alone.mean, rtol=1e-13)


def test_correlated_direction_is_the_exact_one():
    # Curvature and slope of a batch move together: c is their covariance.
    h, g = np.array([0.2, 1.0, 2.4]), np.array([-0.5, 0.3, 0.8])
    path = sgd.moments(sgd.finite_sum(h, g), learning_rate=0.3, steps=25, mean=[2.0])
    got = sgd.direction_moments(
        learning_rate=0.3,
        steps=25,
        curvature=h.mean(),
        gradient_variance=g.var(),
        curvature_variance=h.var(),
        correlation=np.cov(h, g, bias=True)[0, 1],
        drift=g.mean(),
        mean=2.0,
    )
    np.testing.assert_allclose(got.mean, path.mean[:, 0], rtol=1e-12)
    np.testing.assert_allclose(got.variance, path.covariance[:, 0, 0], rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: sgd.moments(p, learning_rate=0.1, steps=1, batch_size=0), "batch_size: got 0"),
        (lambda p: sgd.batch_factor(3, 4, replace=False), "expected at most 3"),
        (lambda p: sgd.moments(p, learning_rate=0.1, steps=1, mean=np.ones(3)), r"mean: got .*3"),
        (lambda p: sgd.finite_sum(np.ones((2, 2, 2)), np.ones((3, 2))), "hessians, gradients"),
        (lambda p: sgd.finite_sum([[[0.0, 1], [0, 0]]], [[0.0, 0]]), "differ from their transp"),
        (lambda p: ensemble(p, sampling="bootstrap"), "sampling: got 'bootstrap'"),
        (lambda p: ensemble(p, record_every=2), "record_every: got 2"),
        (lambda p: ensemble(p, start=np.ones((2, 2))), "start: got shape"),
        (lambda p: ensemble(p, batch_size=7, sampling="epochs"), "batch_size: got 7 of 6"),
        (
            lambda p: sgd.coupled_radius(
                learning_rate=0.1, curvature=jnp.ones(2), curvature_variance=jnp.ones(2)
            ),
            "curvature_variance: got shape",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(random_problem(0))


def ensemble(problem, **options):
    return sgd.sample_ensemble(
        jax.random.key(0), problem, learning_rate=0.1, steps=3, replicas=3, **options
    )
