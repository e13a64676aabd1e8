"""From a configuration to compiled programs, and what a compiled program will cost."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from jaxopt_lab import models, optim
from jaxopt_lab.core.packed import as_shapes, packed_shardings
from jaxopt_lab.lora import LoraSpec, with_taps
from jaxopt_lab.models import Placement
from jaxopt_lab.report.hlo import CollectiveTotal, collectives
from jaxopt_lab.report.tables import format_table
from jaxopt_lab.step import Adapted, Estimator, TrainState, compiler_options, merged
from jaxopt_lab.tasks import Task, Text, language_model
from jaxopt_lab.train.config.finetune import FinetuneConfig, gguf_file, model_directory
from jaxopt_lab.train.config.optimizer_base import ModelInfo
from jaxopt_lab.train.config.optimizers_pairs import PairConfig
from jaxopt_lab.train.config.run import PretrainConfig
from jaxopt_lab.train.config.trainable import LoraAdaptersConfig
from jaxopt_lab.train.diagnostics import diagnostic_hook, make_recorders
from jaxopt_lab.train.dist.mesh import batch_sharding, flag_sharding, make_mesh
from jaxopt_lab.train.evaluation import HeldOut
from jaxopt_lab.train.hooks import Hook
from jaxopt_lab.train.labelled import Labels
from jaxopt_lab.train.rule import build_rule
from jaxopt_lab.train.step import SIGNALS, PlacedStep, make_step, param_shardings
from jaxopt_lab.train.trainable import Trained, adapted, everything, part

Material = Text | Labels
"""What a run learns from."""

KERNEL_CHOICES = "kernel-choices"
"""Directory below a deterministic run that keeps the choice of GPU kernels."""


@dataclass(frozen=True)
class Program:
    """Everything that is compiled for one run."""

    placement: Placement
    task: Task
    tx: optax.GradientTransformation
    step: PlacedStep
    held_out: HeldOut
    hooks: Sequence[Hook]  # the diagnostics of the configuration
    compiler_options: Mapping[str, Any]
    trained: Trained  # what of the task moves
    flops: tuple[float, float]  # of a step: of the model, and on average of the optimizer
    # (optimizer state at the end) -> how the schedule went, as numbers and in a sentence
    outcome: Callable[[PyTree], tuple[dict[str, Any], str]] | None = None

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.placement.mesh

    @property
    def moves_all(self) -> bool:
        """Whether every parameter moves."""
        return self.trained.moves is None and self.trained.spec is None

    @property
    def parameters(self) -> int:
        """Number of parameters of the model, without adapters."""
        params = merged(self.step.abstract_state.params, self.step.abstract_state.frozen)
        return _size(as_shapes(params.base if isinstance(params, Adapted) else params))

    @property
    def trained_count(self) -> int:
        """Number of parameters that move."""
        return _size(self.step.abstract_state.params)


@dataclass(frozen=True)
class Cost:
    """What the compiled training step needs, on one device. `str` is a table."""

    argument_bytes: int
    temporary_bytes: int
    output_bytes: int
    flops: float  # of one device, as counted by the compiler; 0 where it does not count
    model_flops: float  # of the whole step, see `_step_flops`
    optimizer_flops: float  # of the whole step, averaged over the kinds of steps
    collectives: Mapping[str, CollectiveTotal]

    def __str__(self) -> str:
        """Memory, FLOPs and collectives as aligned text."""
        rows = [
            ["arguments", f"{self.argument_bytes / 2**20:,.1f} MiB"],
            ["temporaries", f"{self.temporary_bytes / 2**20:,.1f} MiB"],
            ["output", f"{self.output_bytes / 2**20:,.1f} MiB"],
            ["FLOPs of the program", f"{self.flops:.3g}"],
            ["FLOPs of the model, all devices", f"{self.model_flops:.3g}"],
            [
                "FLOPs of the optimizer, without repetition",
                f"{self.optimizer_flops:.3g}",
            ],
        ]
        for kind, total in self.collectives.items():
            rows.append([kind, f"{total.count} x, {total.bytes / 2**20:,.1f} MiB"])
        if not self.collectives:
            rows.append(["collectives", "none"])
        return format_table(["one training step, per device", ""], rows)


def build_program(
    config: PretrainConfig,
    material: Material | None = None,
    run_directory: Path | None = None,
    spec: LoraSpec | None = None,
) -> Program:
    """Builds mesh, task, optimizer, step and evaluations of a run; compiles nothing.

    Args:
      config: The run.
      material: What it learns from; None where only the parameters or the cost are wanted, which
        for labelled texts depend on the number of classes.
      run_directory: Where a deterministic run keeps the choice of kernels.
      spec: The adapters, where they are not those of the start any more.

    Raises:
      ConfigError: If the mesh does not fit the devices, or what is to move cannot.
    """
    mesh = make_mesh(config.mesh)
    model = model_of(config, material)
    placement = Placement(mesh, config.mesh.rules)
    task = _task(config, model, placement, material)
    shardings = param_shardings(mesh, task.param_specs)
    is_text = isinstance(material, Text)
    vocab_size = material.corpus.tokenizer.vocab_size if is_text else model.vocab_size
    info = ModelInfo.of(model, shardings, vocab_size, jax.random.key(config.seed))
    if isinstance(config, FinetuneConfig) and config.packed:
        task = _on_packed(config, task, shardings)
    trained = _trained(config, model, task, info._replace(clip=config.clip), spec)
    task, info = trained.task, trained.info
    rule = build_rule(config.optimizer, config.schedule, info, config.steps)
    ema = None if config.ema is None else optim.track_params_ema(config.ema)
    tx = rule.tx if ema is None else optax.chain(rule.tx, ema)
    options = _compiler_options(config, mesh, run_directory)
    step = make_step(
        task.init,
        task.loss,
        tx,
        mesh=mesh,
        param_specs=task.param_specs,
        gradient=_estimator(config, trained),
        # Those that need taps clip by the norm of the kernels' gradients.
        clip=None if _needs_taps(config) else config.clip,
        trainable=trained.moves,
        rates=rule.rates,
        compiler_options=options,
    )
    placed = param_shardings(mesh, task.param_specs)
    held_out = HeldOut(task.evaluations, mesh, placed, options, config.eval.best)
    recorders = make_recorders(config.diagnostics, config.optimizer, info, ema)
    hooks = () if recorders is None else (diagnostic_hook(recorders, step),)
    flops = _step_flops(config, model, trained, step.abstract_state)
    return Program(
        placement, task, tx, step, held_out, hooks, options, trained, flops, rule.outcome
    )


def _task(
    config: PretrainConfig, model: Any, placement: Placement, material: Material | None
) -> Task:
    if isinstance(material, Labels):
        assert isinstance(config, FinetuneConfig)
        return material.task(config, model, placement)
    return language_model(
        model,
        placement,
        material,
        seed=config.order_seed,
        z_loss=config.z_loss,
        head_chunks=config.head_chunks,
    )


def _on_packed(config: FinetuneConfig, task: Task, shardings: PyTree) -> Task:
    """A task whose parameters are the packed ones of a file, which are never drawn."""
    file = gguf_file(model_directory("model", config.preset))
    assert file is not None
    _, params = models.load_gguf(file, packed=True)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    specs = jax.tree.map(lambda placed: placed.spec, packed_shardings(shapes, shardings))
    zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return replace(task, init=lambda key: zeros(), param_specs=specs)


def _trained(
    config: PretrainConfig, model: Any, task: Task, info: ModelInfo, spec: LoraSpec | None
) -> Trained:
    if not isinstance(config, FinetuneConfig):
        return everything(task, info)
    if not isinstance(config.trainable, LoraAdaptersConfig):
        return part(config.trainable, task, info, models.roles(model))
    optimizer = config.optimizer
    weights = isinstance(optimizer, PairConfig) and optimizer.needs_weights
    names = models.matrix_names(model)
    dtype = None if config.packed else model.compute_dtype
    return adapted(
        config.trainable, task, info, names, weights=weights, spec=spec, computed_in=dtype
    )


def _estimator(config: PretrainConfig, trained: Trained) -> Estimator:
    """How gradients are estimated, by what the optimizer needs."""
    if _needs_taps(config):
        assert trained.spec is not None
        return with_taps(trained.spec, config.accumulation)
    return config.optimizer.gradient(config.accumulation, trained.info)


def _needs_taps(config: PretrainConfig) -> bool:
    return isinstance(config.optimizer, PairConfig) and config.optimizer.needs_taps


def compile_step(config: PretrainConfig, program: Program) -> jax.stages.Compiled:
    """Compiles the training step for the batches of the run."""
    rows, sharding = config.batch_size, batch_sharding(program.mesh)
    batch = program.task.abstract_batch(rows, sharding)
    devices = program.mesh.size
    batch[SIGNALS] = jax.ShapeDtypeStruct(
        (devices, 2), jnp.int32, sharding=flag_sharding(program.mesh)
    )
    return program.step.update.lower(program.step.abstract_state, batch).compile()


def cost_of(program: Program, compiled: jax.stages.Compiled) -> Cost:
    """Reads memory, FLOPs and collectives off the compiled step."""
    memory: Any = compiled.memory_analysis()
    analysis: Any = compiled.cost_analysis() or {}
    of_model, of_optimizer = program.flops
    return Cost(
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        flops=float(analysis.get("flops", 0.0)),
        model_flops=of_model,
        optimizer_flops=of_optimizer,
        collectives=collectives(compiled.as_text() or ""),
    )


def optimizer_share(program: Program) -> float:
    """Share of a step's FLOPs that the optimizer takes."""
    of_model, of_optimizer = program.flops
    return of_optimizer / (of_model + of_optimizer)


