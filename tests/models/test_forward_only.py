"""The forward-only loss: the value of `loss`, in pieces of the vocabulary and casts by layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab.models import loss, probe_loss
from tests.models.decoders import GPT2_BIASED, LLAMA, STYLES, jit, tokens, varied_params


@functools.partial(jit, static_argnums=(0, 3))
def both(config, params, batch, chunk):
    return probe_loss(config, batch, vocabulary_chunk=chunk)(params), loss(config, params, batch)[0]


@pytest.mark.parametrize("style", STYLES)
def test_the_value_of_the_loss(style):
    # 64 tokens in two pieces, six in a last one; then all in one.
    loop = "scanned" if style in ("llama", "gpt2-biased") else "unrolled"
    config = dataclasses.replace(STYLES[style], vocab_size=70, loop=loop)
    batch = {"tokens": tokens(config, length=13), "mask": np.tile([1, 1, 0], (2, 4))}
    params = varied_params(config)
    for chunk in (32, 96):
        found, wanted = both(config, params, batch, chunk)
        np.testing.assert_allclose(found, wanted, rtol=2e-6)


def test_float64_and_documents():
    with jax.enable_x64(True):
        config = dataclasses.replace(
            LLAMA, compute_dtype="float64", param_dtype="float64", document_mask=True
        )
        segments = np.array([[0] * 5 + [1] * 7] * 2)
        batch = {"tokens": tokens(config, length=13), "segment_ids": segments}
        params = varied_params(config)
        found, wanted = both(config, params, batch, 32)
        np.testing.assert_allclose(found, wanted, rtol=1e-14)
        assert (
            abs(found - both(config, params, batch | {"segment_ids": 0 * segments}, 32)[0]) > 1e-6
        )


def test_large_logits_and_no_valid_position():
    # exp of these logits overflows, and the largest one is in the last piece.
    params = varied_params(LLAMA)
    params["embedding"]["tokens"] = 200 * params["embedding"]["tokens"]
    params["embedding"]["tokens"][-1] *= 3
    batch = {"tokens": tokens(LLAMA, length=13)}
    found, wanted = both(LLAMA, params, batch, 32)
    assert wanted > 100
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert both(LLAMA, params, batch | {"mask": np.zeros((2, 12))}, 32)[0] == 0


def test_bfloat16_is_cast_layer_by_layer():
    config = dataclasses.replace(
        LLAMA, width=64, depth=16, heads=4, hidden=256, compute_dtype="bfloat16", loop="scanned"
    )
    params = varied_params(config)
    batch = {"tokens": tokens(config, batch=1, length=9)}
    found = jax.jit(lambda p: probe_loss(config, batch)(p)).lower(params).compile()
    stacks = sum(x.nbytes for x in jax.tree.leaves(params["layers"]))
    assert found.memory_analysis().temp_size_in_bytes < 0.25 * stacks
    np.testing.assert_allclose(found(params), loss(config, params, batch)[0], rtol=0.02)


def test_bad_input():
    batch = {"tokens": jnp.zeros((1, 9), int)}
    for chunk in (0, 100, 32.0, True):
        with pytest.raises(ValueError, match="vocabulary_chunk: got .*, wanted a multiple of 32"):
            probe_loss(LLAMA, batch, vocabulary_chunk=chunk)
    with pytest.raises(ValueError, match="wanted at most context = 12"):
        probe_loss(LLAMA, {"tokens": jnp.zeros((1, 20), int)})
    with pytest.raises(ValueError, match=r"mask: got shape \(2,\)"):
        probe_loss(GPT2_BIASED, batch | {"mask": np.ones(2)})
