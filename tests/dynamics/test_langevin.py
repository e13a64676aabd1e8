"""Langevin kinds against the steps they approximate, and the rough landscape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab.dynamics import sgd


@pytest.fixture(autouse=True, scope="module")
def x64():
    with jax.enable_x64(True):
        yield


def loss(w):
    return jnp.sum(w**2 / 2 + 0.25 / 3 * w**3 + 0.02 * w**4) + 0.3 * w[0] * w[1]


ROOT = np.array([[0.5, 0.0], [0.2, 0.4]])


def constant_root(w):
    return jnp.asarray(ROOT)


def run(kind, *, rate=0.2, steps=1, substeps=1, replicas=4000, gradient=jax.grad(loss)):  # noqa: B008
    start = jnp.broadcast_to(jnp.array([1.0, -0.5]), (replicas, 2))
    return sgd.simulate_langevin(
        jax.random.key(0),
        gradient,
        constant_root,
        start,
        learning_rate=rate,
        steps=steps,
        kind=kind,
        substeps=substeps,
    )


def test_flow_errors_have_orders_two_and_three():
    rates = np.array([0.02, 0.05, 0.1, 0.2])
    points = jnp.linspace(-1.2, 1.4, 12).reshape(6, 2)
    gradient = jax.grad(loss)

    @jax.jit
    def errors(rate):
        def at(w):
            step = w - rate * gradient(w)
            drifts = gradient, sgd.corrected_gradient(gradient, rate)
            return jnp.stack([jnp.abs(step - sgd.flow(g, w, rate)).max() for g in drifts])

        return jax.vmap(at)(points).mean(0)

    table = np.array([errors(rate) for rate in rates])
    slopes = np.polyfit(np.log(rates), np.log(table), 1)[0]
    np.testing.assert_allclose(slopes, [2, 3], atol=0.15)


def test_correction_descends_on_the_smoothed_loss():
    w = jnp.array([0.7, -1.1])
    smoothed = jax.grad(lambda w: loss(w) + 0.3 / 4 * jnp.sum(jax.grad(loss)(w) ** 2))
    np.testing.assert_allclose(
        sgd.corrected_gradient(jax.grad(loss), 0.3)(w), smoothed(w), rtol=1e-13
    )


@pytest.mark.parametrize("kind", ["standard", "drift-corrected", "wrong-control"])
def test_one_step_has_the_mean_and_covariance_of_its_kind(kind):
    increments = run(kind)[:, 1] - jnp.array([1.0, -0.5])
    g = jax.grad(loss)(jnp.array([1.0, -0.5]))
    drift = sgd.corrected_gradient(jax.grad(loss), 0.2) if kind == "drift-corrected" else None
    mean = -0.2 * (drift(jnp.array([1.0, -0.5])) if drift else g)
    covariance = ROOT @ ROOT.T + (jnp.outer(g, g) if kind == "wrong-control" else 0)
    error = increments.std(0) / np.sqrt(len(increments))
    assert (jnp.abs(increments.mean(0) - mean) < 4 * error).all()
    deviations = increments - increments.mean(0)
    products = deviations[:, :, None] * deviations[:, None]
    error = products.std(0) / np.sqrt(len(products))
    assert (jnp.abs(products.mean(0) - 0.04 * covariance) < 4 * error).all()


def test_stationary_variance_of_the_surrogate_and_of_the_continuous_path():
    rate, curvature, replicas = 0.5, 1.0, 4000
    numbers = {"learning_rate": rate, "curvature": curvature, "gradient_variance": 1.0}
    for substeps, truncated in ((1, False), (40, True)):
        runs = sgd.simulate_langevin(
            jax.random.key(1),
            lambda w: curvature * w,
            lambda w: jnp.ones((1, 1)),
            jnp.zeros((replicas, 1)),
            learning_rate=rate,
            steps=12,
            substeps=substeps,
        )
        wanted = float(sgd.stationary_variance(**numbers, truncated=truncated))
        # 1.3 %: Euler-Maruyama with 40 substeps is itself off by 0.6 %.
        error = wanted * np.sqrt(2 / replicas)
        assert abs(float(runs[:, -1].var()) - wanted) < 3 * error + 0.013 * wanted
        other = float(sgd.stationary_variance(**numbers, truncated=not truncated))
        assert abs(float(runs[:, -1].var()) - other) > 5 * error


def test_replicas_do_not_depend_on_each_other():
    few = run("standard", steps=2, substeps=3, replicas=2)
    many = run("standard", steps=2, substeps=3, replicas=8)
    np.testing.assert_allclose(many[:2], few, rtol=1e-14)


def test_covariance_root():
    c = ROOT @ ROOT.T
    root = sgd.covariance_root(jnp.asarray(c))
    np.testing.assert_allclose(root @ root.T, c, rtol=1e-13)
    singular = jnp.outer(jnp.array([1.0, 2.0]), jnp.array([1.0, 2.0]))
    root = sgd.covariance_root(singular)
    np.testing.assert_allclose(root @ root.T, singular, rtol=1e-12)


def test_gaussian_surrogates_miss_the_skewness_of_the_noise():
    # Slopes spread exponentially: increments of skewness -2 and kurtosis 9 (experiment 41).
    slopes = -np.log((np.arange(20_000) + 0.5) / 20_000) - 1
    problem = sgd.finite_sum(np.zeros_like(slopes), slopes)
    step = sgd.sample_ensemble(
        jax.random.key(0), problem, learning_rate=0.1, steps=1, replicas=20_000
    )[:, 1, 0]
    surrogate = sgd.simulate_langevin(
        jax.random.key(0),
        lambda w: w * 0,
        lambda w: jnp.ones((1, 1)),
        jnp.zeros((20_000, 1)),
        learning_rate=0.1,
        steps=1,
    )[:, 1, 0]
    (skewness, kurtosis), gaussian = standard_moments(step), standard_moments(surrogate)
    assert skewness == pytest.approx(-2, abs=0.2) and kurtosis == pytest.approx(9, abs=2)
    assert gaussian[0] == pytest.approx(0, abs=0.1) and gaussian[1] == pytest.approx(3, abs=0.2)


def standard_moments(x):
    z = (x - x.mean()) / x.std()
    return float((z**3).mean()), float((z**4).mean())


def test_rough_noise_has_its_variance():
    points = jnp.array([-0.8, 0.0, 0.5])
    draws = jax.vmap(lambda key: sgd.rough_noise(key, points))(
        jax.random.split(jax.random.key(0), 4000)
    )
    squares = draws**2
    error = squares.std(0) / np.sqrt(len(draws))
    assert (jnp.abs(squares.mean(0) - sgd.rough_noise_variance(points)) < 4 * error).all()
    assert (jnp.abs(draws.mean(0)) < 4 * draws.std(0) / np.sqrt(len(draws))).all()


def test_rough_landscape_is_that_of_the_published_run():
    # Experiment 44: final variance .01563 for SGD against .0146 for the Langevin equations.
    result = sgd.compare_rough(jax.random.key(0), replicas=2000, substeps=8)
    assert result.mean.shape == (3, 51) and result.mean.dtype == np.float64
    np.testing.assert_allclose(result.mean[:, 0], result.mean[0, 0])
    error = 0.0156 * np.sqrt(2 / 2000)
    assert abs(float(result.variance[0, -1]) - 0.01563) < 4 * error
    assert abs(float(result.variance[1, -1]) - 0.0146) < 4 * error
    assert (result.mean_errors < 0.012).all()


@pytest.mark.slow
def test_the_corrected_drift_follows_the_rough_mean_more_closely():
    result = sgd.compare_rough(jax.random.key(0), replicas=400_000, substeps=32)
    standard, corrected = map(float, result.mean_errors)
    assert corrected < 0.8 * standard


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "modified"}, "kind: got 'modified'"),
        ({"substeps": 0}, "substeps: got 0"),
        ({"start": jnp.zeros(2)}, r"start: got shape \(2,\)"),
    ],
)
def test_bad_input(options, message):
    options = {"start": jnp.zeros((1, 2)), "learning_rate": 0.1, "steps": 1} | options
    start = options.pop("start")
    with pytest.raises(ValueError, match=message):
        sgd.simulate_langevin(jax.random.key(0), jax.grad(loss), constant_root, start, **options)
