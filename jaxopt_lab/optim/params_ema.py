"""An exponential moving average of the weights, kept beside any optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxopt_lab.core.checks import check_decays, check_dtype
from jaxopt_lab.core.numerics import Scalar, wide_dtype
from jaxopt_lab.optim.keywords import explains_keywords


class ParamsEmaState(NamedTuple):
    """State of `track_params_ema`."""

    count: Array  # shape=(), dtype=int32: steps taken
    ema: optax.Params  # the average: shapes of the parameters, dtype at least float32


@explains_keywords()
def track_params_ema(
    decay: Scalar, *, dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Keep $E_t = d_t E_{t-1} + (1 - d_t) W_t$ of the weights after each step.

    Put it last in a chain: it passes updates through, and the weights after the step are the
    parameters plus the updates it sees. The effective decay
    $d_t = \min(d, (1 + t) / (10 + t))$ lets the average forget the initial weights.

    Args:
      decay: $d$, in [0, 1).
      dtype: Dtype of the average; None: that of the parameters, at least float32 (in bfloat16 a
        decay of 0.999 would never move it).

    Raises:
      ValueError: `decay` is outside [0, 1).

    Example:
      >>> tx = optax.chain(optax.sgd(0.1), track_params_ema(0.99))
      >>> w = jnp.ones(2)
      >>> state = tx.init(w)
      >>> updates, state = tx.update(w, state, w)
      >>> bool((params_ema(state) < w).all())
      True
    """
    check_decays(decay=decay)
    check_dtype("dtype", dtype)

    def wide(x: Any):
        return jnp.dtype(dtype) if dtype else wide_dtype(x)

    def init(params: optax.Params) -> ParamsEmaState:
        def start(x):
            abstract = isinstance(x, jax.ShapeDtypeStruct)
            return jnp.zeros_like(x, wide(x)) if abstract else jnp.array(x, wide(x))

        return ParamsEmaState(jnp.zeros([], jnp.int32), jax.tree.map(start, params))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("track_params_ema needs update(grads, state, params)")
        t = state.count.astype(jnp.float32)
        d = jnp.minimum(decay, (1 + t) / (10 + t))

        def average(e: jax.Array, w: jax.Array, u: jax.Array) -> jax.Array:
            new = jnp.asarray(w, e.dtype) + jnp.asarray(u, e.dtype)
            return d.astype(e.dtype) * e + (1 - d).astype(e.dtype) * new

        ema = jax.tree.map(average, state.ema, params, updates)
        return updates, ParamsEmaState(jnp.asarray(optax.safe_increment(state.count)), ema)

    return optax.GradientTransformationExtraArgs(init, update)


def params_ema(state: optax.OptState) -> optax.Params:
    """The averaged weights inside the state of a chain with one `track_params_ema`.

    Raises:
      ValueError: The state holds none, or more than one.
    """
    found = [
        node
        for node in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, ParamsEmaState))
        if isinstance(node, ParamsEmaState)
    ]
    if len(found) != 1:
        raise ValueError(f"the state holds {len(found)} weight averages; wanted exactly one")
    return found[0].ema
