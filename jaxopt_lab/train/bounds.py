"""Which numbers a setting may hold: one table, and what looks a configuration up in it."""

import math
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from jaxopt_lab.train.errors import ConfigError

# Counters on the device are 32 bits wide, rates float32.
_LARGEST_COUNT = 2**31 - 1
_LARGEST_FLOAT = 3.4e38


class _Bound(NamedTuple):
    """An interval, and what to say to a number outside of it."""

    low: float
    high: float
    wanted: str
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """Whether the number is inside."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below


def _at_least(low: float) -> _Bound:
    return _Bound(low, math.inf, f"expected at least {low}")


def _between(low: float, high: float) -> _Bound:
    return _Bound(low, high, f"expected at least {low} and at most {high}")


_POSITIVE = _Bound(0, math.inf, "expected a positive number", open_low=True)
_NOT_NEGATIVE = _Bound(0, math.inf, "expected a positive number or 0")
_AVERAGE = _Bound(0, 1, "expected an average in [0, 1)", open_high=True)
_SHARE = _Bound(0, 1, "expected a share in [0, 1]")
_INNER_SHARE = _Bound(0, 1, "expected a share between 0 and 1", open_low=True, open_high=True)

BOUNDS: dict[str, _Bound] = {
    "steps": _at_least(1),
    "batch_size": _at_least(1),
    "accumulation": _at_least(1),
    "head_chunks": _at_least(1),
    "clip": _Bound(0, math.inf, "expected a positive norm, or None", open_low=True),
    "z_loss": _at_least(0),
    "validation_fraction": _INNER_SHARE,
    "ema": _Bound(0, 1, "expected a decay between 0 and 1, or None", True, True),
    "seed": _between(0, 2**32 - 1),
    "max_skipped": _at_least(0),
    "peak_tflops": _POSITIVE,
    # One token has nothing before it to be predicted from, one word nothing to be told from.
    "model.context": _at_least(2),
    "model.vocab_size": _at_least(2),
    "eval.every": _at_least(1),
    "eval.batches": _at_least(1),
    "eval.sample_tokens": _between(0, 2**20),
    "checkpoint.every_steps": _at_least(1),
    "checkpoint.every_minutes": _Bound(0, math.inf, "expected more than 0", open_low=True),
    "checkpoint.keep_newest": _at_least(1),
    "checkpoint.keep_best": _at_least(0),
    "diagnostics.every": _at_least(1),
    "diagnostics.window": _at_least(1),
    "diagnostics.target_loss": _at_least(0),
    "distributed.num_processes": _at_least(1),
    "distributed.process_id": _at_least(0),
    "distributed.heartbeat_timeout_seconds": _at_least(1),
    "distributed.start_timeout_seconds": _at_least(1),
    "schedule.warmup_fraction": _SHARE,
    "schedule.warmup_steps": _at_least(0),
    "schedule.target_loss": _at_least(0),
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.period": _Bound(1, math.inf, "expected at least 1, or inf for never spectral"),
    "optimizer.sign_lr_ratio": _NOT_NEGATIVE,
    "optimizer.adam_lr_ratio": _NOT_NEGATIVE,
    "optimizer.b1": _AVERAGE,
    "optimizer.b2": _AVERAGE,
    "optimizer.beta": _AVERAGE,
    "optimizer.momentum": _AVERAGE,
    "optimizer.eps": _at_least(0),
    # They are unrolled in the program; five suffice in bfloat16, twelve in float32.
    "optimizer.ns_steps": _between(1, 100),
    "optimizer.precondition_frequency": _at_least(1),
    "optimizer.max_precond_dim": _at_least(0),
    "cells": _between(1, 1000),
    "spacing": _Bound(1, 1000, "expected a ratio above 1, and at most 1000", open_low=True),
    "timing_steps": _at_least(1),
    "sweep_seed": _between(0, 2**32 - 1),
    "seeds": _between(0, 2**32 - 1),
}
"""By the name of the setting, as on the command line. Any other number must be finite, and an
integer fit into 32 bits."""


def check_bounds(config: Any, prefix: str = "") -> None:
    """Checks every number in a configuration, sections included.

    >>> from jaxopt_lab.train.config import EvalConfig
    >>> check_bounds(EvalConfig(every=0), "eval.")
    Traceback (most recent call last):
    jaxopt_lab.train.errors.ConfigError: eval.every: got 0, expected at least 1

    Args:
      config: A dataclass.
      prefix: Name of the section that it is, with a dot behind it.

    Raises:
      ConfigError: Names the first setting that is out of bounds.
    """
    for field in fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if is_dataclass(value):
            check_bounds(value, f"{name}.")
            continue
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, int | float) and not isinstance(item, bool):
                _check(name, item)


def _check(name: str, value: float) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(name, value, "expected a finite number")
    bound = BOUNDS.get(name)
    if bound is not None and not bound.holds(value):
        raise ConfigError(name, value, bound.wanted)
    # An interval that ends may end higher: seeds have 32 bits without a sign.
    largest = _LARGEST_FLOAT if isinstance(value, float) else _LARGEST_COUNT
    if abs(value) > largest and (bound is None or bound.high == math.inf):
        raise ConfigError(name, value, f"expected at most {largest}")
