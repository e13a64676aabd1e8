"""One decoder-only transformer, GPT-2 and LLaMA style, as an NNX module and as pure functions.

The module is for NNX users. Everything else in this library sees parameters as a plain nested
dict of arrays, `init_params`, and pure functions of it, `apply` and `hidden`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxopt_lab.core.packed import unpacked
from jaxopt_lab.models.config import DecoderConfig, check_dtypes, check_tokens
from jaxopt_lab.models.gpu_kernels import kernels_apply
from jaxopt_lab.models.layers import Block, Norm, normal, parameter
from jaxopt_lab.models.sharding import LOGITS, STREAM, OnMesh, constrain
from jaxopt_lab.models.side import Side, looked_up, matmul
from jaxopt_lab.models.stack import stacked, through

Params = dict[str, Any]
Sides = Mapping[str, Any] | None


class Embedding(nnx.Module):
    """Token table and, for learned positions, a position table."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Draws the tables."""
        self.config = config
        tokens_VxD = normal(config, rngs, (config.vocab_size, config.width))
        self.tokens = parameter(tokens_VxD, "embedding", ("vocab", "embed"))
        if config.positions == "learned":
            positions_CxD = normal(config, rngs, (config.context, config.width))
            self.positions = parameter(positions_CxD, "position", ("position", "embed"))

    def __call__(
        self,
        tokens_BxT: jax.Array,
        segment_ids_BxT: jax.Array | None,
        mesh: OnMesh,
        sides: Sides = None,
    ) -> jax.Array:
        """Looks up and adds."""
        sides = sides or {}
        # Rows are gathered before the cast: the gradient of a frequent token is a sum of
        # thousands of terms, which bfloat16 would truncate.
        tokens_VxD = constrain(self.tokens[...], mesh, ("vocab", None))
        x_BxTxD = unpacked(looked_up(sides.get("tokens"), tokens_BxT, tokens_VxD))
        x_BxTxD = constrain(x_BxTxD, mesh, STREAM)
        if self.config.positions == "learned":
            index = jnp.arange(tokens_BxT.shape[1])
            if segment_ids_BxT is not None:
                index = _position_in_document(segment_ids_BxT)
            positions_CxD = constrain(self.positions[...], mesh, (None, None))
            x_BxTxD = x_BxTxD + looked_up(sides.get("positions"), index, positions_CxD)
        return x_BxTxD.astype(self.config.compute_dtype)


class Decoder(nnx.Module):
    """Decoder-only transformer with its layers stacked: every layer leaf is (L, ...).

    Args:
        config: shape and numerics.
        rngs: its ``params`` stream seeds the weights: N(0, 0.02^2), with the two projections of a
            layer that write to the residual stream scaled by 1 / sqrt(2 L); norms 1, biases 0.

    >>> config = DecoderConfig(vocab_size=64, width=32, depth=2, heads=4, context=16)
    >>> Decoder(config, rngs=nnx.Rngs(0))(jnp.zeros((1, 8), int)).shape
    (1, 8, 64)
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Draws all parameters."""
        check_dtypes(config)
        self.config = config
        self.embedding = Embedding(config, rngs=rngs)
        self.layers = stacked(config.depth, lambda rngs: Block(config, rngs=rngs), rngs)
        self.final_norm = Norm(config)
        if not config.tied:
            kernel_DxV = normal(config, rngs, (config.width, config.vocab_size))
            self.head = parameter(kernel_DxV, "head", ("embed", "vocab"))

    def __call__(
        self,
        tokens_BxT: jax.Array,
        segment_ids_BxT: jax.Array | None = None,
        *,
        mesh: OnMesh = None,
        side: Sides = None,
    ) -> jax.Array:
        """Logits of the next token at every position, (B, T, V), in the compute dtype."""
        x_BxTxD = self.hidden(tokens_BxT, segment_ids_BxT, mesh=mesh, side=side)
        logits_BxTxV = matmul(self.head_side(side), x_BxTxD, self.head_kernel(), mesh)
        return constrain(logits_BxTxV, mesh, LOGITS)

    def hidden(
        self,
        tokens_BxT: jax.Array,
        segment_ids_BxT: jax.Array | None = None,
        *,
        mesh: OnMesh = None,
        side: Sides = None,
    ) -> jax.Array:
        """The normalised residual stream that the head reads, (B, T, D)."""
        check_tokens(self.config, tokens_BxT, segment_ids_BxT)
        sides = dict(side or {})
        in_layers, tables = sides.pop("layers", {}), sides.pop("embedding", {})
        if not self.config.tied:
            sides.pop("head", None)
        unknown = [*sides, *(f"embedding.{x}" for x in tables if not hasattr(self.embedding, x))]
        if unknown:
            names = ", ".join(unknown)
            raise ValueError(f"side: {names} is not a stack of layers, table or head of the model")
        x_BxTxD = self.embedding(tokens_BxT, segment_ids_BxT, mesh, tables)
        if kernels_apply(x_BxTxD.dtype, self.config.attention, mesh):
            # Else the compiler keeps the sum in float32 for the backward pass of the first norm.
            x_BxTxD = jax.lax.optimization_barrier(x_BxTxD)

        def whole(block: Block, x_BxTxD: jax.Array, key: None) -> jax.Array:
            del key  # nothing is drawn
            return block(x_BxTxD, segment_ids_BxT, mesh)

        def in_terms(block: Block, terms: Any, key: None) -> tuple[jax.Array, jax.Array]:
            del key
            x_BxTxD, y_BxTxD = terms
            return block.before_sum(x_BxTxD, y_BxTxD, segment_ids_BxT, mesh)

        if self.config.loop == "scanned" or self.config.remat != "none":
            # What a loop or remat keeps of each layer is then one array.
            x_BxTxD = through(self.config, self.layers, x_BxTxD, whole, in_layers)
            return self.final_norm(x_BxTxD)
        terms = through(self.config, self.layers, (x_BxTxD, None), in_terms, in_layers)
        return self.final_norm.of_sum(terms[0], terms[1], mesh)[1]

    def head_kernel(self) -> Any:
        """The output matrix (D, V) in the compute dtype; may be packed."""
        kernel_DxV = self.embedding.tokens[...].T if self.config.tied else self.head[...]
        return kernel_DxV.astype(self.config.compute_dtype)

    def head_side(self, side: Sides) -> Side | None:
        """What stands beside the output matrix."""
        if not self.config.tied:
            return (side or {}).get("head")
        table = (side or {}).get("embedding", {}).get("tokens")
        return None if table is None else table.transposed()


