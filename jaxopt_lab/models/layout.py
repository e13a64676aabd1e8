"""What each parameter is: role, matrix axes, logical axes, placement on a mesh, counts.

All of it is read from the metadata that the layers attach to their parameters, so a new kind of
parameter is described in one place. Every tree has the structure of the parameters.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from flax import nnx
from jax.sharding import Mesh
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab.models.config import DecoderConfig
from jaxopt_lab.models.decoder import abstract_decoder
from jaxopt_lab.models.encoder import abstract_encoder
from jaxopt_lab.models.encoder_config import ModelConfig
from jaxopt_lab.models.sharding import DEFAULT_RULES, Placement, spec_for


def abstract_params(config: ModelConfig) -> dict[str, Any]:
    """Shapes and dtypes of the parameters (`jax.ShapeDtypeStruct`)."""
    return _map(config, lambda leaf, axes: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))


def roles(config: ModelConfig) -> dict[str, Any]:
    """Role of each parameter: embedding, head, position, norm, bias or matrix.

    >>> from jaxopt_lab.models import PRESETS
    >>> roles(PRESETS["llama-124m"])["embedding"]
    {'tokens': 'embedding'}
    """
    return _map(config, lambda leaf, axes: leaf.role)


def matrix_axes(
    config: ModelConfig, *, position_embedding: Literal["matrix", "adamw"] = "matrix"
) -> dict[str, Any]:
    """Which axes of each parameter form a matrix; None where a matrix optimizer has no business.

    The layer axis, and with ``config.fused_qkv_as == "three"`` the axis of query, key and value,
    are batch axes, so each slice is a matrix of its own. With "one" the output axis spans all of
    them, as when the released code of most papers sees a fused projection.

    Args:
        config: of the model.
        position_embedding: whether a learned position table counts as a matrix, as in the
            released LionMuon code, or goes to the fallback.

    Returns:
        A tree of `optax.contrib.MuonDimensionNumbers` or None.

    >>> from jaxopt_lab.models import PRESETS
    >>> matrix_axes(PRESETS["llama-124m"])["layers"]["attention"]["qkv"]["kernel"]
    MuonDimensionNumbers(reduction_axis=1, output_axis=3)
    """

    def describe(leaf: nnx.Variable, axes: tuple[str | None, ...]) -> MuonDimensionNumbers | None:
        if leaf.role == "position" and position_embedding == "matrix":
            return MuonDimensionNumbers(0, 1)
        if leaf.role != "matrix":
            return None
        fused = len(axes) == 4 and config.fused_qkv_as == "one"
        return MuonDimensionNumbers(1, (2, 3) if fused else len(axes) - 1)

    return _map(config, describe)


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """Name of each axis of each parameter, as the sharding rules know them.

    >>> from jaxopt_lab.models import PRESETS
    >>> logical_axes(PRESETS["llama-124m"])["layers"]["mlp"]["down"]["kernel"]
    ('layer', 'hidden', 'embed')
    """
    return _map(config, lambda leaf, axes: axes)


def partition_specs(
    config: ModelConfig, mesh: Mesh | Placement | Mapping[str, int]
) -> dict[str, Any]:
    """PartitionSpec of each parameter on a mesh with axes among data, fsdp and tensor.

    Args:
        config: of the model.
        mesh: the mesh, with its rules or with the default ones, or the size of each of its axes. A
            mesh axis that does not divide the parameter axis is dropped; heads are never cut.

    >>> from jaxopt_lab.models import PRESETS
    >>> specs = partition_specs(PRESETS["llama-124m"], {"data": 2, "fsdp": 4, "tensor": 2})
    >>> tuple(specs["layers"]["mlp"]["down"]["kernel"])
    (None, 'tensor', 'fsdp')
    """
    rules = mesh.rules if isinstance(mesh, Placement) else DEFAULT_RULES
    mesh = mesh.mesh if isinstance(mesh, Placement) else mesh
    sizes = mesh if isinstance(mesh, Mapping) else dict(mesh.shape)
    heads: dict[str | None, int] = {"heads": config.heads}
    if isinstance(config, DecoderConfig):
        heads["kv_heads"] = config.num_kv_heads

    def place(leaf: nnx.Variable, axes: tuple[str | None, ...]) -> jax.sharding.PartitionSpec:
        counts = tuple(heads.get(name, n) for name, n in zip(axes, leaf.shape, strict=True))
        return spec_for(axes, counts, sizes, rules)

    return _map(config, place)


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters, a tied embedding counted once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


def flops_per_token(config: ModelConfig, context: int | None = None) -> float:
    """FLOPs of one training step per token, 6 N + 12 L p T, p the width of all heads together.

    N counts the parameters that multiply activations: all but tables of positions and of tokens,
    unless the latter is the head as well. Each costs 2 FLOPs forward and 4 backward. The second
    term is the attention products over T positions, without a discount for causality (the
    convention of Chowdhery et al., "PaLM", arXiv 2204.02311, appendix B). Rematerialisation is not
    counted.

    Args:
        config: of the model.
        context: sequence length T; None: ``config.context``.
    """
    tied = isinstance(config, DecoderConfig) and config.tied
    tables = ("position",) if tied else ("position", "embedding")
    sizes = _map(config, lambda leaf, _: math.prod(leaf.shape) * (leaf.role in tables))
    lookups = sum(jax.tree.leaves(sizes))
    length = config.context if context is None else context
    attention = 12 * config.depth * config.heads * config.head_width * length
    return float(6 * (parameter_count(config) - lookups) + attention)


def _map(
    config: ModelConfig, describe: Callable[[nnx.Variable, tuple[str | None, ...]], Any]
) -> dict[str, Any]:
    """Maps (abstract parameter, logical axes) to a plain nested dict."""
    decoder = isinstance(config, DecoderConfig)
    model = abstract_decoder(config) if decoder else abstract_encoder(config)
    state = nnx.state(model, nnx.Param)

    def walk(node: Any, inside: tuple[str | None, ...]) -> Any:
        if isinstance(node, nnx.Variable):
            return describe(node, inside + node.axes)
        return {
            name: walk(child, ("layer",) if name == "layers" else inside)
            for name, child in node.items()
        }

    return walk(state, ())
