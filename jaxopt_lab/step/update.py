"""The step: estimate the gradient, clip, update, guard. Pure functions of a state and a batch."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, PyTree

from jaxopt_lab.core.packed import refuse_packed
from jaxopt_lab.step.gradients import Batch, Estimate, Estimator, Loss, backprop
from jaxopt_lab.step.state import TrainState, merged, split

# Folded into a run's key, so that no step draws what the initial parameters were drawn from.
_OF_STEPS = np.uint32(0x57E95)


class Preview(NamedTuple):
    """What a step would do, without doing it."""

    loss: Float[Array, ""]  # of the batch, as it is reported
    grads: PyTree  # as the optimizer receives them
    updates: PyTree  # to be added to the parameters


@dataclass(frozen=True)
class Step:
    r"""One optimizer step.

    The estimate of the gradient is scaled by $\min(1, \mathrm{clip} / \lVert g \rVert_2)$ over all
    trainable parameters, cast to their dtype and given to `tx`, which also receives the reported
    loss as `value`, the objective without the terms that only regularise, and what else the
    estimate says that it needs.

    A guarded step whose objective or gradient norm is not finite leaves parameters and
    floating-point optimizer state as they were. Integer state and keys advance all the same: they
    count steps, and selecting between old and new counters would batch the predicates that
    transforms branch on. A transform that counts for each matrix, such as SOAP, refuses gradients
    that are not finite by itself; every leaf is NaN to it then. Such a step adds one to `skipped`.

    >>> def loss(params, batch, key):
    ...     return jnp.mean((batch["x"] - params["w"]) ** 2), batch["x"].size, {}
    >>> step = Step(loss, optax.sgd(0.25))
    >>> state = step.start({"w": jnp.zeros(())}, jax.random.key(0))
    >>> state, metrics = step.take(state, {"x": jnp.full((4,), 2.0)})
    >>> float(metrics["loss"]), float(state.params["w"])
    (4.0, 1.0)

    Args:
      loss: (params, batch, key) -> (objective, weight, metrics), on all parameters.
      tx: The optimizer; its updates are added.
      gradient: How the gradient is estimated.
      clip: Largest global gradient norm; None does not clip.
      guarded: Whether steps that are not finite are dropped.
    """

    loss: Loss
    tx: optax.GradientTransformation
    gradient: Estimator = backprop
    clip: float | None = None
    guarded: bool = True

    def start(self, params: PyTree, key: Array, trainable: PyTree | None = None) -> TrainState:
        """The state before the first step.

        Args:
          params: All parameters.
          key: Typed PRNG key of the run; may be the one that the parameters were drawn with.
          trainable: Tree of bools, False where a parameter is frozen; None lets everything move.

        Raises:
          TypeError: If packed weights are to move.
        """
        moving, frozen = split(params, trainable)
        refuse_packed(moving)
        zero, of_steps = jnp.zeros((), jnp.int32), jax.random.fold_in(key, _OF_STEPS)
        state = self.tx.init(moving)
        return TrainState(zero, zero, moving, frozen, state, jax.random.key_data(of_steps))

    def estimate(self, state: TrainState, batch: Batch) -> Estimate:
        """Loss and gradient at the state, neither clipped nor cast."""
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

        def loss(params: PyTree, batch: Batch, key: Array) -> tuple[Array, Array, PyTree]:
            return self.loss(merged(params, state.frozen), batch, key)

        return self.gradient(loss, state.params, batch, key)

    def received(self, state: TrainState, batch: Batch) -> tuple[Estimate, Float[Array, ""]]:
        """The estimate with gradients as the optimizer receives them, and their norm before."""
        found = self.estimate(state, batch)
        norm = optax.tree.norm(found.grads)
        grads = found.grads
        if self.clip is not None:
            scale = jnp.minimum(1.0, self.clip / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
            grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        # Optimizers keep the dtype of what they are given: parameters decide it.
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)
        return found._replace(grads=grads), norm

    def preview(self, state: TrainState, batch: Batch) -> Preview:
        """Loss, gradients and updates of the step that would be taken."""
        found, _ = self.received(state, batch)
        updates, _ = self._updates(state, found)
        return Preview(found.metrics["loss"], found.grads, updates)

    def take(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        """The state after the step, and its metrics.

        Returns:
          The state; the metrics of the task, and `grad_norm` before clipping, `weight`, `finite`
          and `skipped`.
        """
        found, norm = self.received(state, batch)
        # The norm is finite only if every gradient is, and it is at hand already.
        finite = jnp.isfinite(found.loss) & jnp.isfinite(norm)
        new = self._guarded(state, found, finite) if self.guarded else self._moved(state, found)
        metrics = {**found.metrics, "grad_norm": norm, "weight": found.weight}
        return new, metrics | {"finite": finite, "skipped": new.skipped}

    def _updates(self, state: TrainState, found: Estimate) -> tuple[PyTree, PyTree]:
        tx = optax.with_extra_args_support(self.tx)
        extra = {"value": found.metrics["loss"], **found.extra}
        return tx.update(found.grads, state.opt_state, state.params, **extra)

    def _moved(self, state: TrainState, found: Estimate) -> TrainState:
        updates, opt_state = self._updates(state, found)
        params = apply_updates(state.params, updates)
        return state._replace(step=state.step + 1, params=params, opt_state=opt_state)

    def _guarded(self, state: TrainState, found: Estimate, finite: Bool[Array, ""]) -> TrainState:
        # Leaves that are finite in a dropped step must not be taken for seen: a counter of theirs
        # would advance without the moments that it corrects.
        grads = jax.tree.map(lambda g: jnp.where(finite, g, jnp.nan), found.grads)
        new = self._moved(state, found._replace(grads=grads))

        def keep_if_bad(new: Array, old: Array) -> Array:
            return jnp.where(finite, new, old) if jnp.issubdtype(new.dtype, jnp.inexact) else new

        return new._replace(
            skipped=state.skipped + jnp.where(finite, 0, 1).astype(jnp.int32),
            params=jax.tree.map(keep_if_bad, new.params, state.params),
            opt_state=jax.tree.map(keep_if_bad, new.opt_state, state.opt_state),
        )


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """The parameters after a step, in their own dtype."""
    return optax.apply_updates(params, updates)
