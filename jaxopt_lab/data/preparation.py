"""The steps of preparing a corpus: scan, split, store the documents, write the tokens."""

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxopt_lab.data import cache
from jaxopt_lab.data.groups import held_out_documents
from jaxopt_lab.data.sources import Document, SinglePart
from jaxopt_lab.data.tokenizer import Tokenizer, TokenizerConfig, make_tokenizer

# Part of every cache key: raise it when the stored layout or the document rules change.
FORMAT = 3
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
    held_out: frozenset[str]
    """Those of the validation split."""
    by_group: bool
    """Whether whole groups are held out."""
    hash: str
    num_bytes: int
    duplicates: int

    def keys_of(self, split: str) -> frozenset[str]:
        """The documents that belong to a split."""
        return self.held_out if split == "validation" else self.keys - self.held_out


def scan_documents(
    sources: Sequence[SinglePart], validation_fraction: float, report: OnProgress
) -> list[Scan]:
    """Hashes every document and splits them; one of two parts stays with the first."""
    seen: set[str] = set()
    scans = []
    for source in sources:
        report(f"reading {source.name}")
        groups: dict[str, str] = {}
        sizes: Counter[str] = Counter()
        count = 0
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
                groups[key] = document.group or key
                sizes[groups[key]] += len(data)
        if not groups:
            why = "all its documents are in other parts too" if count else "it has no text"
            raise ValueError(f"the corpus {source.name} is empty: {why}")
        held_out, by_group = held_out_documents(groups, sizes, validation_fraction)
        # Groups come from paths, so that the text alone does not say which documents these are.
        content = [*sorted(groups), *(sorted(held_out) if by_group else ())]
        digest, size = hashlib.sha256("".join(content).encode()).hexdigest(), sizes.total()
        copies = count - len(groups)
        scans.append(Scan(source, frozenset(groups), held_out, by_group, digest, size, copies))
        report(f"{len(groups):,} documents, {size / 1e6:.1f} MB, {copies} duplicates")
        if validation_fraction and len(sizes) < len(groups):
            out = f"{len(held_out):,} of {len(groups):,} documents"
            how = "whole" if by_group else "too few to be held out whole: single documents are"
            report(f"held out: {out}; {len(sizes):,} packages or directories, {how}")
        if replaced:
            worst = max(replaced, key=lambda name: replaced[name])
            report(
                f"{sum(replaced.values()):,} sequences of bytes in {len(replaced):,} documents are "
                f"no UTF-8 and became replacement characters, most of them in {worst}"
            )
    return scans


def check_splits(name: str, scans: Sequence[Scan], validation_fraction: float) -> None:
    """Raises ValueError where a split has no document."""
    count = sum(len(scan.keys) for scan in scans)
    held_out = sum(len(scan.held_out) for scan in scans)
    if validation_fraction > 0 and not held_out:
        raise ValueError(
            f"the corpus {name} has no validation documents: none of its {count} documents "
            f"falls into validation_fraction = {validation_fraction}; raise the fraction, or give "
            "more documents (one long text can be a jsonl file with one row per chapter)"
        )
    if held_out == count:
        raise ValueError(
            f"the corpus {name} has no training documents: all {count} fall into "
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
        parts = {split: scan.keys_of(split) for split in SPLITS}
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


def near_copies(held_out: Iterable[tuple[str, str]], training: Iterable[str]) -> set[str]:
    """Held-out documents that training has mostly seen, although they are no copies.

    Those are meant of whose lines with more than 40 characters at least half are lines of training
    documents. What is kept in memory is a 64-bit hash of every such line of held-out documents.

    >>> line = "the quick brown fox jumps over the lazy dog"
    >>> near_copies([("a", line), ("b", line.upper())], [line])
    {'a'}

    Args:
        held_out: (key, text) pairs; read once.
        training: texts; read once.

    Returns:
        The keys of these documents.
    """
    telling = {key: _telling_lines(text) for key, text in held_out}
    wanted = np.unique(np.concatenate([np.empty(0, np.int64), *telling.values()]))
    seen = np.zeros(len(wanted), bool)
    for text in training:
        lines = _telling_lines(text)
        at = np.minimum(np.searchsorted(wanted, lines), max(len(wanted) - 1, 0))
        if len(wanted):
            seen[at[wanted[at] == lines]] = True
    return {
        key
        for key, lines in telling.items()
        if len(lines) and 2 * seen[np.searchsorted(wanted, lines)].sum() >= len(lines)
    }


def _telling_lines(text: str) -> np.ndarray:
    lines = [line for line in map(str.strip, text.splitlines()) if len(line) > _TELLING_LINE]
    return np.fromiter(map(hash, lines), np.int64, len(lines))


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

    def held_out() -> Iterator[tuple[str, str]]:
        return heapq.merge(*(read_documents(store, "validation") for store in stores))

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
    documents = sorted((key, document.text) for key, document in _keyed(source, keys))
    facts, copies = _write_unseen(
        directory, SET, lambda: iter(documents), stores, tokenizer, report
    )
    dtype = np.dtype(_SplitWriter.dtype_for(tokenizer)).name
    return {"name": source.name, "dtype": dtype, "splits": {SET: facts}, "near_copies": copies}


def _write_unseen(
    directory: Path,
    split: str,
    documents: Callable[[], Iterator[tuple[str, str]]],
    stores: Sequence[Path],
    tokenizer: Tokenizer,
    report: OnProgress,
) -> tuple[dict[str, int], int]:
    """Encodes documents except near copies of training ones; says how many of these there were."""
    from jaxopt_lab.data.builder import read_documents

    training = (text for store in stores for _, text in read_documents(store, "train"))
    copies = near_copies(documents(), training)
    writer = _SplitWriter(directory, split, tokenizer)
    writer.write((text for key, text in documents() if key not in copies), report)
    facts = writer.finish()
    if copies:
        report(
            f"{len(copies)} of {len(copies) + facts['documents']} held-out documents are left out: "
            f"at least half of their lines with more than {_TELLING_LINE} characters are in "
            "training documents"
        )
        if not facts["documents"]:
            raise ValueError(
                "all held-out documents are near copies of training documents; raise "
                "validation_fraction, or give other documents"
            )
    return facts, len(copies)


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
