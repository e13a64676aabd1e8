"""What a run is: one frozen dataclass, checked before anything is compiled."""

import importlib.util
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, TypeVar

import jax
import tyro
from jaxtyping import Array

from jaxopt_lab.data import (
    VALIDATION,
    PythonSource,
    Source,
    Tokenizer,
    TokenizerConfig,
    sets_from_text,
)
from jaxopt_lab.models import PRESETS, DecoderConfig, abstract_params
from jaxopt_lab.train.config.bounds import (
    Count,
    CountOrZero,
    InnerShare,
    Positive,
    PositiveOrZero,
    Seed,
    check_bounds,
)
from jaxopt_lab.train.config.choices import choose, name_of
from jaxopt_lab.train.config.optimizer_base import OptimizerConfig
from jaxopt_lab.train.config.optimizers_pairs import PairConfig
from jaxopt_lab.train.config.schedules import (
    AdaptiveWarmupConfig,
    CosineConfig,
    ScheduleConfig,
)
from jaxopt_lab.train.config.sections import (
    CheckpointConfig,
    DiagnosticsConfig,
    DistributedConfig,
    EvalConfig,
    MeshConfig,
    axis_sizes,
)
from jaxopt_lab.train.config.tuned import default_optimizer
from jaxopt_lab.train.config.zeroth_order_base import ZerothOrderConfig
from jaxopt_lab.train.errors import ConfigError, within
from jaxopt_lab.train.profile import profiled_steps
from jaxopt_lab.zeroth_order.losses import check_eps


