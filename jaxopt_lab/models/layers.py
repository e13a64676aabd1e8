"""The parts of a decoder layer, written for one layer; storage stacks them.

Array names end in their axes: B batch, T query positions, S key positions, D width, H heads,
K key and value heads, E head width, P all heads side by side, F hidden units.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxopt_lab.core.packed import is_packed
from jaxopt_lab.models import kept
from jaxopt_lab.models.attention import attend, rotate
from jaxopt_lab.models.config import DecoderConfig
from jaxopt_lab.models.encoder_config import ModelConfig
from jaxopt_lab.models.gpu_kernels import add_norm, kernels_apply
from jaxopt_lab.models.sharding import STREAM, OnMesh, constrain, free_spec
from jaxopt_lab.models.side import Side, matmul

INIT_STD = 0.02


def parameter(value: jax.Array, role: str, axes: tuple[str | None, ...]) -> nnx.Param:
    """A parameter that carries its role and the logical names of its axes."""
    return nnx.Param(value, role=role, axes=axes)


def normal(
    config: ModelConfig, rngs: nnx.Rngs, shape: tuple[int, ...], std: float = INIT_STD
) -> jax.Array:
    """Draws N(0, std^2) in the parameters' precision."""
    return std * jax.random.normal(rngs.params(), shape, config.param_dtype)


