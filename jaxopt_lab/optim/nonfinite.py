"""The one rule for gradients that are not finite, or whose square is not.

Such a gradient never enters a state. A rule that works entry by entry leaves out those entries:
their moments stay, their update is 0, and nothing is counted, because a count would be a reduction
over a leaf that may be sharded. A rule that works on whole matrices leaves out the matrix and
counts it. The next good gradient moves them again.

Inside the library a direction says NaN where it was refused, or where its method takes no step:
that costs no array of its own and crosses a mesh with the direction. `guarded` turns it into an
update of 0, weight decay included.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from jaxopt_lab.core.numerics import widened
from jaxopt_lab.optim.routing import float_leaves


def finite_entries(gradient: Array) -> Bool[Array, "..."]:
    """Which entries may enter a state: those that are finite and whose square is."""
    return jnp.isfinite(jnp.square(widened(gradient)))


def guarded(
    direction: optax.GradientTransformationExtraArgs, *rest: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """`optax.chain(direction, *rest)`, whose update is 0 wherever the direction is NaN.

    Updates have the dtypes of the gradients, whatever the dtypes of rates and decays.

    Args:
      direction: Says NaN where a gradient was refused, and where no step is taken.
      *rest: What follows: weight decay, the learning rate. It sees 0 in these places. Without
        anything, the state is that of the direction alone.
    """
    tail = optax.with_extra_args_support(optax.chain(*(rest or (optax.identity(),))))

    def init(params: optax.Params) -> Any:
        params = float_leaves(params)
        start = direction.init(params)
        others: Any = tail.init(params)
        return (start, *others) if rest else start

    def update(updates, state, params=None, **extra_args):
        first, others = (state[0], state[1:]) if rest else (state, (optax.EmptyState(),))
        updates = float_leaves(updates, params)
        params = None if params is None else float_leaves(params)
        steps, first = direction.update(updates, first, params, **extra_args)
        refused = jax.tree.map(jnp.isnan, steps)
        out = jax.tree.map(lambda u, no: jnp.where(no, 0, u), steps, refused)
        out, tail_state = tail.update(out, others, params, **extra_args)
        out = jax.tree.map(
            lambda u, no, g: jnp.where(no, 0, u).astype(g.dtype), out, refused, updates
        )
        return out, (first, *cast(tuple, tail_state)) if rest else first

    return optax.GradientTransformationExtraArgs(init, update)
