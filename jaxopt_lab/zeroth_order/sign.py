"""ZO-SignSGD: signs of estimates."""

from typing import Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxopt_lab.core.checks import check_decays, check_rates
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.zeroth_order.estimators import estimated
from jaxopt_lab.zeroth_order.probes import Probes


@explains_keywords()
def zo_signsgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rule: Literal["elementwise", "scalar"] = "elementwise",
    eps: Scalar = 1e-3,
    b1: Scalar | None = None,
    key: Array,
    probes: Probes = Probes(),
) -> optax.GradientTransformationExtraArgs:
    r"""Descent along the sign of an estimate.

    | rule | update | where |
    |---|---|---|
    | "elementwise" | $x \leftarrow x - \gamma \operatorname{sign}(g)$ | the paper |
    | "scalar" | $x \leftarrow x - \frac\gamma q \sum_j \operatorname{sign}(D_j) z_j$ | ZO-Bench |

    Neither depends on the scale of the loss. With `b1` the elementwise rule takes the sign of an
    average $m \leftarrow \beta_1 m + (1 - \beta_1) g$.

    Args:
      learning_rate: $\gamma$, a number or a schedule.
      rule: "elementwise" or "scalar".
      eps: $\epsilon$ of the estimate.
      b1: $\beta_1$; None: no average.
      key: As for `estimate`.
      probes: Sampler (None: Gaussian), number of directions, engine.

    Raises:
      ValueError: As for `estimate`; the rule is unknown, or has no average.

    Example:
      >>> import jax
      >>> tx = zo_signsgd(0.1, key=jax.random.key(0))
      >>> x = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(None, tx.init(x), x, value_fn=lambda x: jnp.sum(x**2))
      >>> jnp.abs(updates).tolist() == [jnp.float32(0.1)] * 2
      True

    Source: Liu, Chen, Chen and Hong, "signSGD via Zeroth-Order Oracle", ICLR 2019; "scalar" is
    ZO-SGD-Sign of Zhang et al., "Revisiting Zeroth-Order Optimization for Memory-Efficient LLM
    Fine-Tuning", arXiv 2402.11592.
    """
    check_rates(learning_rate=learning_rate)
    if rule not in ("elementwise", "scalar"):
        raise ValueError(f"rule is {rule!r}; choose 'elementwise' or 'scalar'")
    rate = optax.scale_by_learning_rate(learning_rate)
    if rule == "scalar":
        if b1 is not None:
            raise ValueError(f"b1 is {b1}; the rule 'scalar' has no average, so it must be None")
        return optax.chain(estimated(probes, eps=eps, key=key, coefficient=jnp.sign), rate)
    links = []
    if b1 is not None:
        check_decays(b1=b1)
        links.append(optax.ema(b1, debias=False))
    return optax.chain(estimated(probes, eps=eps, key=key), *links, optax.scale_by_sign(), rate)
