"""Split products as accelerators form them, here with the CPU's bfloat16 products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab.core import precision
from jaxopt_lab.core.kronecker import ksl_step
from jaxopt_lab.core.precision import congruence, gram, matmul

# Of float32 products from bfloat16 halves, and of bfloat16 itself, relative to the largest entry.
SPLIT, ROUNDED = 2e-5, 1e-2


@pytest.fixture(autouse=True)
def split(monkeypatch):
    """On a CPU products are not split, and small ones nowhere."""

    def splits(name, dtype, *sides):
        return name == "bf16_x3" and dtype == jnp.float32

    monkeypatch.setattr(precision, "_splits", splits)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(found, wanted, tolerance):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def symmetric_part(x):
    x = np.asarray(x, np.float64)
    return (x + x.mT) / 2


def test_a_split_product_is_not_rounded_to_bfloat16():
    a, b = draw(0, 3, 20, 30), draw(1, 3, 30, 10)
    x, y = jnp.asarray(a), jnp.asarray(b)
    close(matmul(x, y, "bf16_x3"), np.float64(a) @ np.float64(b), SPLIT)
    assert np.abs(matmul(x, y, "bfloat16") - a @ b).max() > 10 * SPLIT * np.abs(a @ b).max()


@pytest.mark.parametrize("transposed", ["a", "b"])
def test_an_operand_in_bfloat16_is_exact(transposed):
    a, b = jnp.asarray(draw(0, 3, 20, 20), jnp.bfloat16), jnp.asarray(draw(1, 3, 20, 20))
    wanted = np.asarray(a, np.float64).mT @ np.asarray(b)
    if transposed == "b":
        close(matmul(b, a, "bf16_x3", transpose_a=True), wanted.mT, SPLIT)
    else:
        close(matmul(a, b, "bf16_x3", transpose_a=True), wanted, SPLIT)


def test_a_rounded_product_is_what_the_next_one_uses():
    a, b, c = (jnp.asarray(draw(seed, 2, 16, 16)) for seed in range(3))
    rounded = matmul(a, b, "bfloat16", rounded=True)
    usual = matmul(a, b, "bfloat16")
    assert (rounded.dtype, usual.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(rounded, usual.astype(jnp.bfloat16))
    wanted = matmul(usual, c, "bfloat16")
    np.testing.assert_array_equal(matmul(rounded, c, "bfloat16"), wanted)
    assert matmul(a, b, rounded=True).dtype == jnp.float32


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", [(2, 24, 40), (2, 40, 24), (24, 24)])
def test_symmetric_parts_have_the_accuracy_of_the_name(shape, transpose):
    g = draw(0, *shape)
    turned = np.float64(g.mT if transpose else g)
    root = draw(1, *shape[:-2], turned.shape[-1], turned.shape[-1])
    x = root @ root.mT
    g = jnp.asarray(g)
    for found, wanted in (
        (gram(g, "bf16_x3", transpose=transpose), turned @ turned.mT),
        (
            congruence(g, jnp.asarray(x), "bf16_x3", transpose=transpose),
            turned @ x @ turned.mT,
        ),
    ):
        close(symmetric_part(found), wanted, SPLIT)
        close(found, wanted, ROUNDED)
        assert np.abs(found - wanted).max() > SPLIT * np.abs(wanted).max(), "the skew part"


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_skew_parts_do_not_build_up(shape):
    """Two hundred steps on factors that are never made symmetric."""
    m, n = shape
    grads = draw(0, 200, m, n)
    with jax.enable_x64(True):
        exact = _follow(jnp.asarray(grads, jnp.float64), "highest")
    split = _follow(jnp.asarray(grads), "bf16_x3")
    for found, wanted in zip(split, exact, strict=True):
        close(symmetric_part(found), wanted, 5 * SPLIT)
        close(found, wanted, ROUNDED)


def _follow(grads, name):
    def step(factors, grad):
        return ksl_step(*factors, grad, decay=0.95, weight=0.05, precision=name), None

    m, n = grads.shape[1:]
    start = (jnp.eye(m, dtype=grads.dtype) / m**0.5, jnp.eye(n, dtype=grads.dtype) / n**0.5)
    return jax.jit(lambda start, grads: jax.lax.scan(step, start, grads)[0])(start, grads)
