"""Small finite sums of quadratics."""

import itertools

import numpy as np

from jaxopt_lab.dynamics import sgd


def random_problem(seed: int, num_samples: int = 6, dimension: int = 2, critical: bool = False):
    """Correlated Hessians and gradients; `critical`: the gradients average to 0."""
    draw = np.random.default_rng(seed)
    h = draw.normal(size=(num_samples, dimension, dimension))
    h = (h + h.swapaxes(1, 2)) / 2 + 1.5 * np.eye(dimension)
    g = 0.5 * draw.normal(size=(num_samples, dimension)) + 0.3 * h[:, 0]
    return sgd.finite_sum(h, g - g.mean(0) if critical else g)


def independent_problem(curvature, gamma, d):
    """All signs of each entry of two-dimensional Hessians and gradients: independent entries."""
    signs = np.array(list(itertools.product((-1, 1), repeat=5)))
    a, b, c, u, v = signs.T * np.sqrt([gamma[0][0], gamma[1][1], gamma[0][1], *d])[:, None]
    h = np.stack([np.stack([a, c], -1), np.stack([c, b], -1)], -2)
    return sgd.finite_sum(np.diag(curvature) + h, np.stack([u, v], -1))


def all_sequences(num_samples: int, steps: int):
    """Indices (N^steps, steps, 1) of every sequence of single samples."""
    return np.array(list(itertools.product(range(num_samples), repeat=steps)))[..., None]
