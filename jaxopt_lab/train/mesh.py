"""Devices: the mesh, how a batch lies on it, and starting several processes."""

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped

from jaxopt_lab.train.bounds import check_bounds
from jaxopt_lab.train.errors import ConfigError
from jaxopt_lab.train.sections import AXES, DistributedConfig, MeshConfig, axis_sizes, sizes_as_text

# A batch is split over both: fsdp is data parallelism whose parameters are also split.
BATCH_AXES = ("data", "fsdp")

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


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Lays the devices out along data, fsdp and tensor.

    Args:
      config: Sizes of the axes. Their product may be smaller than the number of devices when
        there is one process; the first devices are used then.
      devices: All devices by default.

    Returns:
      A mesh of Auto axes.

    Raises:
      ConfigError: If the sizes do not fit the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices))
    used = int(np.prod(sizes))
    if used < len(devices) and jax.process_count() > 1:
        raise ConfigError(
            "mesh",
            sizes_as_text(sizes),
            f"expected all {len(devices)} devices of the processes in use",
        )
    types = (AxisType.Auto,) * len(AXES)
    return Mesh(lay_out(sizes, devices[:used]), AXES, axis_types=types)


def lay_out(sizes: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
    """Devices by data, fsdp and tensor, neighbours in the network next to each other.

    A mesh whose axes are no products of the torus's own, such as 2 x 8 on 4 x 4 chips, splits one
    of these.
    """
    try:
        return mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def rows_of_process(
    devices: Shaped[np.ndarray, "data fsdp tensor"], batch_size: int, process: int
) -> Int[np.ndarray, " rows"]:
    """Numbers of the rows of a batch that lie on the devices of a process, ascending.

    They need not be adjacent: on a TPU slice the devices of a host form a block of the torus. Hosts
    that differ only along the tensor axis hold the same rows.

    Args:
      devices: Those of the mesh.
      batch_size: Rows of the whole batch, a multiple of data times fsdp.
      process: Index of the process.
    """
    groups = devices.reshape(devices.shape[0] * devices.shape[1], -1)
    size = batch_size // len(groups)
    rows = np.arange(batch_size).reshape(len(groups), size)
    own = [any(device.process_index == process for device in group) for group in groups]
    return rows[own].ravel()


def to_global(
    mesh: Mesh,
    batch: Mapping[str, np.ndarray],
    batch_size: int,
    rows: Int[np.ndarray, " rows"] | None = None,
) -> dict[str, Array]:
    """Puts a batch onto the mesh, each device with its own rows.

    Args:
      mesh: Where the batch goes.
      batch: Arrays with the rows that this process holds.
      batch_size: Rows of the whole batch.
      rows: Their numbers, ascending, with all those of `rows_of_process`; None: all rows.
    """
    sharding = batch_sharding(mesh)
    rows = np.arange(batch_size) if rows is None else rows

    def placed(held: np.ndarray) -> Array:
        def on_device(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            # All rows of a device are held, so they are adjacent here too.
            first = int(np.searchsorted(rows, start))
            return held[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *held.shape[1:]), sharding, on_device)

    return {name: placed(held) for name, held in batch.items()}


def flag_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array with one row a device, along every axis of the mesh.

    Unlike rows of a batch, which processes may hold in common, these may differ between any two.
    """
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def flags(mesh: Mesh, values: Sequence[int]) -> Int[Array, "devices values"]:
    """What this process says, once for each of its devices."""
    own, shape = np.asarray([values], np.int32), (mesh.size, len(values))
    return jax.make_array_from_callback(shape, flag_sharding(mesh), lambda index: own)


def _launched_as_one_of_many(environment: Mapping[str, str]) -> bool:
    # JAX's own detection would also fire on a lone process in a container cluster, and then fail
    # there for want of a package; so it is asked only where a launcher announces several tasks.
    tasks = [int(environment.get(name, "1")) for name in _TASK_COUNTS]
    hosts = [environment.get(name, "").count(",") + 1 for name in _TPU_HOSTS]
    return max(tasks + hosts) > 1
