"""Noise statistics: from single samples, from drawn batches, by enumeration."""

import itertools

import jax
import numpy as np
import pytest

from jaxopt_lab.dynamics import sgd
from tests.dynamics.landscapes import critical_sum, tiny_network


def enumerated(problem, replace):
    """Gradients at 0 and Hessians of all batches of two."""
    n = len(problem.gradients)
    pairs = (
        itertools.product(range(n), repeat=2) if replace else itertools.combinations(range(n), 2)
    )
    pairs = np.asarray(list(pairs))
    h, g = np.asarray(problem.hessians, float), np.asarray(problem.gradients, float)
    return g[pairs].mean(1), h[pairs].mean(1)


@pytest.mark.parametrize("replace", [True, False])
def test_exact_statistics_are_those_of_all_batches(replace):
    problem = critical_sum(2, samples=7, dimension=3)
    system = sgd.quadratic(problem)
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    found = sgd.noise_statistics(
        system.loss, np.zeros(3), system.data, directions=basis, batch_size=2, replace=replace,
        curvature="all",
    )  # fmt: skip
    g, h = enumerated(problem, replace)
    g, h = g @ basis, basis.T @ h @ basis
    np.testing.assert_allclose(found.gradient_variance, g.var(0), rtol=1e-10)
    np.testing.assert_allclose(found.curvature_variance, h.var(0), rtol=1e-9)
    own = np.diagonal(h, axis1=1, axis2=2)
    wanted = [np.corrcoef(g[:, i], own[:, i])[0, 1] for i in range(3)]
    np.testing.assert_allclose(found.correlation, wanted, rtol=1e-8)
    np.testing.assert_allclose(found.drift, 0, atol=1e-6)
    np.testing.assert_allclose(found.curvature, own.mean(0), rtol=1e-10)
    gamma = h.var(0)
    assert np.isclose(found.diagonal_mass, np.trace(gamma) / gamma.sum())
    squares = np.square(own.mean(0)).sum()
    wanted = (squares + np.trace(gamma)) / (squares + gamma.sum())
    assert np.isclose(found.hessian_diagonal_mass, wanted)


def test_the_entries_asked_for():
    system = tiny_network()
    params = system.init(jax.random.key(0))
    directions = np.linalg.qr(np.random.default_rng(0).standard_normal((23, 5)))[0]
    by_entries = {
        entries: sgd.noise_statistics(
            system.loss, params, system.data, directions=directions, batch_size=8, curvature=entries
        )
        for entries in ("none", "diagonal", "all")
    }
    none, diagonal, whole = by_entries.values()
    assert none.curvature_variance is None and none.diagonal_mass is None
    np.testing.assert_allclose(none.gradient_variance, diagonal.gradient_variance, rtol=1e-10)
    np.testing.assert_allclose(diagonal.curvature_variance, whole.diagonal_variance, rtol=1e-9)
    np.testing.assert_allclose(diagonal.correlation, whole.correlation, rtol=1e-8)
    hessians = sgd.mini_batch_hessians(
        system.loss, params, system.data, np.arange(40)[:, None], directions=directions
    )
    np.testing.assert_allclose(whole.curvature_variance, hessians.var(0) / 8, rtol=1e-8)


def test_drawn_batches_agree_with_the_exact_statistics():
    system = tiny_network()
    params = system.init(jax.random.key(0))
    directions = np.eye(23)[:, :6]
    arguments = {"directions": directions, "batch_size": 4}
    exact = sgd.noise_statistics(system.loss, params, system.data, **arguments)
    drawn = sgd.noise_statistics(
        system.loss, params, system.data, **arguments, batches=3000, key=jax.random.key(1)
    )
    # Standard error of a variance from 3 000 draws: 2.6 % for a Gaussian.
    np.testing.assert_allclose(drawn.gradient_variance, exact.gradient_variance, rtol=0.15)
    np.testing.assert_allclose(drawn.curvature_variance, exact.curvature_variance, rtol=0.25)


def test_batch_norm_needs_drawn_batches():
    draws = np.random.default_rng(0)
    system = sgd.cnn(draws.random((12, 4, 4)), np.arange(12) % 10, channels=2, hidden=2)
    params = system.init(jax.random.key(0))
    arguments = {"directions": np.eye(system.parameters), "batch_size": 4, "curvature": "none"}
    with pytest.raises(ValueError, match="give `batches` and `key`"):
        sgd.noise_statistics(system.loss, params, system.data, **arguments)
    drawn = sgd.noise_statistics(
        system.loss, params, system.data, **arguments, batches=5, key=jax.random.key(0)
    )
    assert drawn.gradient_variance.shape == (system.parameters,)
    assert (drawn.gradient_variance[-4:] > 0).all()


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"curvature": "some"}, "curvature: got 'some'"),
        ({"batches": 5}, "batches, key"),
        ({"batches": 1, "key": jax.random.key(0)}, "at least 2 batches"),
        ({"batch_size": 8, "replace": False}, "batch_size: got 8 of 7"),
        ({"directions": np.eye(2)}, "directions has shape"),
    ],
)
def test_bad_arguments(changes, named):
    system = sgd.quadratic(critical_sum(2, samples=7, dimension=3))
    arguments = {"directions": np.eye(3), "batch_size": 2, **changes}
    with pytest.raises(ValueError, match=named):
        sgd.noise_statistics(system.loss, np.zeros(3), system.data, **arguments)
