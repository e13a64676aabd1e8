"""Times training steps on meshes at an equal batch per device: weak scaling."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxopt_lab import models
from jaxopt_lab.bench.conditions import Report, device_name, versions
from jaxopt_lab.bench.methods import Method, method
from jaxopt_lab.report.hlo import collectives
from jaxopt_lab.report.tables import format_table
from jaxopt_lab.step import Step, TrainState, compiler_options, state_layout
from jaxopt_lab.tasks import language_model_loss

DEFAULT_METHODS = ("adamw", "lion_muon_p2", "soap_f10", "dykaf_f10")
# Factors have full rank by then, and kernels are loaded.
_WARM_UP_STEPS = 12
_ROUNDS = 5


@dataclass(frozen=True)
class ScalingRow:
    """One optimizer on one mesh."""

    optimizer: str
    mesh: str
    """"one device", or an axis that all devices lie along."""
    step_ms: float
    """Whole periods of the optimizer; the median over rounds."""
    efficiency: float
    """Time on one device over that on the mesh, at an equal batch per device."""
    collectives: dict[str, int]
    """In the compiled step, both branches of a conditional counted."""


@dataclass(frozen=True)
class ScalingReport(Report):
    """Result of `run_scaling`."""

    model: str
    device: str
    versions: dict[str, str]
    batch_per_device: int
    context: int
    compute_dtype: str
    rows: tuple[ScalingRow, ...]

    def __str__(self) -> str:
        """A table with the conditions above it."""
        rows = [
            (
                row.optimizer,
                row.mesh,
                row.step_ms,
                f"{row.efficiency:.1%}",
                ", ".join(f"{count} {kind}" for kind, count in row.collectives.items()) or "none",
            )
            for row in self.rows
        ]
        return (
            f"{self.model}, {self.batch_per_device} x {self.context} tokens per device, "
            f"{self.compute_dtype}, on {self.device}, jax {self.versions['jax']}\n\n"
            f"{format_table(['optimizer', 'mesh', 'ms/step', 'efficiency', 'collectives'], rows)}"
        )


def run_scaling(
    model: str = "gpt2-124m",
    *,
    optimizers: Sequence[str] = DEFAULT_METHODS,
    axes: Sequence[str] = ("data", "fsdp"),
    batch_per_device: int = 32,
    context: int | None = None,
    steps: int = 20,
    compute_dtype: str | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> ScalingReport:
    """Times forward, backward and update on one device, and on all devices along each axis.

    Args:
      model: Named decoder.
      optimizers: Names as `bench.methods.method` knows them.
      axes: Among "data" and "fsdp".
      batch_per_device: Sequences a step and device.
      context: Tokens a sequence; the model's own by default.
      steps: Steps a round, rounded up to whole periods of the optimizer.
      compute_dtype: Of activations and products; bfloat16 by default, float32 on a CPU.
      on_progress: Called with a line of text before each program is compiled.

    Raises:
      ValueError: For an unknown model, optimizer or axis, or a number that does not fit.
    """
    if model not in models.PRESETS:
        raise ValueError(f"model: {model!r} is not one of {', '.join(models.PRESETS)}")
    if not axes or not set(axes) <= {"data", "fsdp"}:
        raise ValueError(f"axes: got {tuple(axes)}; wanted some of data, fsdp")
    if steps < 1 or batch_per_device < 1:
        raise ValueError(f"steps, batch: got {steps}, {batch_per_device}; wanted at least 1")
    if compute_dtype is None:
        compute_dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    preset = models.PRESETS[model]
    config = dataclasses.replace(
        preset,
        context=preset.context if context is None else context,
        compute_dtype=compute_dtype,
    )
    chosen = [method(name) for name in optimizers]  # all names, before anything is compiled
    rows = []
    for each in chosen:
        alone = None
        for axis in ("one device", *axes):
            on_progress(f"{each.name}, {axis}")
            seconds, found = _measured(config, each, _mesh(axis), batch_per_device, steps)
            alone = seconds if alone is None else alone
            rows.append(ScalingRow(each.name, axis, 1e3 * seconds, alone / seconds, found))
    return ScalingReport(
        model=model,
        device=device_name(),
        versions=versions("jax", "jaxlib", "optax", "flax", "jaxopt-lab"),
        batch_per_device=batch_per_device,
        context=config.context,
        compute_dtype=compute_dtype,
        rows=tuple(rows),
    )


def _measured(
    config: models.DecoderConfig, chosen: Method, mesh: Mesh, batch_per_device: int, steps: int
) -> tuple[float, dict[str, int]]:
    """Seconds a step and its collectives; on return all arrays of the row are free."""
    step = _Step(config, chosen, mesh, batch_per_device * mesh.size)
    return step.seconds(-(-steps // chosen.period) * chosen.period), step.collectives


def _mesh(axis: str) -> Mesh:
    devices = jax.devices()[:1] if axis == "one device" else jax.devices()
    sizes = {"data": 1, "fsdp": 1}
    sizes["data" if axis == "one device" else axis] = len(devices)
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 2, devices=devices
    )


class _Step:
    """A compiled training step on a mesh with its state."""

    def __init__(self, config: models.DecoderConfig, chosen: Method, mesh: Mesh, rows: int):
        """Compiles, and makes parameters, state and a batch of random tokens."""
        params_at = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            models.partition_specs(config, mesh),
            is_leaf=lambda node: isinstance(node, PartitionSpec),
        )
        tx = chosen.build(models.matrix_axes(config), params_at)
        step = Step(language_model_loss(config, mesh=mesh), tx, guarded=False)

        def init(key: jax.Array) -> TrainState:
            return step.start(models.init_params(config, key), key)

        def take(state: TrainState, tokens: jax.Array) -> tuple[TrainState, jax.Array]:
            state, metrics = step.take(state, {"tokens": tokens})
            return state, metrics["loss"]

        key = jax.random.key(0)
        state_at = state_layout(tx, jax.eval_shape(init, key), params_at)
        batch_at = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        shape = (rows, config.context + 1)
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, np.int32)
        self._tokens = jax.device_put(jnp.asarray(tokens), batch_at)
        self._state = jax.jit(init, out_shardings=state_at)(key)
        self._program = (
            jax.jit(
                take,
                in_shardings=(state_at, batch_at),
                out_shardings=(state_at, NamedSharding(mesh, PartitionSpec())),
                donate_argnums=0,
            )
            .lower(self._state, self._tokens)
            .compile(compiler_options=compiler_options(jax.default_backend()))
        )
        totals = collectives(self._program.as_text() or "")
        self.collectives = {kind: total.count for kind, total in totals.items()}

    def seconds(self, steps: int) -> float:
        """Seconds a step: the median over rounds of so many steps, after a warm-up."""
        self._take(max(_WARM_UP_STEPS, steps))
        return float(np.median([self._take(steps) / steps for _ in range(_ROUNDS)]))

    def _take(self, steps: int) -> float:
        start = time.perf_counter()
        loss = None
        for _ in range(steps):
            self._state, loss = self._program(self._state, self._tokens)
        jax.block_until_ready((self._state, loss))
        return time.perf_counter() - start
