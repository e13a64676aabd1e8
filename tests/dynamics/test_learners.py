"""Learners of the loop against normal equations and slow loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab.dynamics.loop.learners import LEARNERS, linear_predict, optax_learner, ridge, sgd
from jaxopt_lab.dynamics.loop.sample_sgd import shuffled
from tests.reference import repeated_learning as reference

KEY = jax.random.key(5)
RNG = np.random.default_rng(8)
X = RNG.normal(size=(50, 3)) * [1.0, 20.0, 0.05] + [0.0, 300.0, -2.0]
Y = X @ [2.0, -0.3, 40.0] + RNG.normal(size=50)


def fit(learner, x=X, y=Y, key=KEY):
    with jax.enable_x64(True):
        trained = learner.fit(key, jnp.asarray(x), jnp.asarray(y))
        return jax.device_get(trained), np.asarray(learner.predict(trained, jnp.asarray(x)))


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 30.0])
def test_ridge_solves_the_normal_equations(alpha, standardize):
    (coef, intercept), predictions = fit(ridge(alpha, standardize=standardize))
    scale = X.std(axis=0) if standardize else np.ones(3)
    wanted, bias = reference.ridge(X / scale, Y, alpha)
    np.testing.assert_allclose(coef, wanted / scale, rtol=1e-9)
    np.testing.assert_allclose(intercept, bias, rtol=1e-9)
    np.testing.assert_allclose(predictions, X @ coef + intercept, rtol=1e-9)


def test_ridge_of_a_mask_is_ridge_of_the_items_in_it():
    chosen = RNG.random(50) < 0.6
    wild = np.where(chosen, Y, 1e6)  # what is not in the mask has no influence
    learner = ridge(0.7)
    assert learner.fit_masked is not None
    with jax.enable_x64(True):
        arguments = (jnp.asarray(X), jnp.asarray(wild), jnp.asarray(chosen))
        masked = jax.device_get(learner.fit_masked(KEY, *arguments))
    alone, _ = fit(learner, X[chosen], Y[chosen])
    np.testing.assert_allclose(masked.coef, alone.coef, rtol=1e-9)
    np.testing.assert_allclose(masked.intercept, alone.intercept, rtol=1e-9)


def test_ridge_far_from_the_origin():
    near, _ = fit(ridge(0.1), X, Y)
    far, _ = fit(ridge(0.1), X + 1e6, Y - 1e5)
    np.testing.assert_allclose(far.coef, near.coef, rtol=1e-6)


def test_ridge_ignores_a_constant_feature():
    (coef, _), predictions = fit(ridge(0.1), np.column_stack([X, np.full(50, 4.0)]))
    without, expected = fit(ridge(0.1))
    assert coef[-1] == 0
    np.testing.assert_allclose(coef[:-1], without.coef, rtol=1e-9)
    np.testing.assert_allclose(predictions, expected, rtol=1e-9)


def orders(count, epochs):
    return [shuffled(jax.random.fold_in(KEY, i), count) for i in range(epochs)]


def test_shuffles_are_uniform():
    with jax.enable_x64(True):
        keys = jax.random.split(KEY, 6000)
        drawn = np.asarray(jax.vmap(lambda key: shuffled(key, 4))(keys))
    assert (np.sort(drawn, axis=1) == np.arange(4)).all()
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    # Chi-squared with 23 degrees of freedom exceeds 50 once in a thousand times.
    assert len(counts) == 24 and ((counts - 250) ** 2 / 250).sum() < 50


# 50 items are whole blocks of the fast form and a part of one.
@pytest.mark.parametrize(("tolerance", "patience", "epochs"), [(-np.inf, 1, 3), (1e-3, 2, 50)])
def test_sgd_takes_the_steps_of_the_plain_loop(tolerance, patience, epochs):
    scaled = (X - X.mean(axis=0)) / X.std(axis=0)
    with jax.enable_x64(True):
        shuffles = [np.asarray(order) for order in orders(50, epochs)]
    options = {"learning_rate": 0.05, "tolerance": tolerance, "patience": patience}
    weights, taken = reference.sgd(scaled, Y, shuffles, **options)
    (coef, _), predictions = fit(sgd(epochs, **options))
    assert (taken < epochs) == (patience == 2)  # stopped early
    np.testing.assert_allclose(coef, weights[:-1] / X.std(axis=0), rtol=1e-9)
    np.testing.assert_allclose(predictions, scaled @ weights[:-1] + weights[-1], rtol=1e-9)


def test_lanes_of_sgd_stop_each_by_itself():
    y = np.stack([Y, np.sign(X[:, 0])])  # of different numbers of epochs
    alone = [fit(LEARNERS["sgd50"], y=row)[0] for row in y]
    with jax.enable_x64(True):
        learner = LEARNERS["sgd50"]
        both = jax.vmap(lambda row: learner.fit(KEY, jnp.asarray(X), row))(jnp.asarray(y))
        both = jax.device_get(both)
    for lane, single in enumerate(alone):
        np.testing.assert_allclose(both.coef[lane], single.coef, rtol=1e-9)


def test_optax_learner_reaches_least_squares():
    (coef, intercept), _ = fit(optax_learner(optax.adam(0.5), steps=1500))
    wanted, bias = reference.ridge(X, Y, 0.0)
    np.testing.assert_allclose(coef, wanted, rtol=1e-4)
    np.testing.assert_allclose(intercept, bias, rtol=1e-4)


def test_optax_learner_of_a_model_of_ones_own():
    x = np.linspace(-2, 2, 60)[:, None]
    learner = optax_learner(
        optax.adam(0.05), steps=600, batch_size=16,
        init=lambda key, d: {"square": jax.random.normal(key, (d,)), "bias": jnp.zeros(())},
        apply=lambda params, x: x**2 @ params["square"] + params["bias"],
        loss=lambda guess, y: optax.huber_loss(guess, y),
    )  # fmt: skip
    _, predictions = fit(learner, x, 3 * x[:, 0] ** 2)
    np.testing.assert_allclose(predictions, 3 * x[:, 0] ** 2, atol=0.1)


def test_dtype_follows_the_data():
    x, y = jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32)
    for learner in (ridge(0.1), sgd(2), optax_learner(optax.sgd(0.1), steps=2)):
        model = learner.fit(KEY, x, y)
        assert linear_predict(model, x).dtype == jnp.float32


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ridge(-0.1), "alpha is -0.1"),
        (lambda: ridge(float("nan")), "alpha is nan"),
        (lambda: sgd(0), "max_epochs is 0"),
        (lambda: sgd(learning_rate=0.0), "learning_rate is 0.0"),
        (lambda: optax_learner(optax.sgd(0.1), steps=0), "steps is 0"),
        (lambda: optax_learner(optax.sgd(0.1), init=lambda k, d: 0), "init and apply belong"),
    ],
)
def test_bad_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_same_settings_are_the_same_learner():
    assert ridge(0.1) is LEARNERS["ridge0.1"]  # and their loops are compiled once
