"""Decoders as Hugging Face directories: config.json and model.safetensors.

Learned positions become a GPT2LMHeadModel; rotary ones a LlamaForCausalLM, with biases on queries,
keys and values a Qwen2ForCausalLM, with their norms a Qwen3ForCausalLM. Arrays are moved, split and
transposed, never computed with, so export followed by load is bitwise. The directory also records
our own configuration (a key that Hugging Face ignores), for the fields that their format has no
place for.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.flax import save_file

from jaxopt_lab.models.config import DecoderConfig, check_dtypes
from jaxopt_lab.models.decoder import Params
from jaxopt_lab.models.encoder_config import EncoderConfig, ModelConfig
from jaxopt_lab.models.huggingface_bert import bert_names
from jaxopt_lab.models.huggingface_config import (
    differences,
    from_huggingface_config,
    to_huggingface_config,
)
from jaxopt_lab.models.huggingface_tensors import (
    WEIGHTS,
    Place,
    check_tensors,
    read_tensors,
    shapes,
    stacked,
)
from jaxopt_lab.models.layout import abstract_params
from jaxopt_lab.report.storage import is_remote, path_of, staged, uploading

_OUR_KEY = "jaxopt_lab"
_CONFIG = "config.json"
# Masks and frequencies that older versions wrote beside the parameters.
_UNREAD = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


_GPT2_MODULES = {
    ("attention", "qkv"): Place(("attn.c_attn",), False),
    ("attention", "out"): Place(("attn.c_proj",), False),
    ("mlp", "up"): Place(("mlp.c_fc",), False),
    ("mlp", "down"): Place(("mlp.c_proj",), False),
}
_LLAMA_MODULES = {
    ("attention", "qkv"): Place(tuple(f"self_attn.{p}_proj" for p in "qkv"), True),
    ("attention", "q"): Place(("self_attn.q_proj",), True),
    ("attention", "kv"): Place(tuple(f"self_attn.{p}_proj" for p in "kv"), True),
    ("attention", "out"): Place(("self_attn.o_proj",), True),
    ("mlp", "up"): Place(("mlp.up_proj",), True),
    ("mlp", "gate"): Place(("mlp.gate_proj",), True),
    ("mlp", "down"): Place(("mlp.down_proj",), True),
    ("attention", "q_norm"): Place(("self_attn.q_norm",), False),
    ("attention", "k_norm"): Place(("self_attn.k_norm",), False),
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
    directory = path_of(directory)
    for path in (directory / WEIGHTS, directory / _CONFIG):
        if path.exists():
            raise FileExistsError(f"directory: {path} already exists, wanted a new directory")
    tensors = {}
    for path, leaf in _leaves(_abstract(config)):
        array = _get(params, path)
        array = np.zeros(leaf.shape, leaf.dtype) if array is None else np.asarray(array)
        tensors.update(_to_theirs(config, path, array))
    with _appearing_whole(directory) as partial:
        weights = {name: jnp.asarray(tensor) for name, tensor in tensors.items()}
        save_file(weights, partial / WEIGHTS, {"format": "pt"})
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
            names = _place(config, path).names
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
    if is_remote(directory):
        with uploading(directory) as local:
            local.mkdir()
            yield local
        return
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
    """Reads a directory of a GPT-2, LLaMA, Mistral, Qwen2 or Qwen3, ours or another's.

    Names, shapes and dtypes of all tensors are checked, and all fields of the configuration.

    Args:
        directory: with ``config.json`` and ``model.safetensors``, or the shards that
            ``model.safetensors.index.json`` lists.

    Returns:
        The configuration and the parameters, in ``config.param_dtype``: float32 for another's.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: for an architecture or field that the decoder has no counterpart of, sliding
            windows among them; for tensors that are missing, unknown, or of another shape or kind:
            one error lists all; for shards that are not those of the index.
    """
    directory = pathlib.Path(staged(directory))
    config = huggingface_config_of(directory)
    check_dtypes(config)
    tensors = read_tensors(directory)
    if config.positions == "learned":
        # The original GPT-2 checkpoints were saved without the prefix of the class.
        tensors = {_prefixed(name): tensor for name, tensor in tensors.items()}
    leaves = [(*each, _place(config, each[0])) for each in _leaves(_abstract(config))]
    wanted = {name: shape for each in leaves for name, shape in shapes(*each).items()}
    check_tensors(directory, tensors, wanted, (*_UNREAD, *(["lm_head"] if config.tied else [])))
    _check_tied(config, tensors)
    params: Params = {}
    for path, leaf, place in leaves:
        array = stacked(path, leaf, place, tensors)
        if _is_ours(config, path):
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
        ValueError: for an architecture or field that the decoder has no counterpart of, or one
            that was changed beside our own configuration.
    """
    theirs = json.loads((pathlib.Path(staged(directory)) / _CONFIG).read_text())
    found, ours = from_huggingface_config(theirs), theirs.get(_OUR_KEY)
    if ours is None:
        return found
    try:
        config = DecoderConfig(**ours)
    except TypeError as error:
        raise ValueError(f"{_CONFIG}: {_OUR_KEY}: {error}") from error
    for name, (wanted, got) in differences(config, found).items():
        raise ValueError(f"{name}: got {got!r}, but the section {_OUR_KEY} says {wanted!r}")
    return config


