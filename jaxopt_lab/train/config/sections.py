"""The sections of a run that are not chosen by name."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from jaxopt_lab.data import VALIDATION
from jaxopt_lab.models import ShardingRules
from jaxopt_lab.train.config.bounds import (
    Bound,
    Count,
    CountOrZero,
    Positive,
    PositiveOrZero,
    check_bounds,
)
from jaxopt_lab.train.config.optimizer_base import OptimizerConfig
from jaxopt_lab.train.config.optimizers import LionMuonConfig
from jaxopt_lab.train.config.optimizers_kronecker import EigenbasisConfig
from jaxopt_lab.train.config.zeroth_order_base import PROBE_AXIS, ZerothOrderConfig
from jaxopt_lab.train.errors import ConfigError

AXES = ("data", "fsdp", "tensor")


@dataclass(frozen=True)
class HeldOutConfig:
    """Held-out evaluation."""

    every: Count = 100
    """Steps between evaluations; the last step is always evaluated."""
    batches: Count = 16
    """Held-out text in batches of 8 windows of `model.context` tokens, whatever the batch of the
    training is; the windows are spread over all documents and the same every time."""


@dataclass(frozen=True)
class EvalConfig(HeldOutConfig):
    """Held-out evaluation."""

    sets: tuple[str, ...] = ()
    """More sets to evaluate, `NAME=SOURCE` each, as `notes=text-files:notes/*.md`: documents of the
    source that training does not see, as `NAME/loss` and `NAME/bits_per_byte`. `NAME=train` is the
    training text."""
    best: str = VALIDATION
    """The set whose loss says which checkpoints are the best."""
    sample_tokens: Annotated[int, Bound(0, 2**20)] = 96
    """Length of the continuation sampled at the end; 0 leaves it out."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints. The last step is always saved."""

    every_steps: Count | None = 100
    """Steps between checkpoints; None saves by time alone."""
    every_minutes: Positive | None = None
    """Minutes between checkpoints; None saves by steps alone."""
    keep_newest: Count = 2
    """How many of the newest stay."""
    keep_best: CountOrZero = 1
    """How many of those with the lowest held-out loss stay."""