def _step_flops(
    config: PretrainConfig, model: Any, trained: Trained, abstract: TrainState
) -> tuple[float, float]:
    """FLOPs of a step: of the model and, on average, of the optimizer.

    Those of the model are 6 N tokens + attention with a backward pass, a third of it for each
    forward pass without. Beside a frozen base no gradient of a kernel is formed, which saves a
    third.
    """
    length = config.row_tokens
    passes = config.optimizer.forward_passes
    of_model = models.flops_per_token(model, length) * config.batch_size * length * passes / 3
    if trained.spec is not None and passes == 3:
        of_model *= 2 / 3
    return of_model, config.optimizer.mean_flops(abstract.params, trained.info.matrix_axes)


def averaged_params(config: PretrainConfig, state: TrainState) -> PyTree | None:
    """The average of the weights, if the run keeps one."""
    return None if config.ema is None else optim.params_ema(state.opt_state)


def model_of(config: PretrainConfig, material: Material | None = None) -> Any:
    """The model of a run, with the classes of its task.

    It has an attention kernel that repeats its bits where that is asked for: cuDNN's backward pass
    sums in no fixed order, and XLA (jax 0.11.2) fails at run time when it is asked for
    deterministic operations together with that kernel.
    """
    model = material.model if isinstance(material, Labels) else config.model
    if config.deterministic and model.attention == "auto":
        model = replace(model, attention="xla")
    if isinstance(config, FinetuneConfig) and config.packed:
        # In an unrolled loop XLA's CPU scheduler unpacks all layers at once.
        model = replace(model, loop="scanned")
    return model


def _size(tree: PyTree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _compiler_options(
    config: PretrainConfig, mesh: Mesh, run_directory: Path | None
) -> dict[str, Any]:
    platform = mesh.devices.flat[0].platform
    if not config.deterministic or platform != "gpu":
        return compiler_options(platform)
    options: dict[str, Any] = {"xla_gpu_deterministic_ops": True}
    if run_directory is not None:
        # Kernels are chosen by timing them; another choice after a restart would change rounding.
        cache = run_directory.absolute() / KERNEL_CHOICES
        cache.mkdir(exist_ok=True)
        options["xla_gpu_per_fusion_autotune_cache_dir"] = str(cache)
    return options
