"""F-LoRSum as an optimizer: the preconditioned dense step, projected to the adapter's rank."""

from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxopt_lab.core.checks import check_decays, check_rates, given
from jaxopt_lab.core.low_rank_sum import (
    Metric,
    Pair,
    damped_power,
    kfac_statistics,
    shampoo_statistics,
)
from jaxopt_lab.core.numerics import Scalar, wide_dtype
from jaxopt_lab.lora.lorsum import (
    difference,
    gradient_of,
    momentum_start,
    projected,
    proximal_weight,
)
from jaxopt_lab.lora.options import FactorMetric, LowRankSum
from jaxopt_lab.lora.pairs import laid_out, rate_at
from jaxopt_lab.lora.pairwise import Given, Rule, pairwise
from jaxopt_lab.lora.rest import adamw_rest, with_rest
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.options import AdamW

_SMALLEST_PROXIMAL = 1e-5


@explains_keywords()
def scaled_lorsum(
    learning_rate: optax.ScalarOrSchedule = 0.2,
    *,
    b1: Scalar | None = 0.9,
    b2: Scalar = 0.99,
    damping: Scalar = 1e-5,
    rho: Scalar = 1e-2,
    weight_decay: Scalar = 0.0,
    clip: Scalar | None = 1.0,
    metric: FactorMetric = FactorMetric(),
    projection: LowRankSum = LowRankSum(),
    momentum_convention: Literal["code", "paper"] = "code",
    fallback: AdamW = AdamW(lr_ratio=5e-4),
) -> optax.GradientTransformationExtraArgs:
    r"""A step with diagonal fractional K-FAC on the kernels, projected to the adapter's rank.

    With the gradient $G = X^\top S$ of the kernel, the averages $d_r, d_c$ of the squares of layer
    inputs and of output gradients, and $D = (d + \delta)^p$,

    $$A B \leftarrow \text{F-LoRSum}(A B - \eta (1 - b_1) D_r^{-1} G D_c^{-1}
      - \eta b_1 D_r^{-1} M D_c^{-1}),$$

    projected in the norm of $D$ (`jaxopt_lab.core.low_rank_sum`) with the proximal weight
    $\max(\eta \rho, 10^{-5})$, and then $M \leftarrow \mathrm{LoRSum}(b_1 M + (1 - b_1) G)$. The
    statistics contain the gradient that they precondition. Defaults are those of the published
    language-model runs, not those of the released class.

    Args:
      learning_rate: $\eta$.
      b1: Of the momentum; None keeps none.
      b2: Of the statistics, whose averages are not bias-corrected.
      damping: $\delta$.
      rho: Pull towards the present factors.
      weight_decay: Decays the product $A B$ by $1 - \eta$ times this.
      clip: Largest norm of the gradients of all kernels and other leaves; None does not clip.
      metric: Which statistics, their form and their power.
      projection: Sweeps, jitter and decisions where paper and code differ.
      momentum_convention: "paper" takes $G$ with coefficient $-\eta$ in the step.
      fallback: AdamW for the other leaves; b1 0.9, b2 0.999 unless it says otherwise, and
        `lr_ratio` times the rate, so that both follow one schedule.

    Returns:
      A transformation whose `update` takes `taps`, as from `jaxopt_lab.lora.value_grad_and_taps`.
      Its updates are whole moves: nothing that scales them belongs behind it. Accumulate with
      `jaxopt_lab.lora.joined_taps`: `optax.MultiSteps` hands over the taps of the last part alone.

    Raises:
      ValueError: At `init`, for parameters without pairs; in `update`, for missing taps.

    Source: arXiv 2602.16456, released code (zeligism/PSI-LoRA, `ScaledOPLoraOptimizer`).
    """
    check_rates(learning_rate=learning_rate, rho=rho, damping=damping, weight_decay=weight_decay)
    check_rates(**given(clip=clip))
    check_decays(**given(b1=b1, b2=b2))
    if momentum_convention not in ("code", "paper"):
        raise ValueError(
            f'momentum_convention is {momentum_convention!r}; choose "code" or "paper"'
        )
    dense = metric.form == "dense"
    statistics = kfac_statistics if metric.kind == "kfac" else shampoo_statistics

    def init(a: Any, b: Any, key: Array) -> Mapping[str, Pair]:
        state = {} if b1 is None else {"momentum": momentum_start(a, b, key, projection)}
        return state | {"metric": Pair(*_metric_start(a, b, metric))}

    def step(given: Given) -> tuple[Pair, Mapping[str, Pair]]:
        rate, gradient = rate_at(learning_rate, given.count), gradient_of(given)
        rows = gradient.left.shape[1]
        found = statistics(gradient, rows if metric.loss == "mean" else 1 / rows, dense=dense)
        decay = b2
        if metric.warmup:
            decay = jnp.minimum(b2, 1 - 1 / (given.count + 2).astype(gradient.left.dtype))
        averages = [
            decay * old + (1 - decay) * new
            for old, new in zip(given.state["metric"], found, strict=True)
        ]
        powers = damped_power(Metric(*averages), damping, metric.power)
        fresh = (1.0 if b1 is None else 1 - b1) * given.tap_factor
        size = rate / (1.0 if projection.ignore_scale else given.scale)
        terms = [given.pair, gradient]
        paper = momentum_convention == "paper"
        coefficients = [1 - rate * weight_decay, -size * (given.tap_factor if paper else fresh)]
        proximal = proximal_weight(rate, rho, projection)
        state = {"metric": Pair(*averages)}
        if b1 is not None:
            old = given.state["momentum"]
            terms.append(old)
            coefficients.append(-size * b1)
            state["momentum"] = projected([old, gradient], [b1, fresh], proximal, projection)
        floored = jnp.maximum(proximal, _SMALLEST_PROXIMAL)
        new = projected(terms, coefficients, floored, projection, metric=powers)
        return difference(new, given.pair), state

    tx = pairwise(Rule(init, step, needs_taps=True), "scaled_lorsum", projection.seed)
    rest = adamw_rest(learning_rate, fallback, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    stats = projection.clip_scales_stats
    return with_rest("scaled_lorsum", tx, rest, clip=clip, clip_scales_stats=stats)


def _metric_start(a: Any, b: Any, metric: FactorMetric) -> Metric:
    batch = tuple(range(len(a.shape) - 2))
    sides = []
    for x, axis in ((a, len(batch)), (b, len(batch) + 1)):
        shape = (*x.shape[: len(batch)], x.shape[axis])
        start = jnp.full(shape, metric.init, wide_dtype(x))
        axes: tuple[int | None, ...] = (*batch, axis)
        if metric.form == "dense":
            start = start[..., None] * jnp.eye(shape[-1], dtype=start.dtype)
            axes = (*axes, None)
        sides.append(laid_out(start, x, axes))
    return Metric(*sides)
