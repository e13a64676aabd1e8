"""Hessians against JAX's own, Lanczos against the full decomposition, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxopt_lab.dynamics import sgd
from tests.dynamics.landscapes import critical_sum, tiny_network


@pytest.fixture(scope="module")
def network():
    system = tiny_network()
    return system, system.init(jax.random.key(0))


@pytest.fixture(scope="module")
def hessian(network):
    system, params = network
    return sgd.mean_hessian(system.loss, params, system.data)


def reference_hessian(system, params, data):
    with jax.enable_x64(True):
        flat, unravel = ravel_pytree(jax.tree.map(lambda x: x.astype(float), params))
        data = jax.tree.map(jnp.asarray, data)
        return np.asarray(jax.jit(jax.hessian(lambda w: system.loss(unravel(w), data)))(flat))


def test_the_exact_hessian(network, hessian):
    system, params = network
    np.testing.assert_allclose(
        hessian, reference_hessian(system, params, system.data), rtol=1e-9, atol=1e-13
    )
    np.testing.assert_array_equal(hessian, hessian.T)


@pytest.mark.parametrize("vectors_at_once", [1, 7, 100])
def test_averaged_over_parts_of_the_data(network, hessian, vectors_at_once):
    system, params = network
    parts = np.arange(40).reshape(5, 8)
    found = sgd.mean_hessian(
        system.loss, params, system.data, batches=parts, vectors_at_once=vectors_at_once
    )
    np.testing.assert_allclose(found, hessian, rtol=1e-9, atol=1e-14)


def test_hessians_of_batches_rotated(network, hessian):
    system, params = network
    parts = np.arange(40).reshape(5, 8)
    basis = sgd.eigenbasis(hessian)
    found = sgd.mini_batch_hessians(
        system.loss, params, system.data, parts, directions=basis.directions
    )
    batch = jax.tree.map(lambda x: x[parts[2]], system.data)
    alone = reference_hessian(system, params, batch)
    np.testing.assert_allclose(
        found[2], basis.directions.T @ alone @ basis.directions, rtol=1e-8, atol=1e-13
    )
    np.testing.assert_allclose(found.mean(0), np.diag(basis.eigenvalues), atol=1e-14)


def test_eigenbasis_sorted(hessian):
    basis = sgd.eigenbasis(hessian)
    assert (np.diff(basis.eigenvalues) >= 0).all()
    again = basis.directions * basis.eigenvalues @ basis.directions.T
    np.testing.assert_allclose(again, hessian, atol=1e-14)
    flat, sharp = sgd.flattest(basis.eigenvalues, 4), sgd.sharpest(basis.eigenvalues, 4)
    assert np.abs(basis.eigenvalues[flat]).max() <= np.sort(np.abs(basis.eigenvalues))[3]
    assert sharp.tolist() == [22, 21, 20, 19]
    with pytest.raises(ValueError, match="square"):
        sgd.eigenbasis(np.zeros((2, 3)))


def test_lanczos_finds_the_largest(network, hessian):
    system, params = network
    values = sgd.eigenbasis(hessian).eigenvalues
    wanted = values[np.argsort(-np.abs(values))]
    found = sgd.lanczos(jax.random.key(0), system.loss, params, system.data, count=6)
    np.testing.assert_allclose(found.eigenvalues, wanted[:6], rtol=1e-10)
    np.testing.assert_allclose(found.directions.T @ found.directions, np.eye(6), atol=1e-12)
    np.testing.assert_allclose(
        hessian @ found.directions, found.directions * found.eigenvalues, atol=1e-12
    )
    assert found.residuals.max() < 1e-12


def test_lanczos_reports_what_has_not_converged(network, hessian):
    system, params = network
    few = sgd.lanczos(jax.random.key(0), system.loss, params, system.data, count=3, iterations=4)
    errors = np.linalg.norm(hessian @ few.directions - few.directions * few.eigenvalues, axis=0)
    np.testing.assert_allclose(few.residuals, errors, rtol=1e-8)
    assert few.residuals.max() > 1e-4


def test_lanczos_passes_through_an_invariant_subspace():
    """A projection's Krylov space is exhausted after two vectors; the rest is still found."""
    root = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 5)))[0]
    system = sgd.quadratic(sgd.finite_sum((root @ root.T)[None], np.zeros((1, 12))))
    found = sgd.lanczos(
        jax.random.key(0), system.loss, np.zeros(12), system.data, count=5, iterations=12
    )
    np.testing.assert_allclose(found.eigenvalues, 1, atol=1e-6)
    assert found.residuals.max() < 1e-6


