"""A BERT encoder, as an NNX module and as pure functions of a plain dict of arrays."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxopt_lab.core.numerics import dropped
from jaxopt_lab.models.config import check_dtypes
from jaxopt_lab.models.encoder_config import EncoderConfig, check_inputs
from jaxopt_lab.models.encoder_layers import Block, Embedding, Head, split
from jaxopt_lab.models.sharding import OnMesh
from jaxopt_lab.models.stack import stacked, through

Params = dict[str, Any]
Sides = Mapping[str, Any] | None


class Encoder(nnx.Module):
    """BERT encoder with its layers stacked: every layer leaf is (L, ...).

    Args:
        config: shape and numerics.
        rngs: its ``params`` stream seeds the weights: N(0, 0.02^2); norms 1, biases 0.
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        """Draws all parameters."""
        check_dtypes(config)
        self.config = config
        self.embedding = Embedding(config, rngs=rngs)
        self.layers = stacked(config.depth, lambda rngs: Block(config, rngs=rngs), rngs)
        if config.classes is not None:
            self.head = Head(config, config.classes, rngs=rngs)

    def __call__(
        self,
        tokens_BxT: jax.Array,
        mask_BxT: jax.Array | None,
        types_BxT: jax.Array | None,
        *,
        mesh: OnMesh,
        side: Sides,
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        """Activations after the last layer, (B, T, D)."""
        check_inputs(self.config, tokens_BxT, mask_BxT, types_BxT)
        sides = dict(side or {})
        in_layers, tables = sides.pop("layers", {}), sides.pop("embedding", {})
        unknown = [*sides, *(f"embedding.{x}" for x in tables if not hasattr(self.embedding, x))]
        if unknown:
            names = ", ".join(unknown)
            raise ValueError(f"side: {names} is not a stack of layers or table of the model")
        mask_BxT = None if mask_BxT is None else mask_BxT.astype(bool)
        of_embedding, of_layers = split(dropout_key, 2)
        x_BxTxD = self.embedding(tokens_BxT, types_BxT, mesh, tables)
        x_BxTxD = dropped(x_BxTxD, self.config.dropout, of_embedding)
        keys = None if of_layers is None else jax.random.split(of_layers, self.config.depth)

        def call(block: Block, x_BxTxD: jax.Array, key: jax.Array | None) -> jax.Array:
            return block(x_BxTxD, mask_BxT, mesh, key)

        return through(self.config, self.layers, x_BxTxD, call, in_layers, keys)


def init_params(config: EncoderConfig, key: jax.Array) -> Params:
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


def with_head(
    config: EncoderConfig, params: Params, classes: int, key: jax.Array
) -> tuple[EncoderConfig, Params]:
    """The same encoder with a fresh classification head, in place of any it has.

    Args:
        config: of the encoder.
        params: as from `init_params` or `jaxopt_lab.models.load_bert`.
        classes: number of outputs.
        key: seeds the kernel, N(0, 0.02^2); the bias is 0.
    """
    head = Head(config, classes, rngs=nnx.Rngs(params=key))
    state = nnx.to_pure_dict(nnx.state(head, nnx.Param))
    return dataclasses.replace(config, classes=classes), {**params, "head": state}


def hidden(
    config: EncoderConfig,
    params: Params,
    tokens_BxT: jax.Array,
    mask_BxT: jax.Array | None = None,
    types_BxT: jax.Array | None = None,
    *,
    side: Sides = None,
    dropout_key: jax.Array | None = None,
    mesh: OnMesh = None,
) -> jax.Array:
    """Activations after the last layer.

    Rows of padding are finite and mean nothing: no token sees them, and `pooled` leaves them out.

    Args:
        config: shape and numerics.
        params: as from `init_params`.
        tokens_BxT: token ids, at most ``config.context`` positions.
        mask_BxT: 1 or True for a token, 0 or False for padding; None: no padding.
        types_BxT: token types below ``config.types``; None: all 0.
        side: what stands beside the kernels of linear layers, by path (`models.side`), as from
            ``jaxopt_lab.lora.side``; None: nothing.
        dropout_key: of the model's own dropout, for one step; None, as in evaluation: no dropout.
        mesh: with axes among data, fsdp and tensor, pins activations to it (inside ``jax.jit``).

    Returns:
        (B, T, D) in the compute dtype.

    Raises:
        ValueError: for too many positions, a mask or token types of another shape, or a side at a
            path that is no linear layer's.

    >>> config = EncoderConfig(vocab_size=64, width=32, depth=2, heads=4, context=16)
    >>> params = init_params(config, jax.random.key(0))
    >>> tokens, mask = jnp.ones((1, 8), int), jnp.arange(8)[None] < 5
    >>> jax.jit(hidden, static_argnums=0)(config, params, tokens, mask).shape
    (1, 8, 32)
    """
    encoder = nnx.merge(nnx.graphdef(abstract_encoder(config)), params)
    return encoder(tokens_BxT, mask_BxT, types_BxT, mesh=mesh, side=side, dropout_key=dropout_key)


def pooled(
    hidden_BxTxD: jax.Array, mask_BxT: jax.Array | None, kind: Literal["mean", "cls"]
) -> jax.Array:
    """One vector a row, in float32 or wider.

    Args:
        hidden_BxTxD: from `hidden`.
        mask_BxT: that of the tokens; a row without any token has mean 0.
        kind: "mean" over the tokens that are no padding, or "cls", the first token.

    >>> rows = jnp.array([[[1.0], [3.0], [100.0]]])
    >>> pooled(rows, jnp.array([[1, 1, 0]]), "mean").tolist()
    [[2.0]]
    """
    x_BxTxD = hidden_BxTxD.astype(jnp.promote_types(hidden_BxTxD.dtype, jnp.float32))
    if kind == "cls":
        return x_BxTxD[:, 0]
    if mask_BxT is None:
        return jnp.mean(x_BxTxD, 1)
    there_BxTx1 = mask_BxT.astype(bool)[..., None]
    total_BxD = jnp.sum(jnp.where(there_BxTx1, x_BxTxD, 0), 1)
    return total_BxD / jnp.maximum(jnp.sum(there_BxTx1, 1), 1)


def logits(
    config: EncoderConfig,
    params: Params,
    tokens_BxT: jax.Array,
    mask_BxT: jax.Array | None = None,
    types_BxT: jax.Array | None = None,
    *,
    side: Sides = None,
    dropout_key: jax.Array | None = None,
    mesh: OnMesh = None,
) -> jax.Array:
    """Scores of the classes: the head of ``config.classes`` on what ``config.pooling`` gives.

    Args:
        config: shape and numerics.
        params: as from `init_params`; `with_head` adds a head to others.
        tokens_BxT: as for `hidden`.
        mask_BxT: as for `hidden`.
        types_BxT: as for `hidden`.
        side: as for `hidden`.
        dropout_key: as for `hidden`.
        mesh: as for `hidden`.

    Returns:
        (B, C) in float32 or wider.

    Raises:
        ValueError: as for `hidden`, and for an encoder without a head.

    >>> config = EncoderConfig(vocab_size=64, width=32, depth=2, heads=4, context=16)
    >>> params = init_params(config, jax.random.key(0))
    >>> config, params = with_head(config, params, 3, jax.random.key(1))
    >>> jax.jit(logits, static_argnums=0)(config, params, jnp.ones((1, 8), int)).shape
    (1, 3)
    """
    if config.classes is None:
        raise ValueError("classes: got None, wanted a number: this encoder has no head")
    of_head, of_encoder = split(dropout_key, 2)
    encoder = nnx.merge(nnx.graphdef(abstract_encoder(config)), params)
    sides = dict(side or {})
    of_kernel = sides.pop("head", None)
    x_BxTxD = encoder(
        tokens_BxT, mask_BxT, types_BxT, mesh=mesh, side=sides, dropout_key=of_encoder
    )
    x_BxD = dropped(pooled(x_BxTxD, mask_BxT, config.pooling), config.dropout, of_head)
    return encoder.head(x_BxD, of_kernel)


@functools.lru_cache(maxsize=64)
def abstract_encoder(config: EncoderConfig) -> Encoder:
    """The module with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0)))


@functools.partial(jax.jit, static_argnums=0)
def _init_params(config: EncoderConfig, key: jax.Array) -> Params:
    encoder = Encoder(config, rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.state(encoder, nnx.Param))
