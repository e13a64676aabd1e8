import itertools
from dataclasses import dataclass

import jax
import numpy as np
import pytest

from jaxopt_lab.train.config.sections import DistributedConfig, MeshConfig, axis_sizes
from jaxopt_lab.train.dist.mesh import (
    flags,
    lay_out,
    make_mesh,
    rows_of_process,
    to_global,
)
from jaxopt_lab.train.dist.processes import initialize_processes
from jaxopt_lab.train.errors import ConfigError


@pytest.mark.parametrize(
    ("config", "devices", "sizes"),
    [
        (MeshConfig(), 8, (8, 1, 1)),
        (MeshConfig(2, 2, 2), 8, (2, 2, 2)),
        (MeshConfig(2, -1, 2), 8, (2, 2, 2)),
        (MeshConfig(1, 1, 1), 8, (1, 1, 1)),
    ],
)
def test_sizes_fill_the_devices(config, devices, sizes):
    assert axis_sizes(config, devices) == sizes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(3, 3, 1), r"mesh: got 'data 3 x fsdp 3 x tensor 1'.*9 must be at most.*8"),
        (MeshConfig(-1, 3, 1), r"3 must divide the number of devices, 8"),
        (MeshConfig(-1, -1, 1), "at most one axis of size -1"),
        (MeshConfig(0, 1, 1), r"mesh\.data: got 0"),
        (MeshConfig(1, 1, -2), r"mesh\.tensor: got -2"),
    ],
)
def test_a_mesh_that_does_not_fit_says_so(config, message):
    with pytest.raises(ConfigError, match=message):
        axis_sizes(config, 8)


def test_axes_are_auto_and_unused_devices_are_left_out():
    mesh = make_mesh(MeshConfig(2, 2, 1))
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.size == 4
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_a_batch_lies_over_data_and_fsdp_and_is_repeated_over_tensor():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    rows = np.arange(24).reshape(8, 3)
    batch = to_global(mesh, {"x": rows}, 8)
    assert np.array_equal(batch["x"], rows)
    assert {s.data.shape for s in batch["x"].addressable_shards} == {(2, 3)}
    assert list(rows_of_process(mesh.devices, 8, 0)) == list(range(8))


@dataclass(frozen=True)
class Chip:
    """What laying out a mesh asks of a TPU device."""

    id: int
    platform: str
    device_kind: str
    process_index: int
    coords: tuple[int, ...]
    core_on_chip: int = 0
    slice_index: int = 0


def tpu_slice(kind, shape):
    """The chips of a slice, hosts with blocks of 2 x 2 x 1, in the order of JAX's device list."""
    chips, hosts = [], {}
    for number, place in enumerate(itertools.product(*map(range, reversed(shape)))):
        x, y, z = reversed(place)
        host = hosts.setdefault((x // 2, y // 2, z), len(hosts))
        chips.append(Chip(number, "tpu", kind, host, (x, y, z)))
    return sorted(chips, key=lambda chip: (chip.process_index, chip.id))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("TPU v4", (2, 2, 4)), ("TPU v4", (2, 4, 4)), ("TPU v5 lite", (4, 4, 1)),
        ("TPU v5 lite", (4, 8, 1)), ("TPU v5p", (2, 2, 4)), ("TPU v6 lite", (4, 4, 1)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("config", [
    MeshConfig(), MeshConfig(1, -1), MeshConfig(-1, 4), MeshConfig(1, -1, 4), MeshConfig(2, -1),
], ids=str)  # fmt: skip
def test_every_host_of_a_tpu_slice_holds_the_rows_of_its_chips(kind, shape, config):
    chips = tpu_slice(kind, shape)
    sizes = axis_sizes(config, len(chips))
    devices = lay_out(sizes, chips)
    groups, batch_size = sizes[0] * sizes[1], 3 * sizes[0] * sizes[1]
    for process in {chip.process_index for chip in chips}:
        rows = rows_of_process(devices, batch_size, process)
        wanted = set()
        for place, chip in np.ndenumerate(devices):
            if chip.process_index == process:
                first = 3 * (place[0] * sizes[1] + place[1])
                wanted |= set(range(first, first + 3))
        assert list(rows) == sorted(wanted)
        assert len(rows) >= batch_size // groups


def test_devices_find_their_rows_among_those_that_a_process_holds(monkeypatch):
    mesh = make_mesh(MeshConfig(4, 2, 1))
    # As in a process whose devices are these: the callback is asked for their rows alone.
    own = [0, 1, 4, 5, 10, 11]
    held, found = np.arange(16) * 10, {}
    monkeypatch.setattr(
        jax,
        "make_array_from_callback",
        lambda shape, sharding, at: {
            start: found.setdefault(start, at((slice(start, start + 2),))) for start in own[::2]
        },
    )
    to_global(mesh, {"x": held[own]}, 16, np.asarray(own))
    assert {start: list(rows) for start, rows in found.items()} == {
        start: [10 * start, 10 * start + 10] for start in own[::2]
    }


def test_groups_of_probes_have_a_mesh_each_and_hold_the_same_rows():
    assert axis_sizes(MeshConfig(-1, 2, probe=2), 8) == (2, 2, 1)
    mesh = make_mesh(MeshConfig(-1, 2, probe=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1, "probe": 2}
    # Neighbours are of one group.
    ids = [[device.id for device in mesh.devices[..., group].flat] for group in range(2)]
    assert ids == [[0, 1, 2, 3], [4, 5, 6, 7]]
    batch = to_global(mesh, {"x": np.arange(8)}, 8)["x"]
    held = {shard.device.id: shard.data.tolist() for shard in batch.addressable_shards}
    assert all(held[n] == held[n + 4] == [2 * n, 2 * n + 1] for n in range(4))
    assert rows_of_process(mesh.devices, 8, 0).tolist() == list(range(8))


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(2, 2, 2), MeshConfig(1, 1, 8)])
def test_flags_have_one_row_a_device(config):
    array = flags(make_mesh(config), [1, 0])
    assert array.shape == (8, 2) and np.array_equal(array, [[1, 0]] * 8)
    assert {s.data.shape for s in array.addressable_shards} == {(1, 2)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DistributedConfig(coordinator_address="127.0.0.1:1"), "num_processes: got None"),
        (DistributedConfig("127.0.0.1:1", 2, 2), "process_id: got 2, expected 0 to 1"),
        (DistributedConfig(num_processes=2), "coordinator_address: got None"),
    ],
)
def test_incomplete_process_settings_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        initialize_processes(config)


def test_one_process_alone_starts_nothing():
    assert initialize_processes(DistributedConfig()) is False


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    ],
)
def test_launchers_of_several_tasks_hand_over_to_jax(environment, expected, monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES",
                 "TPU_PROCESS_ADDRESSES"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    settings = DistributedConfig(heartbeat_timeout_seconds=7)
    assert initialize_processes(settings) is expected
    # JAX waits longer than we do: what it does then is no message, but an abort.
    given = {"heartbeat_timeout_seconds": 7, "initialization_timeout": 660}
    assert calls == ([given] if expected else [])
