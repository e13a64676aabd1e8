"""What an optimizer of pairs sees of a layer besides the gradients of the factors."""

from dataclasses import dataclass, field

import jax
from jaxtyping import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tap:
    r"""Inputs of an adapted layer and gradients at its output: $X^\top S$ is that of its kernel."""

    x: Array
    """Inputs, one row for each token: (rows, inputs), or (layers, rows, inputs). Adapters that
    share their inputs, such as those of a fused projection, share an entry."""

    s: Array
    """Gradients of the loss at the outputs: (rows, outputs), or (adapters, rows, outputs)."""

    scale: float = field(default=1.0, metadata={"static": True})
    """Of the adapter: its layer adds `scale * (x a) b`."""

    factor: Array | float = 1.0
    """Of the gradient, beside its statistics: what clipping leaves of it."""
