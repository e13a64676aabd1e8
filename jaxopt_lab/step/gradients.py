"""Gradient estimators: values that turn a loss into a gradient. The step does not know which.

An estimator is called as `estimate(loss, params, batch, key)`. Where `loss` is evaluated, and how
often, is its own business.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

Batch = Mapping[str, Array]
Loss = Callable[[PyTree, Batch, Array], tuple[Array, Array, Mapping[str, Array]]]
"""(params, batch, key) -> (objective, weight, metrics), means over what the weight counts.

The objective is what gradients are of. Where it has terms besides the loss that is reported and
compared, such as the z-loss, `metrics["loss"]` is the loss without them."""


class Estimate(NamedTuple):
    """What an estimator found out about one batch. Everything is a mean weighted by `weight`."""

    loss: Float[Array, ""]  # the objective
    weight: Float[Array, ""]  # what the means are over, such as the number of tokens
    metrics: Mapping[str, Array]  # of the task; "loss" among them
    grads: PyTree  # in the dtype of the parameters, at least float32
    extra: Mapping[str, Any] = {}  # further arguments of the optimizer's update, such as `taps`


Estimator = Callable[[Loss, PyTree, Batch, Array], Estimate]


def measured(
    loss: Loss, params: PyTree, batch: Batch, key: Array
) -> tuple[Array, tuple[Array, dict[str, Array]]]:
    """(objective, (weight, metrics)), the loss to be reported among the metrics.

    Weight and metrics are float32 or wider.
    """
    objective, weight, metrics = loss(params, batch, key)
    metrics = {"loss": objective, **metrics}
    return objective, (_wide(weight), {name: _wide(value) for name, value in metrics.items()})


def backprop(loss: Loss, params: PyTree, batch: Batch, key: Array) -> Estimate:
    """The gradient of the batch in one pass."""

    def objective(params: PyTree) -> tuple[Array, tuple[Array, dict[str, Array]]]:
        return measured(loss, params, batch, key)

    (value, (weight, metrics)), grads = jax.value_and_grad(objective, has_aux=True)(params)
    return Estimate(_wide(value), weight, metrics, jax.tree.map(_wide, grads))


def accumulated(
    microbatches: int,
    part: Estimator = backprop,
    joined: Callable[[Any, Array], Mapping[str, Any]] = lambda extra, shares: extra,
) -> Estimator:
    """Backprop over one part of the batch after the other: memory of a part, gradient of the whole.

    Parts are weighted by their weights, so that the means are those of the whole batch. Part i has
    the key that is folded with i.

    Args:
      microbatches: Number of parts; divides the rows of the batch. 1 is `part`.
      part: The estimator of a part.
      joined: (the parts' `extra`, stacked; their shares of the weight) -> that of the batch.

    Raises:
      ValueError: Below 1.
    """
    if microbatches < 1:
        raise ValueError(f"microbatches: got {microbatches}, expected at least 1")
    if microbatches == 1:
        return part

    def estimate(loss: Loss, params: PyTree, batch: Batch, key: Array) -> Estimate:
        def sums(number: Array, micro: Batch) -> tuple[tuple[Array, Estimate], Any]:
            found = part(loss, params, micro, jax.random.fold_in(key, number))
            summed = _times(found._replace(extra={}), found.weight)
            return (found.weight, summed), (found.extra, found.weight)

        def add(total: PyTree, given: tuple[Array, Batch]) -> tuple[PyTree, Any]:
            found, apart = sums(*given)
            return jax.tree.map(jnp.add, total, found), apart

        parts = (jnp.arange(microbatches), _split(batch, microbatches))
        abstract, _ = jax.eval_shape(sums, *jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
        (weight, total), (extra, weights) = jax.lax.scan(add, zeros, parts)
        # A batch without any weight has nothing to learn from: loss and gradient 0.
        share = 1.0 / jnp.maximum(weight, 1.0)
        return _times(total, share)._replace(weight=weight, extra=joined(extra, share * weights))

    return estimate


def _times(found: Estimate, factor: Array) -> Estimate:
    return jax.tree.map(lambda x: x * factor.astype(x.dtype), found)


def _split(batch: Batch, parts: int) -> dict[str, Array]:
    def split(x: Array) -> Array:
        # Part i takes the rows i, i + k, ...: every device keeps its own rows, so that nothing
        # moves. Contiguous parts would each live on a part of the devices.
        rows = x.reshape(x.shape[0] // parts, parts, *x.shape[1:])
        return jnp.swapaxes(rows, 0, 1)

    return {name: split(x) for name, x in batch.items()}


def _wide(x: Array) -> Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