def init_params(config: DecoderConfig, key: jax.Array) -> Params:
    """Initial parameters as a plain nested dict of arrays.

    Values depend on the key alone, so under ``jax.jit(..., out_shardings=...)`` every device
    creates its own shards of the same parameters.

    Args:
        config: shape and numerics.
        key: typed or raw PRNG key.

    Raises:
        ValueError: for float64 parameters while ``jax_enable_x64`` is off.
    """
    check_dtypes(config)
    return _init_params(config, key)


def apply(
    config: DecoderConfig,
    params: Params,
    tokens_BxT: jax.Array,
    segment_ids_BxT: jax.Array | None = None,
    *,
    mesh: OnMesh = None,
    side: Sides = None,
) -> jax.Array:
    """Logits of the next token at every position.

    Args:
        config: shape and numerics.
        params: as from `init_params`.
        tokens_BxT: token ids, at most ``config.context`` positions.
        segment_ids_BxT: document of each position; exactly when ``config.document_mask``.
        mesh: with axes among data, fsdp and tensor, pins activations to it (inside ``jax.jit``).
        side: what stands beside the kernels of linear layers, by path (`models.side`), as from
            ``jaxopt_lab.lora.side``; None: nothing.

    Returns:
        Logits (B, T, V) in the compute dtype.

    Raises:
        ValueError: for too many positions, missing or unwanted segment ids, or a side at a path
            that is no linear layer's.

    >>> config = DecoderConfig(vocab_size=64, width=32, depth=2, heads=4, context=16)
    >>> params = init_params(config, jax.random.key(0))
    >>> apply(config, params, jnp.zeros((1, 8), int)).shape
    (1, 8, 64)
    """
    return bind(config, params)(tokens_BxT, segment_ids_BxT, mesh=mesh, side=side)


def bind(config: DecoderConfig, params: Params) -> Decoder:
    """The NNX module that holds these parameters; costs nothing inside ``jax.jit``."""
    return nnx.merge(nnx.graphdef(abstract_decoder(config)), params)


@functools.lru_cache(maxsize=64)
def abstract_decoder(config: DecoderConfig) -> Decoder:
    """The module with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


@functools.partial(jax.jit, static_argnums=0)
def _init_params(config: DecoderConfig, key: jax.Array) -> Params:
    decoder = Decoder(config, rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(decoder, nnx.Param))


def _position_in_document(segment_ids_BxT: jax.Array) -> jax.Array:
    """Distance from the start of the run of equal segment ids."""
    index_T = jnp.arange(segment_ids_BxT.shape[1])
    starts_BxT = jnp.diff(segment_ids_BxT, axis=1, prepend=segment_ids_BxT[:, :1]) != 0
    return index_T - jax.lax.cummax(jnp.where(starts_BxT, index_T, 0), axis=1)
