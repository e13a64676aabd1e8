"""Steps of adapters: a loss beside a frozen base, and its gradient with taps."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxopt_lab.lora.adapters import Adapters, whole_leaves
from jaxopt_lab.lora.config import LoraSpec
from jaxopt_lab.lora.side import side
from jaxopt_lab.lora.taps import joined_taps, value_grad_and_taps
from jaxopt_lab.step import Adapted, Batch, Estimate, Estimator, Loss, accumulated, measured


class WithSides(NamedTuple):
    """Adapters, and the sides that a loss shall give to the model."""

    adapters: Adapters
    sides: Mapping[str, Any]

    @classmethod
    def of(cls, moving: Any, spec: LoraSpec, key: Array | None = None) -> "WithSides":
        """What a loss makes of the tree that moves.

        Args:
          moving: Adapters, with their own sides then, or what `with_taps` puts in their place.
          spec: Theirs.
          key: Of dropout; None: no dropout.
        """
        return moving if isinstance(moving, cls) else cls(moving, side(moving, spec, key))


def loss_beside(loss: Loss, spec: LoraSpec, *, dropout: bool = True) -> Loss:
    """A loss of `Adapted` parameters, a base and adapters, from that of a model.

    Args:
      loss: (params, batch, key, side=) -> (objective, weight, metrics), as tasks have it.
      spec: Of the adapters, and of the leaves that are trained whole.
      dropout: Whether adapters drop inputs, as in training.
    """

    def of_both(params: Adapted, batch: Batch, key: Array) -> Any:
        given = WithSides.of(params.beside, spec, key if dropout else None)
        whole = whole_leaves(params.base, given.adapters, spec)
        return loss(whole, batch, key, side=given.sides)

    return of_both


def with_taps(spec: LoraSpec, microbatches: int = 1) -> Estimator:
    r"""Backprop that also gives `taps`: inputs and output gradients of every adapted layer.

    What `lorsum` and `scaled_lorsum` need of a step. The loss gets `WithSides` in place of the
    adapters, as `loss_beside` takes them.

    >>> import optax
    >>> from jaxopt_lab import lora
    >>> from jaxopt_lab.step import Adapted, Step
    >>> base = {"layer": {"kernel": jnp.ones((3, 2))}}
    >>> layout = {"layer": {"kernel": optax.contrib.MuonDimensionNumbers(0, 1)}}
    >>> spec = lora.resolve(lora.LoraConfig(rank=1), base, layout)
    >>> def loss(params, batch, key, side):
    ...     y = side["layer"].product(batch["x"], params["layer"]["kernel"])
    ...     return jnp.mean(y**2), len(y), {}
    >>> beside = lora.loss_beside(loss, spec)
    >>> step = Step(beside, lora.scaled_lorsum(0.1), lora.with_taps(spec))
    >>> adapters = lora.init(jax.random.key(0), spec, base)
    >>> state = step.start(Adapted(base, adapters), jax.random.key(1))
    >>> found = jax.eval_shape(step.estimate, state, {"x": jnp.eye(4, 3)})
    >>> found.extra["taps"]["layer"]["kernel"].x.shape
    (4, 3)

    Args:
      spec: Of the adapters.
      microbatches: Parts of a batch; the taps of the batch have the rows of all of them.

    Raises:
      ValueError: Below 1 part; in a step as `value_grad_and_taps`.
    """

    def part(loss: Loss, adapters: PyTree, batch: Batch, key: Array) -> Estimate:
        def objective(adapters: PyTree, sides: Mapping[str, Any]) -> Any:
            return measured(loss, WithSides(adapters, sides), batch, key)

        (value, (weight, metrics)), grads, taps = value_grad_and_taps(
            objective, adapters, spec, key, has_aux=True
        )
        wide = jnp.promote_types(value.dtype, jnp.float32)
        return Estimate(value.astype(wide), weight, metrics, grads, {"taps": taps})

    def joined(parts: Any, shares: Array) -> Any:
        each = [jax.tree.map(lambda x, i=i: x[i], parts["taps"]) for i in range(microbatches)]
        return {"taps": joined_taps(each, list(shares))}

    return accumulated(microbatches, part, joined)
