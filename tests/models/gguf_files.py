"""GGUF files as llama.cpp's converter and quantiser write them, of small decoders."""

import gguf
import numpy as np

from jaxopt_lab.models import DecoderConfig
from tests.models.decoders import varied_params

# Rows of 32 and 64 numbers: one and two blocks.
CONFIG = DecoderConfig(
    vocab_size=48, width=64, depth=2, heads=4, kv_heads=2, hidden=96, context=12, rope_base=5e4
)


def interleaved(weight, heads):
    """Rows of a query or key matrix in the order of the file, as in convert_hf_to_gguf.py."""
    out, rows_in = weight.shape
    halves = weight.reshape(heads, 2, out // heads // 2, rows_in)
    return halves.swapaxes(1, 2).reshape(out, rows_in)


def tensors(config, params):
    """Name to matrix (out, in) or vector, before quantisation."""
    found = {
        "token_embd": params["embedding"]["tokens"],
        "output_norm": params["final_norm"]["scale"],
    }
    if not config.tied:
        found["output"] = params["head"].T
    layers = params["layers"]
    for i in range(config.depth):
        mixing, mlp = layers["attention"], layers["mlp"]
        if "qkv" in mixing:
            q, k, v = (mixing["qkv"]["kernel"][i, :, j].T for j in range(3))
        else:
            q = mixing["q"]["kernel"][i].T
            k, v = (mixing["kv"]["kernel"][i, :, j].T for j in range(2))
        of_layer = {
            "attn_norm": layers["attention_norm"]["scale"][i],
            "attn_q": interleaved(q, config.heads),
            "attn_k": interleaved(k, config.num_kv_heads),
            "attn_v": v,
            "attn_output": mixing["out"]["kernel"][i].T,
            "ffn_norm": layers["mlp_norm"]["scale"][i],
            **{f"ffn_{name}": mlp[name]["kernel"][i].T for name in ("up", "gate", "down")},
        }
        found |= {f"blk.{i}.{name}": x for name, x in of_layer.items()}
    return {f"{name}.weight": np.ascontiguousarray(x, np.float32) for name, x in found.items()}


def metadata(config):
    return {
        "llama.block_count": config.depth,
        "llama.context_length": config.context,
        "llama.embedding_length": config.width,
        "llama.feed_forward_length": config.hidden_width,
        "llama.attention.head_count": config.heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.rope.freq_base": config.rope_base,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.vocab_size": config.vocab_size,
    }


def write(path, matrices="F32", table="F32", *, config=CONFIG, fields=(), change=lambda t: t):
    """Writes a file and returns the parameters it was made from, before quantisation.

    `matrices` and `table` are the types of matrices of the layers and of embedding and head,
    `fields` is other metadata, `change` a function of the tensors.
    """
    params = varied_params(config)
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {**metadata(config), **dict(fields)}.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    for name, x in change(tensors(config, params)).items():
        in_table = name in ("token_embd.weight", "output.weight")
        kind = "F32" if x.ndim == 1 else table if in_table else matrices
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return params
