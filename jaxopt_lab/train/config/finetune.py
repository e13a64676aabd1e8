"""What a fine-tuning run is: a pretraining run whose model exists, and what of it moves."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from jaxopt_lab import models
from jaxopt_lab.data import Source, TextFiles, TokenizerConfig
from jaxopt_lab.models import PRESETS, DecoderConfig
from jaxopt_lab.train.config.bounds import Count, Positive
from jaxopt_lab.train.config.optimizer_base import OptimizerConfig
from jaxopt_lab.train.config.optimizers import AdamWConfig
from jaxopt_lab.train.config.optimizers_pairs import PairConfig
from jaxopt_lab.train.config.run import PretrainConfig, needs_lora
from jaxopt_lab.train.config.schedules import AdaptiveWarmupConfig
from jaxopt_lab.train.config.sections import EvalConfig
from jaxopt_lab.train.config.trainable import (
    DoraAdaptersConfig,
    LoraAdaptersConfig,
    TrainableConfig,
)
from jaxopt_lab.train.errors import ConfigError

# Longest windows of a text unless the flag says otherwise: the contexts of today's models are much
# longer than what one trains on.
_WINDOW = 512


@dataclass(frozen=True)
class FinetuneConfig(PretrainConfig):
    """One fine-tuning run: `--model DIRECTORY --task text-files --task.paths notes/*.md`."""

    verb: ClassVar[str] = "finetune"

    corpus: Source = TextFiles()
    """What is learnt, `--task NAME` on the command line: the next token of a text."""
    trainable: TrainableConfig = LoraAdaptersConfig()
    """What moves: everything, the head, or low-rank adapters."""
    optimizer: OptimizerConfig = AdamWConfig(learning_rate=1e-3, b2=0.999, weight_decay=0.0)
    """The update rule. Adapters take about ten times the rate of full fine-tuning."""
    clip: Positive | None = 1.0
    """Largest global norm of the gradient; None does not clip. LoRSum clips by the norm of the
    kernels' gradients instead of the factors'."""
    eval: EvalConfig = EvalConfig(sample_tokens=0)
    """Held-out evaluation."""
    batch_size: Count = 16
    """Rows per step, over all devices and microbatches."""

    @staticmethod
    def named_model(name: str) -> tuple[DecoderConfig, TokenizerConfig]:
        """A directory in Hugging Face's layout, or a preset with random weights."""
        if name in PRESETS:
            return PretrainConfig.named_model(name)
        directory = Path(name).expanduser()
        if not (directory / "config.json").is_file():
            raise ConfigError(
                "model", name,
                f"expected a directory with config.json and weights, or {' or '.join(PRESETS)}",
            )  # fmt: skip
        try:
            model = models.huggingface_config_of(directory)
        except (ValueError, KeyError, json.JSONDecodeError) as error:
            raise ConfigError("model", name, f"which cannot be read: {error}") from error
        # One module in peft, so one matrix with one adapter.
        one = "one" if model.positions == "learned" else "three"
        model = replace(model, context=min(model.context, _WINDOW), fused_qkv_as=one)
        if (directory / "tokenizer.json").is_file() or not (directory / "merges.txt").is_file():
            return model, TokenizerConfig("saved", model.vocab_size, str(directory))
        return model, TokenizerConfig("gpt2", model.vocab_size, str(directory))

    def check_what_moves(self) -> None:
        """Checks what moves, and that the optimizer can move it."""
        self.trainable.validate()
        optimizer = self.optimizer
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