def _abstract(config: DecoderConfig) -> Params:
    """Shapes of the parameters, with all tensors that the architecture has."""
    if config.positions == "learned":
        config = dataclasses.replace(config, bias=True)
    return abstract_params(config)


def _is_ours(config: DecoderConfig, path: tuple[str, ...]) -> bool:
    """Whether it is no bias that only the architecture has."""
    return config.bias or config.positions != "learned" or path[-1] != "bias"


def _prefixed(name: str) -> str:
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def _check_tied(config: DecoderConfig, tensors: Mapping[str, Any]) -> None:
    """A head beside an embedding that it is tied to may only repeat it."""
    if not config.tied or "lm_head.weight" not in tensors:
        return
    head, table = (
        tensors["lm_head.weight"],
        tensors[_place(config, ("embedding", "tokens")).names[0]],
    )
    if head.shape != table.shape or not np.array_equal(np.asarray(head), np.asarray(table)):
        raise ValueError(
            "lm_head.weight: differs from the embedding, but tie_word_embeddings is true"
        )


def _place(config: DecoderConfig, path: tuple[str, ...]) -> Place:
    """Where one of our leaves is in theirs."""
    gpt2 = config.positions == "learned"
    names = _GPT2_NAMES if gpt2 else _LLAMA_NAMES
    kind = "bias" if path[-1] == "bias" else "weight"
    match path:
        case ("embedding", table):
            return Place((names[table],), False)
        case ("head",):
            return Place(("lm_head.weight",), True)
        case ("final_norm", _):
            return Place((f"{names['final_norm']}.{kind}",), False)
        case ("layers", ("attention_norm" | "mlp_norm") as norm, _):
            return Place((f"{names['layers']}.{{}}.{names[norm]}.{kind}",), False)
        case ("layers", sublayer, module, _):
            pieces, transposed = (_GPT2_MODULES if gpt2 else _LLAMA_MODULES)[sublayer, module]
            pieces = tuple(f"{names['layers']}.{{}}.{piece}.{kind}" for piece in pieces)
            return Place(pieces, transposed and kind == "weight")
    raise AssertionError(f"unknown parameter {path}")


def _to_theirs(
    config: DecoderConfig, path: tuple[str, ...], array: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    names, transposed = _place(config, path)
    layers = array if path[0] == "layers" else array[None]
    for i, layer in enumerate(layers):
        # The axis of query, key and value is the last but one, in kernels and biases alike.
        if len(names) > 1:
            pieces = [np.take(layer, j, axis=-2) for j in range(len(names))]
        else:
            rows = layer.shape[:1] if layer.ndim > 1 and path[-1] != "bias" else ()
            pieces = [layer.reshape(*rows, -1)]
        for name, piece in zip(names, pieces, strict=True):
            yield name.format(i), np.ascontiguousarray(piece.T if transposed else piece)


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
