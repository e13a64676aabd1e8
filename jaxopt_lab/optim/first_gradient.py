"""Two habits of the released SOAP and DyKAF, for any rule: the first gradient, and late decay."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxopt_lab.optim.routing import Scalar, broadcast_prefix


class SkipFirstGradientState(NamedTuple):
    """State of `skip_first_gradient`."""

    count: Array  # shape=(), dtype=int32: gradients seen
    inner_state: Any  # of the wrapped transformation, which has not seen the first one


def skip_first_gradient(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Hide the first gradient from a transformation: the first update is zero.

    Args:
      inner: Any transformation. Its counters start at the second gradient, so schedules that must
        keep in step with those of other leaves belong behind the wrapper, not inside.

    Example:
      >>> tx = skip_first_gradient(optax.scale(-1.0))
      >>> state = tx.init(jnp.ones(2))
      >>> first, state = tx.update(jnp.ones(2), state)
      >>> second, state = tx.update(jnp.ones(2), state)
      >>> first.tolist(), second.tolist()
      ([0.0, 0.0], [-1.0, -1.0])
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> SkipFirstGradientState:
        return SkipFirstGradientState(jnp.zeros([], jnp.int32), inner.init(params))

    def update(updates, state, params=None, **extra_args):
        first = state.count == 0
        out, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        return (
            jax.tree.map(lambda u: jnp.where(first, jnp.zeros_like(u), u), out),
            SkipFirstGradientState(
                count=jnp.asarray(optax.safe_increment(state.count)),
                inner_state=jax.tree.map(
                    lambda old, new: jnp.where(first, old, new), state.inner_state, inner_state
                ),
            ),
        )

    return optax.GradientTransformationExtraArgs(init, update)


class AddDecayAfterStepState(NamedTuple):
    """State of `add_decay_after_step`."""

    count: Array  # shape=(), dtype=int32: updates seen


def add_decay_after_step(
    weight_decay: Scalar,
    learning_rate: optax.ScalarOrSchedule,
    mask: Any = None,
    *,
    skip_first_step: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Weight decay of the weights that the step has already moved.

    .. math::
      W \leftarrow (1 - \eta \lambda) (W - \eta U) \quad\Longleftrightarrow\quad
      W \leftarrow W - \eta \left[ (1 - \eta \lambda) U + \lambda W \right]

    The bracket is what this returns; follow it with `optax.scale_by_learning_rate` of the same
    rate. `optax.add_decayed_weights` differs by $\eta^2 \lambda U$.

    Args:
      weight_decay: $\lambda$.
      learning_rate: $\eta$, a number or a schedule.
      mask: Which leaves decay: a tree of bools, a prefix of one, or a function of the parameters.
      skip_first_step: Let the first update pass as it is.
    """

    def init(params: optax.Params) -> AddDecayAfterStepState:
        del params
        return AddDecayAfterStepState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("weight_decay needs the parameters: call update(grads, state, params)")
        rate: Any = learning_rate(state.count) if callable(learning_rate) else learning_rate
        decay: Any = (
            jnp.where(state.count == 0, 0, weight_decay) if skip_first_step else weight_decay
        )

        def decayed(u: Array, w: Array) -> Array:
            wide = jnp.promote_types(u.dtype, jnp.float32)
            moved = (1 - rate * decay) * u.astype(wide) + decay * w.astype(wide)
            return moved.astype(u.dtype)

        leaves, treedef = jax.tree.flatten(updates)
        decaying = broadcast_prefix("mask", True if mask is None else mask, updates)
        pairs = zip(leaves, jax.tree.leaves(params), decaying, strict=True)
        out = treedef.unflatten([decayed(u, w) if d else u for u, w, d in pairs])
        return out, AddDecayAfterStepState(jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformationExtraArgs(init, update)
