"""A stack of equal layers: stored with a leading layer axis, run one after the other."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from jaxopt_lab.core.packed import is_packed
from jaxopt_lab.models.encoder_config import ModelConfig
from jaxopt_lab.models.layers import attach
from jaxopt_lab.models.side import for_scan, of_layer

Layer = TypeVar("Layer", bound=nnx.Module)


def stacked(depth: int, layer: Callable[[nnx.Rngs], Layer], rngs: nnx.Rngs) -> Layer:
    """One module whose parameters are those of all layers, each drawn from a key of its own."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs: nnx.Rngs) -> Layer:
        return layer(rngs)

    return stack(rngs)


def through(
    config: ModelConfig,
    layers: nnx.Module,
    x: Any,
    call: Callable[[Any, Any, Any], Any],
    sides: Mapping[str, Any],
    keys: jax.Array | None = None,
) -> Any:
    """Activations after all layers, in the loop and with the remat of the configuration.

    Args:
        config: of the model.
        layers: from `stacked`.
        x: activations before the first layer, an array or a tree of them.
        call: (layer, activations, key) -> activations.
        sides: what stands beside linear layers of the stack.
        keys: one a layer; None: `call` gets none.
    """
    graphdef, weights = nnx.split(layers)
    # One cast of whole stacks is cheaper than one per layer. Vectors stay: their gradients are
    # long sums, and the norms work in float32 anyway.
    weights = jax.tree.map(
        lambda w: w.astype(config.compute_dtype) if w.ndim > 2 else w, weights, is_leaf=is_packed
    )

    def layer(x: Any, weights: Any, sides: Any, key: Any) -> Any:
        module = nnx.merge(graphdef, weights)
        attach(module, sides)
        return call(module, x, key)

    scanned = config.loop == "scanned"
    if config.remat != "none":
        policy = None
        if config.remat == "dots":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        layer = jax.checkpoint(layer, policy=policy, prevent_cse=not scanned)
    if scanned:
        xs = (weights, for_scan(sides), keys)
        return jax.lax.scan(lambda x, given: (layer(x, *given), None), x, xs)[0]
    for i in range(config.depth):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], (weights, keys))
        x = layer(x, own[0], of_layer(sides, i), own[1])
    return x
