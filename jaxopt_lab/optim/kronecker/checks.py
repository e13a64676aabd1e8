"""Options that SOAP and DyKAF share, checked before anything is built."""

import math
from typing import Any, TypeGuard

import jax.numpy as jnp

from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.core.orthogonalization import ORTHOGONALIZERS
from jaxopt_lab.core.precision import PRODUCT_PRECISIONS
from jaxopt_lab.optim.kronecker.step import EigenbasisAdam


def check_method(method: EigenbasisAdam, max_precond_dim: int | None) -> None:
    """Raise `ValueError` for a number out of range or an unknown choice; names the argument.

    Numbers that are arrays come from `optax.inject_hyperparams` and are not looked at.
    """
    for name in ("b1", "b2"):
        value = getattr(method, name)
        if _is_number(value) and not 0 <= value < 1:
            raise ValueError(f"{name} is {value}; it must be in [0, 1)")
    decay, eps, frequency = method.rule.decay, method.eps, method.frequency
    if _is_number(decay) and not 0 <= decay <= 1:
        raise ValueError(f"factor_decay is {decay}; it must be in [0, 1], or None for b2")
    if _is_number(eps) and not 0 <= eps < math.inf:
        raise ValueError(f"eps is {eps}; it must be a finite number of at least 0")
    if _is_number(frequency):
        if not (frequency >= 1 and float(frequency).is_integer()):
            raise ValueError(
                f"precondition_frequency is {frequency}; it must be an integer of at least 1"
            )
    elif method.stagger:
        raise ValueError(
            "stagger divides stacks into precondition_frequency shares, so that must be a plain "
            "integer; under optax.inject_hyperparams name it in static_args"
        )
    if max_precond_dim is not None and max_precond_dim < 0:
        raise ValueError(f"max_precond_dim is {max_precond_dim}; it must be at least 0, or None")
    check_choice("orthogonalizer", method.orthogonalizer, ORTHOGONALIZERS)
    check_choice("factor_precision", method.factor_precision, PRODUCT_PRECISIONS)
    check_choice("rotation_precision", method.rotation_precision, PRODUCT_PRECISIONS)
    check_choice("replicated_work", method.replicated_work, ("repeat", "share"))


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `ValueError` for an unknown choice."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def gradient_weight(decay: Scalar) -> Scalar:
    """The weight of a new gradient beside a decay: 1 - decay, and 1 beside a plain sum."""
    if _is_number(decay):
        return 1.0 if decay == 1 else 1 - decay
    return jnp.where(decay == 1, 1, 1 - decay)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float)
