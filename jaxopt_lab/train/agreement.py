"""What several processes agree on before they compute together: settings, and failures."""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxopt_lab.train.errors import CheckpointError, ConfigError, TrainingError

Result = TypeVar("Result")

# What a user can act on; anything else is a defect, and ends the process with its traceback.
_EXPECTED = (ConfigError, CheckpointError, TrainingError, OSError)
_KINDS = {kind.__name__: kind for kind in (CheckpointError, TrainingError)}


def agreed(work: Callable[[], Result]) -> Result:
    """Runs `work` on every process; if it fails on one, all raise.

    A process that went on alone would wait for the others in its next computation, until JAX ends
    it without a word. All processes must come here. The work may wait for other processes only
    before anything in it can fail.

    Raises:
      ConfigError, CheckpointError, TrainingError, OSError: Its own failure, or the first one
        of another process, with the number of that process.
    """
    if jax.process_count() == 1:
        return work()
    result, failure = None, None
    try:
        result = work()
    except _EXPECTED as error:
        failure = error
    reports = _gather("" if failure is None else f"{type(failure).__name__}\n{failure}")
    if failure is not None:
        raise failure
    for process, report in enumerate(reports):
        if report:
            kind, text = report.split("\n", 1)
            text = f"process {process}: {text}"
            if kind == "ConfigError":
                raise ConfigError.inside("refused", ValueError(text))
            raise _KINDS.get(kind, TrainingError)(text)
    return result  # pyright: ignore[reportReturnType]


def same_everywhere(settings: Mapping[str, Any]) -> None:
    """Refuses to start if processes were given different settings.

    Args:
      settings: JSON values by name, sections as mappings.

    Raises:
      ConfigError: On all processes alike; names a setting that differs, and two of its values.
    """
    if jax.process_count() == 1:
        return
    first, *others = [json.loads(text) for text in _gather(json.dumps(_flat(settings)))]
    for process, other in enumerate(others, start=1):
        for name in sorted(first | other):
            here, there = first.get(name), other.get(name)
            if here != there:
                raise ConfigError(
                    name, there, f"on process {process}, expected {here!r}, which process 0 has"
                )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat


def _gather(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(own.size, np.int32))
    padded = np.zeros(max(1, int(np.max(sizes))), np.uint8)
    padded[: own.size] = own
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]
