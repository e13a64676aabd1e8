"""Compiles one training step for chips that are not there: one case of `bench pod`.

`python -m jaxopt_lab.bench.pod_programs CASE RESULT` compiles in a process of its own, because
what it needs of the environment has to stand before jax starts.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxopt_lab import lora, models, zeroth_order
from jaxopt_lab.bench.conditions import versions
from jaxopt_lab.bench.floors import tree_bytes
from jaxopt_lab.bench.methods import method
from jaxopt_lab.bench.product_flops import product_flops
from jaxopt_lab.report.files import write_json
from jaxopt_lab.report.progress import to_stderr
from jaxopt_lab.report.traffic import traffic
from jaxopt_lab.step import Adapted, Step, TrainState, forward_only, state_layout
from jaxopt_lab.tasks import language_model_loss

LLAMA_7B = models.DecoderConfig(
    vocab_size=32_000,
    width=4096,
    depth=32,
    heads=32,
    hidden=11_008,
    context=2048,
    tied=False,
)
MODELS = {**models.PRESETS, "llama-7b": LLAMA_7B}
LORA, ZEROTH_ORDER = "lora", "mezo"
PROBE = "probe"
COMPILES, TRACES = "compile", "trace"
_RATE = 1e-6  # changes nothing about the program
_CLIP = 1.0
RANK = 16


@dataclass(frozen=True)
class Case:
    """One program: a training step of a model by a method on a target."""

    model: str
    method: str
    """As `bench.methods.method` knows it, "lora" or "mezo"."""
    target: str
    """A topology as v5e:8x8, or cpu:512."""
    mesh: dict[str, int]
    """Size of each axis."""
    batch_per_device: int
    """Sequences."""
    context: int
    remat: str

    @property
    def name(self) -> str:
        """Tells the case from all others, as part of a file name."""
        mesh = "-".join(f"{axis}{size}" for axis, size in self.mesh.items())
        rows = f"{self.batch_per_device}x{self.context}"
        return (
            f"{self.model}_{self.method}_{self.target.replace(':', '-')}_{mesh}_{rows}_{self.remat}"
        )


def trace_case(case: Case, mesh: Mesh) -> tuple[dict[str, Any], Any]:
    """What is known of a step before it is compiled: arguments and products, in seconds.

    Args:
      case: The case.
      mesh: Of its size.

    Returns:
      What the step needs of a chip, as JSON values, and the traced function.
    """
    take, state, state_at, batch_at = _step(case, mesh)
    rows = case.batch_per_device * math.prod(mesh.shape[a] for a in _batch_axes(mesh))
    tokens = jax.ShapeDtypeStruct((rows, case.context + 1), jnp.int32)
    traced = jax.jit(
        take,
        in_shardings=(state_at, batch_at),
        out_shardings=(state_at, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    ).trace(state, tokens)
    arguments = (state, tokens), (state_at, batch_at)
    found = {
        "case": dataclasses.asdict(case),
        "versions": versions("jax", "jaxlib", "jaxopt-lab"),
        "parameters": _count(state),
        "tokens": rows * case.context,
        "state_bytes": tree_bytes(arguments[0]),
        "argument_bytes": sum(jax.tree.leaves(jax.tree.map(_bytes_on_one, *arguments))),
    }
    for name, kind in _kinds_of_steps(case.method).items():
        found[name] = {"flops": product_flops(traced.jaxpr, mesh.size, **kind)}
    return found, traced


def compile_case(case: Case, on_progress: Callable[[str], None]) -> tuple[dict[str, Any], str]:
    """Compiles the step of a case.

    Args:
      case: The case.
      on_progress: Called with a line of text before each stage.

    Returns:
      What the program needs of a chip, as JSON values, and its text.
    """
    mesh = case_mesh(case)
    on_progress("tracing")
    start, cpu = time.perf_counter(), _cpu_seconds()
    found, traced = trace_case(case, mesh)
    platform = "cpu" if case.target.startswith("cpu") else "tpu"
    if platform == "tpu":
        found["versions"]["libtpu"] = _libtpu_version()
    lowered = traced.lower(lowering_platforms=(platform,))
    on_progress("compiling")
    program = lowered.compile()
    seconds, cpu_seconds = time.perf_counter() - start, _cpu_seconds() - cpu
    memory: Any = program.memory_analysis()
    text = program.as_text() or ""
    found |= {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "compile_s": seconds,
        "cpu_s": cpu_seconds,
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    for name, kind in _kinds_of_steps(case.method).items():
        totals = traffic(text, **kind).items()
        found[name]["collectives"] = {what: total._asdict() for what, total in totals}
    return found, text


def _kinds_of_steps(method_name: str) -> dict[str, Any]:
    """What runs in an ordinary step, and in the one of a period that does more."""
    # SOAP and DyKAF start and refresh in loops of one round. LionMuon has a conditional.
    ordinary = max if method_name.startswith(("soap", "dykaf")) else min
    return {
        "ordinary": {"branch": ordinary, "rounds": 0},
        "periodic": {"branch": max, "rounds": 1},
    }


def case_mesh(case: Case, *, compiles: bool = True) -> Mesh:
    """The chips of a case, or as many devices of a CPU where nothing is compiled."""
    if case.target.startswith("cpu") or not compiles:
        devices = jax.devices("cpu")[: math.prod(case.mesh.values())]
    else:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=case.target).devices
    sizes = tuple(case.mesh.values())
    laid_out = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(laid_out, tuple(case.mesh), axis_types=(AxisType.Auto,) * len(sizes))


def _step(case: Case, mesh: Mesh) -> tuple[Any, TrainState, TrainState, NamedSharding]:
    """The step, its state as shapes, and where state and batch lie."""
    config = dataclasses.replace(
        MODELS[case.model],
        context=case.context,
        loop="scanned",
        compute_dtype="bfloat16",
        # A frozen base is held as it is multiplied.
        param_dtype="bfloat16" if case.method == LORA else "float32",
        remat=case.remat,
    )
    params_at = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        models.partition_specs(config, mesh),
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )
    loss, init = language_model_loss(config, mesh=mesh), _init(config)
    if case.method == LORA:
        step, init, params_at = _beside_base(config, loss, params_at)
    elif case.method == ZEROTH_ORDER:
        probes = zeroth_order.Probes(
            num_directions=mesh.shape[PROBE],
            engine=zeroth_order.sharded(mesh, PROBE),
            matrix_axes=models.matrix_axes(config),
        )
        tx = zeroth_order.mezo(_RATE, key=jax.random.key(1), probes=probes)
        step = Step(loss, tx, gradient=forward_only(perturbed="layers"))
    else:
        tx = method(case.method).build(models.matrix_axes(config), params_at)
        step = Step(loss, tx, clip=_CLIP)

    def start(key: jax.Array) -> TrainState:
        return step.start(init(key), key)

    def take(state: TrainState, tokens: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        return step.take(state, {"tokens": tokens})

    state = jax.eval_shape(start, jax.random.key(0))
    state_at = state_layout(step.tx, state, params_at)
    return take, state, state_at, NamedSharding(mesh, PartitionSpec(_batch_axes(mesh)))


def _batch_axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(axis for axis in models.BATCH_AXES if axis in mesh.shape)


def _init(config: models.DecoderConfig) -> Callable[[jax.Array], Any]:
    return lambda key: models.init_params(config, key)


def _beside_base(config: models.DecoderConfig, loss: Any, params_at: Any) -> tuple[Step, Any, Any]:
    """A step of adapters beside all matrices of a frozen base, as `finetune` takes it."""
    base = models.abstract_params(config)
    axes, names = models.matrix_axes(config), models.matrix_names(config)
    spec = lora.resolve(lora.LoraConfig(rank=RANK), base, axes, names)

    def init(key: jax.Array) -> Adapted:
        base = models.init_params(config, key)
        return Adapted(base, lora.init(key, spec, base))

    beside = lora.loss_beside(loss, spec, dropout=False)
    step = Step(beside, optax.adamw(_RATE), clip=_CLIP)
    return step, init, Adapted(params_at, lora.shardings(spec, params_at))


def _count(state: TrainState) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves((state.params, state.frozen)))


def _bytes_on_one(x: Any, sharding: NamedSharding) -> int:
    return math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize


def _libtpu_version() -> str:
    """Of the library that the environment names."""
    place = [str(Path(os.environ["TPU_LIBRARY_PATH"]).parents[1])]
    found = importlib.metadata.distributions(name="libtpu", path=place)
    return next((each.version for each in found), "unknown")


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main(arguments: list[str]) -> int:
    """Compiles the case given as JSON, or traces it, and writes what it needs and its text."""
    case, target, compiles = Case(**json.loads(arguments[0])), Path(arguments[1]), arguments[2]
    if case.target.startswith("cpu") or compiles == TRACES:
        jax.config.update("jax_num_cpu_devices", math.prod(case.mesh.values()))
    if compiles == TRACES:
        found, _ = trace_case(case, case_mesh(case, compiles=False))
    else:
        found, text = compile_case(case, lambda stage: to_stderr(f"{case.name}: {stage}"))
        target.with_suffix(".hlo").write_text(text)
    write_json(target, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
