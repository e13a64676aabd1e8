"""Both orthogonalisers: agreement, and orthogonality for whatever float32 may bring."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from jaxopt_lab.core.orthogonalization import ORTHOGONALIZERS, orthonormal, refresh_eigenbasis
from tests.examples import examples

SIZE = 12
# One column a panel gives several blocks of panels; 5 does not divide the size; 12 is all of it.
PANELS = [1, 5, 12]
ORTHOGONALITY = 1e-5

seeds = st.integers(0, 2**32 - 1)
panels = st.sampled_from(PANELS)
COMPILED = {
    panel: jax.jit(functools.partial(orthonormal, method="cholesky_qr", panel=panel))
    for panel in PANELS
}
REFRESHED = {
    name: jax.jit(functools.partial(refresh_eigenbasis, orthogonalizer=name))
    for name in ORTHOGONALIZERS
}


def distance_from_orthogonal(q):
    q = np.asarray(q, np.float64)
    assert np.isfinite(q).all()
    return np.abs(q.mT @ q - np.eye(q.shape[-1])).max()


def orthogonal(rng, size=SIZE):
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


@st.composite
def hard_matrices(draw):
    """Any spectrum down to 1e-12, of any rank, with repeated, tiny and zero columns."""
    rng = np.random.default_rng(draw(seeds))
    values = np.geomspace(1, 10.0 ** -draw(st.floats(0, 12)), SIZE)
    values[draw(st.integers(0, SIZE)) :] = 0
    x = orthogonal(rng) * values @ orthogonal(rng)
    change = draw(st.sampled_from(["none", "duplicate", "zero_columns", "scales", "equal"]))
    if change == "duplicate":
        x[:, rng.integers(0, SIZE, 6)] = x[:, rng.integers(0, SIZE, 6)]
    elif change == "zero_columns":
        x[:, rng.random(SIZE) < 0.5] = 0
    elif change == "scales":
        x *= 10.0 ** rng.integers(-18, 19, SIZE)
    elif change == "equal":
        x[:] = x[:, :1]
    return (x * 10.0 ** draw(st.integers(-12, 12))).astype(np.float32)


def aligned(q, reference):
    """The columns of `q` with the signs of the reference's."""
    return q * np.sign(np.sum(q * reference, axis=-2, keepdims=True))


@pytest.mark.parametrize(
    ("panel", "dtype"), [*((panel, np.float32) for panel in PANELS), (5, np.float64)]
)
def test_methods_agree_up_to_column_signs(panel, dtype):
    rng = np.random.default_rng(0)
    x = orthogonal(rng) * np.geomspace(1, 1e-3, SIZE) @ orthogonal(rng)
    with jax.enable_x64(dtype == np.float64):
        x = jnp.asarray(x, dtype)
        panelled, householder = COMPILED[panel](x), orthonormal(x, "householder")
        assert panelled.dtype == householder.dtype == dtype
        panelled, householder = np.asarray(panelled), np.asarray(householder)
    tolerance = 1e3 * 10 * np.finfo(dtype).eps  # condition times rounding
    np.testing.assert_allclose(aligned(panelled, householder), householder, atol=tolerance)


@examples(400)
@given(hard_matrices(), panels)
def test_panels_are_orthogonal_for_any_input(x, panel):
    q = np.asarray(COMPILED[panel](x), np.float64)
    assert np.isfinite(q).all()
    # Nothing can be made of a column of zeros, and of more zeros than that nothing certain: what
    # cancels exactly leaves no rounding noise to go on with.
    if np.abs(x).max(axis=0).min() > np.finfo(np.float32).tiny and panel > 1:
        assert distance_from_orthogonal(q) <= ORTHOGONALITY


@given(seeds, panels, st.integers(1, SIZE), st.floats(0.1, 0.9))
def test_columns_of_zeros_stay_zero_and_the_others_are_orthonormal(seed, panel, rank, share):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((SIZE, rank)) @ rng.standard_normal((rank, SIZE))
    zeros = rng.random(SIZE) < share
    x[:, zeros] = 0
    q = np.asarray(COMPILED[panel](np.float32(x)), np.float64)
    np.testing.assert_array_equal(q[:, zeros], 0)
    # In panels of one column a dependent column may cancel exactly as well.
    if panel > 1:
        np.testing.assert_allclose(q.T @ q, np.diag(~zeros), atol=ORTHOGONALITY)


@examples(200)
@given(seeds, panels, st.floats(0, 5), st.booleans())
def test_independent_columns_become_orthogonal_and_keep_their_spans(seed, panel, decades, scaled):
    rng = np.random.default_rng(seed)
    x = orthogonal(rng) * np.geomspace(1, 10.0**-decades, SIZE) @ orthogonal(rng)
    scales = 10.0 ** rng.integers(-18, 19, SIZE) if scaled else 1.0
    q = np.asarray(COMPILED[panel](np.float32(x * scales)), np.float64)
    assert distance_from_orthogonal(q) <= ORTHOGONALITY
    wanted = np.linalg.qr(x)[0]
    for k in (1, 4, 9):
        projectors = [y[:, :k] @ y[:, :k].T for y in (q, wanted)]
        tolerance = 2e-6 * np.linalg.cond(x[:, :k])
        np.testing.assert_allclose(*projectors, atol=tolerance)


@given(hard_matrices(), panels)
def test_orthonormal_columns_keep_what_they_are_before_dependent_ones(x, panel):
    x = x.copy()
    x[:, :5] = orthogonal(np.random.default_rng(0))[:, :5]
    q = np.asarray(COMPILED[panel](x))
    np.testing.assert_allclose(aligned(q, x)[:, :5], x[:, :5], atol=1e-5)


