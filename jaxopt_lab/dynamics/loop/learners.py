"""Learners of the repeated-learning loop: least squares in three forms, and anything of Optax."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxopt_lab.dynamics.loop.sample_sgd import fit_by_samples

Fit = Callable[[PRNGKeyArray, Array, Array], Any]
Predict = Callable[[Any, Array], Array]


class Learner(NamedTuple):
    """How a model is trained and asked; any pair of pure functions of these signatures will do.

    Compiled loops are found again by the identity of the functions: build a learner once.
    """

    fit: Fit
    """(key, features (n, d), targets (n,)) -> parameters, any tree."""

    predict: Predict
    """(parameters, features (n, d)) -> predictions (n,)."""

    fit_masked: Callable[[PRNGKeyArray, Array, Array, Array], Any] | None = None
    """(key, features, targets, mask (n,)) -> parameters of the items in the mask alone, without
    gathering them; optional, for speed."""


class LinearModel(NamedTuple):
    """x ↦ coef·x + intercept."""

    coef: Float[Array, " features"]
    intercept: Float[Array, ""]


def linear_predict(model: LinearModel, features: Float[Array, "n d"]) -> Float[Array, " n"]:
    """Predictions of a linear model."""
    coef, intercept = model
    # The sum of d scaled rows fuses with what follows, which a matrix product does not.
    return jnp.sum(features.T * coef[:, None], axis=0) + intercept


@functools.cache
def ridge(alpha: float = 0.0, *, standardize: bool = True) -> Learner:
    """Ridge regression with a free intercept: min ‖y − Zw − b‖² + α‖w‖² (sum, not mean).

    Z are the features standardised by the mean and the population deviation of the training part
    (a constant feature is only centred), or centred alone with `standardize=False`. Solved by
    Cholesky on the normal equations of Z; α = 0 is ordinary least squares, the same in both forms,
    and needs linearly independent features.

    Args:
      alpha: α ≥ 0.
      standardize: Whether the penalty sees standardised features.

    Returns:
      A learner of `LinearModel`s in the units of the data.

    Raises:
      ValueError: A negative penalty.

    >>> x = jnp.arange(4.0)[:, None]
    >>> model = ridge(0.0).fit(jax.random.key(0), x, 2 * x[:, 0] + 1)
    >>> [round(float(v), 3) for v in (model.coef[0], model.intercept)]
    [2.0, 1.0]
    """
    if not alpha >= 0:
        raise ValueError(f"alpha is {alpha}; wanted a number of at least 0")

    def fit_masked(
        key: PRNGKeyArray,
        features: Float[Array, "n d"],
        targets: Float[Array, " n"],
        mask: Bool[Array, " n"],
    ) -> LinearModel:
        del key
        return _solve_ridge(features, targets, mask, alpha, standardize)

    def fit(key: PRNGKeyArray, features: Array, targets: Array) -> LinearModel:
        return fit_masked(key, features, targets, jnp.ones(targets.shape, bool))

    return Learner(fit, linear_predict, fit_masked)


def _solve_ridge(
    features: Array, targets: Array, mask: Array, alpha: float, standardize: bool
) -> LinearModel:
    gram, start, count = _masked_gram(features, targets, mask)
    total = gram[-1]
    mean = total[:-1] / count
    centred = gram[:-1, :-1] - jnp.outer(total[:-1], mean)
    x_mean, y_mean = mean[:-1] + start[:-1], mean[-1] + start[-1]
    variance = jnp.diag(centred)[:-1] / count
    scale = jnp.sqrt(jnp.where(variance > 0, variance, 1))
    # In standardised coordinates always, which is the better conditioned system.
    penalty = alpha if standardize else alpha / scale**2
    system = centred[:-1, :-1] / jnp.outer(scale, scale) + jnp.diag(penalty * jnp.ones_like(scale))
    factor = jnp.linalg.cholesky(system, symmetrize_input=False)
    coef = jax.scipy.linalg.cho_solve((factor, True), centred[:-1, -1] / scale) / scale
    return LinearModel(coef, y_mean - x_mean @ coef)


def _masked_gram(features: Array, targets: Array, mask: Array) -> tuple[Array, Array, Array]:
    """(Gram matrix of the rows (x, y, 1) in the mask, the item they are shifted by, their number).

    The shift by one item keeps the later subtraction of means from cancelling.
    """
    rows = jnp.concatenate([features.T, targets[None]])
    start = rows[:, 0]
    rows = jnp.concatenate([rows - start[:, None], jnp.ones_like(targets)[None]])
    gram = (rows * mask.astype(rows.dtype)) @ rows.T
    return gram, start, gram[-1, -1]


@functools.cache
def sgd(
    max_epochs: int = 50, *, learning_rate: float = 0.01, tolerance: float = 1e-3,
    patience: int = 5,
) -> Learner:  # fmt: skip
    """Least squares by stochastic gradient descent, one item a step.

    On standardised features with an intercept, from zero, loss ½e², shuffled epochs, step size
    η/k^¼ where k counts the items seen from 1 on. Stops when the mean loss of an epoch has not been
    below the best so far by more than `tolerance` for `patience` epochs.

    Args:
      max_epochs: At most so many passes.
      learning_rate: η.
      tolerance: Of the mean loss, absolute.
      patience: Epochs in a row.

    Returns:
      A learner of `LinearModel`s in the units of the data.

    Raises:
      ValueError: No epochs, or a rate that is not positive.
    """
    if max_epochs < 1 or patience < 1:
        raise ValueError(f"max_epochs is {max_epochs}, patience {patience}; wanted at least 1")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate is {learning_rate}; wanted a positive number")

    def fit(key: PRNGKeyArray, features: Array, targets: Array) -> LinearModel:
        scaled, mean, scale = _standardized(features)
        weights = fit_by_samples(
            key, scaled, targets, max_epochs=max_epochs, learning_rate=learning_rate,
            tolerance=tolerance, patience=patience,
        )  # fmt: skip
        return _in_data_units(weights[:-1], weights[-1], mean, scale)

    return Learner(fit, linear_predict)


def optax_learner(
    tx: optax.GradientTransformation, *, steps: int = 200, batch_size: int | None = None,
    init: Callable[[PRNGKeyArray, int], Any] | None = None, apply: Predict | None = None,
    loss: Callable[[Array, Array], Array] = optax.l2_loss,
) -> Learner:  # fmt: skip
    """A model trained anew at every refit by an Optax optimizer, on standardised features.

    Args:
      tx: The optimizer; its state starts afresh at every refit.
      steps: Steps of a refit.
      batch_size: Items of a step, drawn uniformly with replacement; None for all of them.
      init: (key, number of features) -> parameters. None with `apply`: the zero linear model.
      apply: (parameters, standardised features (n, d)) -> predictions (n,).
      loss: (predictions, targets) -> losses (n,), of which the mean is minimised.

    Returns:
      A learner; without `apply` one of `LinearModel`s in the units of the data.

    Raises:
      ValueError: Only one of `init` and `apply`, or counts that are not positive.

    >>> learner = optax_learner(optax.sgd(0.5), steps=50)
    >>> x = jnp.arange(4.0)[:, None]
    >>> round(float(learner.fit(jax.random.key(0), x, 3 * x[:, 0]).coef[0]), 3)
    3.0
    """
    if (init is None) != (apply is None):
        raise ValueError("init and apply belong together; one of them is None")
    if steps < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(f"steps is {steps}, batch_size {batch_size}; wanted at least 1")
    start, predict = init or _zero_model, apply or linear_predict

    def fit(key: PRNGKeyArray, features: Array, targets: Array) -> Any:
        scaled, mean, scale = _standardized(features)
        init_key, batch_key = jax.random.split(key)
        params = start(init_key, features.shape[1])
        params = jax.tree.map(lambda x: jnp.asarray(x, features.dtype), params)

        def mean_loss(params: Any, x: Array, y: Array) -> Array:
            return jnp.mean(loss(predict(params, x), y))

        def step(carry: tuple, number: Array) -> tuple[tuple, None]:
            params, state = carry
            x, y = scaled, targets
            if batch_size is not None:
                here = jax.random.fold_in(batch_key, number)
                chosen = jax.random.randint(here, (batch_size,), 0, targets.shape[0])
                x, y = scaled[chosen], targets[chosen]
            grads = jax.grad(mean_loss)(params, x, y)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
        if apply is None:
            return _in_data_units(params.coef, params.intercept, mean, scale)
        return params, mean, scale

    def predict_standardized(trained: Any, features: Array) -> Array:
        params, mean, scale = trained
        return predict(params, (features - mean) / scale)

    return Learner(fit, linear_predict if apply is None else predict_standardized)


def _zero_model(key: PRNGKeyArray, num_features: int) -> LinearModel:
    del key
    return LinearModel(jnp.zeros(num_features), jnp.zeros(()))


def _standardized(features: Array) -> tuple[Array, Array, Array]:
    mean, scale = jnp.mean(features, axis=0), jnp.std(features, axis=0)
    scale = jnp.where(scale > 0, scale, 1)
    return (features - mean) / scale, mean, scale


def _in_data_units(coef: Array, intercept: Array, mean: Array, scale: Array) -> LinearModel:
    return LinearModel(coef / scale, intercept - mean @ (coef / scale))


LEARNERS: dict[str, Learner] = {"ridge0": ridge(0.0), "ridge0.1": ridge(0.1), "sgd50": sgd(50)}
