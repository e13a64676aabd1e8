"""The parts of an encoder layer, written for one layer; storage stacks them.

Array names end in their axes: B batch, T positions, D width, H heads, E head width, F hidden
units, C classes.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxopt_lab.core.numerics import dropped
from jaxopt_lab.models.attention import attend
from jaxopt_lab.models.encoder_config import EncoderConfig
from jaxopt_lab.models.layers import Linear, Norm, normal, parameter, zeros
from jaxopt_lab.models.sharding import OnMesh, constrain
from jaxopt_lab.models.side import Side, looked_up, matmul


class Embedding(nnx.Module):
    """Tables of tokens, positions and token types, added and normalised."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        """Draws the tables."""
        self.config = config
        rows = {"tokens": config.vocab_size, "positions": config.context, "types": config.types}
        tables = {name: normal(config, rngs, (n, config.width)) for name, n in rows.items()}
        self.tokens = parameter(tables["tokens"], "embedding", ("vocab", "embed"))
        self.positions = parameter(tables["positions"], "position", ("position", "embed"))
        self.types = parameter(tables["types"], "embedding", (None, "embed"))
        self.norm = Norm(config)

    def __call__(
        self,
        tokens_BxT: jax.Array,
        types_BxT: jax.Array | None,
        mesh: OnMesh,
        sides: Mapping[str, Any] | None = None,
    ) -> jax.Array:
        """Looks up, adds and normalises."""
        sides = sides or {}
        # Rows are gathered before the cast: the gradient of a frequent token is a sum of
        # thousands of terms, which bfloat16 would truncate.
        tokens_VxD = constrain(self.tokens[...], mesh, ("vocab", None))
        x_BxTxD = looked_up(sides.get("tokens"), tokens_BxT, tokens_VxD)
        x_BxTxD = constrain(x_BxTxD, mesh, ("batch", "length", "stream"))
        positions_CxD, types_2xD = (
            constrain(table[...], mesh, (None, None)) for table in (self.positions, self.types)
        )
        length = tokens_BxT.shape[1]
        if "positions" in sides:
            x_BxTxD = x_BxTxD + sides["positions"].rows(jnp.arange(length), positions_CxD)
        else:  # a slice: the gradient of a gather is a scatter
            x_BxTxD = x_BxTxD + positions_CxD[:length]
        types: Any = 0 if types_BxT is None else types_BxT
        x_BxTxD = x_BxTxD + looked_up(sides.get("types"), types, types_2xD)
        return self.norm(x_BxTxD).astype(self.config.compute_dtype)


class Attention(nnx.Module):
    """Self-attention in both directions, with one fused projection."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        """Builds the projections."""
        self.config = config
        d = config.width
        self.qkv = Linear(config, (d, 3, d), ("embed", None, "heads"), rngs=rngs)
        self.out = Linear(config, (d, d), ("heads", "embed"), rngs=rngs)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        mask_BxT: jax.Array | None,
        mesh: OnMesh,
        key: jax.Array | None,
    ) -> jax.Array:
        """Mixes positions."""
        config = self.config
        B, T, D = x_BxTxD.shape
        qkv_BxTx3xD = self.qkv(x_BxTxD, mesh)
        q_BxTxHxE, k_BxTxHxE, v_BxTxHxE = (
            constrain(
                qkv_BxTx3xD[:, :, i].reshape(B, T, config.heads, config.head_width),
                mesh,
                ("batch", None, "heads", None),
            )
            for i in range(3)
        )
        # Padding is a document of its own: tokens do not see it, and its rows stay finite.
        y_BxTxHxE = attend(
            q_BxTxHxE,
            k_BxTxHxE,
            v_BxTxHxE,
            mask_BxT,
            kernel=config.attention,
            causal=False,
            dropout=(config.attention_dropout, key),
            mesh=mesh,
        )
        return self.out(y_BxTxHxE.reshape(B, T, D), mesh)


class MLP(nnx.Module):
    """down(gelu(up x))."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        """Builds the projections."""
        self.config = config
        d, f = config.width, config.hidden_width
        self.up = Linear(config, (d, f), ("embed", "hidden"), rngs=rngs)
        self.down = Linear(config, (f, d), ("hidden", "embed"), rngs=rngs)

    def __call__(self, x_BxTxD: jax.Array, mesh: OnMesh) -> jax.Array:
        """Transforms each position."""
        exact = self.config.activation == "gelu"
        h_BxTxF = gelu(self.up(x_BxTxD, mesh)) if exact else jax.nn.gelu(self.up(x_BxTxD, mesh))
        return self.down(constrain(h_BxTxF, mesh, ("batch", None, "hidden")), mesh)


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU that keeps its slope alone for the backward pass: `jax.nn.gelu` keeps two arrays.

    With a frozen base these are a large part of what a layer keeps.
    """
    return x * _normal_cdf(x)


@gelu.defjvp
def _gelu_jvp(at: Any, moved: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = at, moved
    below = _normal_cdf(x)
    density = jnp.exp(-0.5 * jnp.square(x)) / math.sqrt(2 * math.pi)
    return x * below, dx * (below + x * density)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * jax.lax.erfc(-math.sqrt(0.5) * x)


class Block(nnx.Module):
    """One layer: norm(x + attention x), then norm(x + mlp x)."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        """Builds both sublayers."""
        self.config = config
        self.attention = Attention(config, rngs=rngs)
        self.attention_norm = Norm(config)
        self.mlp = MLP(config, rngs=rngs)
        self.mlp_norm = Norm(config)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        mask_BxT: jax.Array | None,
        mesh: OnMesh,
        key: jax.Array | None,
    ) -> jax.Array:
        """Applies the layer."""
        stream, rate = ("batch", "length", "stream"), self.config.dropout
        of_weights, of_attention, of_mlp = split(key, 3)
        y_BxTxD = dropped(self.attention(x_BxTxD, mask_BxT, mesh, of_weights), rate, of_attention)
        x_BxTxD = self.attention_norm(constrain(x_BxTxD + y_BxTxD, mesh, stream))
        y_BxTxD = dropped(self.mlp(x_BxTxD, mesh), rate, of_mlp)
        return self.mlp_norm(constrain(x_BxTxD + y_BxTxD, mesh, stream))


class Head(nnx.Module):
    """A linear classifier, in float32 or wider."""

    def __init__(self, config: EncoderConfig, classes: int, *, rngs: nnx.Rngs):
        """Draws the kernel; the bias starts at zero."""
        kernel_DxC = normal(config, rngs, (config.width, classes))
        self.kernel = parameter(kernel_DxC, "head", ("embed", None))
        self.bias = zeros(config, (classes,), (None,))

    def __call__(self, x_BxD: jax.Array, side: Side | None = None) -> jax.Array:
        """Scores of the classes."""
        kernel_DxC, bias_C = (x[...].astype(x_BxD.dtype) for x in (self.kernel, self.bias))
        return matmul(side, x_BxD, kernel_DxC) + bias_C


def split(key: jax.Array | None, parts: int) -> list[Any]:
    """Keys for so many parts; none for each where there is none."""
    return [None] * parts if key is None else list(jax.random.split(key, parts))
