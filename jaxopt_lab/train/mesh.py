"""Devices: the mesh, how a batch lies on it, and starting several processes."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxopt_lab.train.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
# A batch is split over both: fsdp is data parallelism whose parameters are also split.
BATCH_AXES = ("data", "fsdp")

# Number of tasks, as the launchers export it to every one of them.
_TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_TPU_HOSTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1 and takes what is left."""

    data: int = -1
    """Replicas of the parameters, each with its own part of the batch."""

    fsdp: int = 1
    """Parts of every parameter and of its optimizer state, each with its part of the batch."""

    tensor: int = 1
    """Parts of the matrix products inside a layer."""


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes. Under SLURM, Open MPI or on a TPU pod nothing needs to be set."""

    coordinator_address: str | None = None
    """`host:port` of process 0; starts multi-process training."""

    num_processes: int | None = None
    """Number of processes."""

    process_id: int | None = None
    """Number of this process, from 0."""

    heartbeat_timeout_seconds: int = 20
    """After this long without a sign of life from one process, JAX ends the others."""


def initialize_processes(config: DistributedConfig) -> bool:
    """Joins the other processes of the job, if there are any.

    Must run before JAX touches a device. With a coordinator address the three settings are used
    as given; otherwise a launcher that JAX knows (SLURM, Open MPI, a TPU pod) provides them.

    Returns:
      True when this process is now one of several.

    Raises:
      ConfigError: If only some of the three settings are given, or they contradict each other.
    """
    timeout = config.heartbeat_timeout_seconds
    if timeout < 1:
        raise ConfigError(
            "distributed.heartbeat_timeout_seconds", timeout, "expected at least 1 second"
        )
    given = (config.coordinator_address, config.num_processes, config.process_id)
    if all(value is None for value in given):
        if not _launched_as_one_of_many(os.environ):
            return False
        jax.distributed.initialize(heartbeat_timeout_seconds=timeout)
        return True
    address, count, index = given
    for name, value in zip(
        ("coordinator_address", "num_processes", "process_id"), given, strict=True
    ):
        if value is None:
            raise ConfigError(f"distributed.{name}", None, "expected all three settings or none")
    assert count is not None and index is not None
    if not 0 <= index < count:
        raise ConfigError("distributed.process_id", index, f"expected 0 to {count - 1}")
    jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=timeout)
    return True


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
            "mesh", _as_text(sizes), f"expected all {len(devices)} devices of the processes in use"
        )
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices[:used])


def axis_sizes(config: MeshConfig, device_count: int) -> tuple[int, int, int]:
    """Sizes of the three axes, with -1 filled in.

    >>> axis_sizes(MeshConfig(data=-1, fsdp=4), 8)
    (2, 4, 1)
    """
    sizes = [config.data, config.fsdp, config.tensor]
    for name, size in zip(AXES, sizes, strict=True):
        if size < 1 and size != -1:
            raise ConfigError(f"mesh.{name}", size, "expected at least 1, or -1 for what is left")
    if sizes.count(-1) > 1:
        raise ConfigError("mesh", _as_text(sizes), "expected at most one axis of size -1")
    fixed = int(np.prod([size for size in sizes if size != -1]))
    if fixed > device_count or (-1 in sizes and device_count % fixed):
        relation = "divide" if -1 in sizes else "be at most"
        raise ConfigError(
            "mesh",
            _as_text(sizes),
            f"expected a product that fits: {fixed} must {relation} "
            f"the number of devices, {device_count}",
        )
    data, fsdp, tensor = (device_count // fixed if size == -1 else size for size in sizes)
    return data, fsdp, tensor


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_slice(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """Which part of the batch this process feeds.

    Processes that differ only along the tensor axis feed the same rows, so this is not always
    (process index, process count).

    Returns:
      Index of the part and number of equal parts.

    Raises:
      ConfigError: If the rows of this process are not one contiguous part.
    """
    layout = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    rows = {index[0].indices(batch_size)[:2] for index in layout.values() if index is not None}
    start, stop = min(first for first, _ in rows), max(last for _, last in rows)
    size = sum(last - first for first, last in rows)
    if stop - start != size or batch_size % size or start % size:
        raise ConfigError("mesh", dict(mesh.shape), "expected the rows of a process to be adjacent")
    return start // size, batch_size // size


def to_global(mesh: Mesh, batch: Mapping[str, np.ndarray], batch_size: int) -> dict[str, Array]:
    """Assembles the global batch from the rows that each process holds."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (batch_size, *rows.shape[1:]))
        for name, rows in batch.items()
    }


def from_whole(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
    """Puts a batch that every process holds as a whole onto the mesh."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_callback(rows.shape, sharding, lambda index, r=rows: r[index])
        for name, rows in batch.items()
    }


def _launched_as_one_of_many(environment: Mapping[str, str]) -> bool:
    # JAX's own detection would also fire on a lone process in a container cluster, and then fail
    # there for want of a package; so it is asked only where a launcher announces several tasks.
    tasks = [int(environment.get(name, "1")) for name in _TASK_COUNTS]
    hosts = [environment.get(name, "").count(",") + 1 for name in _TPU_HOSTS]
    return max(tasks + hosts) > 1


def _as_text(sizes: Sequence[int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in zip(AXES, sizes, strict=True))
