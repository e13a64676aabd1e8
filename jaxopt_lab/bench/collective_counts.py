"""Counts the collectives of optimizer steps on a mesh, from the compiled programs."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxopt_lab import models
from jaxopt_lab.bench.conditions import Report, device_name, versions
from jaxopt_lab.bench.methods import method
from jaxopt_lab.bench.timing import CompiledStep
from jaxopt_lab.report.hlo import collectives
from jaxopt_lab.report.tables import format_table

# One spectral and one sign program: a period in between compiles to both branches.
DEFAULT_METHODS = ("adamw", "muon", "lion_muon_p1", "lion_muon_pinf")


@dataclass(frozen=True)
class CollectiveRow:
    """Collectives of one kind in one optimizer step."""

    optimizer: str
    kind: str
    """"none" when the step has no collective at all."""
    count: int
    bytes: int
    """Of the results on one device."""


@dataclass(frozen=True)
class CollectivesReport(Report):
    """Result of `run_collectives`."""

    model: str
    mesh: dict[str, int]
    device: str
    versions: dict[str, str]
    rows: tuple[CollectiveRow, ...]

    def __str__(self) -> str:
        """A table with the conditions above it."""
        mesh = " x ".join(f"{name} {size}" for name, size in self.mesh.items())
        rows = [(r.optimizer, r.kind, r.count, f"{r.bytes / 1e6:.3f}") for r in self.rows]
        return (
            f"{self.model} on {mesh} ({self.device}), jax {self.versions['jax']}\n\n"
            f"{format_table(['optimizer', 'collective', 'count', 'MB'], rows)}"
        )


def run_collectives(
    model: str = "tiny",
    *,
    mesh: Mapping[str, int] | None = None,
    optimizers: Sequence[str] = DEFAULT_METHODS,
    on_progress: Callable[[str], None] = lambda text: None,
) -> CollectivesReport:
    """Compiles optimizer steps with the model's own shardings and counts their collectives.

    Nothing is run and no array is made, so a large model needs no memory.

    Args:
      model: Named decoder.
      mesh: Devices along each of the axes data, fsdp, tensor; all devices along fsdp by default.
      optimizers: Names as `bench.methods.method` knows them.
      on_progress: Called with a line of text before each stage.

    Raises:
      ValueError: For an unknown model, optimizer or axis, or a mesh that does not fit the devices.
    """
    if model not in models.PRESETS:
        raise ValueError(f"model: {model!r} is not one of {', '.join(models.PRESETS)}")
    sizes = dict(mesh) if mesh else {"fsdp": jax.device_count()}
    unknown = sizes.keys() - {"data", "fsdp", "tensor"}
    if unknown:
        raise ValueError(f"mesh: {sorted(unknown)} not among data, fsdp, tensor")
    if math.prod(sizes.values()) != jax.device_count():
        raise ValueError(
            f"mesh: {sizes} has {math.prod(sizes.values())} devices, there are {jax.device_count()}"
        )
    methods = [method(name) for name in optimizers]
    device_mesh = jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )
    config = models.PRESETS[model]
    shardings = jax.tree.map(
        lambda spec: NamedSharding(device_mesh, spec),
        models.partition_specs(config, device_mesh),
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )
    rows = []
    for each in methods:
        on_progress(f"compiling {each.name}")
        tx = each.build(models.matrix_axes(config), shardings)
        step = CompiledStep(tx, models.abstract_params(config), shardings)
        totals = collectives(step.compiled.as_text() or "")
        rows += [CollectiveRow(each.name, kind, *total) for kind, total in totals.items()]
        if not totals:
            rows.append(CollectiveRow(each.name, "none", 0, 0))
    return CollectivesReport(
        model=model,
        mesh=sizes,
        device=device_name(),
        versions=versions("jax", "jaxlib", "optax", "flax", "jaxopt-lab"),
        rows=tuple(rows),
    )
