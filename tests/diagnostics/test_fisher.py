"""Errors of approximations of a second moment: full, from gradients, and from random products."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from jaxopt_lab.core.kronecker import nearest_kronecker
from jaxopt_lab.diagnostics import (
    FullFisher,
    ProbedFisher,
    SampledFisher,
    basis_distance,
    kronecker_distance,
    moving_average_weights,
    softmax_hessian,
)
from tests.reference import kronecker as reference

M, N, SAMPLES = 3, 4, 7
seeds = st.integers(0, 2**32 - 1)


def compiled(kind, method):
    return jax.jit(lambda known, *arguments: getattr(kind, method)(known, *arguments))


METHODS = {
    kind: {
        name: compiled(kind, name)
        for name in ("kronecker_errors", "eigenbasis_errors", "diagonal_mass")
    }
    for kind in (FullFisher, SampledFisher, ProbedFisher)
}
BEST = {kind: compiled(kind, "best_kronecker") for kind in (FullFisher, SampledFisher)}


def semidefinite(rng, size):
    x = rng.standard_normal((size, size))
    return x @ x.T


def orthogonal(rng, size):
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


def draw(seed):
    """Gradients with weights, factors, bases and values; the matrix in NumPy."""
    rng = np.random.default_rng(seed)
    grads = rng.standard_normal((SAMPLES, M, N)) + 2 * rng.standard_normal((M, N))
    weights = rng.uniform(0, 1, SAMPLES)
    matrix = sum(w * reference.second_moment(g) for w, g in zip(weights, grads, strict=True))
    factors = semidefinite(rng, M), semidefinite(rng, N)
    bases = orthogonal(rng, M), orthogonal(rng, N)
    return grads, weights, matrix, factors, bases, rng.uniform(0, 1, (M, N))


def forms(grads, weights, matrix, dtype=jnp.float32):
    full = FullFisher(jnp.asarray(matrix.reshape(M, N, M, N), dtype))
    return full, SampledFisher(jnp.asarray(grads, dtype), jnp.asarray(weights, dtype))


def as_arrays(*values, dtype=jnp.float32):
    return [jnp.asarray(x, dtype) for x in values]


@given(seeds)
def test_full_and_sampled_equal_the_definition(seed):
    grads, weights, matrix, factors, bases, values = draw(seed)
    q = np.kron(*bases)
    rotated = reference.in_basis(matrix, *bases)
    wanted = {
        "kronecker_errors": reference.errors(matrix, np.kron(*factors)),
        "eigenbasis_errors": reference.errors(matrix, reference.from_basis(values, *bases)),
    }
    wanted_mass = np.linalg.norm(np.diag(rotated)) / np.linalg.norm(matrix)
    arguments = {"kronecker_errors": factors, "eigenbasis_errors": (values, *bases)}
    for known in forms(grads, weights, matrix):
        methods = METHODS[type(known)]
        for name, (relative, rescaled) in wanted.items():
            got = methods[name](known, *as_arrays(*arguments[name]))
            np.testing.assert_allclose(got.relative, relative, rtol=2e-4)
            np.testing.assert_allclose(got.rescaled, rescaled, rtol=2e-4)
        got = methods["diagonal_mass"](known, *as_arrays(*bases))
        np.testing.assert_allclose(got, wanted_mass, rtol=1e-4)
        diagonal = known.diagonal(*as_arrays(*bases))
        np.testing.assert_allclose(diagonal.ravel(), np.diag(q.T @ matrix @ q), rtol=1e-4)


@given(seeds)
def test_scalar_is_the_best_one(seed):
    grads, weights, matrix, factors, _, _ = draw(seed)
    product = np.kron(*factors)
    wanted = np.vdot(matrix, product) / np.vdot(product, product)
    for known in forms(grads, weights, matrix):
        got = METHODS[type(known)]["kronecker_errors"](known, *as_arrays(*factors))
        np.testing.assert_allclose(got.scalar, wanted, rtol=1e-4)
        left, right = factors[0] * got.scalar, factors[1]
        again = METHODS[type(known)]["kronecker_errors"](known, *as_arrays(left, right))
        np.testing.assert_allclose(again.relative, got.rescaled, rtol=1e-4)


@given(seeds)
def test_best_kronecker_is_that_of_the_rearrangement(seed):
    grads, weights, matrix, _, _, _ = draw(seed)
    wanted = reference.best(reference.rearranged(matrix, M, N), M, N)
    for known in forms(grads, weights, matrix):
        for got, x in zip(BEST[type(known)](known), wanted, strict=True):
            np.testing.assert_allclose(got, x, atol=1e-4 * np.linalg.norm(x))


def test_in_float64_both_forms_agree_to_rounding():
    grads, weights, matrix, factors, bases, values = draw(0)
    with jax.enable_x64(True):
        full, sampled = forms(grads, weights, matrix, jnp.float64)
        wide = functools.partial(as_arrays, dtype=jnp.float64)
        for name, arguments in {
            "kronecker_errors": factors,
            "eigenbasis_errors": (values, *bases),
        }.items():
            pair = (METHODS[type(x)][name](x, *wide(*arguments)) for x in (full, sampled))
            for x, y in zip(*pair, strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-12)
        exact = jax.jit(lambda known: known.best_kronecker(tolerance=1e-13))(sampled)
        for x, y in zip(exact, BEST[FullFisher](full), strict=True):
            np.testing.assert_allclose(x, y, atol=1e-10)


@pytest.mark.parametrize("exponent", [-15, 15])
def test_the_errors_do_not_see_the_units_of_the_loss(exponent):
    grads, weights, matrix, factors, bases, values = draw(0)
    c = 10.0**exponent
    _, plain = forms(grads, weights, matrix)
    _, scaled = forms(c * grads, weights, matrix)
    wanted = METHODS[SampledFisher]["kronecker_errors"](plain, *as_arrays(*factors))
    got = METHODS[SampledFisher]["kronecker_errors"](scaled, *as_arrays(*(c * x for x in factors)))
    np.testing.assert_allclose(got, wanted, rtol=1e-4)
    wanted = METHODS[SampledFisher]["eigenbasis_errors"](plain, *as_arrays(values, *bases))
    got = METHODS[SampledFisher]["eigenbasis_errors"](scaled, *as_arrays(c * c * values, *bases))
    np.testing.assert_allclose(got, wanted, rtol=1e-4)
    small = forms(grads, weights, 1e-30 * matrix)[0]
    got = METHODS[FullFisher]["eigenbasis_errors"](small, *as_arrays(1e-30 * values, *bases))
    np.testing.assert_allclose(got, wanted, rtol=1e-4)


@given(seeds)
def test_distance_of_kronecker_products_from_the_factors(seed):
    rng = np.random.default_rng(seed)
    ours, best = ((semidefinite(rng, M), semidefinite(rng, N)) for _ in range(2))
    got = kronecker_distance(*as_arrays(*ours), tuple(as_arrays(*best)))
    wanted = reference.errors(np.kron(*best), np.kron(*ours))
    np.testing.assert_allclose((got.relative, got.rescaled), wanted, rtol=2e-4)


def test_an_exact_approximation_has_no_error():
    rng = np.random.default_rng(0)
    left, right = as_arrays(semidefinite(rng, M), semidefinite(rng, N))
    known = FullFisher(jnp.kron(left, right).reshape(M, N, M, N))
    assert known.kronecker_errors(left, right).relative < 1e-6
    twice = known.kronecker_errors(2 * left, right)
    np.testing.assert_allclose(twice, (1, 0, 0.5), atol=1e-6)
    bases = [jnp.linalg.eigh(x)[1] for x in (left, right)]
    np.testing.assert_allclose(known.diagonal_mass(*bases), 1, rtol=1e-6)
    diagonal = known.diagonal(*bases)
    assert known.eigenbasis_errors(diagonal, *bases).relative < 1e-6


def test_what_is_zero():
    zero, eye = jnp.zeros((M, N, M, N)), (jnp.eye(M), jnp.eye(N))
    assert jnp.isnan(FullFisher(zero).kronecker_errors(*eye).relative)
    sampled = SampledFisher(jnp.zeros((2, M, N)), jnp.ones(2))
    assert jnp.isnan(sampled.kronecker_errors(*eye).relative)
    assert not jnp.any(sampled.best_kronecker()[0])
    known = FullFisher(zero + 1)
    np.testing.assert_array_equal(known.kronecker_errors(0 * eye[0], eye[1]), (1, 1, 0))


@pytest.mark.parametrize("seed", range(3))
def test_probes_estimate_the_exact_errors(seed):
    grads, weights, matrix, factors, bases, values = draw(seed)
    full = forms(grads, weights, matrix)[0]
    factors = [x / np.linalg.norm(x) * np.linalg.norm(matrix) ** 0.5 for x in factors]

    def product(z):
        return jnp.einsum("ijkl,kl->ij", full.entries, z)

    probed = ProbedFisher.of(product, (M, N), probes=20_000, key=jax.random.key(seed))
    arguments = {
        "kronecker_errors": as_arrays(*factors),
        "eigenbasis_errors": as_arrays(values, *bases),
        "diagonal_mass": as_arrays(*bases),
    }
    for name, given_arrays in arguments.items():
        got, wanted = (METHODS[type(x)][name](x, *given_arrays) for x in (probed, full))
        np.testing.assert_allclose(got, wanted, rtol=0.05)


def test_few_probes_do_not_take_noise_for_a_diagonal():
    """A matrix with no diagonal mass: the squared mean of eight probes would show a third."""
    rng = np.random.default_rng(0)
    q = orthogonal(rng, M * N)
    matrix = np.float32(q @ np.diag([1.0, -1.0] * (M * N // 2)) @ q.T)
    matrix -= np.diag(np.diag(matrix))
    full = FullFisher(jnp.asarray(matrix.reshape(M, N, M, N)))
    eye = jnp.eye(M), jnp.eye(N)
    z = rng.choice([-1.0, 1.0], (400, 8, M, N)).astype(np.float32)
    products = np.einsum("ijkl,rpkl->rpij", full.entries, z)
    masses = jax.vmap(lambda *x: ProbedFisher(*x).diagonal_mass(*eye))(z, products)
    naive = np.linalg.norm((z * products).mean(1), axis=(1, 2))
    assert np.mean(np.square(masses)) < 0.5 * np.mean(naive**2) / np.linalg.norm(matrix) ** 2


def test_weights_of_a_moving_average():
    grads = np.random.default_rng(0).standard_normal((5, M, N))
    for decay in (0.9, 1.0):
        matrix = reference.second_moment(grads[0])
        for grad in grads[1:]:
            weight = 1 - decay if decay < 1 else 1
            matrix = decay * matrix + weight * reference.second_moment(grad)
        weights = moving_average_weights(5, decay)
        formed = SampledFisher(jnp.asarray(grads, jnp.float32), weights).form().matrix
        np.testing.assert_allclose(formed, matrix, rtol=1e-4, atol=1e-6)


def test_basis_distance_ignores_signs_alone():
    rng = np.random.default_rng(0)
    bases = as_arrays(orthogonal(rng, M), orthogonal(rng, N))
    flipped = bases[0] * jnp.asarray([1.0, -1.0, 1.0]), -bases[1]
    assert basis_distance(flipped, tuple(bases)) < 1e-3
    swapped = bases[0][:, ::-1], bases[1]
    np.testing.assert_allclose(basis_distance(swapped, tuple(bases)), (2 - 2 / 3) ** 0.5, rtol=1e-5)
    signs = np.sign(np.sum(np.asarray(bases[0]) * np.eye(M), 0))
    left = np.asarray(bases[0]) * signs
    right = np.asarray(bases[1]) * np.sign(np.diag(bases[1]))
    wanted = np.linalg.norm(np.kron(left, right) - np.eye(M * N)) / (M * N) ** 0.5
    got = basis_distance(tuple(bases), (jnp.eye(M), jnp.eye(N)))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_softmax_hessian_is_the_second_derivative_of_the_loss():
    rng = np.random.default_rng(0)
    weights, x = as_arrays(rng.standard_normal((M, N)), rng.standard_normal((6, N)))
    labels = jnp.arange(6) % M

    def loss(weights):
        logits = x @ weights.T
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(6), labels])

    @jax.jit
    def both(weights):
        return softmax_hessian(jax.nn.softmax(x @ weights.T), x).entries, jax.hessian(loss)(weights)

    np.testing.assert_allclose(*both(weights), atol=1e-6)


def test_one_gradient_is_approximated_best_by_its_start():
    grad = jnp.asarray(np.random.default_rng(0).standard_normal((M, N)), jnp.float32)
    sampled = SampledFisher(jnp.stack([grad] * SAMPLES), jnp.eye(SAMPLES, dtype=jnp.float32)[0])
    best, start = BEST[SampledFisher](sampled), jax.jit(nearest_kronecker)(grad)
    for got, wanted in zip(best, start, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-3)
