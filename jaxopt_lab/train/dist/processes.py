"""Starting several processes."""

import os
import threading
from collections.abc import Mapping
from typing import Any

import jax

from jaxopt_lab.train.config.bounds import check_bounds
from jaxopt_lab.train.errors import ConfigError
from jaxopt_lab.train.config.sections import DistributedConfig

# Number of tasks, as the launchers export it to every one of them.
_TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_TPU_HOSTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")


def initialize_processes(config: DistributedConfig) -> bool:
    """Joins the other processes of the job, if there are any.

    Must run before JAX touches a device. With a coordinator address the three settings are used
    as given; otherwise a launcher that JAX knows (SLURM, Open MPI, a TPU pod) provides them.

    Returns:
      True when this process is now one of several.

    Raises:
      ConfigError: If only some of the three settings are given, or they contradict each other.
    """
    check_bounds(config, "distributed.")
    given = (config.coordinator_address, config.num_processes, config.process_id)
    if all(value is None for value in given):
        if not _launched_as_one_of_many(os.environ):
            return False
        _join(config)
        return True
    address, count, index = given
    for name, value in zip(
        ("coordinator_address", "num_processes", "process_id"), given, strict=True
    ):
        if value is None:
            raise ConfigError(f"distributed.{name}", None, "expected all three settings or none")
    assert address is not None and count is not None and index is not None
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError("distributed.coordinator_address", address, "expected host:port")
    if not 0 <= index < count:
        raise ConfigError("distributed.process_id", index, f"expected 0 to {count - 1}")
    _join(config, coordinator_address=address, num_processes=count, process_id=index)
    return True


def _join(config: DistributedConfig, **given: Any) -> None:
    """Waits for the other processes, in a thread: where they do not come, JAX ends the process.

    Raises:
      ConfigError: If they do not come in time, or cannot be reached.
    """
    seconds = config.start_timeout_seconds
    failures: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                **given,
                heartbeat_timeout_seconds=config.heartbeat_timeout_seconds,
                initialization_timeout=2 * seconds + 60,
            )
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=join, name="distributed-start", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        who = (
            "all processes" if config.num_processes is None else f"{config.num_processes} processes"
        )
        raise ConfigError(
            "distributed.start_timeout_seconds",
            seconds,
            f"but in this time not {who} came to the coordinator "
            f"{config.coordinator_address or 'of the launcher'}: start all of them",
        )
    for error in failures:
        reason = " ".join(str(error).split())
        raise ConfigError(
            "distributed.coordinator_address", config.coordinator_address, f"but {reason}"
        ) from error


def _launched_as_one_of_many(environment: Mapping[str, str]) -> bool:
    # JAX's own detection would also fire on a lone process in a container cluster, and then fail
    # there for want of a package; so it is asked only where a launcher announces several tasks.
    tasks = [int(environment.get(name, "1")) for name in _TASK_COUNTS]
    hosts = [environment.get(name, "").count(",") + 1 for name in _TPU_HOSTS]
    return max(tasks + hosts) > 1
