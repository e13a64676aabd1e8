"""Small landscapes for the tests of the ensemble laboratory."""

import jax.numpy as jnp
import numpy as np

from jaxopt_lab.dynamics import sgd


def tiny_network(samples: int = 40) -> sgd.System:
    """4 → 3 → 2 with SiLU, 23 parameters, two classes that overlap."""
    draws = np.random.default_rng(0)
    images = draws.standard_normal((samples, 2, 2))
    labels = (images[:, 0, 0] + images[:, 1, 1] ** 2 > draws.standard_normal(samples)).astype(int)
    return sgd.mlp(images, labels, pooled=None, hidden=(3,), classes=2)


def critical_sum(seed: int, samples: int, dimension: int, noise: float = 0.3) -> sgd.FiniteSum:
    """Quadratics with a positive mean Hessian, whose mean gradient at 0 vanishes."""
    draws = np.random.default_rng(seed)
    root = draws.standard_normal((samples, dimension, dimension))
    hessians = np.diag(np.linspace(0.1, 1, dimension)) + noise * (root + root.transpose(0, 2, 1))
    gradients = draws.standard_normal((samples, dimension))
    return sgd.finite_sum(hessians, gradients - gradients.mean(0))


def least_squares(params, batch):
    """Mean squared error of a linear model."""
    return jnp.mean(jnp.square(batch["x"] @ params - batch["y"])) / 2
