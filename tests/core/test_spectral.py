"""Leading singular triples, eigenbases and their refresh, and products at named precisions."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from jaxopt_lab.core.orthogonalization import refresh_eigenbasis
from jaxopt_lab.core.precision import PRODUCT_PRECISIONS, matmul
from jaxopt_lab.core.spectral import (
    complete_basis,
    eigenbasis,
    leading_singular_triple,
    nuclear_norm,
    spectral_norm,
    trace_in_range,
)
from tests.examples import examples

SIZE = 8
seeds = st.integers(0, 2**32 - 1)
TRIPLE = jax.jit(leading_singular_triple)
EIGENBASIS = jax.jit(eigenbasis)
REFRESH = jax.jit(
    lambda factor, basis, name: refresh_eigenbasis(factor, basis, orthogonalizer=name)[1:],
    static_argnums=2,
)
COMPLEMENT = jax.jit(complete_basis)


def orthogonal(rng, size=SIZE):
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


def with_values(rng, shape, values):
    u, v = (orthogonal(rng, size) for size in shape)
    return u[:, : len(values)] * values @ v[:, : len(values)].T


def aligned(q, reference):
    return q * np.sign(np.sum(q * reference, axis=-2, keepdims=True))


# Nearly equal values, those that rounding drowns, ranks from one to full, conditions up to 1e12.
SPECTRA = {
    "flat": lambda k: np.ones(k),
    "nearly flat": lambda k: 1 - 1e-6 * np.arange(k),
    "ill-conditioned": lambda k: np.geomspace(1, 1e-12, k),
    "drowning": lambda k: np.r_[1, np.full(k - 1, 1e-7)],
    "of rank one": lambda k: np.ones(1),
    "of half the rank": lambda k: np.linspace(1, 2, max(1, k // 2)),
    "zero": lambda k: np.zeros(1),
}


@pytest.mark.parametrize("x64", [False, True])
@given(
    st.sampled_from([(1, 6), (8, 8), (40, 12), (12, 40), (24, 24)]),
    st.lists(st.sampled_from([*SPECTRA, "random"]), min_size=2, max_size=2),
    seeds,
    st.integers(-25, 25),
)
def test_spectral_and_nuclear_norms_are_those_of_the_decomposition(
    x64, shape, names, seed, exponent
):
    rng = np.random.default_rng(seed)

    def draw(name):
        if name == "random":
            return rng.standard_normal(shape)
        return with_values(rng, shape, SPECTRA[name](min(shape)))

    with jax.enable_x64(x64):
        dtype, tolerance = (np.float64, 1e-13) if x64 else (np.float32, 4e-6)
        x = (10.0**exponent * np.stack([draw(name) for name in names])).astype(dtype)
        values = np.linalg.svd(x.astype(np.float64), compute_uv=False)
        np.testing.assert_allclose(spectral_norm(x), values[:, 0], rtol=tolerance / 4)
        np.testing.assert_allclose(nuclear_norm(x), values.sum(-1), rtol=tolerance)


@pytest.mark.parametrize("norm", [spectral_norm, nuclear_norm])
def test_norms_at_the_ends_of_the_range(norm):
    x = np.float32([[3e38, 0], [0, 1e30]])
    np.testing.assert_allclose(norm(x), 3e38, rtol=1e-6)
    np.testing.assert_allclose(norm(np.float32(2e-38) * np.eye(1)), 2e-38, rtol=1e-6)
    assert norm(jnp.zeros((2, 0, 3))).tolist() == [0, 0]
    assert np.isnan(norm(jnp.array([[jnp.nan, 1.0], [0.0, 1.0]])))
    assert np.isnan(norm(jnp.array([[jnp.inf, 1.0], [0.0, 1.0]])))


@examples(100)
@given(
    st.sampled_from([(3, 5), (5, 3), (4, 4)]),
    seeds,
    st.floats(0, 0.99),
    st.integers(-18, 18),
)
def test_leading_triple_equals_the_decomposition(shape, seed, ratio, exponent):
    rng = np.random.default_rng(seed)
    x = np.float32(10.0**exponent * with_values(rng, shape, [1.0, ratio, ratio / 2]))
    sigma, u, v = (np.asarray(y, np.float64) for y in TRIPLE(x))
    left, values, right = np.linalg.svd(x.astype(np.float64))
    np.testing.assert_allclose(sigma, values[0], rtol=3e-6)
    # Perturbation of the vectors: rounding over the relative gap.
    tolerance = 2e-6 / (1 - ratio)
    np.testing.assert_allclose(np.outer(u, u), np.outer(left[:, 0], left[:, 0]), atol=tolerance)
    np.testing.assert_allclose(np.outer(u, v), np.outer(left[:, 0], right[0]), atol=tolerance)


@examples(50)
@given(seeds, st.integers(-18, 18), st.sampled_from([1.0, 0.9999, 0.999999]))
def test_between_tied_values_the_triple_is_one_of_the_leading_space(seed, exponent, ratio):
    rng = np.random.default_rng(seed)
    x = np.float32(10.0**exponent * with_values(rng, (3, 5), [1.0, ratio, 0.1]))
    sigma, u, v = (np.asarray(y, np.float64) for y in TRIPLE(x))
    left, values, right = np.linalg.svd(x.astype(np.float64))
    np.testing.assert_allclose(sigma, values[0], rtol=2e-4)
    np.testing.assert_allclose([np.linalg.norm(u), np.linalg.norm(v)], 1, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(left[:, :2].T @ u), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(right[:2] @ v), 1, rtol=1e-5)
    np.testing.assert_allclose(u @ (x / values[0]) @ v, 1, rtol=2e-4)


def test_triples_of_matrices_without_a_leading_value():
    for shape in [(3, 5), (5, 3), (4, 4)]:
        for y in TRIPLE(jnp.zeros(shape)):
            np.testing.assert_array_equal(y, np.zeros_like(y))
    sigma, u, v = TRIPLE(jnp.eye(4))
    np.testing.assert_allclose([sigma, u @ v, u @ u], 1, rtol=1e-6)
    stack = jnp.stack([jnp.zeros((3, 5)), jnp.ones((3, 5))])
    sigma, u, v = TRIPLE(stack)
    np.testing.assert_allclose(sigma, [0, np.sqrt(15)], rtol=1e-6)
    assert not u[0].any() and not v[0].any()


@pytest.mark.parametrize("kind", ["normal", "first", "minus_first", "nearly_first"])
@given(seeds)
def test_complement_is_an_orthogonal_matrix_that_starts_with_the_vector(kind, seed):
    rng = np.random.default_rng(seed)
    u = rng.standard_normal(SIZE)
    if kind != "normal":
        u = np.eye(SIZE)[0] * (-1 if kind == "minus_first" else 1)
        if kind == "nearly_first":
            u += 1e-5 * rng.standard_normal(SIZE)
    u = np.float32(u / np.linalg.norm(u))
    q = np.asarray(COMPLEMENT(u), np.float64)
    np.testing.assert_allclose(q.T @ q, np.eye(SIZE), atol=2e-6)
    np.testing.assert_allclose(np.abs(q[:, 0] @ u), 1, atol=2e-6)
    np.testing.assert_allclose(np.outer(q[:, 0], q[:, 0]), np.outer(u, u), atol=2e-6)


def test_complement_of_zero_is_the_identity():
    np.testing.assert_array_equal(COMPLEMENT(jnp.zeros(SIZE)), np.eye(SIZE))


@given(seeds, st.integers(-18, 18))
def test_eigenbasis_has_decreasing_eigenvalues(seed, exponent):
    rng = np.random.default_rng(seed)
    q = orthogonal(rng)
    values = rng.permutation(np.arange(1.0, SIZE + 1))
    factor = np.float32(10.0**exponent * (q * values @ q.T))
    basis = np.asarray(EIGENBASIS(factor), np.float64)
    wanted = q[:, np.argsort(-values)]
    np.testing.assert_allclose(aligned(basis, wanted), wanted, atol=2e-5)


@pytest.mark.parametrize("orthogonalizer", ["cholesky_qr", "householder"])
@given(seeds, st.integers(-18, 18))
def test_refresh_sorts_and_takes_one_power_iteration(orthogonalizer, seed, exponent):
    """From any basis: the orthogonal factor of X Q with the columns of Q sorted."""
    rng = np.random.default_rng(seed)
    q = orthogonal(rng)
    factor = np.float32(10.0**exponent * (q * np.geomspace(1, 0.01, SIZE) @ q.T))
    basis = np.float32(orthogonal(rng))
    got, order = (np.asarray(y) for y in REFRESH(factor, basis, orthogonalizer))
    wide = factor.astype(np.float64), basis.astype(np.float64)
    values = np.diag(wide[1].T @ wide[0] @ wide[1])
    assert (np.diff(values[order]) <= 1e-6 * values.max()).all()
    wanted = np.linalg.qr((wide[0] @ wide[1])[:, order])[0]
    np.testing.assert_allclose(aligned(got, wanted), wanted, atol=5e-4)


@given(seeds)
def test_what_is_kept_in_the_eigenbasis_follows_the_permutation(seed):
    """A shuffled eigenbasis: the refresh undoes the shuffle, and reports it."""
    rng = np.random.default_rng(seed)
    q = orthogonal(rng)
    values = np.geomspace(1, 0.01, SIZE)
    shuffle = rng.permutation(SIZE)
    got, order = REFRESH(np.float32(q * values @ q.T), np.float32(q[:, shuffle]), "cholesky_qr")
    np.testing.assert_array_equal(shuffle[order], np.arange(SIZE))
    np.testing.assert_allclose(values[shuffle][order], values)
    np.testing.assert_allclose(aligned(np.asarray(got), q), q, atol=2e-5)


@given(seeds)
def test_repeated_refreshes_reach_the_eigenbasis(seed):
    rng = np.random.default_rng(seed)
    q = orthogonal(rng)
    factor = np.float32(q * 0.5 ** np.arange(SIZE) @ q.T)
    basis = np.float32(orthogonal(rng))
    for _ in range(60):
        basis, _ = REFRESH(factor, basis, "cholesky_qr")
    np.testing.assert_allclose(aligned(np.asarray(basis), q), q, atol=2e-4)


def test_directions_without_curvature_stay():
    rng = np.random.default_rng(0)
    q = orthogonal(rng)
    factor = np.float32(q[:, :3] * [3.0, 2.0, 1.0] @ q[:, :3].T)
    refreshed, order = REFRESH(factor, np.float32(q), "cholesky_qr")
    kept = np.asarray(order)[3:]
    np.testing.assert_array_equal(np.asarray(order)[:3], [0, 1, 2])
    np.testing.assert_allclose(aligned(np.asarray(refreshed)[:, :3], q[:, :3]), q[:, :3], atol=1e-5)
    null = q[:, kept]
    overlap = np.abs(np.sum(np.asarray(refreshed)[:, 3:] * null, axis=0))
    assert overlap.min() > 0.8
    same, order = REFRESH(np.zeros((SIZE, SIZE), np.float32), np.float32(q), "cholesky_qr")
    np.testing.assert_array_equal(order, np.arange(SIZE))
    np.testing.assert_allclose(aligned(np.asarray(same), q), q, atol=2e-6)


# Rounding of the operands of a product, relative to the largest possible entry. The split
# algorithms exist on GPUs alone; elsewhere they are at least as good as their name.
ROUNDING = {
    "bfloat16": 2e-2,
    "default": 2e-3,
    "tf32": 2e-3,
    "bf16_x3": 2e-5,
    "bf16_x6": 2e-6,
    "tf32_x3": 2e-6,
    "highest": 2e-6,
}


@pytest.mark.parametrize("name", PRODUCT_PRECISIONS)
def test_products_are_as_accurate_as_their_name_and_accumulate_in_float32(name):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5, 16)), rng.standard_normal((2, 16, 3))
    limit = ROUNDING[name] * np.abs(a).max() * np.abs(b).max() * 16
    for dtype in (jnp.float32, jnp.bfloat16):
        x, y = jnp.asarray(a, dtype), jnp.asarray(b, dtype)
        exact = np.asarray(x, np.float64) @ np.asarray(y, np.float64)
        got = matmul(x, y, name)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, exact, atol=limit)
    with jax.enable_x64(True):
        got = matmul(jnp.asarray(a), jnp.asarray(b), name)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, a @ b, rtol=1e-12)
        assert matmul(jnp.asarray(a), jnp.asarray(b, jnp.bfloat16), name).dtype == jnp.float64


def test_only_bfloat16_rounds_its_operands():
    x = jnp.full((1, 1), 1 + 2.0**-12)
    assert matmul(x, jnp.ones((1, 1)), "bfloat16") == 1
    assert matmul(x, jnp.ones((1, 1)), "bf16_x3") == x[0, 0]


def test_the_trace_leaves_room_for_what_is_formed():
    factor = np.float32(np.random.default_rng(0).normal(size=(8, 8)))
    factor = factor @ factor.T / np.trace(factor @ factor.T)
    largest = np.finfo(np.float32).max
    sizes = np.float32([0, largest / 4.1, largest / 3.9, np.inf])[:, None, None]
    with np.errstate(invalid="ignore"):
        stack = jnp.asarray(np.float32(sizes * factor))
    fits = np.asarray(trace_in_range(stack))
    assert fits.tolist() == [True, True, False, False]
    basis = complete_basis(jnp.full(8, 8**-0.5))
    assert np.isfinite(stack + stack.mT)[fits].all() and np.isfinite(stack @ basis)[fits].all()
    # Of a Kronecker product neither factor alone decides.
    rows, columns = (factor * np.float32(x)[:, None, None] for x in ([1e20] * 2, [1e17, 1e19]))
    assert trace_in_range(jnp.asarray(rows), jnp.asarray(columns)).tolist() == [True, False]


def test_a_basis_whose_successor_is_not_finite_is_kept():
    rng = np.random.default_rng(0)
    grads = rng.standard_normal((3, 12, 12)) * np.geomspace(1, 1e-3, 12)
    factors = np.float32(grads @ grads.mT)
    bases = np.float32(np.linalg.qr(rng.standard_normal((3, 12, 12)))[0])
    # What a failed decomposition inside would leave.
    broken = factors.copy()
    broken[1] = np.nan
    fine, order = REFRESH(factors, bases, "cholesky_qr")
    kept, kept_order = REFRESH(broken, bases, "cholesky_qr")
    np.testing.assert_array_equal(kept[1], bases[1])
    np.testing.assert_array_equal(kept_order[1], np.arange(12))
    np.testing.assert_array_equal(np.delete(kept, 1, 0), np.delete(fine, 1, 0))
    np.testing.assert_array_equal(np.delete(kept_order, 1, 0), np.delete(order, 1, 0))


def test_a_decomposition_that_fails_gives_the_identity():
    factors = np.stack([np.diag([1.0, 2.0]), np.full((2, 2), np.nan)]).astype(np.float32)
    bases = np.asarray(EIGENBASIS(factors))
    np.testing.assert_array_equal(np.abs(bases), [np.eye(2)[::-1], np.eye(2)])


def test_the_program_for_a_tpu_does_not_grow_with_the_matrix():
    x = jax.ShapeDtypeStruct((1, 2048, 2048), jnp.float32)
    text = EIGENBASIS.trace(x).lower(lowering_platforms=("tpu",)).as_text()
    assert "Eigh" in text and text.count("\n") < 100
