"""AdamW for everything that is not a matrix."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from jaxopt_lab.core.checks import NOT_NEGATIVE, check_decays, check_dtype, check_number
from jaxopt_lab.core.numerics import Scalar, one_minus_power, safe_divide, wide_dtype, widened
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.nonfinite import finite_entries, guarded
from jaxopt_lab.optim.options import AdamW, Routing
from jaxopt_lab.optim.rates import decayed_weights, scaled_rate
from jaxopt_lab.optim.routing import (
    FALLBACK_LABEL,
    MatrixAxesSpec,
    checks_leaves,
    partition_labels,
)


@explains_keywords(eps_root="eps=..., which stands outside of the root")
def scale_by_adamw_fallback(
    *,
    b1: Scalar = 0.8,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with epsilon added to the uncorrected root of the second moment.

    $$\frac{\sqrt{1 - b_2^t}}{1 - b_1^t} \cdot \frac{m_t}{\sqrt{v_t} + \epsilon}$$

    This is Adam with $\epsilon / \sqrt{1 - b_2^t}$ in the usual place: larger in the first steps.
    Entries of a gradient that are not finite, or whose square is not, keep their moments and do not
    move.

    Args:
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to $\sqrt{v_t}$ before the bias correction.
      mu_dtype: Dtype of the first moment; None: that of the parameters.

    Returns:
      A transformation with state `optax.ScaleByAdamState`, whose second moment is float32 or wider.

    Example:
      >>> tx = scale_by_adamw_fallback()
      >>> g = jnp.array([2.0, jnp.nan])
      >>> [round(float(x), 5) for x in tx.update(g, tx.init(g))[0]]
      [1.0, 0.0]

    Source: Bolatov et al., "LionMuon", arXiv 2605.19811, released code.
    """
    return guarded(adam_direction(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype))


def adam_direction(
    *,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    mu_dtype: DTypeLike | None = None,
    skip_first_step: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_adamw_fallback` with NaN where an entry takes no step (`nonfinite.guarded`).

    `skip_first_step`: leave out the first gradient altogether, as SOAP does.
    """
    check_decays(b1=b1, b2=b2)
    check_number("eps", eps, NOT_NEGATIVE)
    check_dtype("mu_dtype", mu_dtype)
    skipped = 1 if skip_first_step else 0

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        return optax.ScaleByAdamState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            nu=jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(p)), params),
        )

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        count = jnp.asarray(optax.safe_increment(state.count))
        takes_step = count > skipped

        def direction(g: jax.Array, m: jax.Array, v: jax.Array):
            t = jnp.maximum(count - skipped, 1).astype(wide_dtype(g))
            usable = finite_entries(g) & takes_step
            g_wide = jnp.where(usable, widened(g), 0)
            m_new = b1 * widened(m) + (1 - b1) * g_wide
            v_new = (b2 * v + (1 - b2) * jnp.square(g_wide)).astype(v.dtype)
            # A narrow moment may overflow where the gradient does not.
            usable &= jnp.isfinite(m_new.astype(m.dtype))
            correction = jnp.sqrt(one_minus_power(b2, t)) / one_minus_power(b1, t)
            step = correction * safe_divide(m_new, jnp.sqrt(v_new) + eps)
            m_new = jnp.where(usable, m_new.astype(m.dtype), m)
            return jnp.where(usable, step, jnp.nan), m_new, jnp.where(usable, v_new, v)

        treedef = jax.tree.structure(updates)
        leaves = map(jax.tree.leaves, (updates, state.mu, state.nu))
        out = [direction(*triple) for triple in zip(*leaves, strict=True)]
        steps, mu, nu = (treedef.unflatten([triple[k] for triple in out]) for k in range(3))
        return steps, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformationExtraArgs(init, update)


def with_fallback(
    label: str,
    matrix_tx: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    fallback: AdamW,
    *,
    b1: Scalar,
    b2: Scalar,
    eps: Scalar = 1e-8,
    weight_decay: optax.ScalarOrSchedule,
    mask: Any,
    matrix_axes: MatrixAxesSpec,
    routing: Routing,
    mu_dtype: DTypeLike | None = None,
    skip_first_step: bool = False,
    labels: Callable[[optax.Params], Any] | None = None,
    **others: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Matrices to `matrix_tx`, all other leaves to AdamW.

    `matrix_tx` is the complete rule of the group `label`, rate and decay included; `others` are
    further groups, and `labels` says which leaves go where (None: as `route` does). Where
    `fallback` says None, AdamW has the numbers given here, which are those of the method.
    """

    def given(value: Any, of_method: Any) -> Any:
        return of_method if value is None else value

    direction = adam_direction(
        b1=given(fallback.b1, b1),
        b2=given(fallback.b2, b2),
        eps=given(fallback.eps, eps),
        mu_dtype=mu_dtype,
        skip_first_step=skip_first_step,
    )
    rate = given(fallback.learning_rate, scaled_rate(learning_rate, fallback.lr_ratio))
    decay = decayed_weights(given(fallback.weight_decay, weight_decay), mask, routing)
    adamw = guarded(direction, decay, optax.scale_by_learning_rate(rate))
    if labels is None:
        labels = partition_labels(label, matrix_axes, routing)
    tx = optax.partition({label: matrix_tx, FALLBACK_LABEL: adamw, **others}, labels)
    return checks_leaves(tx, matrix_axes, routing)
