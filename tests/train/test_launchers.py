"""Launchers: what they tell a process, with two real ones that join, and what is missing."""

import http.server
import json
import os
import subprocess
import sys
import threading

import jax
import pytest
from jax._src import cloud_tpu_init

from jaxopt_lab.train.config.sections import DistributedConfig
from jaxopt_lab.train.dist.processes import initialize_processes
from jaxopt_lab.train.errors import ConfigError
from tests.quick_compile import FLAGS
from tests.train.test_processes import free_port

METADATA = {
    "agent-worker-number": "{rank}",
    "worker-network-endpoints": "unknown:unknown:127.0.0.1,unknown:unknown:127.0.0.1",
    "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\nTYPE: 'V5LITE_POD'",
}


def environments(rank, metadata=""):
    """What each launcher of two processes tells the one of this rank."""
    mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": rank}
    mpi |= {"OMPI_COMM_WORLD_LOCAL_RANK": rank}
    return {
        "slurm": {
            "SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "localhost,other", "SLURM_NTASKS": "2",
            "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_TASKS": "2",
        },
        "openmpi": {"OMPI_MCA_orte_hnp_uri": "40960.0;tcp://127.0.0.1:34911", **mpi},
        "openmpi 5": {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:{port}", **mpi},
        # JAX asks the metadata server there too, for the number of slices.
        "gke": {
            "TPU_WORKER_HOSTNAMES": "localhost,localhost", "TPU_WORKER_ID": rank,
            "GCE_METADATA_IP": metadata,
        },
        # Two slices of one host each.
        "gke slices": {
            "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "MEGASCALE_SLICE_ID": rank,
            "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
        },
        "tpu-vm": {"GCE_METADATA_IP": metadata},
        "plain": {
            "JAX_COORDINATOR_ADDRESS": "127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": rank,
        },
    }  # fmt: skip


NAMES = {name for each in environments("0").values() for name in each}

# Joins once for each environment, without touching a device.
JOIN = """
import json, os, sys
import jax
from jax._src import distributed
from jaxopt_lab.train.config.sections import DistributedConfig
from jaxopt_lab.train.dist.processes import initialize_processes

os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # JAX sets it where it finds no chip
for name, environment in json.loads(sys.argv[1]).items():
    os.environ.update(environment)
    joined = initialize_processes(DistributedConfig(start_timeout_seconds=100))
    state = distributed.global_state
    print(name, joined, state.process_id, state.num_processes, flush=True)
    jax.distributed.shutdown()
    for key in environment:
        del os.environ[key]
"""


class Metadata(http.server.BaseHTTPRequestHandler):
    """The metadata server of a Cloud TPU VM, one for each worker."""

    def do_GET(self):
        key = self.path.rpartition("/")[2]
        text = METADATA[key].format(rank=self.server.rank).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def servers():
    found = []
    for rank in range(2):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
        server.rank = rank
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found.append(server)
    yield found
    for server in found:
        server.shutdown()
        server.server_close()


def test_two_processes_join_as_each_launcher_tells_them(servers):
    ports = {name: str(free_port()) for name in environments("0")}
    usual = {key: value for key, value in os.environ.items() if key not in NAMES}
    usual |= {"JAX_PLATFORMS": "cpu", "JAX_FORCE_TPU_INIT": "1", "NO_PROXY": "*"}
    usual |= {"no_proxy": "*", "XLA_FLAGS": FLAGS}
    processes = []
    for rank, server in enumerate(servers):
        told = environments(str(rank), f"127.0.0.1:{server.server_port}")
        told = {
            name: {k: v.format(port=ports[name]) for k, v in each.items()}
            | {"JAX_COORDINATOR_PORT": ports[name]}
            for name, each in told.items()
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", JOIN, json.dumps(told)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=usual,
            )
        )  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (said, errors) in enumerate(outputs):
        expected = [f"{name} True {rank} 2" for name in ports]
        assert said.splitlines() == expected, errors[-3000:]


@pytest.fixture
def told(monkeypatch):
    """Sets the environment of a launcher; JAX is not called."""
    calls = []
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))

    def tell(environment, without=(), chips=True):
        monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", chips)
        for name, value in environment.items():
            if name not in without:
                monkeypatch.setenv(name, value)
        return calls

    return tell


@pytest.mark.parametrize(
    ("launcher", "without", "chips", "message"),
    [
        ("slurm", ["SLURM_STEP_NODELIST"], True,
         "launcher: got 'slurm', which found SLURM with 2 processes, but not SLURM_STEP_NODELIST"),
        ("openmpi", ["OMPI_MCA_orte_hnp_uri"], True,
         "found Open MPI with 2 processes, but not OMPI_MCA_orte_hnp_uri: start it with mpirun; "
         "Open MPI 5 tells no address, so that it takes --distributed.coordinator-address"),
        ("gke", ["TPU_WORKER_ID"], True, "a TPU slice on GKE with 2 processes, but not TPU_WORKER"),
        ("gke", [], False, "on GKE with 2 processes, but not a TPU chip that libtpu finds: run it"),
        ("plain", ["JAX_NUM_PROCESSES"], True,
         "distributed.num_processes: got None, .* JAX_NUM_PROCESSES is not set either"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(told, launcher, without, chips, message):
    calls = told(environments("0")[launcher], without, chips)
    with pytest.raises(ConfigError, match=message):
        initialize_processes(DistributedConfig())
    assert not calls


def test_a_wrong_detection_is_overridden(told):
    calls = told(environments("1")["slurm"])
    assert initialize_processes(DistributedConfig(launcher="none")) is False and not calls
    with pytest.raises(ConfigError, match="'gke', but a TPU slice on GKE has not started this"):
        initialize_processes(DistributedConfig(launcher="gke"))
    flags = DistributedConfig("head:1", 3, 2, launcher="none")
    assert initialize_processes(flags) and calls.pop()["cluster_detection_method"] == "deactivate"
    # Settings go before what a launcher says, one by one.
    assert initialize_processes(DistributedConfig(coordinator_address="head:1234"))
    assert calls[0]["cluster_detection_method"] == "slurm"
    assert calls[0]["coordinator_address"] == "head:1234" and "process_id" not in calls[0]


def test_numbers_that_are_none_are_named(told):
    told({"SLURM_STEP_NUM_TASKS": "two"})
    with pytest.raises(ConfigError, match="SLURM_STEP_NUM_TASKS: got 'two', expected a whole"):
        initialize_processes(DistributedConfig())


def test_a_slice_of_several_hosts_is_not_trained_on_by_one(told, monkeypatch):
    told({})
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ConfigError, match="devices are those of 4 processes, which have not join"):
        initialize_processes(DistributedConfig())
