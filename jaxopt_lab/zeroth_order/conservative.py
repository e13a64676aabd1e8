"""Conservative zero-order descent: the best of staying, stepping, and stepping the other way."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxopt_lab.core.checks import check_rates
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.zeroth_order.probes import Probes, ProbeState, default_sampler, initial_state
from jaxopt_lab.zeroth_order.probing import Step, finite_or_zero, transformation


@explains_keywords()
def conservative(
    learning_rate: optax.ScalarOrSchedule,
    *,
    eps: Scalar = 1e-3,
    key: Array,
    probes: Probes = Probes(),
) -> optax.GradientTransformationExtraArgs:
    r"""Of $x$, $a = x - \gamma D z$ and $b = x + \gamma D z$, the one with the smallest loss.

    Five losses a step. Ties go to $b$, and where $a$ is no better than $b$ but not worse than $x$,
    as in the released code. A loss that is not finite is never chosen.

    Args:
      learning_rate: $\gamma$, a number or a schedule.
      eps: $\epsilon$ of the difference $D$.
      key: As for `estimate`.
      probes: Sampler (None: Gaussian) and engine; one two-sided direction.

    Raises:
      ValueError: As for `estimate`; there is more than one direction.

    Example:
      >>> import jax
      >>> tx = conservative(1e4, key=jax.random.key(0))  # far too long a step
      >>> x = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(None, tx.init(x), x, value_fn=lambda x: jnp.sum(x**2))
      >>> bool(jnp.any(updates))
      False

    Source: ZO-SGD-Cons of Zhang et al., "Revisiting Zeroth-Order Optimization for Memory-Efficient
    LLM Fine-Tuning", arXiv 2402.11592.
    """
    check_rates(learning_rate=learning_rate)
    probes.only_one_direction("conservative")

    def init(params: optax.Params) -> Any:
        return initial_state(params, key, eps, 5)

    def update(step: Step, state: ProbeState, extra_args: Any) -> Any:
        del extra_args
        same = jnp.zeros(3, jnp.int32)
        plus, minus, here = step.losses(same, eps * jnp.array([1.0, -1.0, 0.0]), sides=3)
        difference = finite_or_zero((plus - minus) / (2 * eps))
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        length = jnp.asarray(rate * difference)
        ahead, behind = step.losses(same[:2], length * jnp.array([-1.0, 1.0]), sides=2)
        here, ahead, behind = (jnp.where(jnp.isnan(f), jnp.inf, f) for f in (here, ahead, behind))
        sign = jnp.where(
            ahead > here,
            jnp.where(here < behind, 0, 1),
            jnp.where(ahead < behind, -1, 1),
        )
        # Nowhere is the loss known: stay.
        sign = jnp.where(jnp.isinf(jnp.minimum(ahead, behind)), 0, sign)
        found, _ = step.combined((sign * length)[None])
        return step.tree(found), step.next_state()

    return transformation(probes, default_sampler(probes), eps, init, update)
