"""Corpora, tokenizers and batches; labelled rows; packages of data and weights."""

from jaxopt_lab.data.batches import (
    Batch,
    RowsOnDemand,
    TrainBatches,
    rows_of_first_epoch,
    train_batches,
    train_rows,
)
from jaxopt_lab.data.corpora import Corpus, CorpusPart, SetError, TokenSplit, list_corpora, prepare
from jaxopt_lab.data.evaluation import (
    bits_per_byte,
    count_targets,
    nats_under,
    standard_error,
    unigram_model,
    unigram_nats,
    validation_batches,
    windows_of,
)
from jaxopt_lab.data.gguf_tokenizer import gguf_tokenizer
from jaxopt_lab.data.labelled import (
    LabelledCorpus,
    LabelledFiles,
    LabelledSource,
    LabelledSplit,
    MovieSentences,
    Topics,
    prepare_labelled,
)
from jaxopt_lab.data.packages import PACKAGES, Package, fetch, find, list_packages
from jaxopt_lab.data.prepared import PreparedTfds, PreparedTokens
from jaxopt_lab.data.sources import (
    CORPORA,
    VALIDATION,
    Mixture,
    PythonSource,
    Source,
    TextFiles,
    sets_from_text,
)
from jaxopt_lab.data.tokenizer import Tokenizer, TokenizerConfig
from jaxopt_lab.data.windows import Windows, draw_windows
from jaxopt_lab.data.wordpiece import Encoded, WordPiece

__all__ = [
    "CORPORA",
    "PACKAGES",
    "VALIDATION",
    "Batch",
    "Corpus",
    "CorpusPart",
    "Encoded",
    "LabelledCorpus",
    "LabelledFiles",
    "LabelledSource",
    "LabelledSplit",
    "Mixture",
    "MovieSentences",
    "Package",
    "PreparedTfds",
    "PreparedTokens",
    "PythonSource",
    "RowsOnDemand",
    "SetError",
    "Source",
    "TextFiles",
    "TokenSplit",
    "Tokenizer",
    "TokenizerConfig",
    "Topics",
    "TrainBatches",
    "Windows",
    "WordPiece",
    "bits_per_byte",
    "count_targets",
    "draw_windows",
    "fetch",
    "find",
    "gguf_tokenizer",
    "list_corpora",
    "list_packages",
    "nats_under",
    "prepare",
    "prepare_labelled",
    "rows_of_first_epoch",
    "sets_from_text",
    "standard_error",
    "train_batches",
    "train_rows",
    "unigram_model",
    "unigram_nats",
    "validation_batches",
    "windows_of",
]
