"""Decoders as Hugging Face directories: config.json and model.safetensors.

Learned positions become a GPT2LMHeadModel, rotary ones a LlamaForCausalLM. Arrays are moved, split
and transposed, never computed with, so export followed by load is bitwise. The directory also
records our own configuration (a key that Hugging Face ignores), for the fields that their format
has no place for.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.flax import load_file, save_file

from jaxopt_lab.models.config import DecoderConfig, check_dtypes
from jaxopt_lab.models.decoder import Params
from jaxopt_lab.models.encoder_config import EncoderConfig, ModelConfig
from jaxopt_lab.models.huggingface_bert import bert_names
from jaxopt_lab.models.huggingface_config import from_huggingface_config, to_huggingface_config
from jaxopt_lab.models.layout import abstract_params

_OUR_KEY = "jaxopt_lab"
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


class _Linear(NamedTuple):
    """A linear layer: Hugging Face names of its pieces and whether theirs are (out, in)."""

    names: tuple[str, ...]
    transposed: bool


_GPT2_LINEAR = {
    ("attention", "qkv"): _Linear(("attn.c_attn",), False),
    ("attention", "out"): _Linear(("attn.c_proj",), False),
    ("mlp", "up"): _Linear(("mlp.c_fc",), False),
    ("mlp", "down"): _Linear(("mlp.c_proj",), False),
}
_LLAMA_LINEAR = {
    ("attention", "qkv"): _Linear(tuple(f"self_attn.{p}_proj" for p in "qkv"), True),
    ("attention", "q"): _Linear(("self_attn.q_proj",), True),
    ("attention", "kv"): _Linear(tuple(f"self_attn.{p}_proj" for p in "kv"), True),
    ("attention", "out"): _Linear(("self_attn.o_proj",), True),
    ("mlp", "up"): _Linear(("mlp.up_proj",), True),
    ("mlp", "gate"): _Linear(("mlp.gate_proj",), True),
    ("mlp", "down"): _Linear(("mlp.down_proj",), True),
}
_GPT2_NAMES = {
    "layers": "transformer.h",
    "attention_norm": "ln_1",
    "mlp_norm": "ln_2",
    "final_norm": "transformer.ln_f",
    "tokens": "transformer.wte.weight",
    "positions": "transformer.wpe.weight",
}
_LLAMA_NAMES = {
    "layers": "model.layers",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "final_norm": "model.norm",
    "tokens": "model.embed_tokens.weight",
}


def export_huggingface(
    config: DecoderConfig,
    params: Params,
    directory: str | pathlib.Path,
    tokenizer_file: str | pathlib.Path | None = None,
) -> None:
    """Writes a directory that ``transformers.AutoModelForCausalLM`` loads.

    A GPT-2 without biases is written with zero biases, which the architecture always has.

    Args:
        config: of the decoder.
        params: as from `init_params`; every array must be addressable from this process.
        directory: created if need be; must not hold a model yet. The files are written to
            ``<directory>.partial`` first.
        tokenizer_file: a ``tokenizer.json`` to put beside the weights.

    Raises:
        ValueError: for a decoder that neither architecture can represent; names the field.
        FileExistsError: when the directory already holds a model.
    """
    theirs = to_huggingface_config(config)
    theirs[_OUR_KEY] = dataclasses.asdict(config)
    directory = pathlib.Path(directory)
    for path in (directory / _WEIGHTS, directory / _CONFIG):
        if path.exists():
            raise FileExistsError(f"directory: {path} already exists, wanted a new directory")
    tensors = {}
    for path, leaf in _leaves(abstract_params(_with_their_biases(config))):
        array = _get(params, path)
        array = np.zeros(leaf.shape, leaf.dtype) if array is None else np.asarray(array)
        tensors.update(_to_theirs(config, path, array))
    with _appearing_whole(directory) as partial:
        weights = {name: jnp.asarray(tensor) for name, tensor in tensors.items()}
        save_file(weights, partial / _WEIGHTS, {"format": "pt"})
        if tokenizer_file is not None:
            shutil.copyfile(tokenizer_file, partial / "tokenizer.json")
            tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast"}
            (partial / "tokenizer_config.json").write_text(json.dumps(tokenizer_config) + "\n")
        (partial / _CONFIG).write_text(json.dumps(theirs, indent=2) + "\n")


def matrix_names(config: ModelConfig) -> dict[str, Any]:
    """Hugging Face module names of the matrices of each kernel of the layers.

    In the order of the kernel's batch axes: for a fused projection (L, d, 3, d) the queries, keys
    and values of layer 0, then those of layer 1. A GPT-2 has one module for all three, whose name
    stands three times, unless ``fused_qkv_as="one"``.

    >>> from jaxopt_lab.models import PRESETS
    >>> names = matrix_names(PRESETS["llama-124m"])["layers"]["attention"]["qkv"]["kernel"]
    >>> names[1]
    'model.layers.0.self_attn.k_proj'
    """
    tree: dict[str, Any] = {"layers": {}}
    for path, leaf in _leaves(abstract_params(config)):
        if path[0] != "layers" or path[-1] != "kernel":
            continue
        if isinstance(config, EncoderConfig):
            names = bert_names(path)
        else:
            names, _ = _names(config, path)
        matrices = math.prod(leaf.shape[2:-1]) if config.fused_qkv_as == "three" else 1
        each = names if len(names) == matrices else names * matrices
        modules = [name.removesuffix(".weight") for name in each]
        found = tuple(module.format(i) for i in range(config.depth) for module in modules)
        tree["layers"].setdefault(path[1], {})[path[2]] = {"kernel": found}
    return tree


@contextlib.contextmanager
def _appearing_whole(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory beside it to write into, whose files are moved at the end of the block.

    Nobody can load a model without its `config.json`, which comes last where the directory exists.
    """
    directory = directory.resolve()
    partial = directory.with_name(f"{directory.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)  # one that was interrupted is written again
    yield partial
    if not directory.exists():
        partial.rename(directory)
        return
    for path in sorted(partial.iterdir(), key=lambda path: path.name == _CONFIG):
        path.replace(directory / path.name)
    partial.rmdir()


def load_huggingface(directory: str | pathlib.Path) -> tuple[DecoderConfig, Params]:
    """Reads a GPT2LMHeadModel or LlamaForCausalLM directory, ours or another's.

    Args:
        directory: with ``config.json`` and one ``model.safetensors``.

    Returns:
        The configuration and the parameters, in ``config.param_dtype``.

    Raises:
        FileNotFoundError: when one of the files is missing.
        ValueError: for an architecture, field or tensor that the decoder cannot represent.
    """
    directory = pathlib.Path(directory)
    config = huggingface_config_of(directory)
    check_dtypes(config)
    if not (directory / "model.safetensors").exists():
        raise FileNotFoundError(f"{directory}: no model.safetensors (one file, not a sharded set)")
    tensors = load_file(directory / "model.safetensors")
    params: Params = {}
    for path, leaf in _leaves(abstract_params(_with_their_biases(config))):
        array = _to_ours(config, path, leaf, tensors)
        if config.bias or not _is_bias(path):
            node = params
            for name in path[:-1]:
                node = node.setdefault(name, {})
            node[path[-1]] = array
        elif np.any(np.asarray(array)):
            raise ValueError(f"{'.'.join(path)}: got a nonzero bias, wanted none with bias = False")
    return config, params


def huggingface_config_of(directory: str | pathlib.Path) -> DecoderConfig:
    """The configuration of such a directory; weights are not read.

    Raises:
        FileNotFoundError: when there is no ``config.json``.
        ValueError: for an architecture or field that the decoder cannot represent.
    """
    theirs = json.loads((pathlib.Path(directory) / "config.json").read_text())
    ours = theirs.get(_OUR_KEY)
    return from_huggingface_config(theirs) if ours is None else DecoderConfig(**ours)


def _with_their_biases(config: DecoderConfig) -> DecoderConfig:
    """The decoder whose parameters are all tensors of the architecture."""
    if config.positions == "learned":
        return dataclasses.replace(config, bias=True)
    return config


def _is_bias(path: tuple[str, ...]) -> bool:
    return path[-1] == "bias"


def _names(config: DecoderConfig, path: tuple[str, ...]) -> tuple[tuple[str, ...], bool]:
    """Their names of one of our leaves (``{}`` stands for the layer) and whether transposed."""
    gpt2 = config.positions == "learned"
    names = _GPT2_NAMES if gpt2 else _LLAMA_NAMES
    kind = "bias" if _is_bias(path) else "weight"
    match path:
        case ("embedding", table):
            return (names[table],), False
        case ("head",):
            return ("lm_head.weight",), True
        case ("final_norm", _):
            return (f"{names['final_norm']}.{kind}",), False
        case ("layers", ("attention_norm" | "mlp_norm") as norm, _):
            return (f"{names['layers']}.{{}}.{names[norm]}.{kind}",), False
        case ("layers", sublayer, linear, _):
            entry = (_GPT2_LINEAR if gpt2 else _LLAMA_LINEAR)[sublayer, linear]
            pieces = tuple(f"{names['layers']}.{{}}.{piece}.{kind}" for piece in entry.names)
            return pieces, entry.transposed and not _is_bias(path)
    raise AssertionError(f"unknown parameter {path}")


def _to_theirs(
    config: DecoderConfig, path: tuple[str, ...], array: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    names, transposed = _names(config, path)
    layers = array if path[0] == "layers" else array[None]
    for i, layer in enumerate(layers):
        # The axis of query, key and value is the last but one, in kernels and biases alike.
        if len(names) > 1:
            pieces = [np.take(layer, j, axis=-2) for j in range(len(names))]
        else:
            rows = layer.shape[:1] if layer.ndim > 1 and not _is_bias(path) else ()
            pieces = [layer.reshape(*rows, -1)]
        for name, piece in zip(names, pieces, strict=True):
            yield name.format(i), np.ascontiguousarray(piece.T if transposed else piece)


def _to_ours(
    config: DecoderConfig,
    path: tuple[str, ...],
    leaf: jax.ShapeDtypeStruct,
    tensors: Mapping[str, jax.Array],
) -> jax.Array:
    names, transposed = _names(config, path)
    stacked = path[0] == "layers"
    shape = leaf.shape[1:] if stacked else leaf.shape
    layers = []
    for i in range(config.depth if stacked else 1):
        pieces = [_find(tensors, name.format(i)) for name in names]
        pieces = [np.asarray(piece.T if transposed else piece) for piece in pieces]
        layer = np.stack(pieces, axis=-2) if len(names) > 1 else pieces[0]
        if layer.size != np.prod(shape):
            raise ValueError(
                f"{', '.join(n.format(i) for n in names)}: got {layer.size} values, wanted "
                f"{'.'.join(path)} of shape {shape}"
            )
        layers.append(layer.reshape(shape))
    return jnp.asarray(np.stack(layers) if stacked else layers[0], leaf.dtype)


def _find(tensors: Mapping[str, jax.Array], name: str) -> jax.Array:
    # The original GPT-2 checkpoints were saved without the prefix of the language-model class.
    for candidate in (name, name.removeprefix("transformer.")):
        if candidate in tensors:
            return tensors[candidate]
    raise ValueError(f"model.safetensors: no tensor {name}")


def _leaves(tree: Params, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, node in tree.items():
        if isinstance(node, dict):
            yield from _leaves(node, (*path, name))
        else:
            yield (*path, name), node


def _get(tree: Params, path: tuple[str, ...]) -> Any:
    node: Any = tree
    for name in path:
        node = None if node is None else node.get(name)
    return node
