"""Corpora, tokenizers and batches."""

from jaxopt_lab.data.batches import Batch, RowsOnDemand, TrainBatches, train_batches, train_rows
from jaxopt_lab.data.corpora import Corpus, CorpusPart, SetError, TokenSplit, list_corpora, prepare
from jaxopt_lab.data.evaluation import (
    bits_per_byte,
    count_targets,
    nats_under,
    unigram_model,
    unigram_nats,
    validation_batches,
    windows_of,
)
from jaxopt_lab.data.sources import (
    CORPORA,
    VALIDATION,
    Mixture,
    PreparedTfds,
    PythonSource,
    Source,
    TextFiles,
    sets_from_text,
)
from jaxopt_lab.data.tokenizer import Tokenizer, TokenizerConfig
from jaxopt_lab.data.windows import Windows, draw_windows

__all__ = [
    "CORPORA",
    "VALIDATION",
    "Batch",
    "Corpus",
    "CorpusPart",
    "Mixture",
    "PreparedTfds",
    "PythonSource",
    "RowsOnDemand",
    "SetError",
    "Source",
    "TextFiles",
    "TokenSplit",
    "Tokenizer",
    "TokenizerConfig",
    "TrainBatches",
    "Windows",
    "bits_per_byte",
    "count_targets",
    "draw_windows",
    "list_corpora",
    "nats_under",
    "prepare",
    "sets_from_text",
    "train_batches",
    "train_rows",
    "unigram_model",
    "unigram_nats",
    "validation_batches",
    "windows_of",
]
