"""Mean and variance of the weights along chosen directions, gathered inside the optimizer state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

from jaxopt_lab.diagnostics.recording import find_state


class FluctuationState(NamedTuple):
    """State of `record_fluctuations`: what Welford's recursion keeps."""

    count: Int[Array, ""]  # shape=(), dtype=int32: weights seen
    mean: Float[Array, " k"]  # shape=(k,), at least float32: mean of the projections
    m2: Float[Array, " k"]  # shape=(k,), same dtype: sum of squared deviations from the mean


def record_fluctuations(
    reference: optax.Params, directions: Float[Array, "D k"]
) -> optax.GradientTransformationExtraArgs:
    r"""Follow $y_n = O^\top (w_n - w^*)$ of a run; updates pass through.

    The state holds mean and squared deviations of $y$ over the steps (Welford's recursion, stable
    where a sum of squares is not), never a trajectory. $w_n$ are the parameters handed to `update`,
    before its step; the reference is subtracted before projecting, because the variances of flat
    directions are often below the rounding of the weights themselves.

    Args:
      reference: $w^*$, a tree like the parameters.
      directions: $O$: vectors in the columns, as long as the parameters flattened by
        `jax.flatten_util.ravel_pytree`.

    Raises:
      ValueError: `directions` does not fit `reference`; at `init`, the parameters have other leaves
        than `reference`; at `update`, `params` is missing.

    Example:
      >>> w = jnp.zeros(2)
      >>> tx = optax.chain(optax.sgd(1.0), record_fluctuations(w, jnp.eye(2)[:, :1]))
      >>> state = tx.init(w)
      >>> for g in jnp.array([[1.0, 0.0], [-1.0, 0.0]]):
      ...     updates, state = tx.update(g, state, w)
      ...     w = optax.apply_updates(w, updates)
      >>> fluctuation_mean(state).tolist(), fluctuation_variance(state).tolist()
      ([-0.5], [0.5])

    Source: Ignashin, Radovskaya, Semenov, Lopatin, Potapov, Kovalenko, Veprikov, Shestakov,
    Leonidov, Beznosikov, "Why SGD is not Brownian Motion", arXiv 2605.22644.

    Differs from the released code in: it keeps no list of weights.
    """
    origin, _ = ravel_pytree(reference)
    if jnp.ndim(directions) != 2 or directions.shape[0] != origin.size:
        raise ValueError(
            f"directions: got shape {jnp.shape(directions)}, expected ({origin.size}, k) for a "
            f"reference of {origin.size} entries"
        )
    dtype = jnp.promote_types(jnp.promote_types(origin.dtype, directions.dtype), jnp.float32)
    basis = directions.astype(dtype)
    shapes = jax.tree.map(jnp.shape, reference)

    def init(params: optax.Params) -> FluctuationState:
        if jax.tree.map(jnp.shape, params) != shapes:
            raise ValueError("params: other leaves than the reference of record_fluctuations")
        zeros = jnp.zeros(basis.shape[1], dtype)
        return FluctuationState(jnp.zeros([], jnp.int32), zeros, zeros)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                "params: missing; record_fluctuations needs tx.update(grads, state, params)"
            )
        offsets = jax.tree.map(
            lambda w, r: w.astype(dtype) - jnp.asarray(r, dtype), params, reference
        )
        projected = ravel_pytree(offsets)[0] @ basis
        count = jnp.asarray(optax.safe_increment(state.count))
        before = projected - state.mean
        mean = state.mean + before / count.astype(dtype)
        m2 = state.m2 + before * (projected - mean)
        return updates, FluctuationState(count, mean, m2)

    return optax.GradientTransformationExtraArgs(init, update)


def fluctuation_mean(state: optax.OptState) -> Float[Array, "*runs k"]:
    """Mean projection over the steps, from the state of any chain with a recorder.

    Raises:
      ValueError: The state holds no recorder.
    """
    return find_state(state, FluctuationState).mean


def fluctuation_variance(state: optax.OptState) -> Float[Array, "*runs k"]:
    """Unbiased variance of the projections over the steps; NaN below two steps.

    Args:
      state: The state of any chain with a recorder, of one run or with leading axes of runs.

    Raises:
      ValueError: The state holds no recorder.
    """
    recorded = find_state(state, FluctuationState)
    divisor = recorded.count[..., None] - 1
    variance = recorded.m2 / jnp.maximum(divisor, 1).astype(recorded.m2.dtype)
    return jnp.where(divisor >= 1, variance, jnp.nan)
