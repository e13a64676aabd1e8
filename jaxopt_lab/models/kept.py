"""Parts of a layer with a backward pass that reads few arrays, for GPUs.

From the derivatives as JAX writes them XLA keeps more than an activation's argument (for a GELU
half as much again as the hidden units), and a product of queries, keys and values side by side is
copied into three. The values are those of the plain functions up to rounding.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_lab.models.sharding import OnMesh, gathered


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """GELU in its tanh approximation.

    The forward pass is left to JAX: cuBLAS takes this form into the product before it.
    """
    return jax.nn.gelu(x)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, left to JAX."""
    return jax.nn.silu(gate) * up


@jax.custom_vjp
def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, in float32 or wider."""
    wide = jnp.promote_types(gate.dtype, jnp.float32)
    return swiglu(gate.astype(wide), up.astype(wide)).astype(gate.dtype)


def _from_arguments(function: Any) -> Any:
    """A backward pass that computes everything again from the arguments, in float32 or wider."""

    def backward(arguments: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, ...]:
        # Without the barrier XLA finds the same terms in the forward pass and keeps those.
        arguments = jax.lax.optimization_barrier(arguments)
        wide = jnp.promote_types(cotangent.dtype, jnp.float32)
        _, pullback = jax.vjp(function, *(x.astype(wide) for x in arguments))
        return tuple(
            d.astype(x.dtype)
            for d, x in zip(pullback(cotangent.astype(wide)), arguments, strict=True)
        )

    return backward


def _logistic_gelu(x: jax.Array) -> jax.Array:
    # 1 + tanh u = 2 logistic 2u, in a third of a hyperbolic tangent's instructions.
    return x * jax.nn.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))


gelu.defvjp(lambda x: (jax.nn.gelu(x), (x,)), _from_arguments(_logistic_gelu))
gated.defvjp(lambda gate, up: (gated(gate, up), (gate, up)), _from_arguments(swiglu))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def products(x_BxTxI: jax.Array, kernel_IxNxO: jax.Array, mesh: OnMesh = None) -> list[jax.Array]:
    """The products x @ kernel[:, n], as arrays of their own: nothing is sliced.

    The backward pass is that of the one product x @ kernel.
    """
    kernel_IxNxO = gathered(kernel_IxNxO, mesh)
    x_MxI = x_BxTxI.reshape(-1, x_BxTxI.shape[-1])
    count = kernel_IxNxO.shape[1]
    # Operands that XLA takes for different ones: it would join the products again.
    operands = jax.lax.optimization_barrier((x_MxI,) * count)
    shape = (*x_BxTxI.shape[:-1], -1)
    return [(operands[n] @ kernel_IxNxO[:, n]).reshape(shape) for n in range(count)]


def _products_backward(mesh: OnMesh, residuals: Any, cotangents: list[jax.Array]) -> Any:
    x, kernel = residuals[0], gathered(residuals[1], mesh)
    x_MxI, kernel_IxP = x.reshape(-1, x.shape[-1]), kernel.reshape(kernel.shape[0], -1)
    d_MxP = jnp.concatenate([d.reshape(x_MxI.shape[0], -1) for d in cotangents], axis=1)
    return (d_MxP @ kernel_IxP.T).reshape(x.shape), (x_MxI.T @ d_MxP).reshape(kernel.shape)


products.defvjp(
    lambda x, kernel, mesh: (products(x, kernel, mesh), (x, kernel)), _products_backward
)
