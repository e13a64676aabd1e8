"""The steps of preparing a corpus: scan, split, store the documents, write the tokens."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxopt_lab.data import cache
from jaxopt_lab.data.sources import Document, SinglePart
from jaxopt_lab.data.tokenizer import Tokenizer, TokenizerConfig, make_tokenizer

# Part of every cache key: raise it when the stored layout or the document rules change.
FORMAT = 2
_ENCODE_CHARACTERS = 2_000_000
_REPORT_BYTES = 20_000_000
# Lines of fewer characters recur by chance or by custom.
_TELLING_LINE = 40

OnProgress = Callable[[str], None]
SPLITS = "train", "validation"
SET = "set"


@dataclass(frozen=True)
class Scan:
    """What a first pass over a source learns; the texts stay where they are."""

    source: SinglePart
    keys: frozenset[str]
    """Content hashes of the documents that this part contributes."""
    hash: str
    num_bytes: int
    duplicates: int


def scan_documents(sources: Sequence[SinglePart], report: OnProgress) -> list[Scan]:
    """Hashes every document; a document of two parts stays with the first one."""
    seen: set[str] = set()
    scans = []
    for source in sources:
        report(f"reading {source.name}")
        keys: set[str] = set()
        count = num_bytes = 0
        replaced: dict[str, int] = {}
        for document in source.documents():
            if not document.text:
                continue
            count += 1
            if document.replaced:
                replaced[document.name] = document.replaced
            data = document.text.encode()
            key = hashlib.sha256(data).hexdigest()
            if key not in seen:
                seen.add(key)
                keys.add(key)
                num_bytes += len(data)
        if not keys:
            why = "all its documents are in other parts too" if count else "it has no text"
            raise ValueError(f"the corpus {source.name} is empty: {why}")
        content = hashlib.sha256("".join(sorted(keys)).encode()).hexdigest()
        scans.append(Scan(source, frozenset(keys), content, num_bytes, count - len(keys)))
        report(f"{len(keys):,} documents, {num_bytes / 1e6:.1f} MB, {count - len(keys)} duplicates")
        if replaced:
            worst = max(replaced, key=lambda name: replaced[name])
            report(
                f"{sum(replaced.values()):,} sequences of bytes in {len(replaced):,} documents are "
                f"no UTF-8 and became replacement characters, most of them in {worst}"
            )
    return scans


def split_of(key: str, validation_fraction: float) -> str:
    """The split of a document, from its content hash alone."""
    return "validation" if int(key[:16], 16) < validation_fraction * 2**64 else "train"


def keys_of(scan: Scan, split: str, validation_fraction: float) -> set[str]:
    """The documents of a part that belong to a split."""
    return {key for key in scan.keys if split_of(key, validation_fraction) == split}


def check_splits(name: str, scans: Sequence[Scan], validation_fraction: float) -> None:
    """Raises ValueError where a split has no document."""
    keys = [key for scan in scans for key in scan.keys]
    held_out = sum(split_of(key, validation_fraction) == "validation" for key in keys)
    if validation_fraction > 0 and not held_out:
        raise ValueError(
            f"the corpus {name} has no validation documents: none of its {len(keys)} documents "
            f"falls into validation_fraction = {validation_fraction}; raise the fraction, or give "
            "more documents (one long text can be a jsonl file with one row per chapter)"
        )
    if held_out == len(keys):
        raise ValueError(
            f"the corpus {name} has no training documents: all {len(keys)} fall into "
            f"validation_fraction = {validation_fraction}; lower the fraction or give "
            "more documents"
        )


def store_documents(root: Path, scan: Scan, validation_fraction: float, report: OnProgress) -> Path:
    """Keeps the documents of a part as a TFDS dataset; returns its directory."""
    from jaxopt_lab.data.builder import write_documents

    key = hash_json([FORMAT, scan.hash, validation_fraction])
    entry = root / "documents" / key[:24]

    def write(directory: Path) -> dict[str, Any]:
        report(f"storing the documents of {scan.source.name}")
        parts = {split: keys_of(scan, split, validation_fraction) for split in SPLITS}
        write_documents(
            directory,
            {split: _keyed(scan.source, keys) for split, keys in parts.items() if keys},
        )
        return {"name": scan.source.name, "hash": scan.hash}

    cache.open_or_build(entry, write, report)
    return entry


def _keyed(source: SinglePart, keys: Set[str]) -> Iterator[tuple[str, Document]]:
    """Some documents of a source, each once, on a second pass over it."""
    left = set(keys)
    for document in source.documents():
        key = hashlib.sha256(document.text.encode()).hexdigest()
        if key in left:
            left.discard(key)
            yield key, document
    if left:
        raise ValueError(
            f"the files of {source.name} changed while they were read: {len(left)} "
            "documents are gone; prepare the corpus again"
        )


def near_copies(held_out: Mapping[str, str], training: Iterable[str]) -> set[str]:
    """Held-out documents that training has mostly seen, although they are no copies.

    Those are meant of whose lines with more than 40 characters at least half are lines of training
    documents. Only the lines of held-out documents are kept in memory.

    >>> line = "the quick brown fox jumps over the lazy dog"
    >>> near_copies({"a": line, "b": line.upper()}, [line])
    {'a'}

    Args:
        held_out: key -> text.
        training: texts; read once.

    Returns:
        The keys of these documents.
    """
    telling = {key: _telling_lines(text) for key, text in held_out.items()}
    wanted, seen = set().union(*telling.values()), set()
    for text in training:
        seen |= wanted.intersection(_telling_lines(text))
    return {
        key
        for key, lines in telling.items()
        if lines and 2 * sum(line in seen for line in lines) >= len(lines)
    }


def _telling_lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if len(line) > _TELLING_LINE]


def write_tokens(
    directory: Path,
    scans: Sequence[Scan],
    stores: Sequence[Path],
    config: TokenizerConfig,
    report: OnProgress,
) -> dict[str, Any]:
    """Makes the tokenizer, encodes both splits, and returns what the manifest says of them."""
    from jaxopt_lab.data.builder import read_documents

    if config.kind == "bpe":
        report(f"training a byte-level BPE of {config.vocab_size:,} entries")
    tokenizer = make_tokenizer(
        config, (text for store in stores for _, text in read_documents(store, "train"))
    )
    tokenizer.save(directory)
    train = _SplitWriter(directory, "train", tokenizer)
    stretches = []
    for scan, store in zip(scans, stores, strict=True):
        report(f"encoding {scan.source.name} ({scan.num_bytes / 1e6:.1f} MB)")
        start = train.num_tokens
        train.write((text for _, text in read_documents(store, "train")), report)
        stretches.append([start, train.num_tokens])
    held_out = dict(sorted(p for store in stores for p in read_documents(store, "validation")))
    validation, copies = _write_unseen(directory, "validation", held_out, stores, tokenizer, report)
    return {
        "tokenizer": {
            "kind": config.kind,
            "vocab_size": tokenizer.vocab_size,
            "hash": tokenizer.hash,
        },
        "dtype": np.dtype(train.dtype).name,
        "stretches": stretches,
        "splits": {"train": train.finish(), "validation": validation},
        "near_copies": copies,
    }


def write_set(
    directory: Path,
    source: SinglePart,
    keys: Set[str],
    stores: Sequence[Path],
    tokenizer: Tokenizer,
    report: OnProgress,
) -> dict[str, Any]:
    """Encodes some documents of a source for evaluation, and returns what the manifest says."""
    documents = {key: document.text for key, document in sorted(_keyed(source, keys))}
    facts, copies = _write_unseen(directory, SET, documents, stores, tokenizer, report)
    dtype = np.dtype(_SplitWriter.dtype_for(tokenizer)).name
    return {"name": source.name, "dtype": dtype, "splits": {SET: facts}, "near_copies": copies}


def _write_unseen(
    directory: Path,
    split: str,
    documents: Mapping[str, str],
    stores: Sequence[Path],
    tokenizer: Tokenizer,
    report: OnProgress,
) -> tuple[dict[str, int], int]:
    """Encodes documents except near copies of training ones; says how many of these there were."""
    from jaxopt_lab.data.builder import read_documents

    training = (text for store in stores for _, text in read_documents(store, "train"))
    copies = near_copies(documents, training)
    if copies:
        report(
            f"{len(copies)} of {len(documents)} held-out documents are left out: at least half of "
            f"their lines with more than {_TELLING_LINE} characters are in training documents"
        )
    if documents and len(copies) == len(documents):
        raise ValueError(
            "all held-out documents are near copies of training documents; raise "
            "validation_fraction, or give other documents"
        )
    writer = _SplitWriter(directory, split, tokenizer)
    writer.write((text for key, text in documents.items() if key not in copies), report)
    return writer.finish(), len(copies)


class _SplitWriter:
    """Appends encoded documents to the files of one split."""

    def __init__(self, directory: Path, split: str, tokenizer: Tokenizer):
        self.dtype = self.dtype_for(tokenizer)
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._offsets = [0]
        self._num_bytes = 0
        self._paths = split_paths(directory, split)
        self._paths[0].touch()

    @staticmethod
    def dtype_for(tokenizer: Tokenizer) -> type[np.integer]:
        return np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32

    def write(self, texts: Iterator[str], report: OnProgress) -> None:
        reported = self._num_bytes
        with open(self._paths[0], "ab") as file:
            for batch in _batches_of_texts(texts):
                for ids in self._tokenizer.encode_batch(batch):
                    ended = np.append(ids, self._tokenizer.end_of_text).astype(self.dtype)
                    file.write(ended.tobytes())
                    self.num_tokens += len(ended)
                    self._offsets.append(self.num_tokens)
                self._num_bytes += sum(len(text.encode()) for text in batch)
                if self._num_bytes - reported >= _REPORT_BYTES:
                    reported = self._num_bytes
                    report(f"encoded {self._num_bytes / 1e6:.0f} MB")

    def finish(self) -> dict[str, int]:
        np.save(self._paths[1], np.asarray(self._offsets, np.int64))
        documents = len(self._offsets) - 1
        return {"documents": documents, "tokens": self.num_tokens, "bytes": self._num_bytes}


def split_paths(directory: Path, split: str) -> tuple[Path, Path]:
    """The files of the tokens and of the document offsets."""
    return directory / f"{split}.tokens", directory / f"{split}.offsets.npy"


def _batches_of_texts(texts: Iterator[str]) -> Iterator[list[str]]:
    """Groups texts so that a batch is worth several threads and fits in memory."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _ENCODE_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def hash_json(value: Any) -> str:
    """A hash of JSON values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
