"""What a fine-tuning run is: a pretraining run whose model exists, and what of it moves."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from jaxopt_lab import data, models
from jaxopt_lab.data import LabelledSource, Source, TextFiles, TokenizerConfig
from jaxopt_lab.lora.inits import FROM_KERNEL
from jaxopt_lab.models import PRESETS, DecoderConfig, EncoderConfig
from jaxopt_lab.models.encoder_config import ModelConfig
from jaxopt_lab.report.storage import is_remote, staged
from jaxopt_lab.tasks import PROMPTS, Prompt
from jaxopt_lab.train.config.bounds import Count, Positive
from jaxopt_lab.train.config.optimizer_base import OptimizerConfig
from jaxopt_lab.train.config.optimizers_pairs import PairConfig
from jaxopt_lab.train.config.run import PretrainConfig, needs_lora
from jaxopt_lab.train.config.schedules import AdaptiveWarmupConfig
from jaxopt_lab.train.config.sections import EvalConfig
from jaxopt_lab.train.config.trainable import (
    DoraAdaptersConfig,
    FullConfig,
    LoraAdaptersConfig,
    TrainableConfig,
)
from jaxopt_lab.train.config.tuned import default_optimizer
from jaxopt_lab.train.errors import ConfigError

# Longest windows of a text unless the flag says otherwise: the contexts of today's models are much
# longer than what one trains on.
_WINDOW = 512


@dataclass(frozen=True)
class FinetuneConfig(PretrainConfig):
    """One fine-tuning run: `--model DIRECTORY --task text-files --task.paths notes/*.md`."""

    verb: ClassVar[str] = "finetune"

    model: ModelConfig = PRESETS["tiny"]  # pyright: ignore[reportIncompatibleVariableOverride]
    """Shape and numerics of the model, as its directory says."""
    corpus: Source | LabelledSource = TextFiles()  # pyright: ignore[reportIncompatibleVariableOverride]
    """What is learnt, `--task NAME` on the command line: the next token of a text, or the label of
    labelled texts, by a head on an encoder or the next word of a decoder."""
    trainable: TrainableConfig = LoraAdaptersConfig()
    """What moves: everything, the head, or low-rank adapters."""
    optimizer: OptimizerConfig = default_optimizer("lora", "adamw")
    """The update rule. Its rate is for adapters, which take about ten times that of full
    fine-tuning; on the command line `--trainable` brings its own (`jaxopt_lab.train.config.tuned`).
    """
    clip: Positive | None = 1.0
    """Largest global norm of the gradient; None does not clip. LoRSum clips by the norm of the
    kernels' gradients instead of the factors'."""
    packed: bool = False
    """Keep the blocks of four or eight bits of a GGUF file as they are beneath adapters, and unpack
    them layer by layer, in a scan. Without it they are unpacked as they are read."""
    length: Count = 64
    """Tokens of a row of labelled text; a longer text loses its end."""
    prompt: Prompt = Prompt()
    """How a decoder reads labelled text, and the word that stands for each class. The default gives
    way to the prompt of a corpus that has one of its own (`jaxopt_lab.tasks.PROMPTS`)."""
    eval: EvalConfig = EvalConfig(sample_tokens=0)
    """Held-out evaluation."""
    batch_size: Count = 16
    """Rows per step, over all devices and microbatches."""

    @property
    def moves_all(self) -> bool:
        """See the base class."""
        return isinstance(self.trainable, FullConfig)

    @property
    def is_labelled(self) -> bool:
        """Whether labels are learnt."""
        return isinstance(self.corpus, LabelledSource)

    @property
    def chosen_prompt(self) -> Prompt:
        """The prompt given, or that of the corpus."""
        own = PROMPTS.get(self.corpus.name) if self.is_labelled else None
        return own if own is not None and self.prompt == Prompt() else self.prompt

    @property
    def row_tokens(self) -> int:
        """See the base class."""
        return self.length if self.is_labelled else self.model.context

    @property
    def row_logits(self) -> int:
        """Labels need the scores of their classes alone."""
        return 0 if self.is_labelled else super().row_logits

    @staticmethod
    def named_model(name: str) -> tuple[Any, TokenizerConfig]:
        """A directory in Hugging Face's layout, a fetched package, or a preset, random weights."""
        if name in PRESETS:
            return PretrainConfig.named_model(name)
        model, tokenizer = given_model("model", name)
        return (_windowed(model) if isinstance(model, DecoderConfig) else model), tokenizer

    def check_what_moves(self) -> None:
        """Checks what moves, that the optimizer can move it, and that the model can learn it."""
        self.trainable.validate()
        if self.init_from is not None:
            raise ConfigError("init_from", self.init_from, "expected --model with that directory")
        if isinstance(self.model, EncoderConfig) and not self.is_labelled:
            raise ConfigError("model", self.preset, "which is an encoder: expected a labelled task")
        if self.is_labelled and self.length > self.model.context:
            raise ConfigError("length", self.length, f"expected at most {self.model.context}")
        if self.packed:
            self._check_packed()
        optimizer = self.optimizer
        if isinstance(self.trainable, LoraAdaptersConfig):
            self._check_start(self.trainable)
        if not isinstance(optimizer, PairConfig):
            return
        dora = isinstance(self.trainable, DoraAdaptersConfig)
        if not self.trainable.adapters or (dora and optimizer.needs_taps):
            raise needs_lora(optimizer)
        optimizer.changes(self.steps)
        if optimizer.needs_taps and isinstance(self.schedule, AdaptiveWarmupConfig):
            raise ConfigError(
                "schedule", "adaptive-warmup",
                "expected another one: it scales updates, and those of LoRSum are whole moves",
            )  # fmt: skip

    def _check_start(self, adapters: LoraAdaptersConfig) -> None:
        if adapters.init not in FROM_KERNEL:
            return
        given = ("trainable.init", adapters.init)
        if self.packed:
            raise ConfigError(*given, "which changes the kernels: expected --no-packed")
        if adapters.dora or getattr(self.optimizer, "needs_weights", False):
            raise ConfigError(
                *given, "expected default: DoRA and WeightLoRA start beside whole kernels"
            )

    def _check_packed(self) -> None:
        if not self.trainable.adapters:
            raise ConfigError(
                "packed", True,
                "but packed weights cannot be trained: expected --trainable lora, or --no-packed, "
                "which unpacks them as they are read",
            )  # fmt: skip
        if self.preset in PRESETS or gguf_file(model_directory("model", self.preset)) is None:
            raise ConfigError("packed", True, "expected a --model in a GGUF file")


