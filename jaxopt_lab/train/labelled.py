"""The labelled texts of a run: opened, checked against the model, and the task of learning them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxopt_lab import data
from jaxopt_lab.data import LabelledCorpus, Tokenizer
from jaxopt_lab.data.tokenizer import make_tokenizer
from jaxopt_lab.data.wordpiece import WordPiece
from jaxopt_lab.models import EncoderConfig, Placement
from jaxopt_lab.models.encoder_config import ModelConfig
from jaxopt_lab.report.storage import staged
from jaxopt_lab.tasks import (
    Rows,
    Task,
    encoder_logits,
    encoder_rows,
    labelled,
    prompt_logits,
    prompt_rows,
    prompted,
    word_tokens,
)
from jaxopt_lab.train.config.finetune import FinetuneConfig
from jaxopt_lab.train.errors import ConfigError

# Rows of a batch in evaluation; a multiple of every number of devices that one has.
_EVALUATED = 256


@dataclass(frozen=True)
class Labels:
    """What a run learns labels from."""

    corpus: LabelledCorpus
    model: ModelConfig  # with the classes of the corpus
    rows: Mapping[str, Rows]  # `train`, `validation` and `test`, as the model reads them
    tokenizer_hash: str
    words: np.ndarray | None  # of a decoder: the token that stands for each class

    def task(self, config: FinetuneConfig, model: Any, mesh: Placement) -> Task:
        """The task on a mesh."""
        options: Any = {
            "length": config.length,
            "seed": config.order_seed,
            "eval_batch": _EVALUATED,
        }
        if self.words is None:
            return labelled(model, mesh, self.rows, **options)
        return prompted(model, mesh, self.words, self.rows, **options)

    def logits(self, model: Any, mesh: Placement) -> Any:
        """Scores of the classes."""
        if self.words is None:
            return encoder_logits(model, mesh)
        return prompt_logits(model, self.words, mesh)

    def summary(self) -> dict[str, Any]:
        """Facts for the manifest."""
        corpus = self.corpus
        counts = {name: len(rows.label) for name, rows in self.rows.items()}
        return {"name": corpus.name, "hash": corpus.hash, "classes": list(corpus.classes), **counts}


def open_labels(config: FinetuneConfig, say: Callable[[str], None]) -> Labels:
    """Opens the texts of a run.

    Raises:
      ConfigError: If they are absent or unsound, or the model cannot read them.
    """
    corpus_source: Any = config.corpus
    try:
        corpus = data.prepare_labelled(corpus_source, on_progress=say)
    except (OSError, ValueError) as error:
        raise ConfigError.inside("task", error) from error
    model: Any = config.model
    if isinstance(model, EncoderConfig):
        model = replace(model, classes=len(corpus.classes))
    try:
        if isinstance(model, EncoderConfig):
            pieces = WordPiece.load(staged(config.tokenizer.directory or ""))
            rows, words = encoder_rows(model, corpus, pieces, length=config.length), None
            hashed = pieces.hash
        else:
            tokenizer: Tokenizer = make_tokenizer(config.tokenizer, corpus.train.texts)
            words = word_tokens(config.chosen_prompt, corpus, tokenizer)
            rows = prompt_rows(model, corpus, tokenizer, config.chosen_prompt, length=config.length)
            hashed = tokenizer.hash
    except (OSError, ValueError) as error:
        raise ConfigError.inside("model", error) from error
    sizes = ", ".join(f"{len(each.label):,} {name}" for name, each in rows.items())
    say(f"task {corpus.name}: {len(corpus.classes)} classes, rows: {sizes}")
    return Labels(corpus, model, rows, hashed, words)
