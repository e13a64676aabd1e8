"""Learning rates and weight decay: numbers or schedules, checked and scaled."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.optim.options import Routing
from jaxopt_lab.optim.routing import broadcast_prefix


def scaled_rate(rate: optax.ScalarOrSchedule, ratio: Scalar) -> optax.ScalarOrSchedule:
    """`ratio * rate` for a number or a schedule."""
    if isinstance(ratio, int | float) and ratio == 1:
        return rate
    if callable(rate):
        return lambda count: ratio * rate(count)
    return ratio * rate


def check_rates(**rates: Any) -> None:
    """Raise `ValueError` for a rate that is NaN, infinite or negative; names the argument."""
    for name, rate in rates.items():
        if isinstance(rate, int | float) and not 0 <= rate < math.inf:
            raise ValueError(f"{name} is {rate}; it must be a finite number of at least 0")


def check_decays(**decays: Any) -> None:
    """Raise `ValueError` for the decay of an average that is outside of [0, 1); names it."""
    for name, decay in decays.items():
        if isinstance(decay, int | float) and not 0 <= decay < 1:
            raise ValueError(f"{name} is {decay}; it must be in [0, 1)")


def decayed_weights(
    weight_decay: optax.ScalarOrSchedule, mask: Any, routing: Routing
) -> optax.GradientTransformation:
    """`optax.add_decayed_weights`, with a mask from the arguments or from the routing.

    Raises:
      ValueError: The decay is negative or no number, there are two masks, or `mask` is one bool:
        that is what `optax.inject_hyperparams` makes of a function.
    """
    check_rates(weight_decay=weight_decay)
    if isinstance(mask, bool | np.bool_ | np.ndarray | jax.Array):
        raise ValueError(
            f"mask is {mask}, wanted a tree of bools or a function of the parameters; under "
            "optax.inject_hyperparams, which takes functions for schedules, give the function as "
            "routing=Routing(decay_mask=...)"
        )
    if mask is not None and routing.decay_mask is not None:
        raise ValueError("give either mask or Routing.decay_mask, not both")
    if isinstance(weight_decay, np.generic):  # its dtype must not become that of the updates
        weight_decay = jnp.asarray(weight_decay)
    mask = routing.decay_mask if mask is None else mask
    if mask is None:
        return optax.add_decayed_weights(weight_decay)

    def matched(params: optax.Params) -> Any:
        # A prefix, or a tree with entries beneath what an outer mask hides.
        entries = broadcast_prefix("mask", mask, params)
        return jax.tree.structure(params).unflatten(entries)

    return optax.add_decayed_weights(weight_decay, matched)
