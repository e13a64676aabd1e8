"""Forward gradient: directional derivatives by forward mode, no backward pass and no epsilon."""

from typing import Any

import optax
from jaxtyping import Array

from jaxopt_lab.core.checks import check_rates
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.zeroth_order.estimators import forward_estimated
from jaxopt_lab.zeroth_order.mezo import decayed_unless_named
from jaxopt_lab.zeroth_order.probes import Probes


@explains_keywords()
def forward_gradient(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    key: Array,
    probes: Probes = Probes(),
) -> optax.GradientTransformationExtraArgs:
    r"""SGD on $\langle \nabla f, z \rangle z$, the product exact and from one `jax.jvp`.

    Unbiased for any loss. A step takes about the time of two losses, and the memory of their
    activations twice. `value_fn` must be differentiable by forward mode.

    Args:
      learning_rate: A number or a schedule.
      weight_decay: Added to the estimate times the parameters.
      mask: Which leaves decay; None: as for `mezo`.
      key: As for `estimate`.
      probes: Sampler (None: Gaussian), number of directions (their average), engine.

    Raises:
      ValueError: As for `estimate`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> tx = forward_gradient(0.1, key=jax.random.key(0))
      >>> x = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(None, tx.init(x), x, value_fn=lambda x: jnp.sum(x**2))
      >>> updates.shape
      (2,)

    Source: Baydin, Pearlmutter, Syme, Wood and Torr, "Gradients without Backpropagation",
    arXiv 2202.08587.
    """
    check_rates(learning_rate=learning_rate)
    return optax.chain(
        forward_estimated(probes, key=key),
        decayed_unless_named(weight_decay, mask, probes),
        optax.scale_by_learning_rate(learning_rate),
    )
