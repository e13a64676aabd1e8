"""BERT encoders from Hugging Face directories: config.json and model.safetensors."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from jaxopt_lab.core.keys import path_names
from jaxopt_lab.models.encoder import Params
from jaxopt_lab.models.encoder_config import EncoderConfig
from jaxopt_lab.models.huggingface_config import expect
from jaxopt_lab.models.huggingface_tensors import (
    Place,
    check_tensors,
    read_tensors,
    shapes,
    stacked,
)
from jaxopt_lab.models.layout import abstract_params
from jaxopt_lab.report.storage import staged

_CONFIG, _POOLING = "config.json", "1_Pooling/config.json"
_TABLES = {
    "tokens": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
}
_MODULES = {
    ("attention", "qkv"): tuple(f"attention.self.{name}" for name in ("query", "key", "value")),
    ("attention", "out"): ("attention.output.dense",),
    ("attention_norm",): ("attention.output.LayerNorm",),
    ("mlp", "up"): ("intermediate.dense",),
    ("mlp", "down"): ("output.dense",),
    ("mlp_norm",): ("output.LayerNorm",),
}
# Heads of the pretraining, and the numbers of the positions, which some versions wrote.
_UNREAD = ("pooler.", "cls.", "embeddings.position_ids")
# The original checkpoints name the parameters of norms so.
_OLD = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


def load_bert(directory: str | pathlib.Path) -> tuple[EncoderConfig, Params]:
    """Reads a BERT directory, such as that of all-MiniLM-L6-v2.

    The pooler and the heads of the pretraining are not read: `jaxopt_lab.models.encoder.with_head`
    adds a fresh head.

    Args:
        directory: with ``config.json`` and ``model.safetensors`` or its shards, names with or
            without ``bert.``; ``1_Pooling/config.json`` of a sentence encoder says what is pooled,
            without it the mean is.

    Returns:
        The configuration, dropout rates among it, and the parameters in float32.

    Raises:
        FileNotFoundError: when one of the files is missing.
        ValueError: for another architecture, a field that the encoder has no counterpart of, or
            tensors that are missing, unknown, or of another shape or kind: one error lists all.
    """
    directory = pathlib.Path(staged(directory))
    config = bert_config_of(directory)
    tensors = {_plain(name): tensor for name, tensor in read_tensors(directory).items()}
    abstract = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    leaves = [(path_names(p), leaf, _place(path_names(p))) for p, leaf in abstract]
    wanted = {name: shape for each in leaves for name, shape in shapes(*each).items()}
    check_tensors(directory, tensors, wanted, _UNREAD)
    params: Params = {}
    for names, leaf, place in leaves:
        node = params
        for name in names[:-1]:
            node = node.setdefault(name, {})
        node[names[-1]] = stacked(names, leaf, place, tensors)
    return config, params


def bert_config_of(directory: str | pathlib.Path) -> EncoderConfig:
    """The configuration of such a directory; weights are not read.

    Raises:
        FileNotFoundError: when there is no ``config.json``.
        ValueError: as for `load_bert`.
    """
    directory = pathlib.Path(staged(directory))
    return from_bert_config(json.loads((directory / _CONFIG).read_text()), _pooling(directory))


def from_bert_config(fields: Mapping[str, Any], pooling: Any = "mean") -> EncoderConfig:
    """Reads a BertConfig.

    Args:
        fields: of its config.json.
        pooling: as `EncoderConfig` has it.

    Raises:
        ValueError: for another architecture, a missing field, or one that the encoder has no
            counterpart of.
    """
    expect({"model_type": None, **fields}, "model_type", "bert")
    expect(fields, "position_embedding_type", "absolute")
    expect(fields, "is_decoder", False)
    expect({"hidden_act": "gelu", **fields}, "hidden_act", *_ACTIVATIONS)
    theirs = {
        "vocab_size": "vocab_size",
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "hidden": "intermediate_size",
        "context": "max_position_embeddings",
        "types": "type_vocab_size",
    }
    missing = [name for name in theirs.values() if name not in fields]
    if missing:
        raise ValueError(f"{_CONFIG}: no {', '.join(missing)}")
    return EncoderConfig(
        **{ours: fields[name] for ours, name in theirs.items()},
        activation=_ACTIVATIONS[fields.get("hidden_act", "gelu")],  # type: ignore[arg-type]
        pooling=pooling,
        dropout=fields.get("hidden_dropout_prob", 0.1),
        attention_dropout=fields.get("attention_probs_dropout_prob", 0.1),
        norm_eps=fields.get("layer_norm_eps", 1e-12),
    )


def bert_names(path: tuple[str, ...]) -> tuple[str, ...]:
    """Hugging Face names of the tensors of one leaf; ``{}`` stands for the layer.

    >>> bert_names(("layers", "mlp", "up", "kernel"))
    ('encoder.layer.{}.intermediate.dense.weight',)
    """
    kind = "bias" if path[-1] == "bias" else "weight"
    if path[0] == "layers":
        modules = tuple(f"encoder.layer.{{}}.{name}" for name in _MODULES[path[1:-1]])
    else:
        modules = (_TABLES.get(path[1], "embeddings.LayerNorm"),)
    return tuple(f"{module}.{kind}" for module in modules)


def _pooling(directory: pathlib.Path) -> str:
    path = directory / _POOLING
    if not path.exists():
        return "mean"
    fields = json.loads(path.read_text())
    modes = [n for n, value in fields.items() if n.startswith("pooling_mode_") and value is True]
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise ValueError(f"{path}: got {', '.join(modes)}, wanted one of {', '.join(_POOLINGS)}")
    return _POOLINGS[modes[0]]


def _plain(name: str) -> str:
    name = name.removeprefix("bert.")
    for old, new in _OLD.items():
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return name


def _place(path: tuple[str, ...]) -> Place:
    # Theirs are (out, in), tables apart.
    return Place(bert_names(path), path[0] == "layers" and path[-1] == "kernel")