def test_flat_proxies(network, hessian):
    system, params = network
    key = jax.random.key(0)
    found = sgd.lanczos(key, system.loss, params, system.data, count=8)
    proxies = sgd.flat_proxies(
        key, system.loss, params, system.data, excluded=found.directions, count=4
    )
    v = proxies.directions
    np.testing.assert_allclose(v.T @ v, np.eye(4), atol=1e-13)
    np.testing.assert_allclose(found.directions.T @ v, 0, atol=1e-13)
    np.testing.assert_allclose(proxies.curvatures, np.diagonal(v.T @ hessian @ v), atol=1e-14)
    assert np.abs(proxies.curvatures).max() <= np.abs(found.eigenvalues).min()
    errors = np.linalg.norm(hessian @ v - v * proxies.curvatures, axis=0)
    np.testing.assert_allclose(proxies.residuals, errors, rtol=1e-7)
    with pytest.raises(ValueError, match="count: got 16, expected 1 to 15"):
        sgd.flat_proxies(key, system.loss, params, system.data, excluded=found.directions, count=16)


def test_too_many_parameters_names_the_way_out():
    with pytest.raises(ValueError, match=r"10001 parameters.*10000; `lanczos`"):
        sgd.mean_hessian(lambda w, x: jnp.sum(w) * jnp.mean(x), np.ones(10_001), np.ones(3))


@jax.custom_vjp
def opaque(x):
    return 2 * x


opaque.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


@jax.custom_vjp
def once_differentiable(x):
    return x**2


# The rule of the gradient calls what has no forward derivative.
once_differentiable.defvjp(lambda x: (x**2, x), lambda x, g: (opaque(x) * g,))


def searched(w, x):
    """A loop of unknown length, which has no gradient."""
    return jnp.mean(jax.lax.while_loop(lambda y: jnp.sum(y) < 9, lambda y: y + w[0] ** 2, x))


@pytest.mark.parametrize(
    "loss, reason",
    [
        (lambda w, x: jnp.mean(jnp.abs(x - w[0])), "piecewise linear"),
        (lambda w, x: jnp.mean(once_differentiable(x - w[0])), "its gradient has no derivative"),
        (searched, "its gradient has no derivative"),
        (lambda w, x: jnp.mean(jnp.abs(x - w[0] + 1e-300) ** 1.5 * (w[0] - w[0]) ** 0.5), "finite"),
    ],
)
@pytest.mark.parametrize("measure", ["mean_hessian", "lanczos"])
def test_losses_without_second_derivatives(loss, reason, measure):
    measures = {
        "mean_hessian": sgd.mean_hessian,
        "lanczos": functools.partial(sgd.lanczos, jax.random.key(0), count=1),
    }
    with pytest.raises(ValueError, match=reason):
        measures[measure](loss, np.ones(2), np.arange(3.0))


def test_orthogonal_invariance_of_the_pipeline():
    """Rotated parameters: the same eigenvalues, noise and variances along the same directions."""
    problem = critical_sum(1, samples=12, dimension=4)
    turn = np.linalg.qr(np.random.default_rng(5).standard_normal((4, 4)))[0]
    turned = sgd.finite_sum(
        np.einsum("ia,kij,jb->kab", turn, problem.hessians, turn), problem.gradients @ turn
    )
    results = []
    for each in (problem, turned):
        system = sgd.quadratic(each)
        basis = sgd.eigenbasis(sgd.mean_hessian(system.loss, np.zeros(4), system.data))
        noise = sgd.noise_statistics(
            system.loss, np.zeros(4), system.data, directions=basis.directions, batch_size=2
        )
        ensemble = sgd.run_ensemble(
            jax.random.key(0), system.loss, np.zeros(4), system.data, directions=basis.directions,
            learning_rate=0.1, batch_size=2, steps=10, replicas=20,
        )  # fmt: skip
        results.append(
            (basis.eigenvalues, noise.gradient_variance, noise.curvature_variance,
             ensemble.variance)
        )  # fmt: skip
    for one, other in zip(*results, strict=True):
        # The problem itself is float32, and so is its rotation.
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-7)
