"""Exported directories against a float64 NumPy model written from the Hugging Face definitions."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxopt_lab.models import export_huggingface, load_huggingface
from tests.models.decoders import (
    GPT2,
    GPT2_BIASED,
    GQA,
    LLAMA,
    STYLES,
    logits,
    tokens,
    varied_params,
)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def causal_attention(q, k, v):
    """q, k, v: (heads, T, head width)."""
    scores = q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1])
    scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
    return softmax(scores) @ v


def split_heads(x, heads):
    return x.reshape(len(x), heads, -1).swapaxes(0, 1)


def merge_heads(x):
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)


def gpt2_logits(config, w, ids):
    def layer_norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        variance = np.square(centred).mean(-1, keepdims=True)
        scaled = centred / np.sqrt(variance + config["layer_norm_epsilon"])
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def conv1d(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: len(ids)]
    for i in range(config["n_layer"]):
        h = f"transformer.h.{i}"
        qkv = np.split(conv1d(layer_norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn"), 3, axis=-1)
        mixed = causal_attention(*(split_heads(p, config["n_head"]) for p in qkv))
        x = x + conv1d(merge_heads(mixed), f"{h}.attn.c_proj")
        y = conv1d(layer_norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + conv1d(y, f"{h}.mlp.c_proj")
    head = w["transformer.wte.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return layer_norm(x, "transformer.ln_f") @ head.T


def llama_logits(config, w, ids):
    def rms_norm(x, name):
        mean_square = np.square(x).mean(-1, keepdims=True)
        return x / np.sqrt(mean_square + config["rms_norm_eps"]) * w[f"{name}.weight"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def rotary(x):  # (heads, T, E): x cos + rotate_half(x) sin
        half = x.shape[-1] // 2
        frequency = config["rope_theta"] ** (-np.arange(half) / half)
        angle = np.concatenate([np.arange(len(ids))[:, None] * frequency] * 2, axis=-1)
        rotated = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
        return x * np.cos(angle) + rotated * np.sin(angle)

    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    x = w["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        h = f"model.layers.{i}"
        y = rms_norm(x, f"{h}.input_layernorm")
        q = rotary(split_heads(linear(y, f"{h}.self_attn.q_proj"), heads))
        k = rotary(split_heads(linear(y, f"{h}.self_attn.k_proj"), kv_heads))
        v = split_heads(linear(y, f"{h}.self_attn.v_proj"), kv_heads)
        k, v = (np.repeat(p, heads // kv_heads, axis=0) for p in (k, v))
        x = x + linear(merge_heads(causal_attention(q, k, v)), f"{h}.self_attn.o_proj")
        y = rms_norm(x, f"{h}.post_attention_layernorm")
        gate = linear(y, f"{h}.mlp.gate_proj")
        gated = gate / (1 + np.exp(-gate)) * linear(y, f"{h}.mlp.up_proj")
        x = x + linear(gated, f"{h}.mlp.down_proj")
    head = w["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return rms_norm(x, "model.norm") @ head.T


@pytest.mark.parametrize("config", STYLES.values(), ids=STYLES)
def test_exported_weights_give_the_same_logits(config, tmp_path):
    params = varied_params(config)
    export_huggingface(config, params, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    weights = {name: array.astype(np.float64) for name, array in tensors.items()}
    assert ("lm_head.weight" in weights) != config.tied
    reference = gpt2_logits if fields["model_type"] == "gpt2" else llama_logits
    ids = tokens(config)
    expected = np.stack([reference(fields, weights, row) for row in ids])
    np.testing.assert_allclose(logits(config, params, ids), expected, atol=5e-6)


@pytest.mark.parametrize(
    "config",
    [*STYLES.values(), dataclasses.replace(GQA, param_dtype="bfloat16", remat="full")],
    ids=[*STYLES, "bfloat16"],
)
def test_round_trip_is_bitwise(config, tmp_path):
    params = varied_params(config)
    export_huggingface(config, params, tmp_path / "new" / "model")
    loaded_config, loaded = load_huggingface(tmp_path / "new" / "model")
    assert loaded_config == config
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(loaded), strict=True):
        assert theirs.dtype == ours.dtype
        np.testing.assert_array_equal(theirs, ours)


@pytest.mark.parametrize("config", [GPT2_BIASED, GQA], ids=["gpt2", "llama"])
def test_directories_of_others_are_read_from_their_own_fields(config, tmp_path):
    params = varied_params(config)
    export_huggingface(config, params, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["jaxopt_lab"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    if config is GPT2_BIASED:  # the original GPT-2 files carry no prefix
        tensors = load_file(tmp_path / "model.safetensors")
        bare = {name.removeprefix("transformer."): array for name, array in tensors.items()}
        save_file(bare, tmp_path / "model.safetensors")
    loaded_config, loaded = load_huggingface(tmp_path)
    assert loaded_config.hidden_width == config.hidden_width
    assert dataclasses.replace(loaded_config, hidden=config.hidden) == config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), loaded, params))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": "learned"}, "norm: got 'rms', but GPT2LMHeadModel needs 'layer'"),
        ({"norm": "layer"}, "norm: got 'layer', but LlamaForCausalLM needs 'rms'"),
        ({"mlp": "gelu"}, "mlp: got 'gelu', but LlamaForCausalLM needs 'swiglu'"),
        (
            {"positions": "learned", "norm": "layer", "mlp": "gelu", "kv_heads": 2},
            "kv_heads: got 2, but GPT2LMHeadModel needs 4",
        ),
    ],
)
def test_what_they_cannot_represent_is_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_huggingface(dataclasses.replace(LLAMA, **change), {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type: got 'mamba', wanted one of gpt2, llama"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', wanted 'silu'"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling: got rope_type 'default' with"),
        ({"head_dim": 32}, r"q_proj.weight \(16, 16\) float32 instead of \(128, 16\)"),
        ({"mlp_bias": True}, "mlp_bias: got True, wanted False"),
        (
            {"intermediate_size": 32},
            r"mlp.down_proj.weight \(16, 24\) float32 instead of \(16, 32\)",
        ),
        ({"num_hidden_layers": 3}, "missing: model.layers.2"),
    ],
)
def test_what_the_decoder_cannot_represent_is_refused(change, message, tmp_path):
    export_huggingface(LLAMA, varied_params(LLAMA), tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text()) | change
    del fields["jaxopt_lab"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        load_huggingface(tmp_path)


def test_nothing_is_overwritten_or_guessed(tmp_path):
    tokenizer = tmp_path / "bpe.json"
    tokenizer.write_text("{}")
    params = varied_params(GPT2)
    export_huggingface(GPT2, params, tmp_path / "a", tokenizer_file=tokenizer)
    assert (tmp_path / "a" / "tokenizer.json").read_text() == "{}"
    with pytest.raises(FileExistsError, match="model.safetensors already exists"):
        export_huggingface(GPT2, params, tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        load_huggingface(tmp_path / "a")


def test_a_bias_is_never_dropped_silently(tmp_path):
    export_huggingface(GPT2_BIASED, varied_params(GPT2_BIASED), tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["jaxopt_lab"]["bias"] = False
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="got a nonzero bias, wanted none with bias = False"):
        load_huggingface(tmp_path)
