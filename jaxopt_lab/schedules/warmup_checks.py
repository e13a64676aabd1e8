"""Checks of the arguments of `adaptive_warmup`; traced numbers have no value to look at."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxopt_lab.core.dual_norms import check_pair
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.schedules.gap_rate import Curvature
from jaxopt_lab.schedules.warmup_phases import DecayFactory, WarmupPhases, official_cosine


def check_phases(p: WarmupPhases) -> None:
    """Check all numbers and names of a rule.

    Raises:
      ValueError: One is out of range or unknown.
    """
    check_number("peak_lr", p.peak_lr, "a finite number above 0", lambda x: 0 < x < math.inf)
    check_number("total_steps", p.total_steps, "a whole number of at least 1", _is_count)
    if not (isinstance(p.target_loss, str) and p.target_loss == "auto"):
        check_number("target_loss", p.target_loss, "a finite number, or 'auto'", math.isfinite)
    check_number(
        "div_factor", p.div_factor, "a finite number of at least 1", lambda x: 1 <= x < math.inf
    )
    check_number("sigma", p.sigma, "a finite number of at least 0", lambda x: 0 <= x < math.inf)
    check_number("final_div_factor", p.final_div_factor, "a number of at least 1", lambda x: x >= 1)
    check_number("smoothing", p.smoothing, "in [0, 1)", lambda x: 0 <= x < 1)
    if p.fallback_after is not None:
        check_number("fallback_after", p.fallback_after, "in (0, 1], or None", lambda x: 0 < x <= 1)
    if not (isinstance(p.delta_star_rule, str) and p.delta_star_rule == "exact"):
        wanted = "'exact' or a number in (0, 1), a share of the first gap"
        if isinstance(p.delta_star_rule, str) and p.delta_star_rule == "official":
            wanted += "; the released rule is jaxopt_lab.parity.warmup.official_warmup"
        check_number("delta_star_rule", p.delta_star_rule, wanted, lambda x: 0 < x < 1)
    if p.curvature is not None:
        _check_curvature(p.curvature)
    if p.curvature is not None and isinstance(p.target_loss, str):
        raise ValueError(
            "target_loss is 'auto' and curvature is given; coefficients by hand are those of gaps "
            "to a fixed target"
        )


def check_kappa(norm: Any, kappa: Scalar | None) -> None:
    """Check the norm, and a kappa that is given.

    Raises:
      ValueError: A norm is unknown, or a number is out of range.
    """
    for pair, weight in norm.items() if isinstance(norm, Mapping) else [(norm, 1.0)]:
        check_pair(pair)
        wanted = "a finite weight of at least 0"
        check_number(f"norm[{pair!r}]", weight, wanted, lambda x: 0 <= x < math.inf)
    if kappa is not None:
        check_number("kappa", kappa, "a finite number above 0", lambda x: 0 < x < math.inf)


def positive_kappa(kappa: float) -> float:
    """The argument, if there was any matrix to measure.

    Raises:
      ValueError: There was none.
    """
    if kappa > 0:
        return kappa
    raise ValueError(
        "adaptive_warmup found no matrix among the parameters, so its norm has no kappa; say in "
        "matrix_axes which axes form matrices, or give kappa"
    )


def decay_factory(decay: DecayFactory | str) -> DecayFactory:
    """The factory that the argument names or is.

    Raises:
      ValueError: It does not make a schedule of scalars from a number of steps that is traced.
    """
    if isinstance(decay, str) and decay == "cosine":
        return official_cosine
    if not callable(decay):
        raise ValueError(
            f"decay is {decay!r}; it must be 'cosine' or a function from a number of steps to a "
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
        raise ValueError(f"decay gives a schedule of shape {share.shape}; it must be a scalar")
    return decay


def scalar_loss(value: Any) -> Array:
    """The loss of a step as an array.

    Raises:
      ValueError: It is missing or not a scalar.
    """
    if value is None:
        raise ValueError(
            "adaptive_warmup needs the loss of this step as the argument value; call "
            "tx.update(grads, state, params, value=loss)"
        )
    loss = jnp.asarray(value)
    if loss.shape:
        raise ValueError(
            f"value has shape {loss.shape}; it must be one scalar, the mean loss of this step over "
            "microbatches and replicas"
        )
    return loss


def _check_curvature(c: Curvature) -> None:
    check_number("curvature.k0", c.k0, "a finite number of at least 0", lambda x: 0 <= x < math.inf)
    check_number("curvature.k1", c.k1, "a finite number", math.isfinite)
    wanted = "a finite number above 0; without it the rate has no peak"
    check_number("curvature.k_rho", c.k_rho, wanted, lambda x: 0 < x < math.inf)
    check_number("curvature.rho", c.rho, "a finite number above 1", lambda x: 1 < x < math.inf)


def check_number(name: str, value: Any, wanted: str, holds: Callable[[Any], bool]) -> None:
    """Check a number that has a value.

    Raises:
      ValueError: It is none, or does not hold.
    """
    if isinstance(value, jax.Array):
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not holds(value):
        raise ValueError(f"{name} is {value!r}; it must be {wanted}")


def _is_count(x: float) -> bool:
    return x >= 1 and float(x).is_integer()
