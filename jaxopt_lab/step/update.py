"""The step: estimate the gradient, clip, update, guard. Pure functions of a state and a batch."""

from dataclasses import dataclass
from typing import Any, NamedTuple

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
    grads: PyTree  # as the optimizer receives them; None where it receives none
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

    With `forward_only` there is no gradient: nothing is clipped, `tx` receives `value_fn` in place
    of gradient and `value`, and a step is dropped if no loss that it evaluated is finite.

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

        def loss(params: PyTree, batch: Batch, key: Array, **options: Any) -> Any:
            return self.loss(merged(params, state.frozen), batch, key, **options)

        return self.gradient(loss, state.params, batch, key)

    def received(self, state: TrainState, batch: Batch) -> tuple[Estimate, Float[Array, ""] | None]:
        """The estimate with gradients as the optimizer receives them, and their norm before."""
        found = self.estimate(state, batch)
        if found.grads is None:
            return found, None
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
        updates, opt_state = self._updates(state, found)
        return Preview(found.after(opt_state).metrics["loss"], found.grads, updates)

    def take(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        """The state after the step, and its metrics.

        Returns:
          The state; the metrics of the task, and `grad_norm` before clipping (where there is a
          gradient), `weight`, `finite` and `skipped`.
        """
        found, norm = self.received(state, batch)
        # The norm is finite only if every gradient is, and it is at hand already.
        finite = _finite(found.loss) & _finite(norm)
        if self.guarded and norm is not None:
            found = _wholly(found, finite)
        updates, opt_state = self._updates(state, found)
        found = found.after(opt_state)
        finite &= _finite(found.loss)
        params = apply_updates(state.params, updates)
        new = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
        if self.guarded:
            new = _guarded(state, new, finite)
        norms = {} if norm is None else {"grad_norm": norm}
        metrics = {**found.metrics, **norms, "weight": found.weight}
        return new, metrics | {"finite": finite, "skipped": new.skipped}

    def _updates(self, state: TrainState, found: Estimate) -> tuple[PyTree, PyTree]:
        tx = optax.with_extra_args_support(self.tx)
        # Without gradients the loss is not known yet.
        value = {} if found.grads is None else {"value": found.metrics["loss"]}
        grads: Any = found.grads
        return tx.update(grads, state.opt_state, state.params, **value, **found.extra)


def _finite(x: Array | None) -> Bool[Array, ""]:
    return jnp.ones((), bool) if x is None else jnp.isfinite(x)


def _wholly(found: Estimate, finite: Bool[Array, ""]) -> Estimate:
    """Gradients of which either all are used or none."""
    # Leaves that are finite in a dropped step must not be taken for seen: a counter of theirs
    # would advance without the moments that it corrects.
    return found._replace(grads=jax.tree.map(lambda g: jnp.where(finite, g, jnp.nan), found.grads))


def _guarded(old: TrainState, new: TrainState, finite: Bool[Array, ""]) -> TrainState:
    """The new state, or of a step that is dropped only its counters and keys."""

    def has_own_rule(node: Any) -> bool:
        return hasattr(node, "not_guarded")

    def keep_if_bad(new: Any, old: Any) -> Any:
        if has_own_rule(new):
            names = [name for name in new._fields if name not in new.not_guarded]
            both = ((name, getattr(new, name), getattr(old, name)) for name in names)
            return new._replace(**{name: jax.tree.map(keep_if_bad, *pair) for name, *pair in both})
        return jnp.where(finite, new, old) if jnp.issubdtype(new.dtype, jnp.inexact) else new

    return new._replace(
        skipped=old.skipped + jnp.where(finite, 0, 1).astype(jnp.int32),
        params=jax.tree.map(keep_if_bad, new.params, old.params),
        opt_state=jax.tree.map(keep_if_bad, new.opt_state, old.opt_state, is_leaf=has_own_rule),
    )


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """The parameters after a step, in their own dtype."""
    return optax.apply_updates(params, updates)
