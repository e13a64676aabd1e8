"""Data of the repeated-learning loop: the two synthetic sets, and checks of any other."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray


class Data(NamedTuple):
    """Items with their features and their true labels; any pair of arrays of these shapes."""

    features: Float[Array, "items features"]
    targets: Float[Array, " items"]


def linear_data(
    key: PRNGKeyArray, *, num_items: int = 2000, num_features: int = 10,
    noise: float | Float[ArrayLike, ""] = 1.0,
) -> Data:  # fmt: skip
    """A linear law with noise: y = Xw + σξ.

    X_ij ~ N(0, 1) and w_j ~ 100 U(0, 1), independent; no intercept. The semantics of
    scikit-learn's `make_regression` with all features informative.

    Args:
      key: Typed PRNG key.
      num_items: N.
      num_features: d.
      noise: σ, the standard deviation of the noise (not its variance).

    Returns:
      Features (N, d) and targets (N,) in the default floating dtype.

    >>> linear_data(jax.random.key(0), num_items=5, num_features=2).features.shape
    (5, 2)

    Source: A. Veprikov, A. Afanasiev, A. Khritankov, "A Mathematical Model of the Hidden Feedback
    Loop Effect in Machine Learning Systems", arXiv 2405.02726.
    """
    normals_key, weights_key = jax.random.split(key)
    # A generator with a short last axis takes seconds to compile.
    normals = jax.random.normal(normals_key, (num_features + 1, num_items))
    weights = 100.0 * jax.random.uniform(weights_key, (num_features,))
    return Data(normals[:-1].T, weights @ normals[:-1] + noise * normals[-1])


def friedman_data(
    key: PRNGKeyArray, *, num_items: int = 2000, num_features: int = 10,
    noise: float | Float[ArrayLike, ""] = 1.0,
) -> Data:  # fmt: skip
    """Friedman's first function, which no linear model fits.

    y = 10 sin(π x₁x₂) + 20 (x₃ − ½)² + 10 x₄ + 5 x₅ + σξ with X_ij ~ U(0, 1); the features from
    the sixth on are irrelevant. The best linear fit leaves residuals of standard deviation 2.42
    without noise and 2.63 with σ = 1, the level that the published figures fit.

    Args:
      key: Typed PRNG key.
      num_items: N.
      num_features: d, at least 5.
      noise: σ, the standard deviation of the noise.

    Returns:
      Features (N, d) and targets (N,) in the default floating dtype.

    Raises:
      ValueError: Fewer than five features.

    >>> friedman_data(jax.random.key(0), num_items=4).features.shape
    (4, 10)

    Source: J. Friedman, "Multivariate Adaptive Regression Splines", 1991; used in arXiv 2405.02726.
    """
    if num_features < 5:
        raise ValueError(f"num_features is {num_features}; Friedman's function needs at least 5")
    features_key, noise_key = jax.random.split(key)
    x = jax.random.uniform(features_key, (num_features, num_items))
    clean = 10 * jnp.sin(math.pi * x[0] * x[1]) + 20 * (x[2] - 0.5) ** 2 + 10 * x[3] + 5 * x[4]
    return Data(x.T, clean + noise * jax.random.normal(noise_key, (num_items,)))


DATA = {"linear": linear_data, "friedman": friedman_data}


def check_data(features: ArrayLike, targets: ArrayLike) -> None:
    """Refuses data on which the loop has no meaning.

    Args:
      features: (N, d).
      targets: (N,).

    Raises:
      ValueError: Shapes that do not match, a value that is not finite (the row is named), or a
        constant target.
    """
    x, y = np.asarray(features), np.asarray(targets)
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(
            f"features of shape {x.shape} and targets of shape {y.shape}; wanted (items, features) "
            "and (items,)"
        )
    if not np.issubdtype(x.dtype, np.number) or not np.issubdtype(y.dtype, np.number):
        raise ValueError(f"features are {x.dtype} and targets {y.dtype}; wanted numbers")
    for name, values in (("features", x), ("targets", y[:, None])):
        rows = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if rows.size:
            raise ValueError(
                f"{name}: row {rows[0]} (counted from 0) holds {_first_bad(values[rows[0]])}, "
                f"{rows.size} such rows in all; wanted finite numbers"
            )
    if y.size and np.ptp(y) == 0:
        raise ValueError(f"targets: all {y.size} values are {y[0]}; a constant cannot be learned")


def _first_bad(row: np.ndarray) -> float:
    return float(row[~np.isfinite(row)][0])
