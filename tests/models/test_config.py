import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxopt_lab.models import PRESETS, DecoderConfig, apply, init_params, loss, parameter_count
from jaxopt_lab.models.layout import abstract_params, flops_per_token
from tests.models.decoders import GPT2, LLAMA


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 3}, "heads: got 3, wanted a divisor of width = 16"),
        ({"heads": 16}, "heads: got 16, wanted such that the head width is even"),
        ({"head_dim": 0}, "head_dim: got 0, wanted at least 1, or None"),
        ({"head_dim": 3}, "head_dim: got 3, wanted such that the head width is even"),
        ({"qk_norm": True, "norm": "layer"}, "qk_norm: got True, wanted False with norm"),
        ({"rope_scaling": (8, 4, 1, 64)}, "rope_scaling: got .* wanted four: factor >= 1"),
        ({"rope_scaling": (8, 1, 4)}, "rope_scaling: got .* wanted four: factor >= 1"),
        ({"kv_heads": 3}, "kv_heads: got 3, wanted a divisor of heads = 4"),
        ({"kv_heads": 0}, "kv_heads: got 0, wanted a divisor of heads = 4"),
        ({"context": 0}, "context: got 0, wanted at least 1"),
        ({"vocab_size": -1}, "vocab_size: got -1, wanted at least 1"),
        ({"hidden": 0}, "hidden: got 0, wanted at least 1"),
        ({"norm_eps": 0.0}, "norm_eps: got 0.0, wanted greater than 0"),
        ({"positions": "alibi"}, "positions: got 'alibi', wanted one of rope, learned"),
        ({"mlp": "relu"}, "mlp: got 'relu', wanted one of swiglu, gelu"),
        ({"remat": "some"}, "remat: got 'some', wanted one of none, full, dots"),
        ({"compute_dtype": "int8"}, "compute_dtype: got 'int8', wanted one of float32"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LLAMA, **fields)


def test_float64_needs_x64():
    with pytest.raises(ValueError, match="param_dtype: got float64, which needs jax_enable_x64"):
        init_params(dataclasses.replace(LLAMA, param_dtype="float64"), jax.random.key(0))


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["rope", "learned"])
def test_sequences_beyond_the_context_are_refused(config):
    params = abstract_params(config)
    with pytest.raises(ValueError, match="got 13 positions, wanted at most context = 12"):
        jax.eval_shape(lambda p: apply(config, p, jnp.zeros((1, 13), int)), params)


def test_segment_ids_come_exactly_with_the_document_mask():
    params = abstract_params(LLAMA)
    ids = jnp.zeros((1, 4), int)
    masked = dataclasses.replace(LLAMA, document_mask=True)
    with pytest.raises(ValueError, match="segment_ids: got none, but they are required"):
        apply(masked, params, ids)
    with pytest.raises(ValueError, match="segment_ids: .* not allowed with document_mask = False"):
        apply(LLAMA, params, ids, ids)
    with pytest.raises(ValueError, match="segment_ids: got shape .1, 3., wanted .1, 4."):
        apply(masked, params, ids, ids[:, 1:])
    with pytest.raises(ValueError, match="batch: no segment_ids"):
        loss(masked, params, {"tokens": ids})


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("gpt2-124m", 123.98),  # 50304 x 768 + 512 x 768 + 12 (12 x 768^2 + 2 x 768) + 768
        ("llama-124m", 123.59),
        ("llama-210m", 208.54),
        ("gpt2-355m", 354.60),
        ("gpt2-720m", 708.10),
    ],
)
def test_presets_have_their_published_size(name, millions):
    assert parameter_count(PRESETS[name]) / 1e6 == pytest.approx(millions, abs=0.01)


def test_tiny_is_a_llama_of_a_few_million_parameters():
    tiny = PRESETS["tiny"]
    assert tiny.vocab_size == 4096
    assert (tiny.positions, tiny.norm, tiny.mlp) == ("rope", "rms", "swiglu")
    assert 3e6 < parameter_count(tiny) < 5e6


def test_parameter_count_counts_what_is_created():
    config = dataclasses.replace(GPT2, bias=True, tied=False)
    created = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert parameter_count(config) == sum(leaf.size for leaf in jax.tree.leaves(created))


def test_flops_count_each_product_once():
    untied = DecoderConfig(vocab_size=7, width=4, depth=3, heads=1, hidden=5, tied=False, context=9)
    products = 7 * 4 + 3 * (4 * 4 * 4 + 3 * 4 * 5)
    norms = 4 * (2 * 3 + 1)
    assert flops_per_token(untied) == 6 * (products + norms) + 12 * 3 * 4 * 9
    tied = dataclasses.replace(untied, tied=True)
    assert flops_per_token(tied) == flops_per_token(untied)
    assert flops_per_token(tied, context=1) == 6 * (products + norms) + 12 * 3 * 4
