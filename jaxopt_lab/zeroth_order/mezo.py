"""MeZO: stochastic gradient descent on estimates from two losses."""

from typing import Any

import jax
import optax
from jax.tree_util import KeyPath, keystr
from jaxtyping import Array

from jaxopt_lab.core.checks import check_decays, check_rates
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.options import Routing
from jaxopt_lab.optim.rates import decayed_weights
from jaxopt_lab.zeroth_order.directions import moving
from jaxopt_lab.zeroth_order.estimators import estimated
from jaxopt_lab.zeroth_order.probes import Probes


@explains_keywords()
def mezo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    eps: Scalar = 1e-3,
    momentum: Scalar | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    key: Array,
    probes: Probes = Probes(),
) -> optax.GradientTransformationExtraArgs:
    r"""SGD on the two-sided estimate $g$ of `estimate`, at the memory of inference.

    $$b_t = \rho b_{t-1} + g_t + \lambda x, \qquad x \leftarrow x - \gamma b_t.$$

    The second moment of $g$ is $d + 2$ times that of the gradient, so learning rates are smaller
    than those of SGD by about the number of parameters. Without momentum there is no state of the
    size of the parameters, and they are a function of the start, the key and the losses:
    `jaxopt_lab.zeroth_order.save_replay` keeps a run in a few kilobytes.

    Args:
      learning_rate: $\gamma$, a number or a schedule.
      eps: $\epsilon$ of the estimate.
      momentum: $\rho$; None: none.
      weight_decay: $\lambda$, added to the estimate.
      mask: Which leaves decay; None: all whose name does not contain bias, layer_norm or layernorm.
      key: As for `estimate`.
      probes: Sampler (None: Gaussian), number of directions, engine.

    Raises:
      ValueError: As for `estimate`; or a rate or decay is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = mezo(0.1, key=jax.random.key(0))
      >>> x = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(None, tx.init(x), x, value_fn=lambda x: jnp.sum(x**2))
      >>> updates.shape
      (2,)

    Source: Malladi, Gao, Nichani, Damian, Lee, Chen and Arora, "Fine-Tuning Language Models with
    Just Forward Passes", arXiv 2305.17333. With momentum: ZO-SGD-MMT of ZO-Bench, arXiv 2402.11592.

    Differs from the released code in: see `estimate`.
    """
    check_rates(learning_rate=learning_rate)
    links = [decayed_unless_named(weight_decay, mask, probes)]
    if momentum is not None:
        check_decays(momentum=momentum)
        links.append(optax.trace(momentum))
    return optax.chain(
        estimated(probes, eps=eps, key=key), *links, optax.scale_by_learning_rate(learning_rate)
    )


def decayed_unless_named(
    weight_decay: optax.ScalarOrSchedule, mask: Any, probes: Probes
) -> optax.GradientTransformation:
    """Weight decay by `mask`; without one, of all leaves but those that MeZO leaves out."""
    routing = Routing(decay_mask=_decays_by_name if mask is None else None)
    return of_trainable(decayed_weights(weight_decay, mask, routing), probes)


def of_trainable(tx: optax.GradientTransformation, probes: Probes) -> optax.GradientTransformation:
    """`tx` on the leaves that move: decay would move the others as well."""
    if probes.trainable is None:
        return tx
    return optax.masked(tx, lambda params: moving(params, probes.trainable))


def _decays_by_name(params: optax.Params) -> Any:
    def decays(path: KeyPath, _: Any) -> bool:
        return not any(word in keystr(path) for word in ("bias", "layer_norm", "layernorm"))

    return jax.tree_util.tree_map_with_path(decays, params)
