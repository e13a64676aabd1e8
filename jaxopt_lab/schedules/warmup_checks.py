"""Checks of the arguments of `adaptive_warmup`; traced numbers have no value to look at."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxopt_lab.core.checks import (
    COUNT,
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    Wanted,
    check_choice,
    check_decays,
    check_number,
)
from jaxopt_lab.core.dual_norms import DUAL_NORMS
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.schedules.warmup_phases import DecayFactory, WarmupPhases, official_cosine

_AT_LEAST_1 = Wanted("a number >= 1", lambda x: x >= 1)
_FINITE_AT_LEAST_1 = Wanted("a finite number >= 1", lambda x: 1 <= x < math.inf)
_ABOVE_1 = Wanted("a finite number > 1", lambda x: 1 < x < math.inf)
_SHARE = Wanted("a number in (0, 1]", lambda x: 0 < x <= 1)
_SHARE_OF_GAP = Wanted("'exact' or a share of the first gap in (0, 1)", lambda x: 0 < x < 1)
_TARGET = Wanted("a finite number, or 'auto'", math.isfinite)


def check_phases(p: WarmupPhases) -> None:
    """Raise `ValueError` for a number or a name of a rule that is out of range or unknown."""
    check_number("peak_lr", p.peak_lr, POSITIVE)
    check_number("total_steps", p.total_steps, COUNT)
    if p.target_loss != "auto":
        check_number("target_loss", p.target_loss, _TARGET)
    check_number("div_factor", p.div_factor, _FINITE_AT_LEAST_1)
    check_number("sigma", p.sigma, NOT_NEGATIVE)
    check_number("final_div_factor", p.final_div_factor, _AT_LEAST_1)
    check_decays(smoothing=p.smoothing)
    if p.fallback_after is not None:
        check_number("fallback_after", p.fallback_after, _SHARE)
    if p.delta_star_rule == "official":
        raise ValueError(
            "delta_star_rule: got 'official', which is jaxopt_lab.parity.warmup.official_warmup"
        )
    if p.delta_star_rule != "exact":
        check_number("delta_star_rule", p.delta_star_rule, _SHARE_OF_GAP)
    if p.curvature is not None:
        check_number("curvature.k0", p.curvature.k0, NOT_NEGATIVE)
        check_number("curvature.k1", p.curvature.k1, FINITE)
        check_number("curvature.k_rho", p.curvature.k_rho, POSITIVE)  # else there is no peak
        check_number("curvature.rho", p.curvature.rho, _ABOVE_1)
        if p.target_loss == "auto":
            raise ValueError(
                "target_loss: got 'auto' beside curvature, wanted a number: coefficients by hand "
                "are those of gaps to a fixed target"
            )


def check_kappa(norm: Any, kappa: Scalar | None) -> None:
    """Raise `ValueError` for an unknown norm, or a weight or kappa out of range."""
    for pair, weight in norm.items() if isinstance(norm, Mapping) else [(norm, 1.0)]:
        check_choice("norm", pair, DUAL_NORMS)
        check_number(f"norm[{pair!r}]", weight, NOT_NEGATIVE)
    if kappa is not None:
        check_number("kappa", kappa, POSITIVE)


def decay_factory(decay: DecayFactory | str) -> DecayFactory:
    """The factory that the argument names or is.

    Raises:
      ValueError: It does not make a schedule of scalars from a number of steps that is traced.
    """
    if isinstance(decay, str) and decay == "cosine":
        return official_cosine
    if not callable(decay):
        raise ValueError(
            f"decay: got {decay!r}, wanted 'cosine' or a function from a number of steps to a "
            "schedule"
        )
    number = jax.ShapeDtypeStruct((), jnp.result_type(float))
    try:
        share = jax.eval_shape(lambda n, k: jnp.asarray(decay(n)(k)), number, number)
    except jax.errors.ConcretizationTypeError as error:
        raise ValueError(
            "decay looks at the value of its number of steps, which is not known before the "
            "switch; call a schedule of one step with the share k / n instead: "
            "lambda n: lambda k: optax.linear_schedule(1.0, 0.0, 1)(k / n)"
        ) from error
    if share.shape:
        raise ValueError(f"decay: got a schedule of shape {share.shape}, wanted a scalar")
    return decay


def scalar_loss(value: Any) -> Array:
    """The loss of a step as an array; raises `ValueError` if it is missing or not a scalar."""
    if value is None:
        raise ValueError(
            "adaptive_warmup needs the loss of this step as the argument value; call "
            "tx.update(grads, state, params, value=loss)"
        )
    loss = jnp.asarray(value)
    if loss.shape:
        raise ValueError(
            f"value: got shape {loss.shape}, wanted one scalar, the mean loss of this step over "
            "microbatches and replicas"
        )
    return loss
