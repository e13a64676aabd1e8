"""LoRSum as an optimizer: the dense step, projected back to the rank of the adapter."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxopt_lab.core.checks import check_decays, check_rates, given
from jaxopt_lab.core.low_rank_sum import Pair, low_rank_sum
from jaxopt_lab.core.numerics import Scalar, wide_dtype
from jaxopt_lab.lora.options import LowRankSum
from jaxopt_lab.lora.pairs import laid_out, rate_at
from jaxopt_lab.lora.pairwise import Given, Rule, pairwise
from jaxopt_lab.lora.rest import adamw_rest, heavy_ball_rest, with_rest
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.options import AdamW


@explains_keywords()
def lorsum(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rho: Scalar = 1e-2,
    momentum: Scalar | None = None,
    dampening: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    clip: Scalar | None = None,
    projection: LowRankSum = LowRankSum(),
    fallback: AdamW | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient descent on the adapted kernels, each step projected to the adapter's rank.

    With the gradient $G = X^\top S$ of the kernel, never formed, and a low-rank momentum $M$,

    $$A B \leftarrow \mathrm{LoRSum}(A B - \eta (1 - d) G - \eta \mu M), \qquad
      M \leftarrow \mathrm{LoRSum}(\mu M + (1 - d) G),$$

    where LoRSum is one sweep of alternating least squares with the proximal weight
    $\lambda = \eta \rho$ (`jaxopt_lab.core.low_rank_sum`). At full rank and $\rho = 0$ this is
    heavy-ball SGD on the kernel.

    Args:
      learning_rate: $\eta$, of the kernel, a number or a schedule.
      rho: Pull towards the present factors. Keep it positive where `b` starts at zero.
      momentum: $\mu$; None keeps no momentum, 0.0 keeps one that is not used.
      dampening: $d$.
      weight_decay: Decays the product $A B$ by $1 - \eta$ times this.
      clip: Largest norm of the gradients of all kernels and other leaves; None does not clip.
      projection: Sweeps, jitter and decisions where paper and code differ.
      fallback: AdamW for the other leaves; None: SGD with the same rate, momentum and dampening.

    Returns:
      A transformation whose `update` takes `taps`, as from `jaxopt_lab.lora.value_grad_and_taps`.
      Its updates are whole moves: nothing that scales them belongs behind it. Accumulate with
      `jaxopt_lab.lora.joined_taps`: `optax.MultiSteps` hands over the taps of the last part alone.

    Raises:
      ValueError: At `init`, for parameters without pairs; in `update`, for missing taps, where the
        released code takes a plain step on the factors with the same rate.

    Example:
      >>> from jaxopt_lab.lora import Tap
      >>> adapter = {"up": {"kernel": {"a": jnp.ones((2, 1)), "b": jnp.zeros((1, 3))}}}
      >>> taps = {"up": {"kernel": Tap(x=jnp.eye(2), s=-jnp.ones((2, 3)))}}
      >>> tx = lorsum(0.5, rho=1e-3)
      >>> updates, _ = tx.update(adapter, tx.init(adapter), adapter, taps=taps)
      >>> jnp.round(updates["up"]["kernel"]["b"], 2).tolist()
      [[0.5, 0.5, 0.5]]

    Source: arXiv 2602.16456, released code (zeligism/PSI-LoRA, `OPLoraOptimizer`).
    """
    check_rates(learning_rate=learning_rate, rho=rho, weight_decay=weight_decay)
    check_rates(**given(clip=clip))
    check_decays(**given(momentum=momentum, dampening=dampening))

    def init(a: Any, b: Any, key: Array) -> Mapping[str, Pair]:
        return {} if momentum is None else {"momentum": momentum_start(a, b, key, projection)}

    def step(given: Given) -> tuple[Pair, Mapping[str, Pair]]:
        rate = rate_at(learning_rate, given.count)
        gradient, factor = gradient_of(given), (1 - dampening) * given.tap_factor
        size = rate / (1.0 if projection.ignore_scale else given.scale)
        proximal = proximal_weight(rate, rho, projection)
        terms, coefficients = [given.pair, gradient], [1 - rate * weight_decay, -size * factor]
        state = {}
        if momentum is not None:
            old = given.state["momentum"]
            terms.append(old)
            coefficients.append(-size * momentum)
            weights = [momentum, factor]
            state["momentum"] = projected([old, gradient], weights, proximal, projection)
        return difference(projected(terms, coefficients, proximal, projection), given.pair), state

    tx = pairwise(Rule(init, step, needs_taps=True), "lorsum", projection.seed)
    if fallback is None:
        mu = 0.0 if momentum is None else momentum
        rest = heavy_ball_rest(learning_rate, mu, dampening)
    else:
        rest = adamw_rest(learning_rate, fallback, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    stats = projection.clip_scales_stats
    return with_rest("lorsum", tx, rest, clip=clip, clip_scales_stats=stats)


def gradient_of(given: Given) -> Pair:
    """The gradient of the kernel as a pair."""
    assert given.tap is not None
    return given.tap


def difference(new: Pair, old: Pair) -> Pair:
    """The move from one pair to another."""
    return Pair(new.left - old.left, new.right - old.right)


def proximal_weight(rate: Scalar, rho: Scalar, projection: LowRankSum) -> Scalar:
    r"""$\eta \rho$, or the bare $\rho$."""
    return rate * rho if projection.scale_rho_by_lr else rho


def projected(
    terms: list[Pair], coefficients: list[Scalar], proximal: Scalar, projection: LowRankSum, **more
) -> Pair:
    """`low_rank_sum` with the options."""
    return low_rank_sum(
        terms,
        coefficients,
        sweeps=projection.sweeps,
        proximal=proximal,
        jitter=projection.jitter,
        start="left" if projection.start == "a" else "right",
        **more,
    )


def momentum_start(a: Any, b: Any, key: Array, projection: LowRankSum) -> Pair:
    """A zero matrix whose left factor is normal: from two zero factors nothing would ever move."""
    rank = max(1, round(projection.momentum_rank * a.shape[-1]))
    batch = tuple(range(len(a.shape) - 2))
    left = jax.random.normal(key, (*a.shape[:-1], rank), wide_dtype(a))
    right = jnp.zeros((*b.shape[:-2], rank, b.shape[-1]), wide_dtype(b))
    return Pair(
        laid_out(left, a, (*batch, len(batch), None)),
        laid_out(right, b, (*batch, None, len(batch) + 1)),
    )
