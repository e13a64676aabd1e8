"""Parameter trees of public models: path, shape, and what should become of each leaf.

Shapes are small, names and ranks those of the projects. `role` is that of the default routing,
`axes` (reduction, output) what `flax_matrix_axes` or the project's own tree gives; None: no matrix.
`tests/elsewhere` runs the methods inside these projects.
"""

from typing import Any, NamedTuple

import jax
from optax.contrib import MuonDimensionNumbers


class Leaf(NamedTuple):
    """One parameter."""

    shape: tuple[int, ...]
    role: str
    axes: tuple[tuple[int, ...], tuple[int, ...]] | None


def _kernel(*shape: int, role: str = "matrix") -> Leaf:
    return Leaf(shape, role, ((0,), (1,)))


def _other(role: str, *shape: int) -> Leaf:
    return Leaf(shape, role, None)


def _stack(shape: tuple[int, ...], reduction: tuple[int, ...], output: tuple[int, ...]) -> Leaf:
    return Leaf(shape, "unspecified", (reduction, output))


_HEADS_OUT, _HEADS_IN = ((6, 2, 4), (0,), (1, 2)), ((2, 4, 6), (0, 1), (2,))

# google-deepmind/nanodo, model.py: TransformerDo, without biases.
NANODO = {
    "embed/embedding": _other("embedding", 12, 6),
    "pos_embed/embedding": _other("embedding", 8, 6),
    "blocks_0/LayerNorm_0/scale": _other("vector", 6),
    "blocks_0/CausalAttn_0/query/kernel": _stack(*_HEADS_OUT),
    "blocks_0/CausalAttn_0/key/kernel": _stack(*_HEADS_OUT),
    "blocks_0/CausalAttn_0/value/kernel": _stack(*_HEADS_OUT),
    "blocks_0/CausalAttn_0/attn_out_proj/kernel": _stack(*_HEADS_IN),
    "blocks_0/Mlp_0/Dense_0/kernel": _kernel(6, 10),
    "blocks_0/Mlp_0/Dense_1/kernel": _kernel(10, 6),
    "out_ln/scale": _other("vector", 6),
}

# google/flax, examples/gemma: grouped and plain attention.
GEMMA = {
    "embedder/embedding": _other("embedding", 12, 6),
    "layers/0/pre_attention_norm/scale": _other("vector", 6),
    "layers/0/attn/q_einsum/kernel": _stack((2, 6, 4), (1,), (0, 2)),
    "layers/0/attn/kv_einsum/kernel": _stack((2, 1, 6, 4), (2,), (1, 3)),
    "layers/0/attn/attn_vec_einsum/kernel": _stack(*_HEADS_IN),
    "layers/0/attn/_query_norm/scale": _other("vector", 4),
    "layers/1/attn/qkv_einsum/kernel": _stack((3, 2, 6, 4), (2,), (1, 3)),
    "layers/1/attn/attn_vec_einsum/kernel": _stack(*_HEADS_IN),
    "layers/1/mlp/gate_proj/kernel": _kernel(6, 10),
    "layers/1/mlp/up_proj/kernel": _kernel(6, 10),
    "layers/1/mlp/down_proj/kernel": _kernel(10, 6),
    "final_norm/scale": _other("vector", 6),
}

# google/flax, examples/mnist.
MNIST = {
    "conv1/kernel": _stack((3, 3, 2, 4), (0, 1, 2), (3,)),
    "conv1/bias": _other("vector", 4),
    "batch_norm1/scale": _other("vector", 4),
    "batch_norm1/bias": _other("vector", 4),
    "conv2/kernel": _stack((3, 3, 4, 8), (0, 1, 2), (3,)),
    "conv2/bias": _other("vector", 8),
    "linear1/kernel": _kernel(32, 8),
    "linear1/bias": _other("vector", 8),
    "linear2/kernel": _kernel(8, 10),
    "linear2/bias": _other("vector", 10),
}