@dataclass(frozen=True)
class DiagnosticsConfig:
    """What to measure along the run, besides losses. Off, it costs nothing."""

    record: tuple[Literal["norms", "fisher", "smoothness"], ...] = ()
    """`norms`: norm ratios of gradients, weights and updates, for the LionMuon family. `fisher`:
    errors of the Kronecker factors, for SOAP and DyKAF. `smoothness`: change of the gradient over
    the length of the step in three pairs of norms, for every optimizer that has gradients."""
    every: Count = 50
    """Steps between two records of one residue."""
    residues: tuple[int, ...] = (0, 1)
    """`norms`, `smoothness`: steps that are congruent to one of these modulo `every` are recorded.
    Two neighbours see both kinds of steps of an optimizer that alternates."""
    window: Count = 20
    """`fisher`: gradients before each record that it compares with; they are kept meanwhile."""
    layers: tuple[str, ...] | None = None
    """`fisher`: leaves to look at, such as `layers/mlp/down/kernel`; None takes all matrices that
    have a factor."""
    target_loss: PositiveOrZero | None = None
    """`smoothness`: loss in nats per token from which the gap is measured; None takes the lowest
    held-out loss of the run."""

    def validate(self, optimizer: OptimizerConfig) -> None:
        """Checks the values.

        Raises:
          ConfigError: For an interval below 1, no or a negative residue, a window that does not
            fit, a target that is not finite, or an optimizer that the diagnostics cannot look into.
        """
        check_bounds(self, "diagnostics.")
        if not self.residues or min(self.residues) < 0:
            wanted = "expected numbers of at least 0"
            raise ConfigError("diagnostics.residues", self.residues, wanted)
        if self.record and isinstance(optimizer, ZerothOrderConfig):
            wanted = f"expected nothing: {type(optimizer).__name__} has no gradient"
            raise ConfigError("diagnostics.record", self.record, wanted)
        families = {
            "norms": (LionMuonConfig, "an optimizer of the LionMuon family"),
            "fisher": (EigenbasisConfig, "SOAP or DyKAF"),
            "smoothness": (OptimizerConfig, "an optimizer"),
        }
        for family, words in map(families.__getitem__, self.record):
            if not isinstance(optimizer, family):
                wanted = f"expected {words}, not {type(optimizer).__name__}"
                raise ConfigError("diagnostics.record", self.record, wanted)
        if "fisher" in self.record and self.window >= self.every:
            wanted = f"expected 1 to {self.every - 1} gradients"
            raise ConfigError("diagnostics.window", self.window, wanted)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of data, fsdp and tensor may be -1 and takes what is left."""

    data: int = -1
    """Replicas of the parameters, each with its own part of the batch."""
    fsdp: int = 1
    """Parts of every parameter and of its optimizer state, each with its part of the batch."""
    tensor: int = 1
    """Parts of the matrix products inside a layer."""
    probe: int = 1
    """Groups of devices that share out the directions of a zero-order step."""
    slices: Count | None = None
    """Groups of devices with fast links inside and slow ones between: groups of probes and the data
    axis cross them as far as they can, fsdp then, tensor never. None takes what the devices say;
    elsewhere it may be the number of processes."""
    rules: ShardingRules = ShardingRules()
    """Mesh axes that split each logical axis of parameters and activations."""


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes. Under SLURM, Open MPI or on a TPU pod nothing needs to be set.

    Elsewhere the first three may also stand in the environment, as JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """

    coordinator_address: str | None = None
    """`host:port` of process 0; starts multi-process training."""
    num_processes: Count | None = None
    """Number of processes."""
    process_id: CountOrZero | None = None
    """Number of this process, from 0."""
    launcher: Literal["auto", "none", "openmpi", "slurm", "gke", "tpu-vm"] = "auto"
    """What has started the processes, where it should not be guessed. `none`: whatever the
    environment says, this one is alone, or has the three settings above."""
    heartbeat_timeout_seconds: Count = 20
    """After this long without a sign of life from one process, JAX ends the others."""
    start_timeout_seconds: Count = 300
    """How long the first processes wait for the last one."""


def axis_sizes(config: MeshConfig, device_count: int) -> tuple[int, int, int]:
    """Sizes of the three axes of a group of devices, with -1 filled in.

    >>> axis_sizes(MeshConfig(data=-1, fsdp=4), 8)
    (2, 4, 1)
    """
    if config.probe < 1:
        raise ConfigError("mesh.probe", config.probe, "expected at least 1")
    sizes = config.data, config.fsdp, config.tensor
    given = sizes if config.probe == 1 else (*sizes, config.probe)
    for name, size in zip(AXES, sizes, strict=True):
        if size < 1 and size != -1:
            raise ConfigError(f"mesh.{name}", size, "expected at least 1, or -1 for what is left")
    if sizes.count(-1) > 1:
        raise ConfigError("mesh", sizes_as_text(given), "expected at most one axis of size -1")
    fixed = math.prod(size for size in given if size != -1)
    if fixed > device_count or (-1 in sizes and device_count % fixed):
        relation = "divide" if -1 in sizes else "be at most"
        wanted = f"{fixed} must {relation} the number of devices, {device_count}"
        raise ConfigError("mesh", sizes_as_text(given), f"expected a product that fits: {wanted}")
    data, fsdp, tensor = (device_count // fixed if size == -1 else size for size in sizes)
    return data, fsdp, tensor


def sizes_as_text(sizes: Sequence[int]) -> str:
    """`data 2 x fsdp 4 x tensor 1`, and the groups of probes where there are sizes of four axes."""
    names = (*AXES, PROBE_AXIS)[: len(sizes)]
    return " x ".join(f"{name} {size}" for name, size in zip(names, sizes, strict=True))