def zeros(config: ModelConfig, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """A bias."""
    return parameter(jnp.zeros(shape, config.param_dtype), "bias", axes)


def residual_std(config: DecoderConfig) -> float:
    """Standard deviation of the two projections that write to the residual stream.

    Each layer adds two terms, so 1 / sqrt(2 L) keeps the stream's variance independent of depth
    (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019).
    """
    return INIT_STD / math.sqrt(2 * config.depth)


def elementwise(config: ModelConfig, function: Callable[..., jax.Array]) -> Any:
    """A function of which a scanned loop keeps the arguments alone for its backward pass.

    A scan stores every intermediate that autodiff keeps. In an unrolled loop XLA computes them
    again from the arguments by itself, as part of its fusions.
    """
    return jax.checkpoint(function, prevent_cse=False) if config.loop == "scanned" else function


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last axis, in float32 or wider."""

    def __init__(self, config: ModelConfig, width: int | None = None):
        """Starts as the identity scale; the width is that of the stream by default."""
        self.config = config
        ones = jnp.ones(width or config.width, config.param_dtype)
        self.scale = parameter(ones, "norm", ("stream",))
        biased = config.norm == "layer" and config.bias
        self.bias = zeros(config, (config.width,), ("stream",)) if biased else None

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """Normalises and scales."""
        bias = None if self.bias is None else self.bias[...]
        return elementwise(self.config, self._normalised)(x_BxTxD, self.scale[...], bias)

    def of_sum(
        self, x_BxTxD: jax.Array, y_BxTxD: jax.Array, mesh: OnMesh
    ) -> tuple[jax.Array, jax.Array]:
        """The sum x + y, pinned like the residual stream, and what this norm makes of it."""
        config, width = self.config, x_BxTxD.shape[-1]
        on_gpu = kernels_apply(x_BxTxD.dtype, config.attention, mesh, width)
        if on_gpu and self.bias is None:
            centred = config.norm == "layer"
            return add_norm(x_BxTxD, y_BxTxD, self.scale[...], centred, config.norm_eps, mesh)
        x_BxTxD = constrain(x_BxTxD + y_BxTxD, mesh, STREAM)
        return x_BxTxD, self(x_BxTxD)

    def _normalised(
        self, x_BxTxD: jax.Array, scale: jax.Array, bias: jax.Array | None
    ) -> jax.Array:
        # The scale multiplies before the cast: its gradient is a sum over all tokens, which would
        # lose its small terms in bfloat16.
        y_BxTxD = x_BxTxD.astype(jnp.promote_types(x_BxTxD.dtype, jnp.float32))
        if self.config.norm == "layer":
            y_BxTxD = y_BxTxD - jnp.mean(y_BxTxD, -1, keepdims=True)
        variance = jnp.mean(jnp.square(y_BxTxD), -1, keepdims=True)
        y_BxTxD = y_BxTxD * jax.lax.rsqrt(variance + self.config.norm_eps) * scale
        if bias is not None:
            y_BxTxD = y_BxTxD + bias
        return y_BxTxD.astype(x_BxTxD.dtype)


class Linear(nnx.Module):
    """y = x W + b with W stored (in, *out), or what its `side` makes of x and W."""

    def __init__(
        self,
        config: ModelConfig,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        rngs: nnx.Rngs,
        std: float = INIT_STD,
        bias: bool = False,
    ):
        """Draws the kernel; the bias, where the model or this layer has one, starts at zero."""
        self.kernel = parameter(normal(config, rngs, shape, std), "matrix", axes)
        # Vectors along the residual stream are replicated, like the stream itself.
        bias_axes = tuple("stream" if name == "embed" else name for name in axes[1:])
        biased = config.bias or bias
        self.bias = zeros(config, shape[1:], bias_axes) if biased else None
        self.side: Side | None = None  # `attach` sets it

    def __call__(self, x_BxTxI: jax.Array, mesh: OnMesh = None) -> jax.Array:
        """Applies the map to the last axis."""
        y = matmul(self.side, x_BxTxI, self.kernel[...].astype(x_BxTxI.dtype), mesh)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def parts(self, x_BxTxI: jax.Array, mesh: OnMesh, *, apart: bool) -> list[jax.Array]:
        """What `self(x)` has at each index of its third axis, by separate products if wanted."""
        kernel = self.kernel[...].astype(x_BxTxI.dtype)
        if not apart or self.side is not None or is_packed(kernel):
            y = self(x_BxTxI, mesh)
            return [y[:, :, n] for n in range(y.shape[2])]
        parts: Any = kept.products(x_BxTxI, kernel, mesh)
        if self.bias is None:
            return parts
        return [y + b.astype(y.dtype) for y, b in zip(parts, self.bias[...], strict=True)]


def attach(module: nnx.Module, sides: Mapping[str, Any], path: str = "layers") -> None:
    """Set the sides of the linear layers below a module.

    Raises:
        ValueError: a path of `sides` is not that of a linear layer.
    """
    for name, side in sides.items():
        child, at = getattr(module, name, None), f"{path}.{name}"
        if isinstance(side, Mapping) and isinstance(child, nnx.Module):
            attach(child, side, at)
        elif isinstance(child, Linear) and not isinstance(side, Mapping):
            child.side = None if side is None else nnx.data(side)
        else:
            raise ValueError(f"side: {at} is not a linear layer of the model")


class Attention(nnx.Module):
    """Causal self-attention; one fused projection, or separate q and kv for grouped queries."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Builds the projections."""
        self.config = config
        d, bias = config.width, config.qkv_bias
        h, k = (count * config.head_width for count in (config.heads, config.num_kv_heads))
        if k == h:
            axes = ("embed", None, "heads")
            self.qkv = Linear(config, (d, 3, h), axes, rngs=rngs, bias=bias)
        else:
            axes = ("embed", None, "kv_heads")
            self.q = Linear(config, (d, h), ("embed", "heads"), rngs=rngs, bias=bias)
            self.kv = Linear(config, (d, 2, k), axes, rngs=rngs, bias=bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = (Norm(config, config.head_width) for _ in range(2))
        std = residual_std(config)
        self.out = Linear(config, (h, d), ("heads", "embed"), rngs=rngs, std=std)

    def __call__(
        self, x_BxTxD: jax.Array, segment_ids_BxT: jax.Array | None, mesh: OnMesh
    ) -> jax.Array:
        """Mixes positions."""
        config = self.config
        B, T, _ = x_BxTxD.shape
        # Products of their own take the kernel whole, so only where all devices have all heads.
        split = any(free_spec(mesh, ("heads", "kv_heads"), (config.heads, config.num_kv_heads)))
        apart = not split and kernels_apply(x_BxTxD.dtype, config.attention, mesh)
        if hasattr(self, "qkv"):
            projections, keys = self.qkv.parts(x_BxTxD, mesh, apart=apart), "heads"
        else:
            keys_and_values = self.kv.parts(x_BxTxD, mesh, apart=apart)
            projections, keys = [self.q(x_BxTxD, mesh), *keys_and_values], "kv_heads"
        q_BxTxHxE, k_BxTxKxE, v_BxTxKxE = (
            constrain(p.reshape(B, T, -1, config.head_width), mesh, ("batch", None, name, None))
            for p, name in zip(projections, ("heads", keys, keys), strict=True)
        )
        if config.qk_norm:
            q_BxTxHxE, k_BxTxKxE = self.q_norm(q_BxTxHxE), self.k_norm(k_BxTxKxE)
        if config.positions == "rope":
            q_BxTxHxE = rotate(q_BxTxHxE, config.rope_base, config.rope_scaling)
            k_BxTxKxE = rotate(k_BxTxKxE, config.rope_base, config.rope_scaling)
        y_BxTxHxE = attend(
            *(q_BxTxHxE, k_BxTxKxE, v_BxTxKxE, segment_ids_BxT),
            kernel=config.attention,
            mesh=mesh,
        )
        return self.out(y_BxTxHxE.reshape(B, T, -1), mesh)


class MLP(nnx.Module):
    """down(silu(gate x) * up x), or down(gelu(up x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Builds the projections."""
        self.config = config
        d, f = config.width, config.hidden_width
        self.up = Linear(config, (d, f), ("embed", "hidden"), rngs=rngs)
        if config.mlp == "swiglu":
            self.gate = Linear(config, (d, f), ("embed", "hidden"), rngs=rngs)
        std = residual_std(config)
        self.down = Linear(config, (f, d), ("hidden", "embed"), rngs=rngs, std=std)

    def __call__(self, x_BxTxD: jax.Array, mesh: OnMesh) -> jax.Array:
        """Transforms each position."""
        h_BxTxF = self.up(x_BxTxD, mesh)
        on_gpu = kernels_apply(h_BxTxF.dtype, self.config.attention, mesh)
        if self.config.mlp == "swiglu":
            gated = kept.gated if on_gpu else elementwise(self.config, kept.swiglu)
            h_BxTxF = gated(self.gate(x_BxTxD, mesh), h_BxTxF)
        else:
            h_BxTxF = (kept.gelu if on_gpu else elementwise(self.config, jax.nn.gelu))(h_BxTxF)
        return self.down(constrain(h_BxTxF, mesh, ("batch", None, "hidden")), mesh)


class Block(nnx.Module):
    """One pre-norm layer: x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Builds both sublayers."""
        self.attention_norm = Norm(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x_BxTxD: jax.Array, segment_ids_BxT: Any = None, mesh: OnMesh = None
    ) -> jax.Array:
        """Applies the layer."""
        x_BxTxD, y_BxTxD = self.before_sum(x_BxTxD, None, segment_ids_BxT, mesh)
        return constrain(x_BxTxD + y_BxTxD, mesh, STREAM)

    def before_sum(
        self, x_BxTxD: jax.Array, y_BxTxD: jax.Array | None, segment_ids_BxT: Any, mesh: OnMesh
    ) -> tuple[jax.Array, jax.Array]:
        """The layer on x + y, as two terms as well: the next norm takes their sum itself."""
        if y_BxTxD is None:
            normed_BxTxD = self.attention_norm(x_BxTxD)
        else:
            x_BxTxD, normed_BxTxD = self.attention_norm.of_sum(x_BxTxD, y_BxTxD, mesh)
        y_BxTxD = self.attention(normed_BxTxD, segment_ids_BxT, mesh)
        x_BxTxD, normed_BxTxD = self.mlp_norm.of_sum(x_BxTxD, y_BxTxD, mesh)
        return x_BxTxD, self.mlp(normed_BxTxD, mesh)
