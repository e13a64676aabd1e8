"""Devices: the mesh, and how a batch lies on it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped

from jaxopt_lab.models import BATCH_AXES
from jaxopt_lab.train.errors import ConfigError
from jaxopt_lab.train.config.sections import AXES, MeshConfig, axis_sizes, sizes_as_text
from jaxopt_lab.train.config.zeroth_order_base import PROBE_AXIS


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
            sizes_as_text(sizes if groups == 1 else (*sizes, groups)),
            f"expected all {len(devices)} devices of the processes in use",
        )
    if groups == 1:
        grid, names = lay_out(sizes, devices[:used], config.slices), AXES
    else:
        # As the last axis they hold the rows of a batch in common, as devices along tensor do.
        grid = np.moveaxis(lay_out((groups, *sizes), devices[:used], config.slices), 0, -1)
        names = (*AXES, PROBE_AXIS)
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def lay_out(
    sizes: tuple[int, ...], devices: Sequence[Any], slices: int | None = None
) -> np.ndarray:
    """Devices by the sizes of the axes, neighbours in the network next to each other.

    Several slices, or hosts of GPUs, lie one after another along the first axes. Where they do not
    fit, GPUs are laid out in their order, and TPUs refused.

    Args:
      sizes: Of data, fsdp and tensor; before them, where there are any, of groups of probes.
      devices: As many.
      slices: Number of slices; None: as many as the devices say.

    Raises:
      ConfigError: If the devices have another number of slices, or tensor would cross them.
    """
    announced = len({getattr(device, "slice_index", 0) for device in devices})
    processes = len({device.process_index for device in devices})
    on_tpu = devices[0].platform == "tpu"
    known = {announced} if on_tpu else {1, announced, processes}
    if slices is not None and slices not in known:
        wanted = f"expected {' or '.join(map(str, sorted(known)))}: the {len(devices)} devices of"
        told = f"{wanted} {processes} processes name {announced}"
        raise ConfigError("mesh.slices", slices, told)
    count = announced if slices is None else slices
    across = slices_along(sizes, count)
    if across is None:
        if slices is None and not on_tpu:
            return _in_one_slice(sizes, devices)
        crossing = "data x fsdp" if len(sizes) == len(AXES) else "probe x data x fsdp"
        wanted = (
            f"expected {crossing} to be a multiple of the {count} slices: tensor cannot cross them"
        )
        named = (*sizes[-len(AXES) :], *sizes[: -len(AXES)])
        raise ConfigError("mesh", sizes_as_text(named), wanted)
    if count == 1:
        return _in_one_slice(sizes, devices)
    inside = tuple(size // n for size, n in zip(sizes, across, strict=True))
    return mesh_utils.create_hybrid_device_mesh(
        inside,
        across,
        devices,
        process_is_granule=count != announced,
        allow_split_physical_axes=True,
    )


def slices_along(sizes: tuple[int, ...], slices: int) -> tuple[int, ...] | None:
    """How many slices each axis crosses, the first as many as it can; None if they do not fit.

    >>> slices_along((2, 16, 1), 4), slices_along((8, 1, 4), 4), slices_along((1, 1, 8), 2)
    ((2, 2, 1), (4, 1, 1), None)
    """
    across = []
    for size in sizes[:-1]:
        across.append(math.gcd(size, slices))
        slices //= across[-1]
    return (*across, 1) if slices == 1 else None


def mesh_as_text(mesh: Mesh) -> str:
    """Sizes of the axes, and which of them cross slices."""
    crossing = []
    for i, name in enumerate(mesh.axis_names):
        line = np.moveaxis(mesh.devices, i, 0).reshape(mesh.devices.shape[i], -1)[:, 0]
        count = len({getattr(device, "slice_index", 0) for device in line})
        crossing += [f"{count} slices along {name}"] if count > 1 else []
    return ", ".join([sizes_as_text(mesh.devices.shape), *crossing])


def _in_one_slice(sizes: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """A mesh whose axes are no products of the torus's own splits one, as 2 x 8 on 4 x 4 chips."""
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