@st.composite
def factors_with_basis(draw):
    """A semidefinite factor and any previous basis: related, unrelated, or the identity."""
    rng = np.random.default_rng(draw(seeds))
    q = orthogonal(rng)
    kind = draw(st.sampled_from(["spectrum", "rank", "gram", "zero", "zero_rows", "tie"]))
    values = np.geomspace(1, 10.0 ** -draw(st.floats(0, 12)), SIZE)
    if kind == "rank":
        values[draw(st.integers(1, SIZE)) :] = 0
    elif kind == "tie":
        values[:] = 1
    elif kind == "zero":
        values[:] = 0
    factor = q * values @ q.T
    if kind in ("gram", "zero_rows"):
        grad = rng.standard_normal((SIZE, draw(st.integers(1, SIZE))))
        if kind == "zero_rows":
            grad[rng.random(SIZE) < 0.6] = 0
        factor = grad @ grad.T
    basis = {
        "own": q,
        "shuffled": q[:, rng.permutation(SIZE)],
        "near": np.linalg.qr(q + 1e-3 * rng.standard_normal(q.shape))[0],
        "other": orthogonal(rng),
        "identity": np.eye(SIZE),
    }[draw(st.sampled_from(["own", "shuffled", "near", "other", "identity"]))]
    factor = factor * 10.0 ** draw(st.integers(-18, 18))
    return np.float32((factor + factor.T) / 2), np.float32(basis)


@pytest.mark.parametrize("name", ORTHOGONALIZERS)
@examples(200)
@given(factors_with_basis())
def test_a_refreshed_basis_is_orthogonal(name, case):
    factor, basis = case
    _, refreshed, order = REFRESHED[name](factor, basis)
    assert distance_from_orthogonal(refreshed) <= ORTHOGONALITY
    assert sorted(np.asarray(order).tolist()) == list(range(SIZE))


@examples(200)
@given(factors_with_basis(), panels)
def test_what_a_refresh_orthogonalises_becomes_orthogonal_in_any_panels(case, panel):
    factor, basis = case
    size = np.linalg.norm(factor.astype(np.float64))
    image = (factor @ basis) / size if size > 0 else np.zeros_like(basis)
    image = np.float32(image) + 8 * np.finfo(np.float32).eps * basis
    assert distance_from_orthogonal(COMPILED[panel](image)) <= ORTHOGONALITY


@given(factors_with_basis())
def test_thirty_refreshes_in_a_row_stay_orthogonal(case):
    factor, basis = case
    for _ in range(30):
        _, basis, _ = REFRESHED["cholesky_qr"](factor, basis)
    assert distance_from_orthogonal(basis) <= ORTHOGONALITY


def test_a_refresh_of_several_full_panels():
    """The panel width of production: 160 columns are two panels."""
    rng = np.random.default_rng(0)
    size = 160
    related, unrelated = orthogonal(rng, size), orthogonal(rng, size)
    spectra = {
        "condition 1e12": np.geomspace(1, 1e-12, size),
        "rank 7": np.where(np.arange(size) < 7, 1.0, 0.0),
        "rank 1": np.where(np.arange(size) < 1, 1.0, 0.0),
        "zero": np.zeros(size),
    }
    for basis in (related, unrelated, np.eye(size)):
        factors = [related * values @ related.T for values in spectra.values()]
        bases = np.broadcast_to(basis, (len(factors), size, size))
        _, refreshed, _ = REFRESHED["cholesky_qr"](np.float32(np.stack(factors)), np.float32(bases))
        for name, q in zip(spectra, np.asarray(refreshed), strict=True):
            assert distance_from_orthogonal(q) <= ORTHOGONALITY, name


@pytest.mark.slow
def test_low_rank_and_an_unrelated_basis_at_full_size():
    """Several blocks of panels, and almost every column lost in the first pass."""
    rng = np.random.default_rng(0)
    size = 900
    basis, unrelated = orthogonal(rng, size), orthogonal(rng, size)
    for rank in (1, 7, 40):
        factor = np.float32(basis[:, :rank] @ basis[:, :rank].T)
        for start in (unrelated, np.eye(size)):
            _, refreshed, _ = REFRESHED["cholesky_qr"](factor, np.float32(start))
            assert distance_from_orthogonal(refreshed) <= ORTHOGONALITY


def test_stacks_are_treated_one_by_one():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, SIZE, SIZE)).astype(np.float32)
    together = np.asarray(COMPILED[12](x))
    for index in np.ndindex(2, 3):
        np.testing.assert_allclose(together[index], COMPILED[12](x[index]), atol=1e-6)


@pytest.mark.parametrize("size", [1, 2])
def test_tiny_matrices(size):
    x = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32)
    assert distance_from_orthogonal(COMPILED[12](x)) <= ORTHOGONALITY


def test_a_matrix_that_is_not_finite_does_not_end_the_passes_of_others():
    """Dependent columns need further passes, which the whole stack decides about."""
    rng = np.random.default_rng(0)
    hard = np.float32(orthogonal(rng) * np.geomspace(1, 1e-7, SIZE) @ orthogonal(rng))
    stack = np.stack([hard, np.full_like(hard, np.nan)])
    for panel in PANELS:
        assert distance_from_orthogonal(COMPILED[panel](hard)) <= ORTHOGONALITY
        assert distance_from_orthogonal(COMPILED[panel](stack)[0]) <= ORTHOGONALITY
