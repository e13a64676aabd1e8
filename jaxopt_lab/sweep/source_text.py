"""The text of long studies: the source code of the machine's own packages, as token files.

It follows the rules of `data.prepare` (whole packages held out, near-copies dropped) without the
packages that keep its cache, so that it runs where only jax, numpy and tokenizers are installed.
"""

import hashlib
import json
import pathlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxopt_lab import data
from jaxopt_lab.data.documents import Document
from jaxopt_lab.data.groups import ALONE, KEY_DTYPE, held_out_documents
from jaxopt_lab.data.preparation import near_copies
from jaxopt_lab.data.tokenizer import Tokenizer, make_tokenizer
from jaxopt_lab.report.files import write_json
from jaxopt_lab.report.progress import to_stderr

FRACTION = 0.05
# The vocabulary is trained on every so manieth training document.
STRIDE = 8
_DOCUMENTS_AT_ONCE = 512


@dataclass(frozen=True)
class Text:
    """Tokens of both sides, and what they are."""

    train: np.ndarray  # uint16
    validation: data.TokenSplit
    end_of_text: int
    facts: dict[str, Any]

    def windows(self, seed: int, start: int, stop: int, rows: int, context: int) -> np.ndarray:
        """Training batches `start` to `stop - 1`, (batches, rows, context + 1).

        Every epoch visits all windows once, in an order of its own.
        """
        count = (len(self.train) - 1) // context
        epochs, within = np.divmod(np.arange(start * rows, stop * rows), count)
        order = [
            np.random.default_rng([seed, epoch]).permutation(count)[within[epochs == epoch]]
            for epoch in np.unique(epochs)
        ]
        at = context * np.concatenate(order)[:, None] + np.arange(context + 1)
        return self.train[at].reshape(stop - start, rows, -1).astype(np.int32)


def open_text(directory: pathlib.Path, roots: Sequence[str], vocab_size: int) -> Text:
    """Reads the token files of a directory, or makes them first.

    Args:
      directory: Of this text and vocabulary alone.
      roots: As of `data.PythonSource`.
      vocab_size: Entries of the tokenizer.
    """
    facts_file = directory / "facts.json"
    if not facts_file.exists():
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory, data.PythonSource(tuple(roots)), vocab_size)
    facts = json.loads(facts_file.read_text())
    validation = data.TokenSplit(
        np.load(directory / "validation.npy"),
        np.load(directory / "offsets.npy"),
        facts["validation_bytes"],
    )
    train = np.load(directory / "train.npy", mmap_mode="r")
    return Text(train, validation, facts["end_of_text"], facts)


def _write(directory: pathlib.Path, source: data.PythonSource, vocab_size: int) -> None:
    begun = time.perf_counter()
    documents: dict[bytes, Document] = {}
    for document in source.documents():
        if document.content:
            documents.setdefault(hashlib.sha256(document.content).digest(), document)
    keys = sorted(documents)
    held, by_group = _held_out(keys, [documents[key] for key in keys])
    train = [documents[key].text for key in keys if key not in held]
    held_out = [(key, documents[key].text) for key in keys if key in held]
    copies = near_copies(held_out, train)
    kept = [text for key, text in held_out if key not in copies]
    to_stderr(f"{len(copies)} of {len(held_out)} held-out documents are near-copies")
    tokenizer = make_tokenizer(data.TokenizerConfig("bpe", vocab_size), train[::STRIDE])
    to_stderr(f"vocabulary after {time.perf_counter() - begun:.0f} s")
    tokens, _ = _encoded(tokenizer, train)
    np.save(directory / "train.npy", tokens)
    validation, offsets = _encoded(tokenizer, kept)
    np.save(directory / "validation.npy", validation)
    np.save(directory / "offsets.npy", offsets)
    facts = {
        "hash": _digest([*keys, *(sorted(held) if by_group else ())]),
        "tokenizer": tokenizer.hash,
        "end_of_text": tokenizer.end_of_text,
        "documents": len(train),
        "bytes": sum(len(text.encode()) for text in train),
        "tokens": len(tokens),
        "validation_documents": len(kept),
        "validation_bytes": sum(len(text.encode()) for text in kept),
        "validation_tokens": len(validation),
        "near_copies": len(copies),
        "held_out_by_group": by_group,
        "seconds": round(time.perf_counter() - begun, 1),
    }
    to_stderr(json.dumps(facts))
    write_json(directory / "facts.json", facts)


def _held_out(keys: Sequence[bytes], documents: Sequence[Document]) -> tuple[set[bytes], bool]:
    """Which documents are held out, and whether whole packages are; the rules of `data.scans`."""
    names = sorted({document.group for document in documents} - {""})
    numbers = {name: number for number, name in enumerate(names)}
    groups = np.array([numbers.get(document.group, ALONE) for document in documents])
    sizes = np.array([len(document.content) for document in documents])
    columns = np.array(keys, KEY_DTYPE), groups, sizes
    held_out, by_group = held_out_documents(*columns, names, FRACTION)
    return {key for key, held in zip(keys, held_out, strict=True) if held}, by_group


def _digest(keys: Sequence[bytes]) -> str:
    return hashlib.sha256("".join(key.hex() for key in keys).encode()).hexdigest()


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, each text ended by end-of-text, and where texts start."""
    pieces: list[np.ndarray] = []
    for first in range(0, len(texts), _DOCUMENTS_AT_ONCE):
        for ids in tokenizer.encode_batch(texts[first : first + _DOCUMENTS_AT_ONCE]):
            pieces.append(np.append(ids, tokenizer.end_of_text).astype(np.uint16))
    return np.concatenate(pieces), np.cumsum([0, *map(len, pieces)])
