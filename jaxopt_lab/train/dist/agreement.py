"""What several processes agree on before they compute together: settings, failures, signals."""

import itertools
import json
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # the client has no public name
from jax.experimental import multihost_utils

from jaxopt_lab.train.errors import (
    CheckpointError,
    ConfigError,
    NotReadyError,
    Terminated,
    TrainingError,
)

Result = TypeVar("Result")
_LAST_SECONDS, _POLL_SECONDS = 1.0, 0.05
# Of what processes tell through the coordinator, and the number of the next topic on all of them.
_PLACE, _TOPICS = "jaxopt-lab/outcomes", itertools.count()

# Raised again as what it was; anything else as a TrainingError.
_KINDS: dict[str, Callable[[str], BaseException]] = {
    "ConfigError": lambda text: ConfigError.inside("refused", ValueError(text)),
    "NotReadyError": lambda text: NotReadyError.inside("refused", ValueError(text)),
    "CheckpointError": CheckpointError,
    "TrainingError": TrainingError,
    "KeyboardInterrupt": KeyboardInterrupt,
    "Terminated": Terminated,
}


def agreed(work: Callable[[], Result]) -> Result:
    """Runs `work` on every process; if it fails on one, all raise.

    A process that went on alone would wait for the others in its next computation, until JAX ends
    it without a word. All processes must come here. The work may wait for other processes only
    before anything in it can fail.

    Raises:
      Exception: Its own failure, or the first one of another process with the number of that
        process: ConfigError, NotReadyError, CheckpointError, KeyboardInterrupt and Terminated as what
        they are, others as TrainingError.
    """
    if jax.process_count() == 1:
        return work()
    result, failure = None, None
    try:
        result = work()
    except BaseException as error:
        failure = error
    reports = gather("" if failure is None else _report(failure))
    if any(reports):
        leave_last()
    if failure is not None:
        raise failure
    for process, report in enumerate(reports):
        if report:
            kind, text = report.split("\n", 1)
            raise _KINDS.get(kind, TrainingError)(f"process {process}: {text}")
    return result  # pyright: ignore[reportReturnType]


def _report(failure: BaseException) -> str:
    kind = type(failure).__name__
    # What is no user's mistake is of use only with its kind.
    told = kind in _KINDS or isinstance(failure, OSError)
    return f"{kind}\n{failure}" if told else f"{kind}\n{kind}: {failure}"


def leave_last() -> None:
    """Before all processes raise: the first one waits a moment.

    When it ends, the others lose their connection, and JAX aborts them before they have said why
    they end.
    """
    if jax.process_count() > 1 and jax.process_index() == 0:
        time.sleep(_LAST_SECONDS)


def from_first(work: Callable[[], Any]) -> Any:
    """What `work` returns on process 0, on all processes; a JSON value.

    Raises:
      Exception: As `agreed`.
    """
    text = agreed(lambda: json.dumps(work()) if jax.process_index() == 0 else "")
    return json.loads(gather(text)[0])


def same_everywhere(settings: Mapping[str, Any]) -> None:
    """Refuses to start if processes were given different settings, or have different text.

    Args:
      settings: JSON values by name, sections as mappings.

    Raises:
      ConfigError: On all processes alike; names a setting that differs, two of its values, and the
        hosts that have them.
    """
    if jax.process_count() == 1:
        return
    told = gather(json.dumps([socket.gethostname(), _flat(settings)]))
    (host, first), *others = [json.loads(text) for text in told]
    for process, (its_host, other) in enumerate(others, start=1):
        for name in sorted(first | other):
            here, there = first.get(name), other.get(name)
            if here != there:
                leave_last()
                where = f"which process 0 has (on the hosts {its_host} and {host})"
                raise ConfigError(
                    name, there, f"on process {process}, expected {here!r}, {where}"
                )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat


def told_by_all(outcome: Callable[[], str | None]) -> dict[int, str]:
    """Waits for an outcome on every process, or until it is a failure on one.

    Meanwhile the work may compute together with that of other processes: these tell each other
    through the coordinator, and not through their devices. All processes must come here.

    Args:
      outcome: None while there is none yet, "" for success, otherwise why it failed.

    Returns:
      The outcomes by number of the process; of all, or with at least one failure.
    """
    client, topic = distributed.global_state.client, next(_TOPICS)
    assert client is not None
    own, told = None, {}
    while True:
        if own is None and (own := outcome()) is not None:
            client.key_value_set(f"{_PLACE}/{topic}/{jax.process_index()}", own)
        found = client.key_value_dir_get(f"{_PLACE}/{topic}/")
        told = {int(key.rpartition("/")[2]): text for key, text in found}
        if any(told.values()):
            return told
        if len(told) == jax.process_count():
            # Whoever tells about this topic is done with the one before.
            client.key_value_delete(f"{_PLACE}/{topic - 1}/")
            return told
        time.sleep(_POLL_SECONDS)


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(own.size, np.int32))
    padded = np.zeros(max(1, int(np.max(sizes))), np.uint8)
    padded[: own.size] = own
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]
