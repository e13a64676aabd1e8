"""The runs of the studies on text: size of the model, its windows, and what a result file says."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax

from jaxopt_lab import data, models
from jaxopt_lab.models.config import DType
from jaxopt_lab.sweep.task import Task
from jaxopt_lab.tasks import language_model_loss


@dataclass(frozen=True)
class DecoderRuns:
    """Size of the runs of a study: a LLaMA-style decoder with a tied head on source code.

    Args:
      roots: Of the corpus, see `data.PythonSource`.
      vocab_size: Entries of the tokenizer, which is trained on the corpus.
      width: Of the residual stream.
      depth: Layers.
      heads: Attention heads.
      context: Tokens a window.
      batch_size: Windows a step.
      steps: Optimizer steps a run.
      evaluate_every: Steps between evaluations.
      validation_batches: Held-out batches.
      compute_dtype: Of the model; parameters are float32.
    """

    roots: tuple[str, ...]
    vocab_size: int
    width: int
    depth: int
    heads: int
    context: int
    batch_size: int
    steps: int
    evaluate_every: int
    validation_batches: int
    compute_dtype: DType

    @property
    def warmup(self) -> int:
        """A tenth of the steps, for schedules whose length is not under study."""
        return max(1, self.steps // 10)

    def model(self) -> models.DecoderConfig:
        """The decoder."""
        return models.DecoderConfig(
            vocab_size=self.vocab_size,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            context=self.context,
            compute_dtype=self.compute_dtype,
        )

    def shortened(self, steps: int | None) -> "DecoderRuns":
        """The same with fewer steps, for a trial; unchanged for None."""
        if steps is None:
            return self
        return replace(self, steps=steps, evaluate_every=min(self.evaluate_every, steps))

    def windows(self, seeds: Sequence[int], saved: Path | None = None) -> data.Windows:
        """Reads windows from a file, or prepares the corpus and draws them."""
        if saved is not None:
            return data.Windows.read(saved)
        tokenizer = data.TokenizerConfig("bpe", self.vocab_size)
        corpus = data.prepare(data.PythonSource(self.roots), tokenizer, on_progress=print)
        return data.draw_windows(
            corpus, seeds=seeds, steps=self.steps, batch_size=self.batch_size,
            context=self.context, max_batches=self.validation_batches,
        )  # fmt: skip

    def task(self, tokens: data.Windows, *, clip: float) -> Task:
        """What all runs share, gradients clipped to a global norm."""
        config = self.model()
        return Task(
            init_params=lambda key: models.init_params(config, key),
            loss=language_model_loss(config),
            batches=tokens.batches,
            held_out=tokens.held_out(),
            steps=self.steps,
            evaluate_every=self.evaluate_every,
            tokens_per_step=self.batch_size * self.context,
            clip=clip,
        )

    def conditions(self, tokens: data.Windows) -> dict[str, Any]:
        """What a result file says of how its numbers came about."""
        return {
            "scale": asdict(self),
            "parameters": models.parameter_count(self.model()),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "corpus": tokens.corpus_hash,
            "bytes_per_token": tokens.bytes_per_token,
        }
