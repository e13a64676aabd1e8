"""LoRA-FA: one factor of an adapter is frozen, and preconditions the gradient of the other."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxopt_lab.core import low_rank_sum
from jaxopt_lab.core.checks import check_rates
from jaxopt_lab.core.low_rank_sum import Pair
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.lora.pairs import find_pairs
from jaxopt_lab.lora.pairwise import Given, Rule, pair_direction
from jaxopt_lab.lora.rest import adamw_rest, with_rest
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.nonfinite import guarded
from jaxopt_lab.optim.options import AdamW

# Of peft's implementation: added to the Gram matrix of `a`.
_RIDGE = 1e-8


@explains_keywords()
def lora_fa(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    fallback: AdamW = AdamW(),
) -> optax.GradientTransformationExtraArgs:
    r"""Only `b` moves, by AdamW on $(A^\top A + 10^{-8} I)^{-1} g_B$; `a` stays and has no moments.

    That is peft's form. Its factor $1 / s^2$ is left out, which Adam divides out again.

    Args:
      learning_rate: Of `b` and of all leaves that are no factors.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment before the bias correction.
      weight_decay: Decoupled, of `b`.
      fallback: AdamW of the other leaves; the same numbers unless it says otherwise.

    Raises:
      ValueError: At `init`, for parameters without pairs.

    Source: Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models
    Fine-tuning", arXiv 2308.03303.
    """
    check_rates(learning_rate=learning_rate)

    def init(a: Any, b: Any, key: Array) -> Mapping[str, Pair]:
        del a, b, key
        return {}

    def step(given: Given) -> tuple[Pair, Mapping[str, Pair]]:
        found = low_rank_sum.preconditioned(given.pair, given.gradient, _RIDGE)
        return Pair(jnp.zeros_like(given.pair.left), found.right), {}

    def is_right(params: optax.Params) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        rights = {pair.right for pair in find_pairs(params)}
        return treedef.unflatten([i in rights for i in range(len(leaves))])

    own = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay}
    moved = optax.masked(adamw_rest(learning_rate, AdamW(), **own), is_right)
    pairs = guarded(pair_direction(Rule(init, step, needs_taps=False), "lora_fa"), moved)
    rest = adamw_rest(learning_rate, fallback, **{**own, "weight_decay": 0.0})
    return with_rest("lora_fa", pairs, rest)
