"""Two other forms of momentum for LoRSum, from its released code."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxopt_lab.core.checks import check_decays, check_rates, given
from jaxopt_lab.core.low_rank_sum import Pair, product, pseudo_inverses
from jaxopt_lab.core.numerics import Scalar, wide_dtype
from jaxopt_lab.lora.lorsum import difference, gradient_of, projected, proximal_weight
from jaxopt_lab.lora.options import LowRankSum
from jaxopt_lab.lora.pairs import rate_at
from jaxopt_lab.lora.pairwise import Given, Rule, pairwise
from jaxopt_lab.lora.rest import heavy_ball_rest, with_rest
from jaxopt_lab.optim.keywords import explains_keywords


@explains_keywords()
def projected_lorsum(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rho: Scalar = 1e-2,
    momentum: Scalar = 0.9,
    dampening: Scalar = 0.0,
    clip: Scalar | None = None,
    projection: LowRankSum = LowRankSum(),
) -> optax.GradientTransformationExtraArgs:
    r"""`lorsum` with momentum in the space of the factors ("Proj. PSI-LoRA").

    The fresh gradient goes through LoRSum. The momentum $(u_A, u_B)$ averages the gradient as the
    factors see it, least squares in the other factor, is carried from the old factors to the new
    ones, and is subtracted from them before the fresh gradient joins it.

    Args:
      learning_rate: $\eta$, of the kernel.
      rho: Pull towards the present factors.
      momentum: $\mu$.
      dampening: Of the fresh gradient.
      clip: Largest norm of all gradients; None does not clip.
      projection: Sweeps, jitter and decisions where paper and code differ.

    Returns:
      A transformation whose `update` takes `taps`. Other leaves: SGD with momentum.

    Raises:
      ValueError: At `init`, for parameters without pairs; in `update`, for missing taps.

    Source: arXiv 2602.16456, released code.
    """
    _check(learning_rate, rho, momentum, clip)
    check_decays(dampening=dampening)

    def init(a: Any, b: Any, key: Array) -> Mapping[str, Pair]:
        del key
        return {"momentum": _zeros(a, b), "previous": _zeros(a, b)}

    def step(given: Given) -> tuple[Pair, Mapping[str, Pair]]:
        rate, gradient = rate_at(learning_rate, given.count), gradient_of(given)
        size = rate / (1.0 if projection.ignore_scale else given.scale)
        fresh = (1 - dampening) * given.tap_factor
        proximal = proximal_weight(rate, rho, projection)
        new = projected([given.pair, gradient], [1.0, -size * fresh], proximal, projection)
        to_left, to_right = pseudo_inverses(new, proximal + projection.jitter)
        seen = Pair(
            product(gradient.left, product(gradient.right, to_left)),
            product(product(to_right, gradient.left), gradient.right),
        )
        old, before = given.state["momentum"], given.state["previous"]
        carried = Pair(
            product(old.left, product(before.right, to_left)),
            product(product(to_right, before.left), old.right),
        )
        first = given.count == 0
        held = [
            jnp.where(first, given.tap_factor * h, momentum * p + fresh * h)
            for h, p in zip(seen, carried, strict=True)
        ]
        moved = [
            jnp.where(first, x, x - size * momentum * p) for x, p in zip(new, carried, strict=True)
        ]
        return difference(Pair(*moved), given.pair), {"momentum": Pair(*held), "previous": new}

    tx = pairwise(Rule(init, step, needs_taps=True), "projected_lorsum", projection.seed)
    rest = heavy_ball_rest(learning_rate, momentum, dampening)
    stats = projection.clip_scales_stats
    return with_rest("projected_lorsum", tx, rest, clip=clip, clip_scales_stats=stats)


@explains_keywords()
def extrapolated_lorsum(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rho: Scalar = 1e-2,
    momentum: Scalar = 0.5,
    clip: Scalar | None = None,
    projection: LowRankSum = LowRankSum(),
) -> optax.GradientTransformationExtraArgs:
    r"""`lorsum` with Nesterov's extrapolation (the released code's "FISTA").

    $$A' B' = \mathrm{LoRSum}(A B - \eta G), \qquad
      A B = \mathrm{LoRSum}((1 + \mu) A' B' - \mu A'_{old} B'_{old})$$

    Args:
      learning_rate: $\eta$, of the kernel.
      rho: Pull towards the present factors.
      momentum: $\mu$.
      clip: Largest norm of all gradients; None does not clip.
      projection: Sweeps, jitter and decisions where paper and code differ.

    Returns:
      A transformation whose `update` takes `taps`. Other leaves: SGD with momentum.

    Raises:
      ValueError: At `init`, for parameters without pairs; in `update`, for missing taps.

    Source: arXiv 2602.16456, released code.
    """
    _check(learning_rate, rho, momentum, clip)

    def init(a: Any, b: Any, key: Array) -> Mapping[str, Pair]:
        del key
        # Zeros: the factors themselves are what came before the first step.
        return {"previous": _zeros(a, b)}

    def step(given: Given) -> tuple[Pair, Mapping[str, Pair]]:
        rate, gradient = rate_at(learning_rate, given.count), gradient_of(given)
        size = rate * given.tap_factor / (1.0 if projection.ignore_scale else given.scale)
        proximal = proximal_weight(rate, rho, projection)
        new = projected([given.pair, gradient], [1.0, -size], proximal, projection)
        previous = Pair(
            *(
                jnp.where(given.count == 0, x, y)
                for x, y in zip(given.pair, given.state["previous"], strict=True)
            )
        )
        terms, coefficients = [new, previous], [1.0 + momentum, -momentum]
        moved = projected(terms, coefficients, proximal, projection)
        return difference(moved, given.pair), {"previous": new}

    tx = pairwise(Rule(init, step, needs_taps=True), "extrapolated_lorsum", projection.seed)
    rest = heavy_ball_rest(learning_rate, momentum, 0.0)
    stats = projection.clip_scales_stats
    return with_rest("extrapolated_lorsum", tx, rest, clip=clip, clip_scales_stats=stats)


def _zeros(a: Any, b: Any) -> Pair:
    return Pair(*(jnp.zeros_like(x, dtype=wide_dtype(x)) for x in (a, b)))


def _check(learning_rate: Any, rho: Any, momentum: Any, clip: Any) -> None:
    check_rates(learning_rate=learning_rate, rho=rho, **given(clip=clip))
    check_decays(momentum=momentum)
