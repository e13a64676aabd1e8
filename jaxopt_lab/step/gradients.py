"""Gradient estimators: values that turn a loss into a gradient. The step does not know which.

An estimator is called as `estimate(loss, params, batch, key)`. Where `loss` is evaluated, and how
often, is its own business.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxopt_lab.zeroth_order.losses import fill_masked
from jaxopt_lab.zeroth_order.low_rank import beside
from jaxopt_lab.zeroth_order.replay import recorded

Batch = Mapping[str, Array]
Loss = Callable[..., tuple[Array, Array, Mapping[str, Array]]]
"""(params, batch, key) -> (objective, weight, metrics), means over what the weight counts.

The objective is what gradients are of. Where it has terms besides the loss that is reported and
compared, such as the z-loss, `metrics["loss"]` is the loss without them."""


class Estimate(NamedTuple):
    """What an estimator found out about one batch. Everything is a mean weighted by `weight`.

    Either there are gradients, or there is a `value_fn` among `extra` for an optimizer that makes
    its own; loss and metrics are then known `after` its update, from `losses`.
    """

    loss: Float[Array, ""] | None  # the objective
    weight: Float[Array, ""]  # what the means are over, such as the number of tokens
    metrics: Mapping[str, Array]  # of the task; "loss" among them
    grads: PyTree  # in the dtype of the parameters, at least float32; None: there are none
    extra: Mapping[str, Any] = {}  # further arguments of the optimizer's update, such as `value_fn`
    # (optimizer state after the update) -> losses that it evaluated, at or near the parameters
    losses: Callable[[PyTree], Array] | None = None

    def after(self, opt_state: PyTree) -> "Estimate":
        """With what the optimizer's update found out: the mean of the losses that are finite.

        NaN where none of them is.
        """
        if self.losses is None:
            return self
        losses = self.losses(opt_state)
        finite = jnp.isfinite(losses)
        loss = jnp.sum(jnp.where(finite, losses, 0)) / jnp.sum(finite)
        return self._replace(loss=loss, metrics={"loss": loss})


Estimator = Callable[[Loss, PyTree, Batch, Array], Estimate]


def measured(
    loss: Loss, params: PyTree, batch: Batch, key: Array, **options: Any
) -> tuple[Array, tuple[Array, dict[str, Array]]]:
    """(objective, (weight, metrics)), the loss to be reported among the metrics.

    Weight and metrics are float32 or wider. Options are passed to the loss.
    """
    objective, weight, metrics = loss(params, batch, key, **options)
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
    _check(microbatches)
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


def forward_only(
    microbatches: int = 1,
    *,
    losses: Callable[[PyTree], Array] = recorded,
    perturbed: Literal["trees", "layers", "beside"] = "trees",
) -> Estimator:
    """No gradient and no backward pass: the optimizer evaluates the objective itself.

    So do zero-order methods. Their update is called as `update(None, state, params, value_fn=...)`.
    Every evaluation of a step sees the same batch and the same keys. Of the metrics there is the
    loss alone: the mean of those that the optimizer has evaluated, which is that at the parameters
    up to the square of its perturbation, or exact where `losses` picks it out.

    Args:
      microbatches: Number of parts of the batch, evaluated one after the other; as for
        `accumulated`, with its keys and weights.
      losses: (optimizer state after the update) -> losses at or near the parameters.
      perturbed: Where parameters are perturbed. `trees`: before the loss sees them. `layers`:
        inside of it, one layer at a time; the loss takes `perturbation=(direction, scale)`
        (`zeroth_order.layerwise`). `beside`: low-rank directions stand beside the matrices; the
        loss takes `side=` (`zeroth_order.beside`). The last two need every parameter to move.

    Raises:
      ValueError: Below 1 part.
    """
    _check(microbatches)

    def estimate(loss: Loss, params: PyTree, batch: Batch, key: Array) -> Estimate:
        def mean(params: PyTree, **options: Any) -> Array:
            def one(part: tuple[Array, Batch]) -> tuple[Array, Array]:
                number, micro = part
                of_part = jax.random.fold_in(key, number)
                value, (weight, _) = measured(loss, params, micro, of_part, **options)
                return _wide(value), weight

            if microbatches == 1:
                return measured(loss, params, batch, key, **options)[0]
            parts = (jnp.arange(microbatches), _split(batch, microbatches))
            values, weights = jax.lax.map(one, parts)
            return jnp.sum(values * weights) / jnp.maximum(jnp.sum(weights), 1.0)

        # Nothing else of this evaluation is used, so that nothing else of it is compiled.
        _, (weight, _) = measured(loss, params, batch, key)
        extra: dict[str, Any] = {
            # What is frozen is a hole in `params`, which the loss fills.
            "trees": lambda: {"value_fn": fill_masked(mean, params)},
            "layers": lambda: {"probe_fn": lambda p, *at: mean(p, perturbation=at)},
            "beside": lambda: {"probe_fn": beside(lambda p, sides: mean(p, side=sides))},
        }[perturbed]()
        return Estimate(None, weight, {}, None, extra, losses)

    return estimate


def _check(microbatches: int) -> None:
    if microbatches < 1:
        raise ValueError(f"microbatches: got {microbatches}, expected at least 1")


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
