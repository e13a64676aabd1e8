"""Starting several processes."""

import os
import threading
from collections.abc import Mapping
from typing import Any

import jax
from jax._src import distributed  # the address in use has no public name

from jaxopt_lab.train.config.bounds import check_bounds
from jaxopt_lab.train.config.sections import DistributedConfig
from jaxopt_lab.train.dist.launchers import Launcher, detect, number
from jaxopt_lab.train.errors import ConfigError, NotReadyError

# What may stand in the environment in place of a flag.
_VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}


def initialize_processes(config: DistributedConfig) -> bool:
    """Joins the other processes of the job, if there are any.

    Must run before JAX touches a device. Coordinator, number of processes and number of this one
    come from the settings, else from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID,
    else from a launcher that JAX knows: SLURM, Open MPI, GKE, a Cloud TPU VM.

    Returns:
      True when this process is now one of several.

    Raises:
      ConfigError: If one of the three is not known, or they contradict each other; names what was
        found and what is missing.
      NotReadyError: If the others do not come in time, or cannot be reached.
    """
    check_bounds(config, "distributed.")
    if jax.distributed.is_initialized():  # by the caller
        return jax.process_count() > 1
    given = _given(config, {} if config.launcher == "none" else os.environ)
    found = detect(config.launcher, os.environ)
    if not given and found is None:
        _check_alone(config.launcher)
        return False
    launcher = None if found is None else found[0]
    missing = [] if launcher is None else launcher.missing(os.environ)
    if launcher is None or missing:
        given = _completed(given, found, missing)
    if len(given) == len(_VARIABLES):
        _check(given["coordinator_address"], given["num_processes"], given["process_id"])
    # JAX's own detection would also ask a cluster of containers, which needs a package.
    method = "deactivate" if launcher is None or missing else launcher.method
    _join(config, launcher, cluster_detection_method=method, **given)
    return True


def _given(config: DistributedConfig, environment: Mapping[str, str]) -> dict[str, Any]:
    """The settings, or their variables, that are set."""
    given: dict[str, Any] = {}
    for name, variable in _VARIABLES.items():
        value = getattr(config, name)
        if value is None and variable in environment:
            is_address = name == "coordinator_address"
            value = environment[variable] if is_address else number(environment, variable)
        if value is not None:
            given[name] = value
    return given


def _completed(
    given: dict[str, Any], found: tuple[Launcher, int] | None, missing: list[str]
) -> dict[str, Any]:
    """The three settings, where JAX would not find them all by itself."""
    if found is not None:
        launcher, count = found
        rank = None if launcher.rank is None else number(os.environ, launcher.rank)
        known = {"num_processes": count} | ({} if rank is None else {"process_id": rank})
        given = known | given
    for name, variable in _VARIABLES.items():
        if name in given:
            continue
        if found is None:
            wanted = f"expected all three settings or none; {variable} is not set either"
            raise ConfigError(f"distributed.{name}", None, wanted)
        launcher, count = found
        raise ConfigError(
            "distributed.launcher",
            launcher.name,
            f"which found {launcher.title} with {count} processes, but not {', '.join(missing)}: "
            f"{launcher.remedy}; --distributed.launcher none starts this process alone",
        )
    return given


def _check(address: str, count: int, index: int) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError("distributed.coordinator_address", address, "expected host:port")
    if not 0 <= index < count:
        raise ConfigError("distributed.process_id", index, f"expected 0 to {count - 1}")


def _check_alone(launcher: str) -> None:
    """A TPU slice is used by all of its hosts, whether they have joined or not."""
    if (count := jax.process_count()) > 1:
        wanted = (
            f"but the devices are those of {count} processes, which have not joined: expected the "
            "launcher or the three settings of a coordinator, or for one host of a TPU slice alone "
            "TPU_PROCESS_BOUNDS=1,1,1 and TPU_CHIPS_PER_PROCESS_BOUNDS=2,2,1"
        )
        raise ConfigError("distributed.launcher", launcher, wanted)


def _join(config: DistributedConfig, launcher: Launcher | None, **given: Any) -> None:
    """Waits for the other processes, in a thread: where they do not come, JAX ends the process.

    Raises:
      NotReadyError: If they do not come in time, or cannot be reached.
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
    by = "" if launcher is None else f", as found by {launcher.name}"
    address = given.get("coordinator_address") or distributed.global_state.coordinator_address
    if thread.is_alive():
        count = given.get("num_processes")
        who = "all processes" if count is None else f"{count} processes"
        raise NotReadyError(
            "distributed.start_timeout_seconds",
            seconds,
            f"but in this time not {who} came to the coordinator "
            f"{address or 'of the launcher'}{by}: start all of them",
        )
    for error in failures:
        reason = " ".join(str(error).split())
        raise NotReadyError(
            "distributed.coordinator_address", address, f"but{by and f'{by}:'} {reason}"
        ) from error
