"""Scaled gradient descent on the factors: the baseline that LoRSum is compared with."""

from collections.abc import Mapping
from typing import Any

import optax
from jaxtyping import Array

from jaxopt_lab.core import low_rank_sum
from jaxopt_lab.core.checks import check_decays, check_rates, given
from jaxopt_lab.core.low_rank_sum import Pair
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.lora.pairwise import Given, Rule, pair_direction
from jaxopt_lab.lora.rest import adamw_rest, heavy_ball_rest, with_rest
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.nonfinite import guarded
from jaxopt_lab.optim.options import AdamW


def scale_by_preconditioned(
    *, rho: Scalar = 1e-2, jitter: float = 1e-6
) -> optax.GradientTransformationExtraArgs:
    r"""Gradients of the factors, each preconditioned by the other factor.

    $$(g_A (B B^\top + \rho I)^{-1}, \; (A^\top A + \rho I)^{-1} g_B)$$

    Args:
      rho: Added to the Gram matrices; not multiplied by a rate.
      jitter: Added besides, before the Cholesky decompositions.

    Returns:
      A transformation of trees that hold pairs alone; see `preconditioned` for whole adapter trees.

    Source: Zhang and Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models",
    arXiv 2402.02347.
    """
    return guarded(_direction(rho, jitter))


@explains_keywords()
def preconditioned(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rho: Scalar = 1e-2,
    momentum: Scalar | None = 0.9,
    jitter: float = 1e-6,
    fallback: AdamW = AdamW(),
) -> optax.GradientTransformationExtraArgs:
    r"""SGD with momentum, or AdamW, on the gradients of `scale_by_preconditioned`.

    Args:
      learning_rate: Of the factors.
      rho: As in `scale_by_preconditioned`.
      momentum: Heavy-ball momentum; None: AdamW with the numbers of `fallback`.
      jitter: As in `scale_by_preconditioned`.
      fallback: AdamW, for the leaves that are no factors, and for the factors without `momentum`;
        b1 0.9, b2 0.999, no decay unless it says otherwise.

    Raises:
      ValueError: At `init`, for parameters without pairs.

    Example:
      >>> import jax.numpy as jnp
      >>> adapter = {"up": {"a": jnp.ones((2, 1)), "b": jnp.zeros((1, 2))}}
      >>> tx = preconditioned(1.0, rho=0.0)
      >>> updates, _ = tx.update(adapter, tx.init(adapter), adapter)
      >>> updates["up"]["b"].tolist()
      [[-0.0, -0.0]]

    Source: as for `scale_by_preconditioned`. The released LoRSum code fails in the second step of
    its AdamW form; here that form is the formula.
    """
    check_rates(learning_rate=learning_rate, rho=rho)
    check_decays(**given(momentum=momentum))
    rest = adamw_rest(learning_rate, fallback, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    then = rest if momentum is None else heavy_ball_rest(learning_rate, momentum, 0.0)
    return with_rest("preconditioned", guarded(_direction(rho, jitter), then), rest)


def _direction(rho: Scalar, jitter: float) -> optax.GradientTransformationExtraArgs:
    check_rates(rho=rho, jitter=jitter)

    def init(a: Any, b: Any, key: Array) -> Mapping[str, Pair]:
        del a, b, key
        return {}

    def step(given: Given) -> tuple[Pair, Mapping[str, Pair]]:
        return low_rank_sum.preconditioned(given.pair, given.gradient, rho + jitter), {}

    return pair_direction(Rule(init, step, needs_taps=False), "preconditioned")
