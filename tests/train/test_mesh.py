import itertools
from argparse import Namespace
from dataclasses import dataclass, replace

import jax
import numpy as np
import pytest
from jax._src import cloud_tpu_init
from jax.sharding import PartitionSpec

from jaxopt_lab.models import ShardingRules
from jaxopt_lab.train.arguments import parse_config
from jaxopt_lab.train.config.sections import DistributedConfig, MeshConfig, axis_sizes
from jaxopt_lab.train.dist.mesh import (
    batch_sharding,
    flags,
    lay_out,
    make_mesh,
    mesh_as_text,
    rows_of_process,
    to_global,
)
from jaxopt_lab.train.dist.processes import initialize_processes
from jaxopt_lab.train.errors import ConfigError
from jaxopt_lab.train.program import build_program
from tests.train.tiny_run import MODEL, tiny_config


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


def tpu_slice(kind, shape, slices=1):
    """The chips of slices, hosts with blocks of 2 x 2 x 1, in the order of JAX's device list."""
    chips, hosts = [], {}
    for number, (at, *place) in enumerate(
        itertools.product(range(slices), *map(range, reversed(shape)))
    ):
        x, y, z = reversed(place)
        host = hosts.setdefault((at, x // 2, y // 2, z), len(hosts))
        chips.append(Chip(number, "tpu", kind, host, (x, y, z), slice_index=at))
    return sorted(chips, key=lambda chip: (chip.process_index, chip.id))


def gpu_hosts(hosts, each=8):
    """GPUs, of which JAX calls those of a host a slice."""
    return [
        Chip(i, "gpu", "H100", i // each, (), slice_index=i // each) for i in range(hosts * each)
    ]


SHAPES = [
    ("TPU v4", (2, 2, 4)), ("TPU v4", (2, 4, 4)), ("TPU v5 lite", (4, 4, 1)),
    ("TPU v5 lite", (4, 8, 1)), ("TPU v5p", (2, 2, 4)), ("TPU v6 lite", (4, 4, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "shape"), SHAPES)
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


@pytest.mark.parametrize(
    ("kind", "shape"), [*SHAPES, ("TPU v5", (4, 4, 4)), ("TPU v5e", (8, 8, 1))]
)
@pytest.mark.parametrize("config", [
    MeshConfig(), MeshConfig(fsdp=8), MeshConfig(fsdp=4, tensor=4), MeshConfig(2, -1),
    MeshConfig(2, -1, 4), MeshConfig(4, -1),
], ids=lambda config: f"{config.data}-{config.fsdp}-{config.tensor}")  # fmt: skip
def test_only_data_crosses_the_slices_of_a_pod(kind, shape, config):
    chips = tpu_slice(kind, shape, slices=2)
    devices = lay_out(axis_sizes(config, len(chips)), chips)
    assert {chip.id for chip in devices.ravel()} == {chip.id for chip in chips}
    for of_replica in devices:
        assert len({chip.slice_index for chip in of_replica.ravel()}) == 1
    # The tensor axis goes along links: neighbours differ by one step, or by the way around a ring.
    for line in devices.reshape(-1, devices.shape[2]):
        for one, other in itertools.pairwise(line):
            steps = [abs(a - b) for a, b in zip(one.coords, other.coords, strict=True)]
            assert sum(min(n, size - n) for n, size in zip(steps, shape, strict=True)) <= 2


def test_fsdp_crosses_slices_only_where_data_cannot():
    chips = tpu_slice("TPU v5 lite", (4, 4, 1), slices=4)
    devices = lay_out((2, 32, 1), chips)
    for replica, of_replica in enumerate(devices):
        assert {chip.slice_index for chip in of_replica.ravel()} == {2 * replica, 2 * replica + 1}
    mesh = Namespace(devices=devices, axis_names=("data", "fsdp", "tensor"))
    wanted = "data 2 x fsdp 32 x tensor 1, 2 slices along data, 2 slices along fsdp"
    assert mesh_as_text(mesh) == wanted
    with pytest.raises(ConfigError, match="mesh: got 'data 1 x fsdp 2 x tensor 32', expected data"):
        lay_out((1, 2, 32), chips)


@pytest.mark.parametrize("sizes", [(2, 8, 1), (2, 1, 8), (4, 2, 2), (1, 16, 1)])
def test_axes_inside_of_data_stay_on_one_host_of_gpus(sizes):
    devices = lay_out(sizes, gpu_hosts(2))
    groups = devices.reshape(-1, *devices.shape[1:]) if sizes[0] > 1 else devices.reshape(2, 8)
    for group in groups:
        assert len({device.process_index for device in group.ravel()}) == 1
    # Where not even fsdp can cross hosts alone, devices keep their order.
    across = lay_out((1, 1, 16), gpu_hosts(2))
    assert [device.id for device in across.ravel()] == list(range(16))


def test_slices_are_what_devices_say_or_processes():
    chips, hosts = tpu_slice("TPU v6 lite", (4, 4, 1), slices=2), gpu_hosts(4)
    with pytest.raises(
        ConfigError, match="mesh.slices: got 4, expected 2: the 32 devices of 8 pro"
    ):
        lay_out((4, 8, 1), chips, 4)
    # One domain of fast links over all hosts, and hosts as slices all the same.
    joined = [replace(device, slice_index=0) for device in hosts]
    for of_replica in lay_out((4, 8, 1), joined, 4):
        assert len({device.process_index for device in of_replica.ravel()}) == 1
    with pytest.raises(ConfigError, match="mesh.slices: got 3, expected 1 or 4"):
        lay_out((4, 8, 1), joined, 3)


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


SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "4", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
}  # fmt: skip
OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1.0;tcp://a:1", "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),
        (SLURM, None),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "4"}, "slurm"),
        ({**OMPI, "OMPI_COMM_WORLD_SIZE": "2"}, "ompi"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, "gketpu"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
def test_launchers_of_several_tasks_hand_over_to_jax(environment, expected, monkeypatch):
    for name in (*SLURM, *OMPI, "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE",
                 "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    settings = DistributedConfig(heartbeat_timeout_seconds=7)
    assert initialize_processes(settings) is (expected is not None)
    # JAX waits longer than we do: what it does then is no message, but an abort.
    given = {"heartbeat_timeout_seconds": 7, "initialization_timeout": 660}
    assert calls == ([given | {"cluster_detection_method": expected}] if expected else [])


def test_rules_and_slices_are_flags():
    words = "--mesh.rules.hidden fsdp tensor --mesh.rules.vocab --mesh.slices 2".split()
    mesh = parse_config(words, "pretrain").mesh
    assert mesh == MeshConfig(slices=2, rules=ShardingRules(hidden=("fsdp", "tensor"), vocab=()))
    for word, message in {
        "hiden tensor": "rules.hiden: got 'tensor', but there is no such .* did you mean hidden?",
        "hidden modle": "mesh.rules.hidden: got 'modle', expected data or fsdp or tensor",
    }.items():
        with pytest.raises(ConfigError, match=message):
            parse_config(f"--mesh.rules.{word}".split(), "pretrain")


def test_the_programs_of_a_run_follow_its_rules():
    rules = ShardingRules(hidden=("fsdp", "tensor"), embed=())
    program = build_program(tiny_config("none", None, mesh=MeshConfig(2, 2, 2, rules=rules)))
    up = program.step.shardings.params["layers"]["mlp"]["up"]["kernel"]
    assert up.spec == PartitionSpec(None, None, ("fsdp", "tensor"))
    batch = program.task.abstract_batch(4, batch_sharding(program.mesh))
    text = program.step.value_and_grad.lower(program.step.abstract_state, batch).as_text()
    pinned = [line for line in text.splitlines() if "sharding_constraint" in line]
    hidden = MODEL.hidden_width
    # The batch has taken fsdp.
    assert any(f'{{}}, {{"tensor"}}]> : tensor<4x16x{hidden}xf32>' in line for line in pinned)
    assert not any('{"fsdp"' in line for line in pinned)
