"""ZO-AdaMM: AMSGrad on estimates."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxopt_lab.core.checks import check_decays, check_rates
from jaxopt_lab.core.numerics import Scalar, wide_dtype, widened
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.nonfinite import finite_entries
from jaxopt_lab.optim.routing import float_leaves
from jaxopt_lab.zeroth_order.estimators import estimated
from jaxopt_lab.zeroth_order.probes import Probes


class AdaMMState(NamedTuple):
    """State of `scale_by_adamm`; trees like the parameters, float32 or wider."""

    mu: optax.Updates  # average of the gradients
    nu: optax.Updates  # average of their squares
    nu_max: optax.Updates  # largest nu so far


def scale_by_adamm(
    *, b1: Scalar = 0.9, b2: Scalar = 0.999, eps: Scalar = 1e-10
) -> optax.GradientTransformationExtraArgs:
    r"""AMSGrad without bias correction.

    $$m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2,
    \quad \hat v \leftarrow \max(\hat v, v), \quad u = \frac{m}{\sqrt{\hat v} + \epsilon}.$$

    Entries of a gradient that are not finite, or whose square is not, stay out of the state and
    have an update of 0.

    Args:
      b1: $\beta_1$.
      b2: $\beta_2$.
      eps: Added to the root.
    """
    check_decays(b1=b1, b2=b2)

    def init(params: optax.Params) -> AdaMMState:
        def zeros() -> optax.Updates:
            return jax.tree.map(lambda p: jnp.zeros_like(p, wide_dtype(p)), float_leaves(params))

        return AdaMMState(zeros(), zeros(), zeros())

    def update(updates, state, params=None, **extra_args):
        del extra_args
        updates = float_leaves(updates, params)

        def step(g: Array, *old: Array) -> tuple[Array, ...]:
            usable, wide = finite_entries(g), widened(g)
            mu, nu, largest = old
            mu, nu = b1 * mu + (1 - b1) * wide, b2 * nu + (1 - b2) * wide**2
            new = mu, nu, jnp.maximum(largest, nu)
            kept = [jnp.where(usable, n, o).astype(o.dtype) for n, o in zip(new, old, strict=True)]
            u = jnp.where(usable, kept[0] / (jnp.sqrt(kept[2]) + eps), 0)
            return u.astype(g.dtype), *kept

        leaves = map(jax.tree.leaves, (updates, *state))
        treedef = jax.tree.structure(updates)
        out = [step(*arrays) for arrays in zip(*leaves, strict=True)]
        u, *new = (treedef.unflatten([x[k] for x in out]) for k in range(4))
        return u, AdaMMState(*new)

    return optax.GradientTransformationExtraArgs(init, update)


@explains_keywords()
def zo_adamm(
    learning_rate: optax.ScalarOrSchedule,
    *,
    eps: Scalar = 1e-3,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    box: tuple[float, float] | None = None,
    key: Array,
    probes: Probes = Probes(),
) -> optax.GradientTransformationExtraArgs:
    r"""AMSGrad on the estimate of `estimate`; see `scale_by_adamm` for the step.

    Args:
      learning_rate: A number or a schedule.
      eps: $\epsilon$ of the estimate.
      b1: Decay of the average.
      b2: Decay of the average of squares.
      box: (low, high): every parameter is clipped to these bounds after the step. The paper
        projects in the metric $\sqrt{\hat v}$, which for a box is the same.
      key: As for `estimate`.
      probes: Sampler (None: Gaussian), number of directions, engine. The paper draws on a sphere
        and evaluates one side: `Probes(sphere(), two_sided=False)`.

    Raises:
      ValueError: As for `estimate`; or a rate, a decay or the box is out of range.

    Example:
      >>> tx = zo_adamm(0.1, key=jax.random.key(0))
      >>> x = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(None, tx.init(x), x, value_fn=lambda x: jnp.sum(x**2))
      >>> updates.shape
      (2,)

    Source: Chen, Liu, Xu, Li, Lin, Hong and Cox, "ZO-AdaMM: Zeroth-Order Adaptive Momentum Method
    for Black-Box Optimization", arXiv 1910.06513.
    """
    check_rates(learning_rate=learning_rate)
    links = [scale_by_adamm(b1=b1, b2=b2), optax.scale_by_learning_rate(learning_rate)]
    if box is not None:
        links.append(_clipped_to(*box))
    return optax.chain(estimated(probes, eps=eps, key=key), *links)


def _clipped_to(low: float, high: float) -> optax.GradientTransformation:
    if not -math.inf <= low < high <= math.inf:
        raise ValueError(f"box: got ({low}, {high}), wanted (low, high) with low < high")

    def update(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u, p: jnp.clip(p + u, low, high) - p, updates, params)

    return optax.stateless(update)
