"""AdamW for everything that is not a matrix, as the LionMuon code base has it."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jaxopt_lab.optim.routing import (
    FALLBACK_LABEL,
    MatrixAxesSpec,
    OnUncovered,
    Scalar,
    partition_labels,
)


def one_minus_power(b: Scalar, t: jax.Array) -> jax.Array:
    """`1 - b**t` without the cancellation that costs float32 five digits at b = 0.999, t = 1."""
    if isinstance(b, int | float):
        log_b = math.log(b) if b > 0 else -math.inf
    else:
        log_b = jnp.log(b)
    return -jnp.expm1(t * log_b)


def scale_by_adamw_fallback(
    *,
    b1: Scalar = 0.8,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with epsilon added to the uncorrected root of the second moment.

    .. math::
      \frac{\sqrt{1 - b_2^t}}{1 - b_1^t} \cdot \frac{m_t}{\sqrt{v_t} + \epsilon}

    which is Adam with $\epsilon / \sqrt{1 - b_2^t}$ in the usual place: larger in the first steps.

    Args:
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to $\sqrt{v_t}$ before the bias correction.
      mu_dtype: Dtype of the first moment; None: that of the parameters.

    Returns:
      A transformation whose state is `optax.ScaleByAdamState`.

    Source: Bolatov et al., "LionMuon", arXiv 2605.19811, released code.
    """

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        return optax.ScaleByAdamState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            nu=optax.tree.zeros_like(params),
        )

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        count = jnp.asarray(optax.safe_increment(state.count))

        def direction(g: jax.Array, m: jax.Array, v: jax.Array):
            wide = jnp.promote_types(g.dtype, jnp.float32)
            t = count.astype(wide)
            g_wide = g.astype(wide)
            m_new = b1 * m.astype(wide) + (1 - b1) * g_wide
            v_new = b2 * v.astype(wide) + (1 - b2) * jnp.square(g_wide)
            correction = jnp.sqrt(one_minus_power(b2, t)) / one_minus_power(b1, t)
            step = correction * m_new / (jnp.sqrt(v_new) + eps)
            return step.astype(g.dtype), m_new.astype(m.dtype), v_new.astype(v.dtype)

        treedef = jax.tree.structure(updates)
        leaves = map(jax.tree.leaves, (updates, state.mu, state.nu))
        out = [direction(*triple) for triple in zip(*leaves, strict=True)]
        steps, mu, nu = (treedef.unflatten([triple[k] for triple in out]) for k in range(3))
        return steps, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformationExtraArgs(init, update)


def with_adamw_fallback(
    label: str,
    matrix_tx: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    weight_decay: optax.ScalarOrSchedule,
    matrix_axes: MatrixAxesSpec,
    mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    on_uncovered: OnUncovered = "adamw",
    vocabulary_size: int | None = None,
    labels: Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Give matrices to `matrix_tx` and all other leaves to AdamW.

    Args:
      label: Name of the matrix group in the state and in `describe`.
      matrix_tx: The complete rule of the matrices, rate and decay included.
      learning_rate: Rate of AdamW.
      b1: First-moment decay.
      b2: Second-moment decay.
      eps: Epsilon on the uncorrected root.
      weight_decay: Decoupled decay.
      matrix_axes: As in `route`.
      mask: Which leaves decay.
      mu_dtype: Dtype of the first moment.
      on_uncovered: As in `route`.
      vocabulary_size: As in `route`.
      labels: Which leaves go where, by `label` and "adamw"; None: as `route` says.
    """
    adamw = optax.chain(
        scale_by_adamw_fallback(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype),
        # Also for a decay of zero: the structure of the state must not depend on a number.
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    if labels is None:
        labels = partition_labels(
            label, matrix_axes, on_uncovered=on_uncovered, vocabulary_size=vocabulary_size
        )
    return optax.partition({label: matrix_tx, FALLBACK_LABEL: adamw}, labels)
