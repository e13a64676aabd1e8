"""LoRA+: AdamW with a larger rate for one factor of an adapter than for the other."""

from typing import Any

import jax
import optax

from jaxopt_lab.core.checks import check_rates
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.lora.pairs import find_pairs
from jaxopt_lab.lora.rest import adamw_rest, with_rest
from jaxopt_lab.optim.fallback import adam_direction
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.nonfinite import guarded
from jaxopt_lab.optim.options import AdamW, Routing
from jaxopt_lab.optim.rates import decayed_weights


@explains_keywords()
def lora_plus(
    learning_rate: optax.ScalarOrSchedule,
    *,
    ratio: Scalar = 16.0,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    fallback: AdamW = AdamW(),
) -> optax.GradientTransformationExtraArgs:
    """AdamW with a larger rate for `b` than for `a`; with a ratio of 1 it is AdamW.

    Args:
      learning_rate: Of `a` and of all leaves that are no factors.
      ratio: Rate of `b` over that of `a`.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment before the bias correction.
      weight_decay: Decoupled, times the rate of each factor.
      fallback: AdamW of the other leaves; the same numbers unless it says otherwise.

    Raises:
      ValueError: At `init`, for parameters without pairs.

    Source: Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv 2402.12354.
    """
    check_rates(learning_rate=learning_rate, ratio=ratio)
    direction = adam_direction(b1=b1, b2=b2, eps=eps)

    def larger_b(updates: optax.Updates, params: Any = None) -> optax.Updates:
        del params
        leaves, treedef = jax.tree.flatten(updates)
        for pair in find_pairs(updates):
            leaves[pair.right] = ratio * leaves[pair.right]
        return treedef.unflatten(leaves)

    decay = decayed_weights(weight_decay, None, Routing())
    rate = optax.scale_by_learning_rate(learning_rate)
    pairs = guarded(direction, decay, optax.stateless(larger_b), rate)
    own = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": 0.0}
    return with_rest("lora_plus", pairs, adamw_rest(learning_rate, fallback, **own))