@dataclass(frozen=True)
class RunConfig:
    """What is trained, on which text and for how long: what every verb that trains shares."""

    # `--model NAME` sets it, together with the model.
    preset: Annotated[str, tyro.conf.Suppress] = "tiny"
    """Name of the preset that the model starts from."""
    model: DecoderConfig = PRESETS["tiny"]
    """Shape and numerics of the decoder."""
    schedule: ScheduleConfig = CosineConfig()
    """The learning rate over time."""
    corpus: Source = PythonSource()
    """The text."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """How text becomes tokens."""
    steps: Count = 300
    """Optimizer steps."""
    batch_size: Count = 8
    """Windows of `model.context` tokens per step, over all devices and microbatches."""
    clip: Positive | None = 0.5
    """Largest global norm of the gradient; None does not clip. Without effect on zero-order
    optimizers, which have no gradient."""
    z_loss: PositiveOrZero = 0.0
    """Weight of the squared log-partition in the training loss."""
    head_chunks: Count = 1
    """Pieces of the sequence for which the logits are held at a time; saves memory, costs time."""
    validation_fraction: InnerShare = 0.05
    """Share of the text that is held out, by whole packages or directories where there are some."""
    compilation_cache: str = "auto"
    """Where compiled programs are kept: `auto` (beside the prepared corpora, or where JAX has been
    told to), `off`, or a directory."""
    run_directory: str | None = None
    """Where everything is written; by default a new directory below `runs/`."""
    init_seed: Seed | None = None
    """Seed of the initial weights; None: the seed of the run."""
    data_seed: Seed | None = None
    """Seed of the order of the text; None: the seed of the run."""

    @property
    def row_tokens(self) -> int:
        """Tokens of a row of a batch."""
        return self.model.context

    @property
    def row_logits(self) -> int:
        """Logits of a row: of every token at every position."""
        return self.row_tokens * self.model.vocab_size

    @property
    def moves_all(self) -> bool:
        """Whether every parameter of the model moves."""
        return True

    @staticmethod
    def named_model(name: str) -> tuple[DecoderConfig, TokenizerConfig]:
        """A model that the flag `--model` can name, and a tokenizer for it.

        Raises:
          ConfigError: If there is no such model.
        """
        model = choose("model", PRESETS, name)
        return model, TokenizerConfig(vocab_size=model.vocab_size)


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """One pretraining run. Everything is a flag: `--steps 500 --optimizer.period 5`."""

    verb: ClassVar[str] = "pretrain"

    optimizer: OptimizerConfig = default_optimizer("tiny", "lion-muon")
    """The update rule."""
    mesh: MeshConfig = MeshConfig()
    """The devices."""
    distributed: DistributedConfig = DistributedConfig()
    """The processes."""
    eval: EvalConfig = EvalConfig()
    """Held-out evaluation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    """What to measure besides losses."""
    accumulation: Count = 1
    """Microbatches per step, one after another."""
    ema: InnerShare | None = None
    """Decay of an average of the weights, which is then evaluated and sampled as well."""
    seed: Seed = 0
    """Seed of everything that is drawn: the initial weights and the order of the text, unless they
    have their own, and what an optimizer draws."""
    max_skipped: CountOrZero = 20
    """Steps with a non-finite loss or gradient that a run may skip before it stops."""
    init_from: str | None = None
    """Start from the weights in this directory, in Hugging Face's layout or one GGUF file, or of a
    fetched package. On the command line its model and its vocabulary are the defaults."""
    fork_from: str | None = None
    """Start from the weights of the newest checkpoint of this run, with a new optimizer state. On
    the command line its configuration gives the defaults."""
    resume: bool = False
    """Continue the run in `run_directory`, with its own configuration and these changes."""
    restartable: bool = False
    """For a command that a launcher repeats: continue the run in `run_directory` if it has begun,
    else begin it; after SIGTERM, or where other processes are not there yet, exit with 75 (start
    the same command again)."""
    dry_run: bool = False
    """Compile, print memory, FLOPs and collectives, and stop."""
    profile: str | None = None
    """`START:STEPS`: write a profiler trace of so many steps, the first being number `START`, to
    `profile/` in the run directory. The first steps of a run still warm up; None traces nothing."""
    peak_tflops: Positive | None = None
    """Peak of one device in TFLOP/s, of which MFU is the share that the model uses. None takes the
    data sheet's dense bfloat16 peak of a known accelerator, and leaves MFU out elsewhere."""
    deterministic: bool = False
    """On a GPU, use deterministic kernels (slower, without cuDNN's attention) and keep the kernel
    choice with the run."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: bool = False
    """Also log to Weights & Biases; needs the package `wandb`."""

    @property
    def weights_key(self) -> Array:
        """The key that the initial weights are drawn with."""
        return jax.random.key(self.seed if self.init_seed is None else self.init_seed)

    @property
    def order_seed(self) -> int:
        """The seed of the order of the text."""
        return self.seed if self.data_seed is None else self.data_seed

    def check_what_moves(self) -> None:
        """Checks that the optimizer can move what is trained: here, every parameter.

        Raises:
          ConfigError: For an optimizer that needs something else.
        """
        if isinstance(self.optimizer, PairConfig):
            raise needs_lora(self.optimizer)
        if self.init_from is not None and self.fork_from is not None:
            raise ConfigError("init_from", self.init_from, "expected None beside fork_from")


def needs_lora(optimizer: OptimizerConfig) -> ConfigError:
    """The refusal of an optimizer of adapters where there are none."""
    return ConfigError(
        "optimizer",
        name_of(optimizer),
        "which moves pairs of low-rank factors: expected --trainable lora of the verb finetune",
    )


AnyRun = TypeVar("AnyRun", bound=RunConfig)


def from_preset(preset: str) -> PretrainConfig:
    """The defaults for a named model: a tokenizer as large as its vocabulary.

    >>> from_preset("gpt2-124m").tokenizer.vocab_size
    50304
    """
    return with_preset(PretrainConfig(), preset)


def with_preset(config: AnyRun, preset: str) -> AnyRun:
    """The same run of another named model, with a tokenizer as large as its vocabulary.

    An optimizer that was left at the defaults of the model before has those of this one.

    Raises:
      ConfigError: If there is no such preset.
    """
    model, tokenizer = config.named_model(preset)
    # Not every verb that trains has one optimizer.
    optimizer: OptimizerConfig | None = getattr(config, "optimizer", None)
    if optimizer is not None and optimizer == default_optimizer(config.preset, name_of(optimizer)):
        config = replace(config, optimizer=default_optimizer(preset, name_of(optimizer)))  # pyright: ignore
    return replace(config, preset=preset, model=model, tokenizer=tokenizer)


def validate(config: PretrainConfig, device_count: int) -> None:
    """Checks everything that can be known before the corpus is read.

    Raises:
      ConfigError: Names the field, the value and what would be right.
    """
    validate_run(config)
    config.optimizer.validate()
    config.check_what_moves()
    check_optimizer(config, config.optimizer)
    config.diagnostics.validate(config.optimizer)
    profiled_steps(config.profile, config.steps)
    with within("eval.sets"):
        sets = dict.fromkeys((VALIDATION, *sets_from_text(config.eval.sets)))
    choose("eval.best", sets, config.eval.best)
    if config.deterministic and config.model.attention == "cudnn":
        wanted = "expected auto or xla: cuDNN's kernel is not deterministic"
        raise ConfigError("model.attention", "cudnn", wanted)
    data, fsdp, _ = axis_sizes(config.mesh, device_count)
    _check_groups(config)
    rows = config.accumulation * data * fsdp
    if config.batch_size % rows:
        parts = f"accumulation {config.accumulation} x data {data} x fsdp {fsdp} = {rows}"
        raise ConfigError("batch_size", config.batch_size, f"expected a multiple of {parts}")
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError("wandb", True, "needs a package: pip install 'jaxopt-lab[wandb]'")


def _check_groups(config: PretrainConfig) -> None:
    groups, optimizer = config.mesh.probe, config.optimizer
    if isinstance(optimizer, ZerothOrderConfig):
        optimizer.check_groups(groups)
    elif groups > 1:
        wanted = f"expected 1: {name_of(optimizer)} evaluates no probes"
        raise ConfigError("mesh.probe", groups, wanted)


def validate_run(config: RunConfig) -> None:
    """Checks what all verbs that train share.

    Raises:
      ConfigError: Names the field, the value and what would be right.
    """
    config.named_model(config.preset)
    check_bounds(config)
    config.schedule.validate(config.steps)
    # One token has nothing before it to be predicted from, one word nothing to be told from.
    for name in ("context", "vocab_size"):
        if getattr(config.model, name) < 2:
            raise ConfigError(f"model.{name}", getattr(config.model, name), "expected at least 2")
    context, chunks = config.model.context, config.head_chunks
    if context % chunks:
        raise ConfigError("head_chunks", chunks, f"expected a divisor of model.context = {context}")


def check_optimizer(config: RunConfig, optimizer: OptimizerConfig) -> None:
    """Checks what an optimizer without gradients cannot work with.

    Raises:
      ConfigError: Names the field, the value and what would be right.
    """
    if not isinstance(optimizer, ZerothOrderConfig):
        return
    if config.z_loss:
        wanted = f"expected 0: {name_of(optimizer)} sees one number, which is logged as the loss"
        raise ConfigError("z_loss", config.z_loss, wanted)
    if isinstance(config.schedule, AdaptiveWarmupConfig):
        wanted = f"expected another: it reads the loss before a step of {name_of(optimizer)} has it"
        raise ConfigError("schedule", name_of(config.schedule), wanted)
    for rate in ("dropout", "attention_dropout"):
        if value := getattr(config.model, rate, 0):
            wanted = f"expected 0: {name_of(optimizer)} compares losses of one step"
            raise ConfigError(f"model.{rate}", value, wanted)
    if value := getattr(getattr(config, "trainable", None), "dropout", 0):
        wanted = f"expected 0: {name_of(optimizer)} compares losses of one step"
        raise ConfigError("trainable.dropout", value, wanted)
    optimizer.evaluation(whole=config.moves_all)
    try:
        check_eps(optimizer.eps, abstract_params(config.model))
    except ValueError as error:
        raise ConfigError.inside("optimizer", error) from error


def check_vocabulary(model: DecoderConfig, tokenizer: Tokenizer) -> str | None:
    """Compares the tokenizer with the model.

    Returns:
      A note when the model has many rows that the tokenizer never uses.

    Raises:
      ConfigError: If there are tokens that the model has no row for.
    """
    rows, tokens = model.vocab_size, tokenizer.vocab_size
    if tokens > rows:
        wanted = f"expected at least the {tokens} entries of the tokenizer"
        raise ConfigError("model.vocab_size", rows, wanted)
    # Up to 128 spare rows are the usual padding to a multiple that devices divide well.
    if rows - tokens < 128:
        return None
    sizes = f"model.vocab_size is {rows}, the tokenizer has {tokens} entries"
    return f"{sizes}: {rows - tokens} rows of the embedding are never used"
