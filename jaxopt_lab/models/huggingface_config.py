"""Translation between `DecoderConfig` and the fields of a Hugging Face config.json."""

from collections.abc import Mapping
from typing import Any

from jaxopt_lab.models.config import DecoderConfig

ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Classes of the families that are read, by model_type."""

_GPT2_READ = {
    "vocab_size": "vocab_size",
    "width": "n_embd",
    "depth": "n_layer",
    "heads": "n_head",
    "context": "n_positions",
}
_LLAMA_READ = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "context": "max_position_embeddings",
}
# What has another default in each class, so that its absence says nothing.
_NEEDED = {
    "mistral": ("num_key_value_heads", "sliding_window"),
    "qwen2": ("num_key_value_heads",),
    "qwen3": ("num_key_value_heads", "head_dim"),
}
_READ_AS_WELL = {
    "gpt2": {"n_inner", "layer_norm_epsilon"},
    "llama": {
        *("num_key_value_heads", "head_dim", "rms_norm_eps", "attention_bias", "mlp_bias"),
        *("rope_theta", "rope_scaling", "rope_parameters", "layer_types"),
    },
}
# What changes the logits, and the values that our decoder has.
_FIXED = {
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
    },
    "llama": {
        "hidden_act": ("silu",),
        "partial_rotary_factor": (1.0, None),
        "rope_interleaved": (False,),
        "use_sliding_window": (False,),
    },
    "all": {
        "is_encoder_decoder": (False,),
        "add_cross_attention": (False,),
        "quantization_config": (None,),
        "pruned_heads": ({}, None),
    },
}
# What does not: provenance, tokens of the vocabulary, dropout in training, generation, other heads.
_INERT = frozenset(
    "architectures attention_dropout attn_implementation attn_pdrop auto_map bad_words_ids "
    "begin_suppress_tokens bos_token_id chunk_size_feed_forward decoder_start_token_id "
    "diversity_penalty do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size "
    "eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id "
    "forced_eos_token_id gradient_checkpointing id2label initializer_range is_decoder "
    "is_llama_config jaxopt_lab label2id length_penalty max_length max_window_layers min_length "
    "model_type n_ctx no_repeat_ngram_size num_beam_groups num_beams num_return_sequences "
    "output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp "
    "problem_type remove_invalid_values repetition_penalty resid_pdrop return_dict "
    "return_dict_in_generate sep_token_id sliding_window summary_activation "
    "summary_first_dropout summary_proj_to_labels summary_type summary_use_proj suppress_tokens "
    "task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings "
    "tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config "
    "transformers_version typical_p use_bfloat16 use_cache".split()
)
_ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def to_huggingface_config(config: DecoderConfig) -> dict[str, Any]:
    """Fields of a GPT2Config, LlamaConfig, Qwen2Config or Qwen3Config.

    Raises:
        ValueError: for a decoder that the architecture cannot represent; names the field.
    """
    if config.positions == "learned":
        equal = {"num_kv_heads": config.heads, "head_width": config.width // config.heads}
        _demand(config, "gpt2", norm="layer", mlp="gelu", qkv_bias=False, **equal)
        return _gpt2(config) | _common(config, "gpt2")
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    others = {"qwen3": {"bias": False, "qkv_bias": False}, "qwen2": {"bias": False}}
    _demand(config, kind, norm="rms", mlp="swiglu", **others.get(kind, {}))
    return _llama(config) | _common(config, kind)


def from_huggingface_config(fields: Mapping[str, Any]) -> DecoderConfig:
    """Reads the configuration of one of the families, every field of it.

    Dropout rates are passed over: the decoder has none.

    Raises:
        ValueError: for another architecture, a missing field, one that the decoder has no
            counterpart of, or unknown ones.
    """
    kind = fields.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"model_type: got {kind!r}, wanted one of {', '.join(ARCHITECTURES)}")
    style = "gpt2" if kind == "gpt2" else "llama"
    read = _GPT2_READ if kind == "gpt2" else _LLAMA_READ
    needed = (*read.values(), *_NEEDED.get(kind, ()))
    if missing := [name for name in needed if name not in fields]:
        raise ValueError(f"config.json: no {', '.join(missing)}")
    fixed = _FIXED[style] | _FIXED["all"]
    for name, allowed in fixed.items():
        expect(fields, name, *allowed)
    known = {*needed, *_READ_AS_WELL[style], *fixed, *_INERT}
    if unknown := [name for name in fields if name not in known and not name.startswith("_")]:
        each = ", ".join(f"{name} = {fields[name]!r}" for name in unknown)
        raise ValueError(
            f"config.json: unknown {each}; remove what does not change the logits of the model"
        )
    sizes: dict[str, Any] = {ours: fields[name] for ours, name in read.items()}
    return _from_gpt2(fields, sizes) if kind == "gpt2" else _from_llama(fields, sizes)


def differences(one: DecoderConfig, other: DecoderConfig) -> dict[str, tuple[Any, Any]]:
    """Fields in which two decoders differ for Hugging Face, but for the dtype."""
    first, second = (to_huggingface_config(config) for config in (one, other))
    names = [name for name in first if name != "torch_dtype" and first[name] != second.get(name)]
    return {name: (first[name], second.get(name)) for name in names}


def _common(config: DecoderConfig, kind: str) -> dict[str, Any]:
    return {
        "model_type": kind,
        "architectures": [ARCHITECTURES[kind]],
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
        "torch_dtype": config.param_dtype,
        # The defaults of the classes are ids of their original vocabularies.
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _gpt2(config: DecoderConfig) -> dict[str, Any]:
    return {
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
    scaling = None
    if config.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **dict(zip(_ROPE_KEYS, config.rope_scaling, strict=True))}
        scaling[_ROPE_KEYS[-1]] = int(scaling[_ROPE_KEYS[-1]])
    return {
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
        "rope_scaling": scaling,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
    }


def _from_gpt2(fields: Mapping[str, Any], sizes: Mapping[str, Any]) -> DecoderConfig:
    return DecoderConfig(
        **sizes,
        hidden=fields.get("n_inner"),
        positions="learned",
        norm="layer",
        mlp="gelu",
        tied=fields.get("tie_word_embeddings", True),
        bias=True,
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
    )


def _from_llama(fields: Mapping[str, Any], sizes: Mapping[str, Any]) -> DecoderConfig:
    bias, kind = fields.get("attention_bias", False), fields["model_type"]
    width, heads = sizes["width"], sizes["heads"]
    expect({"mlp_bias": False, **fields}, "mlp_bias", bias)
    if "use_sliding_window" not in fields:  # where it stands, it was checked to be false
        expect(fields, "sliding_window", None)
    if others := set(fields.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"layer_types: got {', '.join(sorted(others))}, wanted full_attention")
    head_dim = fields.get("head_dim")
    base, scaling = _rope(fields)
    return DecoderConfig(
        **sizes,
        head_dim=None if width % heads == 0 and head_dim == width // heads else head_dim,
        kv_heads=fields.get("num_key_value_heads"),
        tied=fields.get("tie_word_embeddings", False),
        bias=bias,
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        rope_base=base,
        rope_scaling=scaling,
        norm_eps=fields.get("rms_norm_eps", 1e-6),
    )


def _rope(fields: Mapping[str, Any]) -> tuple[float, tuple[float, ...] | None]:
    """Base and scaling of the wavelengths; newer files have both in one section."""
    rope = {"rope_theta": fields.get("rope_theta", 10_000.0)}
    rope |= fields.get("rope_parameters") or {}
    rope |= fields.get("rope_scaling") or {}
    base = rope.pop("rope_theta")
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    expect(rope, "partial_rotary_factor", 1.0)
    rope.pop("partial_rotary_factor", None)
    if kind == "default" and not rope:
        return base, None
    if kind != "llama3" or set(rope) != set(_ROPE_KEYS):
        wanted = f"default alone, or llama3 with {', '.join(_ROPE_KEYS)}"
        raise ValueError(f"rope_scaling: got rope_type {kind!r} with {rope}, wanted {wanted}")
    return base, tuple(float(rope[name]) for name in _ROPE_KEYS)


def _demand(config: DecoderConfig, kind: str, **wanted: Any) -> None:
    names = {"num_kv_heads": "kv_heads", "head_width": "head_dim"}
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{names.get(name, name)}: got {getattr(config, name)!r}, but "
                f"{ARCHITECTURES[kind]} needs {value!r}"
            )


def expect(fields: Mapping[str, Any], name: str, *allowed: Any) -> None:
    """Checks one field, which may be absent.

    Raises:
        ValueError: it has a value that is not allowed.
    """
    value = fields.get(name, allowed[0])
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, wanted {' or '.join(map(repr, allowed))}")
