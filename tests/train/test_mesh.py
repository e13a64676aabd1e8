import jax
import numpy as np
import pytest

from jaxopt_lab.train.errors import ConfigError
from jaxopt_lab.train.mesh import (
    DistributedConfig,
    MeshConfig,
    axis_sizes,
    batch_slice,
    from_whole,
    initialize_processes,
    make_mesh,
    to_global,
)


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
    for batch in (to_global(mesh, {"x": rows}, 8), from_whole(mesh, {"x": rows})):
        assert np.array_equal(batch["x"], rows)
        assert {s.data.shape for s in batch["x"].addressable_shards} == {(2, 3)}
    assert batch_slice(mesh, 8) == (0, 1)


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
    assert calls == ([{"heartbeat_timeout_seconds": 7}] if expected else [])
