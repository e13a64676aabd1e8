"""What has started this process: launchers that JAX knows, recognised by what they tell it."""

import os
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import NamedTuple

from jax._src import cloud_tpu_init  # whether there are TPU chips has no public name

from jaxopt_lab.train.errors import ConfigError, NotReadyError

Environment = Mapping[str, str]
_METADATA_SECONDS = 5.0


class Launcher(NamedTuple):
    """A way in which the processes of a job are started."""

    name: str  # of `--distributed.launcher`
    title: str
    method: str  # as `jax.distributed.initialize` calls it
    count: Callable[[Environment], int | None]  # processes; None: it has not started this one
    needs: tuple[str, ...]  # variables that JAX reads
    remedy: str
    rank: str | None = None  # variable with the number of the process, where it is one
    on_tpu: bool = False

    def missing(self, environment: Environment) -> list[str]:
        """What JAX would not find, although the launcher is there."""
        missing = [name for name in self.needs if name not in environment]
        if self.on_tpu and not cloud_tpu_init.running_in_cloud_tpu_vm:
            missing.append("a TPU chip that libtpu finds")
        return missing


def detect(choice: str, environment: Environment) -> tuple[Launcher, int] | None:
    """The launcher of this process, and of how many.

    Args:
      choice: `auto`, `none`, or the name of one, which is then not doubted.
      environment: The variables of this process.

    Raises:
      ConfigError: If the named one tells no number of processes.
    """
    for launcher in LAUNCHERS:
        if choice in ("auto", launcher.name):
            count = launcher.count(environment)
            if count is not None and (count > 1 or choice != "auto"):
                return launcher, count
            if choice != "auto":
                wanted = f"but {launcher.title} has not started this process: {launcher.remedy}"
                raise ConfigError("distributed.launcher", choice, wanted)
    return None


def number(environment: Environment, name: str) -> int | None:
    """The whole number in a variable; None where it is not set.

    Raises:
      ConfigError: If it is none.
    """
    text = environment.get(name)
    if text is None or text.strip().isdecimal():
        return None if text is None else int(text)
    raise ConfigError(name, text, "expected a whole number in this environment variable")


def _slices(environment: Environment) -> int:
    return number(environment, "MEGASCALE_NUM_SLICES") or 1


def _of_gke(environment: Environment) -> int | None:
    # JAX looks in the same order.
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    return None if hosts is None else (hosts.count(",") + 1) * _slices(environment)


def _of_tpu_vm(environment: Environment) -> int | None:
    """Asks the metadata server, which alone knows the other hosts of a Cloud TPU VM."""
    chips = cloud_tpu_init.running_in_cloud_tpu_vm
    if not chips or "TPU_SKIP_MDS_QUERY" in environment or _of_gke(environment) is not None:
        return None
    try:
        hosts, about = _metadata("worker-network-endpoints"), _metadata("tpu-env")
    except OSError as error:
        if _is_elsewhere(error):
            return None
        told = f"but its metadata server did not answer: {error}"
        raise NotReadyError("distributed.launcher", "tpu-vm", told) from error
    values = dict(line.split(":", 1) for line in about.splitlines() if ":" in line)
    told = {name.strip(): value.strip(" '") for name, value in values.items()}
    return (hosts.count(",") + 1) * _slices({**told, **environment})


def _is_elsewhere(error: OSError) -> bool:
    """Whether there is no such server, or it knows nothing of a TPU."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code == HTTPStatus.NOT_FOUND
    return isinstance(getattr(error, "reason", None), socket.gaierror)


def _metadata(key: str) -> str:
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{key}",
        headers={"Metadata-Flavor": "Google"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=_METADATA_SECONDS) as response:
        return response.read().decode()


# In JAX's own order.
LAUNCHERS = (
    Launcher(
        "openmpi",
        "Open MPI",
        "ompi",
        lambda environment: number(environment, "OMPI_COMM_WORLD_SIZE"),
        ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
        "start it with mpirun; Open MPI 5 tells no address, so that it takes "
        "--distributed.coordinator-address HOST:PORT as well",
        "OMPI_COMM_WORLD_RANK",
    ),
    Launcher(
        "slurm",
        "SLURM",
        "slurm",
        lambda environment: number(environment, "SLURM_STEP_NUM_TASKS"),
        (
            "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID",
        ),
        "start it with srun",
        "SLURM_PROCID",
    ),  # fmt: skip
    Launcher(
        "gke",
        "a TPU slice on GKE",
        "gketpu",
        _of_gke,
        ("TPU_WORKER_ID",),
        "run it in a pod that asks for google.com/tpu, with pip install 'jax[tpu]'",
        on_tpu=True,
    ),
    Launcher(
        "tpu-vm",
        "a Cloud TPU VM",
        "gcetpu",
        _of_tpu_vm,
        (),
        "run it on every worker of the slice, with pip install 'jax[tpu]'",
        on_tpu=True,
    ),
)