def given_model(field: str, name: str) -> tuple[ModelConfig, TokenizerConfig]:
    """The model in a directory and the tokenizer beside it.

    Args:
      field: What names it, for messages.
      name: As for `model_directory`.

    Raises:
      ConfigError: If there is none that can be read.
    """
    directory = model_directory(field, name)
    try:
        model = _model_of(directory)
    except (OSError, ValueError, KeyError, ModuleNotFoundError) as error:
        raise ConfigError(field, name, f"which cannot be read: {error}") from error
    is_bpe = (directory / "merges.txt").is_file() and not (directory / "tokenizer.json").exists()
    kind = "gpt2" if is_bpe else "saved"
    where = name if is_remote(name) else str(directory)
    return model, TokenizerConfig(kind, model.vocab_size, where)


def model_directory(field: str, name: str) -> Path:
    """The directory of a model, by its path or the name of a package that was fetched.

    Args:
      field: What names it, for messages.
      name: The path or the package.

    Raises:
      ConfigError: If there is none; names the command that fetches it.
    """
    if name in data.PACKAGES:
        try:
            return data.find(name)
        except ValueError as error:
            raise ConfigError.inside(field, error) from error
    directory = Path(staged(name)).expanduser()
    if not (directory / "config.json").is_file() and gguf_file(directory) is None:
        names = ["minilm", "smollm2", *(PRESETS if field == "model" else [])]
        raise ConfigError(
            field, name,
            "expected a directory with config.json and weights or one GGUF file, or one of "
            f"{', '.join(names)}",
        )  # fmt: skip
    return directory


def gguf_file(directory: Path) -> Path | None:
    """The one GGUF file of a directory."""
    found = list(directory.glob("*.gguf"))
    return found[0] if len(found) == 1 else None


def _model_of(directory: Path) -> ModelConfig:
    if (file := gguf_file(directory)) is not None:
        return models.gguf_config_of(file)
    if json.loads((directory / "config.json").read_text()).get("model_type") == "bert":
        return models.bert_config_of(directory)
    return models.huggingface_config_of(directory)


def _windowed(model: DecoderConfig) -> DecoderConfig:
    # One module in peft, so one matrix with one adapter.
    one = "one" if model.positions == "learned" else "three"
    return replace(model, context=min(model.context, _WINDOW), fused_qkv_as=one)
