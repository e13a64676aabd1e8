"""Translation between `DecoderConfig` and the fields of a Hugging Face config.json."""

from collections.abc import Mapping
from typing import Any

from jaxopt_lab.models.config import DecoderConfig


def to_huggingface_config(config: DecoderConfig) -> dict[str, Any]:
    """Fields of a GPT2Config or LlamaConfig.

    Raises:
        ValueError: for a decoder that the architecture cannot represent; names the field.
    """
    if config.positions == "learned":
        _demand(config, "GPT2LMHeadModel", norm="layer", mlp="gelu", num_kv_heads=config.heads)
        return _gpt2(config) | _common(config, "GPT2LMHeadModel")
    _demand(config, "LlamaForCausalLM", norm="rms", mlp="swiglu")
    return _llama(config) | _common(config, "LlamaForCausalLM")


def from_huggingface_config(fields: Mapping[str, Any]) -> DecoderConfig:
    """Reads a GPT2Config or LlamaConfig.

    Raises:
        ValueError: for another architecture, or a field the decoder has no counterpart of.
    """
    kind = fields.get("model_type")
    if kind == "gpt2":
        return _from_gpt2(fields)
    if kind == "llama":
        return _from_llama(fields)
    raise ValueError(f"model_type: got {kind!r}, wanted 'gpt2' or 'llama'")


def _common(config: DecoderConfig, architecture: str) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        "torch_dtype": config.param_dtype,
        # The defaults of the classes are ids of their original vocabularies.
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _gpt2(config: DecoderConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_embd": config.width,
        "n_layer": config.depth,
        "n_head": config.heads,
        "n_inner": config.hidden_width,
        "n_positions": config.context,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def _llama(config: DecoderConfig) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.hidden_width,
        "max_position_embeddings": config.context,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
    }


def _from_gpt2(fields: Mapping[str, Any]) -> DecoderConfig:
    expect(fields, "activation_function", "gelu_new", "gelu_pytorch_tanh")
    for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        expect(fields, name, False)
    return DecoderConfig(
        vocab_size=fields["vocab_size"],
        width=fields["n_embd"],
        depth=fields["n_layer"],
        heads=fields["n_head"],
        hidden=fields.get("n_inner"),
        context=fields["n_positions"],
        positions="learned",
        norm="layer",
        mlp="gelu",
        tied=fields.get("tie_word_embeddings", True),
        bias=True,
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
    )


def _from_llama(fields: Mapping[str, Any]) -> DecoderConfig:
    bias = fields.get("attention_bias", False)
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    rope = fields.get("rope_parameters") or {}
    expect(fields, "hidden_act", "silu")
    expect(fields, "mlp_bias", bias)
    expect(fields, "rope_scaling", None)
    expect(rope, "rope_type", "default")
    expect({"head_dim": fields.get("head_dim") or width // heads}, "head_dim", width // heads)
    return DecoderConfig(
        vocab_size=fields["vocab_size"],
        width=width,
        depth=fields["num_hidden_layers"],
        heads=heads,
        kv_heads=fields.get("num_key_value_heads"),
        hidden=fields["intermediate_size"],
        context=fields["max_position_embeddings"],
        tied=fields.get("tie_word_embeddings", False),
        bias=bias,
        rope_base=rope.get("rope_theta", fields.get("rope_theta", 10_000.0)),
        norm_eps=fields.get("rms_norm_eps", 1e-6),
    )


def _demand(config: DecoderConfig, architecture: str, **wanted: Any) -> None:
    for name, value in wanted.items():
        if getattr(config, name) != value:
            field = name.removeprefix("num_")
            raise ValueError(
                f"{field}: got {getattr(config, name)!r}, but {architecture} needs {value!r}"
            )


def expect(fields: Mapping[str, Any], name: str, *allowed: Any) -> None:
    """Checks one field, which may be absent.

    Raises:
        ValueError: it has a value that is not allowed.
    """
    value = fields.get(name, allowed[0])
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, wanted {' or '.join(map(repr, allowed))}")