# nn.MultiHeadDotProductAttention and nnx.MultiHeadAttention, with biases; a scan over five layers.
ATTENTION = {
    "query/kernel": _stack(*_HEADS_OUT),
    "query/bias": _other("vector", 2, 4),
    "key/kernel": _stack(*_HEADS_OUT),
    "key/bias": _other("vector", 2, 4),
    "value/kernel": _stack(*_HEADS_OUT),
    "value/bias": _other("vector", 2, 4),
    "out/kernel": _stack(*_HEADS_IN),
    "out/bias": _other("vector", 6),
}
SCANNED = {
    "layers/attention/query/kernel": _stack((5, 6, 2, 4), (1,), (2, 3)),
    "layers/attention/query/bias": _other("vector", 5, 2, 4),
    "layers/attention/key/kernel": _stack((5, 6, 2, 4), (1,), (2, 3)),
    "layers/attention/value/kernel": _stack((5, 6, 2, 4), (1,), (2, 3)),
    "layers/attention/out/kernel": _stack((5, 2, 4, 6), (1, 2), (3,)),
    "layers/attention/out/bias": _other("vector", 5, 6),
    "layers/norm/scale": _other("vector", 5, 6),
    "layers/mlp/kernel": _stack((5, 6, 8), (1,), (2,)),
    "layers/mlp/bias": _other("vector", 5, 8),
}

# A vision transformer: patches by a convolution called `embedding`, tokens of one row, a head.
VISION = {
    "embedding/kernel": _stack((4, 4, 3, 6), (0, 1, 2), (3,)),
    "embedding/bias": _other("vector", 6),
    "cls": _other("vector", 1, 1, 6),
    "pos_embedding": _other("embedding", 1, 5, 6),
    "encoder/Dense_0/kernel": _kernel(6, 10),
    "audio/Conv_0/kernel": _stack((3, 6, 10), (0, 1), (2,)),
    "head/kernel": _other("head", 6, 10),
    "head/bias": _other("vector", 10),
}
FLAX = {
    "nanodo": NANODO,
    "gemma": GEMMA,
    "mnist": MNIST,
    "attention": ATTENTION,
    "scanned": SCANNED,
    "vision": VISION,
}

# Haiku: `~` for the constructor, slashes in the names of modules.
HAIKU = {
    "embed|embeddings": _other("embedding", 11, 8),
    "layer_norm|scale": _other("vector", 8),
    "layer_norm|offset": _other("vector", 8),
    "multi_head_attention/query|w": _kernel(8, 8),
    "multi_head_attention/query|b": _other("vector", 8),
    "mlp/~/linear_0|w": _kernel(8, 16),
    "mlp/~/head|w": _other("head", 8, 11),
    "lm_head|w": _other("head", 8, 11),
}
# GPT-2 in Equinox, whose linear layers call their weights `weight`.
EQUINOX = {
    "wte|weight": _other("embedding", 12, 6),
    "token_embedding|weight": _other("embedding", 12, 6),
    "wpe": _other("embedding", 8, 6),
    "blocks|0|attention|query_proj|weight": _kernel(6, 6),
    "blocks|0|mlp|layers|0|bias": _other("vector", 10),
    "lm_head|weight": _other("head", 12, 6),
}
# AI-Hypercomputer/maxtext: layers scanned along the second axis, and a dimension-number tree of its
# own, which is given as it is.
MAXTEXT = {
    "params|decoder|decoder_norm|scale": _other("vector", 6),
    "params|decoder|layers|self_attention|query|kernel": _stack((6, 3, 2, 4), (0,), (-2, -1)),
    "params|decoder|layers|self_attention|out|kernel": _stack((2, 3, 4, 6), (0, -2), (-1,)),
    "params|decoder|layers|mlp|wi_0|kernel": _stack((6, 3, 10), (0,), (-1,)),
    "params|decoder|layers|MoeBlock_0|wo": _stack((4, 3, 10, 6), (-2,), (-1,)),
    "params|decoder|layers|pre_self_attention_layer_norm|scale": _other("vector", 6, 3),
    "params|decoder|logits_dense|kernel": _other("head", 6, 12),
    "params|token_embedder|embedding": _other("embedding", 12, 6),
}
OTHERS = {"haiku": HAIKU, "equinox": EQUINOX, "maxtext": MAXTEXT}


def nested(table: dict[str, Leaf], leaf: Any, separator: str = "/") -> dict[str, Any]:
    """The tree of `leaf(entry)` for each entry of a table."""
    tree: dict[str, Any] = {}
    for path, entry in table.items():
        *modules, name = path.split(separator)
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[name] = leaf(entry)
    return tree


def abstract(entry: Leaf) -> jax.ShapeDtypeStruct:
    """The parameter without its numbers."""
    return jax.ShapeDtypeStruct(entry.shape, "float32")


def layout(entry: Leaf) -> MuonDimensionNumbers | None:
    """The layout that is right for the parameter."""
    return entry.axes and MuonDimensionNumbers(*entry.axes)
