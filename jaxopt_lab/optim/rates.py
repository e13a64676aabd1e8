"""Learning rates: numbers or schedules, checked and scaled."""

import math
from typing import Any

import optax

from jaxopt_lab.optim.routing import Scalar


def scaled_rate(rate: optax.ScalarOrSchedule, ratio: Scalar) -> optax.ScalarOrSchedule:
    """`ratio * rate` for a number or a schedule."""
    if callable(rate):
        return lambda count: ratio * rate(count)
    return ratio * rate


def check_rates(**rates: Any) -> None:
    """Raise `ValueError` for a rate that is NaN, infinite or negative; names the argument."""
    for name, rate in rates.items():
        if isinstance(rate, int | float) and not 0 <= rate < math.inf:
            raise ValueError(f"{name} is {rate}; it must be a finite number of at least 0")
