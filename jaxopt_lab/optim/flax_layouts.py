"""Layouts of the parameters of Flax models, by the names that Linen and NNX give them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab.core.keys import path_names
from jaxopt_lab.optim.roles import WEIGHTS, module_names, role_by_name
from jaxopt_lab.optim.routing import Route, warn_unspecified

# Projections to heads, whose last axes are (inputs, heads, head size).
_PROJECTIONS = tuple(
    name
    for short, long in (("q", "query"), ("k", "key"), ("v", "value"))
    for name in (short, long, f"w{short}", f"{short}_proj", f"{long}_proj")
)
# The equations of Gemma's kernels; axes before the named ones are batch.
_EINSUMS = {
    "q_einsum": ((-2,), (-3, -1)),  # (heads, inputs, head size)
    "kv_einsum": ((-2,), (-3, -1)),  # (key and value, heads, inputs, head size)
    "qkv_einsum": ((-2,), (-3, -1)),
    "attn_vec_einsum": ((-3, -2), (-1,)),  # (heads, head size, outputs)
    "gating_einsum": ((-2,), (-1,)),
}


def flax_matrix_axes(params: optax.Params) -> Any:
    """Which axes form the matrices of a Linen or NNX model, for `matrix_axes`.

    All heads of an attention kernel belong to one matrix: `(inputs, heads, head_dim)` maps inputs
    to everything else, `(heads, head_dim, outputs)` everything else to outputs, and so for Gemma's
    einsums. A convolution maps all but its last axis to the last. Any other kernel maps to as many
    trailing axes as its bias has; an axis that both have in front is the axis of a scan over
    layers. Biases, scales, embeddings and output heads have no layout, wherever they have two axes.

    Args:
      params: The parameters: a dict, an `nnx.State`, with or without `nn.Partitioned` boxes, as
        arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      A tree like `params` with `optax.contrib.MuonDimensionNumbers` or None for each leaf. The
      function itself can be given too: `matrix_axes=flax_matrix_axes`.

    Warns:
      UserWarning: A leaf of more than two axes has a name and a shape that say nothing.

    Example:
      >>> import flax.linen as nn
      >>> attention = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
      >>> x = jnp.ones((1, 5, 6))
      >>> params = jax.eval_shape(attention.init, jax.random.key(0), x)["params"]
      >>> axes = flax_matrix_axes(params)
      >>> params["query"]["kernel"].shape, axes["query"]["kernel"]
      ((6, 2, 4), MuonDimensionNumbers(reduction_axis=(0,), output_axis=(1, 2)))
      >>> params["query"]["bias"].shape, axes["query"]["bias"]
      ((2, 4), None)
    """
    if isinstance(params, int | jax.Array) and jnp.issubdtype(jnp.result_type(params), jnp.integer):
        raise TypeError(
            "flax_matrix_axes got an integer, wanted parameters; under optax.inject_hyperparams, "
            'which takes functions for schedules, say static_args=("matrix_axes",) or give the '
            "tree flax_matrix_axes(params)"
        )
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    shapes = {path: tuple(jnp.shape(x)) for path, x in leaves}
    biases = {_owner(path): s for path, s in shapes.items() if module_names(path)[-1] == "bias"}
    attention = {_owner(path)[:-1] for path in shapes if _module(path) in _PROJECTIONS}
    layouts, unspecified = [], []
    for path, shape in shapes.items():
        layout = None
        if len(shape) > 1 and role_by_name(path) is None and sum(n > 1 for n in shape) > 1:
            bias = biases.get(_owner(path))
            layout = _layout(_module(path), shape, bias, _owner(path)[:-1] in attention)
            if layout is None:
                unspecified.append(Route(path, None, "unspecified"))
        layouts.append(layout and MuonDimensionNumbers(*layout))
    warn_unspecified(unspecified, [shapes[r.path] for r in unspecified])
    return treedef.unflatten(layouts)


_Axes = tuple[Sequence[int], Sequence[int]]  # reduction, output


def _layout(
    module: str, shape: tuple[int, ...], bias: tuple[int, ...] | None, in_attention: bool
) -> _Axes | None:
    rank = len(shape)
    axes = tuple(range(rank))
    bias_rank = None if bias is None else len(bias)
    if module in _EINSUMS and rank > 2:
        reduction, output = _EINSUMS[module]
        return tuple(a % rank for a in reduction), tuple(a % rank for a in output)
    # A scan over layers puts one axis more in front, of kernel and bias.
    if rank > 2 and module in _PROJECTIONS and bias_rank in (None, rank - 1):
        return axes[-3:-2], axes[-2:]
    if rank > 2 and in_attention and bias_rank in (None, rank - 2):
        return axes[-3:-1], axes[-1:]
    if bias is not None and bias == shape[rank - len(bias) :] and len(bias) < rank:
        return axes[: rank - len(bias)], axes[rank - len(bias) :]
    if bias is not None and len(bias) > 1 and bias[0] == shape[0]:
        inner = len(bias) - 1
        if bias[1:] == shape[rank - inner :] and inner < rank - 1:
            return axes[1 : rank - inner], axes[rank - inner :]
    if rank == 2:
        return axes[:1], axes[1:]
    if rank == 4 or "conv" in module.lower():
        return axes[:-1], axes[-1:]
    return None


def _owner(path: KeyPath) -> tuple[str, ...]:
    """The names of the module that a leaf belongs to."""
    names = path_names(path)
    return names[:-1] if names and names[-1] in (*WEIGHTS, "bias") else names


def _module(path: KeyPath) -> str:
    owner = _owner(path)
    return owner[-1] if owner else ""
