import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from jaxopt_lab.core.newton_schulz import COEFFICIENTS, newton_schulz


def with_singular_values(values, m, n, seed=0):
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.standard_normal((m, m)))
    v, _ = np.linalg.qr(rng.standard_normal((n, n)))
    k = min(m, n)
    return u[:, :k] @ np.diag(values) @ v[:, :k].T, u[:, :k] @ v[:, :k].T


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_maps_singular_values_by_the_polynomial_and_keeps_the_vectors(shape):
    m, n = shape
    values = np.geomspace(0.05, 1.0, min(m, n))
    with jax.enable_x64(True):
        x, _ = with_singular_values(values, m, n)
        for name, table in COEFFICIENTS.items():
            y = np.asarray(newton_schulz(jnp.asarray(x), steps=3, coefficients=name))
            s = values / (table.norm_factor * np.linalg.norm(values))
            for a, b, c in table.steps[:3] if len(table.steps) > 1 else table.steps * 3:
                s = a * s + b * s**3 + c * s**5
            expected, _ = with_singular_values(s, m, n)
            np.testing.assert_allclose(y, expected, atol=1e-12)


def test_quintic_ends_in_its_documented_interval():
    with jax.enable_x64(True):
        x, _ = with_singular_values(np.geomspace(0.02, 1.0, 12), 12, 16)
        s = np.linalg.svd(np.asarray(newton_schulz(jnp.asarray(x))), compute_uv=False)
    assert 0.68 < s.min() and s.max() < 1.14


@pytest.mark.parametrize(
    ("name", "steps", "error"), [("polar_express", 8, 1e-6), ("you_jiacheng", 12, 0.05)]
)
def test_better_coefficients_reach_the_polar_factor(name, steps, error):
    with jax.enable_x64(True):
        x, polar = with_singular_values(np.geomspace(0.01, 1.0, 8), 8, 10)
        y = newton_schulz(jnp.asarray(x), steps=steps, coefficients=name)
    assert np.abs(np.asarray(y) - polar).max() < error


def test_five_steps_of_polar_express_beat_the_quintic():
    with jax.enable_x64(True):
        x, polar = with_singular_values(np.geomspace(0.003, 1.0, 16), 16, 16)
        errors = {
            name: np.abs(np.asarray(newton_schulz(jnp.asarray(x), coefficients=name)) - polar).max()
            for name in ("quintic", "polar_express")
        }
    assert errors["polar_express"] < 0.6 * errors["quintic"]


@given(st.integers(0, 2**31), st.sampled_from(["bfloat16", "float32"]))
def test_batch_equals_single_and_transposition_commutes(seed, dtype):
    x = jax.random.normal(jax.random.key(seed), (2, 5, 8))
    y = newton_schulz(x, compute_dtype=dtype)
    assert y.dtype == dtype
    tolerance = 0.1 if dtype == "bfloat16" else 1e-4
    one = newton_schulz(x[1], compute_dtype=dtype)
    np.testing.assert_allclose(y[1].astype("float32"), one.astype("float32"), atol=tolerance)
    turned = newton_schulz(x.mT, compute_dtype=dtype).mT
    np.testing.assert_allclose(y.astype("float32"), turned.astype("float32"), atol=tolerance)


def test_zero_and_empty_matrices_stay():
    for shape in [(3, 4), (0, 4), (2, 0, 0), (0, 3, 3)]:
        y = newton_schulz(jnp.zeros(shape), compute_dtype="bfloat16")
        assert y.shape == shape and not np.isnan(y.astype("float32")).any() and not y.any()


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e6, 1e18])
def test_float16_takes_any_scale(scale):
    x = jax.random.normal(jax.random.key(0), (5, 8))
    y = newton_schulz(scale * x, compute_dtype="float16").astype("float32")
    np.testing.assert_allclose(y, newton_schulz(x), atol=0.02)


def test_products_accumulate_wider_than_bfloat16():
    # 4096 equal terms: a bfloat16 accumulator stops growing after 256 of them.
    x = jnp.ones((2, 4096), jnp.bfloat16).at[1].set(-1)
    y = newton_schulz(x, steps=1).astype(jnp.float32)
    with jax.enable_x64(True):
        exact = newton_schulz(x.astype(jnp.float64), steps=1)
    np.testing.assert_allclose(y, exact, rtol=2e-2)
