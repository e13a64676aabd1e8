import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_lab.core.dual_norms import (
    DUAL_NORMS,
    dual_norm,
    largest_dual,
    matrix_norm,
    pair_of,
)

SHAPES = [(64, 32), (32, 32), (100, 16), (16, 100)]
TOTALS = {"spectral": 96, "sign": 6272, "frobenius": 4}


@pytest.mark.parametrize("pair", DUAL_NORMS)
def test_largest_duals_of_the_reference_shapes(pair):
    assert sum(largest_dual(m, n, pair) for m, n in SHAPES) == TOTALS[pair]


@pytest.mark.parametrize("pair", DUAL_NORMS)
@given(seed=st.integers(0, 1000))
def test_duality(pair, seed):
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        g, x = jnp.asarray(rng.standard_normal((2, 3, 5, 4)))
        inner = jnp.sum(g * x, axis=(-2, -1))
        dual, norm = dual_norm(g, pair), matrix_norm(x, pair)
        assert np.all(inner <= dual * norm * (1 + 1e-12))
        assert np.all(dual_norm(x, pair) <= largest_dual(5, 4, pair) * norm * (1 + 1e-12))


def test_equality_where_all_directions_are_equally_long():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        q = jnp.asarray(np.linalg.qr(rng.standard_normal((6, 4)))[0])
        for pair, x in (("spectral", q), ("sign", jnp.sign(q)), ("frobenius", q)):
            ratio = dual_norm(x, pair) / matrix_norm(x, pair)
            np.testing.assert_allclose(ratio, largest_dual(6, 4, pair), rtol=1e-12)


def test_unknown_pairs_are_named():
    # Not through the functions themselves, whose annotations are enforced in tests.
    with pytest.raises(ValueError, match="'nuclear', wanted one of spectral, sign, frobenius"):
        pair_of("nuclear")
