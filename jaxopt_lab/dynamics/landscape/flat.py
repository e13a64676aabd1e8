"""What the ensemble laboratory asks of a loss and its data: float64, flat parameters, samples."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

Loss = Callable[[PyTree, PyTree], Array]  # (params, batch) -> mean loss of the batch, a scalar


def in_double(tree: PyTree) -> PyTree:
    """Arrays of the tree on the device, floating ones as float64; call it with x64 enabled."""

    def convert(x: Any) -> Array:
        x = jnp.asarray(x)
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(convert, tree)


def sample_count(data: PyTree) -> int:
    """Length of the leading axis that all leaves of the data share.

    Raises:
      ValueError: No leaves, a leaf without axes, no samples, or leaves of different lengths.
    """
    leaves = jax.tree_util.tree_leaves_with_path(data)
    if not leaves:
        raise ValueError("data: no arrays; expected a tree of arrays with a leading sample axis")
    lengths = {}
    for path, leaf in leaves:
        shape = np.shape(leaf)
        name = f"data{jax.tree_util.keystr(path)}"
        if not shape or not shape[0]:
            raise ValueError(f"{name} has shape {shape}; expected a leading sample axis, not empty")
        lengths[name] = shape[0]
    if len(set(lengths.values())) > 1:
        raise ValueError(f"data: the leaves hold different numbers of samples: {lengths}")
    return next(iter(lengths.values()))


def take(data: PyTree, indices: Int[Array, "batch"]) -> PyTree:
    """The batch of the samples with these indices."""
    return jax.tree.map(lambda x: x[indices], data)


def parameter_count(params: PyTree) -> int:
    """Number of scalars in the tree."""
    return sum(int(np.prod(np.shape(x))) for x in jax.tree.leaves(params))


def displaced(
    loss: Loss, params: PyTree
) -> Callable[[Float[Array, "parameters"], PyTree], Float[Array, ""]]:
    """The loss as a function of the flat displacement θ = w - w* and the batch."""
    reference, unravel = ravel_pytree(params)
    return lambda theta, batch: loss(unravel(reference + theta), batch)


def check_loss(loss: Loss, params: PyTree, data: PyTree) -> int:
    """Number of samples of data that the loss accepts.

    Raises:
      ValueError: Parameters that are not floating point, data without a common sample axis, or a
        loss that is not a floating-point scalar.
    """
    samples = sample_count(data)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            name = jax.tree_util.keystr(path)
            raise ValueError(f"params{name} is {jnp.result_type(leaf)}, expected floating point")
    out = jax.eval_shape(loss, params, data)
    if not hasattr(out, "shape") or out.shape != () or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(f"loss: returned {out}, expected the mean loss of the batch, a scalar")
    return samples
