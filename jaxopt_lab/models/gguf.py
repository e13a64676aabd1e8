"""Decoders from GGUF files of the llama architecture, as llama.cpp reads them.

GGUF lists shapes reversed: a matrix read from it is (out, in). llama.cpp turns adjacent pairs of
coordinates in its rotary embedding, so converters reorder the rows of the query and key matrices;
they are put back into the half-split order of `models.attention.rotate`.
"""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.core.keys import path_names
from jaxopt_lab.core.packed import Packed
from jaxopt_lab.models.config import DecoderConfig, DType, check_dtypes
from jaxopt_lab.models.decoder import Params
from jaxopt_lab.models.layout import abstract_params
from jaxopt_lab.report.files import open_gguf

# Tensors that one of our leaves is made of; {} stands for the layer.
_NAMES = {
    ("embedding", "tokens"): ("token_embd",),
    ("head",): ("output",),
    ("final_norm", "scale"): ("output_norm",),
    ("layers", "attention_norm", "scale"): ("blk.{}.attn_norm",),
    ("layers", "attention", "qkv", "kernel"): ("blk.{}.attn_q", "blk.{}.attn_k", "blk.{}.attn_v"),
    ("layers", "attention", "q", "kernel"): ("blk.{}.attn_q",),
    ("layers", "attention", "kv", "kernel"): ("blk.{}.attn_k", "blk.{}.attn_v"),
    ("layers", "attention", "out", "kernel"): ("blk.{}.attn_output",),
    ("layers", "mlp_norm", "scale"): ("blk.{}.ffn_norm",),
    ("layers", "mlp", "up", "kernel"): ("blk.{}.ffn_up",),
    ("layers", "mlp", "gate", "kernel"): ("blk.{}.ffn_gate",),
    ("layers", "mlp", "down", "kernel"): ("blk.{}.ffn_down",),
}
_FLOATS, _PACKED = ("F32", "F16", "BF16"), ("Q4_1", "Q8_0")
# Metadata that changes what the model computes, and the values it has in our decoder.
_FIXED = {
    "rope.scaling.type": (None, "none"),
    "rope.scale_linear": (None, 1.0),
    "expert_count": (None, 0),
    "attention.causal": (None, True),
}


