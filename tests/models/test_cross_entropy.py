import dataclasses

import jax
import numpy as np
import pytest

from jaxopt_lab.core.matrices import MatrixAxes
from jaxopt_lab.models import loss
from jaxopt_lab.zeroth_order import LowRankSide
from tests.models import decoders
from tests.models.decoders import (
    jit,
    largest_difference,
    logits,
    loss_and_gradient,
    tokens,
    varied_params,
)

LLAMA = dataclasses.replace(decoders.LLAMA, depth=1)
UNTIED = dataclasses.replace(decoders.GPT2_BIASED, depth=1)
BATCH = {"tokens": tokens(LLAMA, length=13), "mask": np.tile([1, 1, 0], (2, 4))}


def test_loss_is_the_mean_over_valid_positions_with_z_loss():
    params = varied_params(LLAMA)
    (value, aux), _ = loss_and_gradient(LLAMA, params, BATCH, z_loss=0.1)
    scores = np.asarray(logits(LLAMA, params, BATCH["tokens"][:, :-1]), np.float64)
    normaliser = np.log(np.exp(scores).sum(-1))
    targets = np.take_along_axis(scores, BATCH["tokens"][:, 1:, None], -1)[..., 0]
    nats = np.average(normaliser - targets, weights=BATCH["mask"])
    squared = np.average(normaliser**2, weights=BATCH["mask"])
    np.testing.assert_allclose(aux["cross_entropy"], nats, rtol=1e-6)
    np.testing.assert_allclose(value, nats + 0.1 * squared, rtol=1e-6)
    assert aux["tokens"] == 16


def test_no_valid_position_gives_zero_and_not_nan():
    batch = BATCH | {"mask": np.zeros((2, 12))}
    (value, aux), gradient = loss_and_gradient(LLAMA, varied_params(LLAMA), batch)
    assert value == 0
    assert aux["tokens"] == 0
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(gradient))


def test_chunks_change_neither_loss_nor_gradient():
    params = varied_params(UNTIED)
    plain = loss_and_gradient(UNTIED, params, BATCH, z_loss=0.1)
    chunked = loss_and_gradient(UNTIED, params, BATCH, z_loss=0.1, head_chunks=4)
    assert largest_difference(plain, chunked) < 2e-6


def test_chunks_agree_in_float64_with_a_tied_head():
    with jax.enable_x64(True):
        config = dataclasses.replace(LLAMA, compute_dtype="float64", param_dtype="float64")
        params = varied_params(config)
        plain = loss_and_gradient(config, params, BATCH, z_loss=0.1)
        chunked = loss_and_gradient(config, params, BATCH, z_loss=0.1, head_chunks=4)
        assert largest_difference(plain, chunked) < 1e-14


def test_chunks_never_hold_all_logits():
    config = dataclasses.replace(LLAMA, vocab_size=4096)
    params = varied_params(config)
    batch = {"tokens": tokens(config, batch=16, length=13)}
    logits_bytes = 16 * 12 * 4096 * 4

    def temp_bytes(chunks):
        lowered = loss_and_gradient.lower(config, params, batch, head_chunks=chunks)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temp_bytes(6) < temp_bytes(1) - logits_bytes / 2


def test_cotangent_scales_the_chunked_gradient():
    def scaled(params, chunks):
        return -3.0 * loss(LLAMA, params, BATCH, head_chunks=chunks)[0]

    params = varied_params(LLAMA)
    plain, chunked = (jit(jax.grad(scaled), static_argnums=1)(params, c) for c in (1, 3))
    assert largest_difference(plain, chunked) < 2e-6


def test_chunks_differentiate_what_stands_beside_a_tied_head():
    params, rng = jax.tree.map(jax.numpy.asarray, varied_params(LLAMA)), np.random.default_rng(0)
    shape = params["embedding"]["tokens"].shape
    factors = [rng.normal(size=(n, 2)).astype("float32") for n in shape]

    def value(factors, chunks):
        table = LowRankSide(*factors, shape, MatrixAxes((), (0,), (1,)))
        return loss(
            LLAMA, params, BATCH, head_chunks=chunks, side={"embedding": {"tokens": table}}
        )[0]

    whole, pieces = (jit(jax.grad(value), static_argnums=1)(factors, n) for n in (1, 4))
    for a, b in zip(whole, pieces, strict=True):
        assert abs(a).max() > 1e-2
        np.testing.assert_allclose(b, a, atol=1e-5)


def test_misfits_are_named():
    params = varied_params(LLAMA)
    with pytest.raises(ValueError, match="head_chunks: got 5, wanted a divisor of 12 positions"):
        loss(LLAMA, params, BATCH, head_chunks=5)
    with pytest.raises(ValueError, match=r"mask: got shape \(2, 13\), wanted \(2, 12\)"):
        loss(LLAMA, params, BATCH | {"mask": np.ones((2, 13))})
