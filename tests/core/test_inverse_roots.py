"""Inverse roots: exact where that is possible, finite always."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab.core.inverse_roots import ROOT_METHODS, inverse_root
from tests.examples import examples
from tests.reference import shampoo as reference

METHODS = tuple(ROOT_METHODS)
both = pytest.mark.parametrize("method", METHODS)


@functools.partial(
    jax.jit,
    static_argnames=("exponent", "relative", "method", "precision"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def root(x, eps, exponent=0.25, **options):
    return inverse_root(x, exponent, eps=eps, **options)


def orthogonal(rng, n):
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


def spectra(rng, values):
    """Matrices (b, n, n) of these eigenvalues (b, n) in random bases."""
    bases = [orthogonal(rng, values.shape[1]) for _ in values]
    return np.stack([(q * v) @ q.T for q, v in zip(bases, values, strict=True)])


@both
@pytest.mark.parametrize("exponent", [0.5, 1 / 6])
def test_root_undoes_the_matrix(method, exponent):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = spectra(rng, rng.uniform(0.01, 10, size=(3, 6)))
        y = np.asarray(root(jnp.asarray(x), 0.0, exponent, method=method))
        product = np.linalg.matrix_power(y, round(1 / exponent)) @ x
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(6), x.shape), atol=1e-10)
    np.testing.assert_array_equal(y, y.transpose(0, 2, 1))


@hypothesis.given(st.integers(0, 10**6), st.floats(-6, 6), st.booleans())
def test_methods_agree_with_the_reference(seed, size, relative):
    rng = np.random.default_rng(seed)
    values = 10**size * 10 ** rng.uniform(-4, 0, size=(2, 6))
    eps = 1e-3 if relative else 1e-3 * 10**size
    with jax.enable_x64(True):
        x = spectra(rng, values)
        for method in METHODS:
            # The largest eigenvalue is exact in one method and estimated from below in the other.
            tolerance = 0.02 if relative and method == "newton" else 1e-9
            got = root(jnp.asarray(x), eps, relative=relative, method=method)
            for y, one in zip(got, x, strict=True):
                wanted = reference.inverse_root(one, 0.25, eps, relative)
                error = np.linalg.norm(y - wanted) / np.linalg.norm(wanted)
                assert error < tolerance, method


@both
def test_commutes_with_a_change_of_basis(method):
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        x, q = spectra(rng, 10 ** rng.uniform(-3, 0, size=(3, 6))), orthogonal(rng, 6)
        turned = root(jnp.asarray(q.T @ x @ q), 1e-6, method=method)
        y = root(jnp.asarray(x), 1e-6, method=method)
        np.testing.assert_allclose(turned, q.T @ np.asarray(y) @ q, atol=1e-9)


@examples(200)
@hypothesis.given(
    seed=st.integers(0, 10**6),
    condition=st.floats(0, 12),
    size=st.floats(-25, 25),
    rank=st.integers(0, 6),
    eps=st.sampled_from([0.0, 1e-12, 1e-6]),
)
def test_never_nan_in_float32(seed, condition, size, rank, eps):
    rng = np.random.default_rng(seed)
    values = 10**size * np.logspace(0, -condition, 6)
    values[rank:] = 0
    noise = 1e-7 * 10**size * rng.normal(size=(1, 6, 6))  # as of an accumulated Gram matrix
    x = jnp.asarray(spectra(rng, values[None]) + noise, "float32")
    for method in METHODS:
        y = np.asarray(root(x, eps, method=method))
        assert np.isfinite(y).all(), method
        # The leading direction is the one that round-off cannot hide.
        if rank and eps == 0:
            (top,) = np.linalg.eigh(np.asarray(x, float))[1][..., -1]
            np.testing.assert_allclose(top @ y[0] @ top, 10 ** (-size / 4), rtol=1e-2)


@both
def test_zero_and_edge_cases(method):
    zero = jnp.zeros((2, 6, 6))
    np.testing.assert_allclose(root(zero, 1e-8, method=method)[0], 100 * np.eye(6), rtol=1e-5)
    assert (root(zero, 0.0, method=method) == 0).all()
    assert (root(zero, 1.0, relative=True, method=method) == 0).all()
    assert root(jnp.zeros((2, 0, 0)), 1.0, method=method).shape == (2, 0, 0)
    np.testing.assert_allclose(root(jnp.full((1, 1), 16.0), 0.0, method=method), [[0.5]], rtol=1e-6)
    # Each matrix has its own ridge, and its own end of the iteration.
    diagonals = jnp.stack([jnp.linspace(1.0, 6, 6), jnp.full(6, 1e-8)])
    got = root(diagonals[..., None] * jnp.eye(6), jnp.array([0.0, 1.0]), method=method)
    wanted = np.stack([np.linspace(1.0, 6, 6) ** -0.25, np.ones(6)])[..., None] * np.eye(6)
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_round_off_below_the_ridge_is_shifted_to_it():
    with jax.enable_x64(True):
        x = np.diag([-1e-3, 1.0, 2.0])
        got = root(jnp.asarray(x), 1e-6)
        wanted = np.diag(np.array([1e-6, 1.001001, 2.001001]) ** -0.25)
        np.testing.assert_allclose(got, wanted, rtol=1e-9)


@pytest.mark.parametrize(("precision", "floor"), [("highest", 8), ("bf16_x3", 64)])
def test_newton_treats_what_round_off_hides_as_one_size(precision, floor):
    rng = np.random.default_rng(2)
    values = np.logspace(0, -12, 6)
    x = spectra(rng, values[None])
    x = jnp.asarray(x, "float32")
    got = root(x, 1e-12, method="newton", precision=precision)[0]
    floored = reference.inverse_root(np.asarray(x[0], float), 0.25, floor * 2.0**-23)
    np.testing.assert_allclose(got, floored, rtol=0.02, atol=0.02 * np.abs(floored).max())


@pytest.mark.parametrize("method", ["newton", "eigh"])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("scale", [2.0**-120, 2.0**126])
def test_factors_at_either_end_of_float32(method, relative, scale):
    # The reciprocal of the larger one is denormal, and flushed to zero.
    x = jnp.array([[1.0, 0.5], [0.5, 1.0]])
    root = inverse_root(scale * x, 0.25, method=method, relative=relative)
    exact = inverse_root(x, 0.25, method="eigh")
    np.testing.assert_allclose(root * scale**0.25, exact, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "exponent", "message"),
    [
        ("qr", 0.25, "method: got 'qr', wanted one of eigh, newton"),
        ("eigh", -0.5, "exponent: got -0.5, wanted a finite number > 0"),
        ("newton", 0.4, "exponent: got 0.4, wanted the inverse of an integer"),
    ],
)
def test_bad_input(method, exponent, message):
    with pytest.raises(ValueError, match=message):
        inverse_root(jnp.eye(2), exponent, method=method)
