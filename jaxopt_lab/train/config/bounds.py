"""Which numbers a setting may hold: a bound stands in the type of its field."""

import math
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import numpy as np

from jaxopt_lab.train.errors import ConfigError

# Counters on the device are 32 bits wide, rates float32. An interval that ends may end higher:
# seeds have 32 bits without a sign.
_LARGEST_COUNT = 2**31 - 1
_LARGEST_FLOAT = 3.4e38


class Bound(NamedTuple):
    """An interval of numbers.

    >>> str(Bound(0, 1, open_high=True))
    'expected at least 0 and below 1'
    """

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """Whether the number is inside."""
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        """What to say to a number outside."""
        low = f"{'above' if self.open_low else 'at least'} {self.low}"
        if self.high == math.inf:
            return "expected a positive number" if low == "above 0" else f"expected {low}"
        return f"expected {low} and {'below' if self.open_high else 'at most'} {self.high}"


Count = Annotated[int, Bound(1)]
CountOrZero = Annotated[int, Bound(0)]
Seed = Annotated[int, Bound(0, 2**32 - 1)]
Positive = Annotated[float, Bound(0, open_low=True)]
PositiveOrZero = Annotated[float, Bound(0)]
Share = Annotated[float, Bound(0, 1)]
InnerShare = Annotated[float, Bound(0, 1, open_low=True, open_high=True)]
Average = Annotated[float, Bound(0, 1, open_high=True)]


def check_bounds(config: Any, prefix: str = "") -> None:
    """Checks every number in a configuration, sections included.

    A number without a bound must be finite, and an integer fit into 32 bits. A bound is one for the
    float32 that a number becomes.

    >>> from jaxopt_lab.train.config.sections import EvalConfig
    >>> check_bounds(EvalConfig(every=0), "eval.")
    Traceback (most recent call last):
    jaxopt_lab.train.errors.ConfigError: eval.every: got 0, expected at least 1

    Args:
      config: A dataclass.
      prefix: Name of the section that it is, with a dot behind it.

    Raises:
      ConfigError: Names the first setting that is out of bounds.
    """
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if is_dataclass(value):
            check_bounds(value, f"{name}.")
            continue
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, int | float) and not isinstance(item, bool):
                _check(name, item, hints[field.name])


def _check(name: str, value: float, hint: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(name, value, "expected a finite number")
    bound, held = _bound(hint) or Bound(-math.inf), value
    if isinstance(value, float) and abs(value) <= _LARGEST_FLOAT:
        # What the device makes of it: 1 - 1e-9 is 1 there, and 1e-40 is 0.
        held = 0.0 if abs(value) < np.finfo(np.float32).tiny else float(np.float32(value))
    if not bound.holds(held):
        words = [a for option in get_args(hint) for a in get_args(option) if isinstance(a, str)]
        words += ["None"] if type(None) in get_args(hint) else []
        rounded = f", and it is {held} in float32" if bound.holds(value) else ""
        raise ConfigError(name, value, ", or ".join([str(bound), *words]) + rounded)
    largest = _LARGEST_FLOAT if isinstance(value, float) else _LARGEST_COUNT
    if bound.high == math.inf and abs(value) > largest:
        raise ConfigError(name, value, f"expected at most {largest}")


def _bound(hint: Any) -> Bound | None:
    """The bound of a type, of a member of a union or of the items of a tuple."""
    if isinstance(hint, Bound):
        return hint
    inside = getattr(hint, "__metadata__", ()) or get_args(hint)
    return next(filter(None, map(_bound, inside)), None)