def load_gguf(
    path: str | pathlib.Path, *, packed: bool = False, dtype: DType = "float32"
) -> tuple[DecoderConfig, Params]:
    """Reads a decoder of the llama architecture from a GGUF file.

    Args:
        path: one file, not a part of a split one.
        packed: keep Q4_1 and Q8_0 tensors as they are (`jaxopt_lab.core.packed`), to be unpacked
            layer by layer. Such parameters cannot be trained, but adapters beside them can.
        dtype: of the parameters that are not packed, ``config.param_dtype``. Q4_1 and Q8_0 are
            exact in float32.

    Returns:
        The configuration, which computes in float32, and the parameters. Packed ones have the
        scanned loop: XLA's CPU scheduler would unpack the layers of an unrolled one all at once.

    Raises:
        ModuleNotFoundError: without the package gguf.
        FileNotFoundError: without the file.
        ValueError: not a GGUF file, or a model that the decoder cannot represent. What is wrong
            with its tensors is listed in one message: missing and unknown ones, other shapes and
            types that cannot be read or kept packed.
    """
    reader = open_gguf(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(reader.fields, tensors, packed, dtype)
    check_dtypes(config)
    abstract = abstract_params(config)
    wanted = {name: shape for leaf in _leaves(abstract) for name, shape in _pieces(config, *leaf)}
    problems = [*_wrong_tensors(tensors, wanted, packed), *_mixed_leaves(config, tensors, packed)]
    if problems:
        raise ValueError(f"{path}: " + "\n  ".join(["tensors do not fit the model", *problems]))

    def build(key: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> Any:
        return _to_ours(config, tensors, path_names(key), leaf, packed)

    return config, jax.tree_util.tree_map_with_path(build, abstract)


def gguf_config_of(path: str | pathlib.Path) -> DecoderConfig:
    """The configuration of such a file, unpacked; weights are not read.

    Raises:
        ModuleNotFoundError: without the package gguf.
        FileNotFoundError: without the file.
        ValueError: as for `load_gguf`.
    """
    reader = open_gguf(path)
    return _config(reader.fields, {t.name: t for t in reader.tensors}, False, "float32")


def _config(
    fields: Mapping[str, Any], tensors: Mapping[str, Any], packed: bool, dtype: DType
) -> DecoderConfig:
    def value(name: str, *otherwise: Any) -> Any:
        if name in fields:
            return fields[name].contents()
        if not otherwise:
            raise ValueError(f"{name}: the file does not have it")
        return otherwise[0]

    def expect(name: str, *allowed: Any) -> None:
        got = value(name, allowed[0])
        if got not in allowed:
            wanted = " or ".join(repr(one) for one in allowed if one is not None)
            raise ValueError(f"{name}: got {got!r}, wanted {wanted}")

    if value("general.architecture") != "llama":
        raise ValueError(
            f"general.architecture: got {value('general.architecture')!r}, wanted 'llama'"
        )
    for name, allowed in _FIXED.items():
        expect(f"llama.{name}", *allowed)
    width, heads = value("llama.embedding_length"), value("llama.attention.head_count")
    head_dim = value("llama.attention.key_length", width // heads)
    for name in ("rope.dimension_count", "attention.value_length"):
        expect(f"llama.{name}", head_dim)
    if "token_embd.weight" not in tensors:
        raise ValueError("token_embd.weight: the file does not have this tensor")
    vocab_size = value("llama.vocab_size", int(tensors["token_embd.weight"].shape[-1]))
    entries = "tokenizer.ggml.tokens"
    if entries in fields and len(fields[entries].data) != vocab_size:
        raise ValueError(
            f"{entries}: got {len(fields[entries].data)}, but the model has {vocab_size} tokens"
        )
    return DecoderConfig(
        vocab_size=vocab_size,
        width=width,
        depth=value("llama.block_count"),
        heads=heads,
        head_dim=None if heads * head_dim == width else head_dim,
        kv_heads=value("llama.attention.head_count_kv", heads),
        hidden=value("llama.feed_forward_length"),
        context=value("llama.context_length"),
        tied="output.weight" not in tensors,
        rope_base=_shortest(value("llama.rope.freq_base", 10_000.0)),
        norm_eps=_shortest(value("llama.attention.layer_norm_rms_epsilon")),
        param_dtype=dtype,
        loop="scanned" if packed else "unrolled",
    )


def _shortest(number: float) -> float:
    """The decimal number that a float32 was rounded from: 1e-5, not 9.999999747e-06."""
    return float(str(np.float32(number)))


def _leaves(abstract: Params) -> Iterator[tuple[tuple[str, ...], jax.ShapeDtypeStruct]]:
    for key, leaf in jax.tree_util.tree_leaves_with_path(abstract):
        yield path_names(key), leaf


def _pieces(
    config: DecoderConfig, path: tuple[str, ...], leaf: jax.ShapeDtypeStruct
) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes, (out, in) or (in,), of the tensors of a leaf: layer by layer, in order."""
    names, in_layers = _NAMES[path], path[0] == "layers"
    shape = list(leaf.shape[1:] if in_layers else leaf.shape)
    if len(names) > 1:
        del shape[-2]  # queries, keys and values
    if path[-1] in ("kernel", "head"):
        shape.reverse()
    layers = range(config.depth if in_layers else 1)
    return [(f"{name.format(i)}.weight", tuple(shape)) for i in layers for name in names]


def _wrong_tensors(
    tensors: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]], packed: bool
) -> Iterator[str]:
    for name, shape in wanted.items():
        if name not in tensors:
            yield f"{name}: missing, wanted shape {shape}"
            continue
        found, kind = _shape(tensors[name]), tensors[name].tensor_type.name
        if found != shape:
            yield f"{name}: got shape {found}, wanted {shape}"
        if not _readable(tensors[name]):
            yield f"{name}: got type {kind}, which cannot be read"
        elif packed and kind not in (*_FLOATS, *_PACKED):
            yield f"{name}: got type {kind}, but only {_choice(_PACKED)} can stay packed"
    for name in tensors.keys() - wanted.keys():
        yield f"{name}: unknown, of shape {_shape(tensors[name])}"


def _mixed_leaves(config: DecoderConfig, tensors: Mapping[str, Any], packed: bool) -> Iterator[str]:
    """Leaves that cannot be one packed array."""
    for path, leaf in _leaves(abstract_params(config)) if packed else ():
        names = [name for name, _ in _pieces(config, path, leaf) if name in tensors]
        kinds = sorted({tensors[name].tensor_type.name for name in names})
        if len(kinds) > 1 and not set(kinds).issubset(_FLOATS):
            yield f"{', '.join(_NAMES[path])}: got types {', '.join(kinds)}, wanted one to pack"


def _to_ours(
    config: DecoderConfig,
    tensors: Mapping[str, Any],
    path: tuple[str, ...],
    leaf: jax.ShapeDtypeStruct,
    packed: bool,
) -> Any:
    names = [name for name, _ in _pieces(config, path, leaf)]
    keep = packed and tensors[names[0]].tensor_type.name in _PACKED
    pieces = []
    for name in names:
        arrays = _blocks(tensors[name]) if keep else [_floats(tensors[name])]
        heads = {"attn_q.weight": config.heads, "attn_k.weight": config.num_kv_heads}
        count = heads.get(name.rpartition(".")[0].rpartition(".")[2] + ".weight")
        pieces.append([_half_split(x, count) if count else x for x in arrays])
    lead = (config.depth,) if path[0] == "layers" else ()
    lead += (len(_NAMES[path]),) if len(_NAMES[path]) > 1 else ()
    stacks = [np.stack(x).reshape(*lead, *x[0].shape) for x in zip(*pieces, strict=True)]
    # Ours have the inputs in front of queries, keys and values, and of outputs.
    axis = -1 if path[-1] not in ("kernel", "head") else -2 if len(_NAMES[path]) == 1 else -3
    if keep:
        codes, scale, *minimum = map(jnp.asarray, stacks)
        return Packed(codes, scale, minimum[0] if minimum else None, axis=axis)
    return jnp.asarray(np.moveaxis(stacks[0], -1, axis), leaf.dtype)


def _half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix: coordinates 2i, 2i + 1 of each head become i, i + E / 2."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))


def _readable(tensor: Any) -> bool:
    from gguf import GGML_QUANT_SIZES, quants

    block_bytes = GGML_QUANT_SIZES[tensor.tensor_type][1]
    try:
        quants.dequantize(np.zeros((1, block_bytes), np.uint8), tensor.tensor_type)
    except NotImplementedError:
        return False
    return True


def _floats(tensor: Any) -> np.ndarray:
    from gguf import quants

    return quants.dequantize(tensor.data, tensor.tensor_type)


def _blocks(tensor: Any) -> list[np.ndarray]:
    """Codes, scales and, of Q4_1, minima of a tensor: (out, blocks, ...)."""
    four_bits = tensor.tensor_type.name == "Q4_1"
    numbers, code = (2, np.uint8) if four_bits else (1, np.int8)
    size = 2 * numbers + (16 if four_bits else 32)
    blocks = np.ascontiguousarray(tensor.data).reshape(len(tensor.data), -1, size)
    halves = np.ascontiguousarray(blocks[..., : 2 * numbers]).view(np.float16)
    codes = np.ascontiguousarray(blocks[..., 2 * numbers :]).view(code)
    return [codes, *(np.ascontiguousarray(halves[..., i]) for i in range(numbers))]


def _choice(names: tuple[str, ...]) -> str:
    return " and ".join(names)
