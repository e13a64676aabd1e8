"""Devices: the mesh, and how a batch lies on it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped

from jaxopt_lab.train.errors import ConfigError
from jaxopt_lab.train.config.sections import AXES, MeshConfig, axis_sizes, sizes_as_text
from jaxopt_lab.train.config.zeroth_order_base import PROBE_AXIS

# A batch is split over both: fsdp is data parallelism whose parameters are also split.
BATCH_AXES = ("data", "fsdp")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Lays the devices out along data, fsdp and tensor, and probe where there are such groups.

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
    groups = config.probe
    used = int(np.prod(sizes)) * groups
    if used < len(devices) and jax.process_count() > 1:
        raise ConfigError(
            "mesh",
            sizes_as_text(sizes),
            f"expected all {len(devices)} devices of the processes in use",
        )
    if groups == 1:
        grid, names = lay_out(sizes, devices[:used]), AXES
    else:
        # Groups exchange next to nothing, so neighbours in the network are of one group; as the
        # last axis they hold the rows of a batch in common, as devices along tensor do.
        grid = np.moveaxis(lay_out((groups, *sizes), devices[:used]), 0, -1)
        names = (*AXES, PROBE_AXIS)
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def lay_out(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices by the sizes of the axes, neighbours in the network next to each other.

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
    devices: Shaped[np.ndarray, "data fsdp *within"], batch_size: int, process: int
) -> Int[np.ndarray, " rows"]:
    """Numbers of the rows of a batch that lie on the devices of a process, ascending.

    They need not be adjacent: on a TPU slice the devices of a host form a block of the torus. Hosts
    that differ only along other axes hold the same rows.

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
