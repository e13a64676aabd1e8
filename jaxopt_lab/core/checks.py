"""Checks of arguments, before anything is compiled: errors say what came and what was wanted."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

NO_TREE = str, bool, int, float, np.generic, np.ndarray, jax.Array
DTYPES = ("bfloat16", "float16", "float32", "float64")


class Wanted(NamedTuple):
    """A condition on a number, and its words."""

    text: str
    holds: Callable[[float], bool]


FINITE = Wanted("a finite number", math.isfinite)
NOT_NEGATIVE = Wanted("a finite number >= 0", lambda x: 0 <= x < math.inf)
POSITIVE = Wanted("a finite number > 0", lambda x: 0 < x < math.inf)
DECAY = Wanted("a number in [0, 1)", lambda x: 0 <= x < 1)
DECAY_OR_SUM = Wanted("a number in [0, 1], where 1 accumulates sums", lambda x: 0 <= x <= 1)
COUNT = Wanted("an integer >= 1", lambda x: x >= 1 and float(x).is_integer())


def plain_number(value: Any) -> Any:
    """A NumPy number as a Python one, whose dtype promotes nothing; anything else as it is."""
    if not isinstance(value, np.generic | np.ndarray) or value.ndim:
        return value
    kinds = (np.bool_, bool), (np.integer, int), (jnp.floating, float)
    return next((make(value) for kind, make in kinds if jnp.issubdtype(value.dtype, kind)), value)


def check_number(name: str, value: Any, wanted: Wanted) -> None:
    """Check a number of Python or NumPy.

    An array of jax is checked for its shape alone: it may be a tracer, which
    `optax.inject_hyperparams` makes of all numbers.

    Args:
      name: The argument or field, for the error.
      value: What was given for it.
      wanted: The condition.

    Raises:
      ValueError: It is no number, or none that holds the condition.
    """
    value = plain_number(value)
    if isinstance(value, jax.Array):
        holds = value.ndim == 0
    else:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        holds = is_number and wanted.holds(value)
    if not holds:
        raise ValueError(f"{name}: got {value!r}, wanted {wanted.text}")


def check_rates(**rates: Any) -> None:
    """Check learning rates and weight decays by name: numbers or schedules.

    Raises:
      ValueError: One is NaN, infinite, negative or no number.
    """
    for name, rate in rates.items():
        if not callable(rate):
            check_number(name, rate, NOT_NEGATIVE)


def check_decays(**decays: Any) -> None:
    """Check the decays of averages by name.

    Raises:
      ValueError: One is outside of [0, 1), or was rounded to 1.

    Warns:
      UserWarning: One has the dtype of half-precision parameters.
    """
    for name, decay in decays.items():
        check_number(name, decay, DECAY)
        if isinstance(decay, jax.Array) and decay.dtype.itemsize < 4:
            text = (
                f"{name} is rounded to {decay.dtype}, in which 0.999 is 1 or nearly so; tell "
                "optax.inject_hyperparams hyperparam_dtype=jnp.float32"
            )
            if not isinstance(decay, Tracer) and decay >= 1:
                raise ValueError(text)
            warnings.warn(text, stacklevel=2)


def given(**values: Any) -> dict[str, Any]:
    """The arguments that are not None, where None leaves something out."""
    return {name: value for name, value in values.items() if value is not None}


def check_choice(name: str, value: Any, choices: Iterable[str | None]) -> None:
    """Check one of several words.

    Raises:
      ValueError: It is none of them; the message lists them.
    """
    choices = tuple(choices)
    if not (isinstance(value, str | None) and value in choices):
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(str, choices))}")


def check_tree(name: str, value: Any, entries: str, remedy: str) -> None:
    """Check what is a tree or a function of the parameters.

    Raises:
      ValueError: It is one word or number: what `optax.inject_hyperparams` makes of a function.
    """
    if isinstance(value, NO_TREE):
        wanted = f"a tree of {entries} or a function of the parameters"
        raise ValueError(f"{name}: got {value!r}, wanted {wanted}; {remedy}")


def check_dtype(name: str, dtype: Any) -> None:
    """Check a dtype to compute or to keep state in; None is left to the caller.

    Raises:
      ValueError: It is none of `DTYPES`. Floats of 8 bits have too few digits for an average, and
        too small a range for products.
    """
    known = {jnp.dtype(each) for each in DTYPES}
    try:
        named = isinstance(dtype, str | type | np.dtype)  # a number has a dtype, but is none
        holds = dtype is None or (named and jnp.dtype(dtype) in known)
    except TypeError:  # not the name of any dtype
        holds = False
    if not holds:
        raise ValueError(f"{name}: got {dtype!r}, wanted None or one of {', '.join(DTYPES)}")
