"""Corpora, tokenizers and batches."""

from jaxopt_lab.data.batches import Batch, TrainBatches, train_batches
from jaxopt_lab.data.corpora import Corpus, CorpusPart, TokenSplit, list_corpora, prepare
from jaxopt_lab.data.evaluation import (
    bits_per_byte,
    count_targets,
    unigram_nats,
    validation_batches,
)
from jaxopt_lab.data.sources import Mixture, PreparedTfds, PythonSource, Source, TextFiles
from jaxopt_lab.data.tokenizer import Tokenizer, TokenizerConfig

__all__ = [
    "Batch",
    "Corpus",
    "CorpusPart",
    "Mixture",
    "PreparedTfds",
    "PythonSource",
    "Source",
    "TextFiles",
    "TokenSplit",
    "Tokenizer",
    "TokenizerConfig",
    "TrainBatches",
    "bits_per_byte",
    "count_targets",
    "list_corpora",
    "prepare",
    "train_batches",
    "unigram_nats",
    "validation_batches",
]
