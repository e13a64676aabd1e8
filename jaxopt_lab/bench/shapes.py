"""Parameter shapes of the named decoders, without building a model.

The optimizer benchmark must run where flax is not installed, so the shapes are written down here
once more; a test compares them with the models themselves.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers

Layout = Literal["stacked", "per-layer"]
LAYOUTS: tuple[Layout, ...] = ("stacked", "per-layer")


@dataclass(frozen=True)
class DecoderShape:
    """What decides the parameter shapes of a decoder with a tied head and no biases."""

    vocab_size: int
    width: int
    depth: int
    hidden: int
    gated: bool = False  # a gate beside the up projection (SwiGLU)
    positions: int | None = None  # rows of a learned position table


SHAPES = {
    "tiny": DecoderShape(4096, 256, 3, 704, gated=True),
    "gpt2-124m": DecoderShape(50_304, 768, 12, 3072, positions=512),
    "llama-124m": DecoderShape(50_304, 768, 12, 2048, gated=True),
    "llama-210m": DecoderShape(50_304, 768, 24, 2048, gated=True),
    "gpt2-355m": DecoderShape(50_304, 1024, 24, 4096, positions=1024),
    "gpt2-720m": DecoderShape(50_304, 2048, 12, 8192, positions=512),
}


def model_shape(model: str) -> DecoderShape:
    """Looks up a named decoder.

    Raises:
      ValueError: If there is none of that name.
    """
    if model not in SHAPES:
        raise ValueError(f"model: {model!r} is not one of {', '.join(SHAPES)}")
    return SHAPES[model]


def abstract_params(model: str, layout: Layout = "stacked") -> dict[str, Any]:
    """Shapes and dtypes of the parameters of a named decoder.

    Args:
      model: Name of the decoder.
      layout: "stacked" keeps the layers in one leaf (L, ...); "per-layer" has a subtree for each.

    >>> abstract_params("tiny")["layers"]["attention"]["qkv"]["kernel"].shape
    (3, 256, 3, 256)
    >>> abstract_params("tiny", "per-layer")["layers"]["2"]["mlp"]["up"]["kernel"].shape
    (256, 704)
    """
    shape = model_shape(model)
    width = shape.width
    embedding = {"tokens": _f32(shape.vocab_size, width)}
    if shape.positions is not None:
        embedding["positions"] = _f32(shape.positions, width)

    def layer(*stack: int) -> dict[str, Any]:
        mlp = {
            "up": {"kernel": _f32(*stack, width, shape.hidden)},
            "down": {"kernel": _f32(*stack, shape.hidden, width)},
        }
        if shape.gated:
            mlp["gate"] = {"kernel": _f32(*stack, width, shape.hidden)}
        return {
            "attention": {
                "qkv": {"kernel": _f32(*stack, width, 3, width)},
                "out": {"kernel": _f32(*stack, width, width)},
            },
            "attention_norm": {"scale": _f32(*stack, width)},
            "mlp": mlp,
            "mlp_norm": {"scale": _f32(*stack, width)},
        }

    stacked = layout == "stacked"
    layers = layer(shape.depth) if stacked else {str(i): layer() for i in range(shape.depth)}
    return {"embedding": embedding, "final_norm": {"scale": _f32(width)}, "layers": layers}


def matrix_axes(
    model: str, layout: Layout = "stacked", *, fused_qkv: bool = False
) -> dict[str, Any]:
    """Which axes of each parameter form a matrix; None for leaves that are none.

    Args:
      model: Name of the decoder.
      layout: As in `abstract_params`.
      fused_qkv: Treat query, key and value as one matrix of three times the width, as the
        released code of most papers does, instead of three.
    """
    batch = 1 if layout == "stacked" else 0

    def axes(path: Any, leaf: jax.ShapeDtypeStruct) -> MuonDimensionNumbers | None:
        names = [entry.key for entry in path]
        if names[-1] == "positions":
            return MuonDimensionNumbers(0, 1)
        if names[-1] != "kernel":
            return None
        if names[-2] == "qkv":
            return MuonDimensionNumbers(batch, (batch + 1, batch + 2) if fused_qkv else batch + 2)
        return MuonDimensionNumbers(batch, batch + 1)

    return jax.tree_util.tree_map_with_path(axes, abstract_params(model, layout))


def _f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
