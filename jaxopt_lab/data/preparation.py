"""The steps of preparing a corpus whose documents are stored: vocabulary, tokens of both splits."""

import heapq
import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxopt_lab.data.documents import TOKEN_DTYPE, StoredDocument, in_chunks
from jaxopt_lab.data.pace import OnProgress, Pace
from jaxopt_lab.data.prepared import PreparedTokens
from jaxopt_lab.data.scans import Scan
from jaxopt_lab.data.sources import SinglePart
from jaxopt_lab.data.tokenizer import Tokenizer, TokenizerConfig, make_tokenizer

# Part of every key of tokens: raise it when their layout or the document rules change.
FORMAT = 3
LEARNT_FROM = 1_000_000_000
"""Bytes of text, about, that a vocabulary is learnt from; a random sample of a larger corpus."""
_ENCODED_AT_ONCE = 2_000_000  # bytes
_WRITTEN_AT_ONCE = 500_000  # tokens
# Lines of fewer characters recur by chance or by custom.
_TELLING_LINE = 40

SPLITS = "train", "validation"
SET = "set"
COUNTS = "train.counts.npy"


def check_splits(name: str, scans: Sequence[Scan], validation_fraction: float) -> None:
    """Raises ValueError where a split has no document."""
    count = sum(len(scan.keys) for scan in scans)
    held_out = sum(int(scan.held_out.sum()) for scan in scans)
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


def near_copies(held_out: Iterable[tuple[bytes, str]], training: Iterable[str]) -> set[bytes]:
    """Held-out documents that training has mostly seen, although they are no copies.

    Those are meant of whose lines with more than 40 characters at least half are lines of training
    documents. What is kept in memory is a 64-bit hash of every such line of held-out documents.

    >>> line = "the quick brown fox jumps over the lazy dog"
    >>> near_copies([(b"a", line), (b"b", line.upper())], [line])
    {b'a'}

    Args:
        held_out: (key, text) pairs; read once.
        training: texts; read once.

    Returns:
        The keys of these documents.
    """
    keys, counts, lines = [], [], array("q")
    for key, text in held_out:
        found = _telling_lines(text)
        if len(found):
            keys.append(key)
            counts.append(len(found))
            lines.frombytes(found.tobytes())
    of_held_out = np.frombuffer(lines, np.int64)
    wanted = np.unique(of_held_out)
    if not len(wanted):
        return set()
    seen = np.zeros(len(wanted), bool)
    for chunk in in_chunks(training, _ENCODED_AT_ONCE, len):
        found = np.concatenate([_telling_lines(text) for text in chunk])
        at = np.minimum(np.searchsorted(wanted, found), len(wanted) - 1)
        seen[at[wanted[at] == found]] = True
    are_seen = seen[np.searchsorted(wanted, of_held_out)].astype(np.int64)
    sums = np.add.reduceat(are_seen, np.cumsum([0, *counts[:-1]]))
    return {key for key, n, many in zip(keys, sums, counts, strict=True) if 2 * n >= many}


def _telling_lines(text: str) -> np.ndarray:
    lines = [line for line in map(str.strip, text.splitlines()) if len(line) > _TELLING_LINE]
    return np.fromiter(map(hash, lines), np.int64, len(lines))


class Part(NamedTuple):
    """Stored documents of one source, and those of them that are meant."""

    source: SinglePart
    documents: Path
    rows: np.ndarray
    """Their numbers in the order of their hashes."""

    @property
    def comes_tokenized(self) -> bool:
        """Whether tokens are stored, and not text."""
        return isinstance(self.source, PreparedTokens)

    def read(self) -> Iterator[StoredDocument]:
        """The documents, in the order of their hashes."""
        from jaxopt_lab.data.builder import read_documents

        return read_documents(self.documents, self.rows)

    def texts(self, tokenizer: Tokenizer) -> Iterator[tuple[bytes, str]]:
        """Key and text of the documents; of tokens, what they stand for."""
        for document in self.read():
            content = document.content
            if self.comes_tokenized:
                content = tokenizer.bytes_of(_given_tokens(document, tokenizer))
            yield document.key, content.decode("utf-8", "replace")

    def check(self, tokenizer: Tokenizer) -> None:
        """Refuses a tokenizer that is not the one that lies beside given tokens."""
        if not isinstance(self.source, PreparedTokens):
            return
        directory = self.source.tokenizer_directory()
        if directory is None or (theirs := Tokenizer.load(directory)).hash == tokenizer.hash:
            return
        raise ValueError(
            f"{self.source.name}: its tokenizer.json ({theirs.vocab_size:,} entries) is not the "
            f"tokenizer that was given ({tokenizer.vocab_size:,} entries); give --tokenizer.kind "
            f"saved --tokenizer.directory {directory}"
        )


def parts_of(scans: Sequence[Scan], stores: Sequence[Path], split: str) -> list[Part]:
    """The documents of a split."""
    return [
        Part(scan.source, store, scan.rows_of(split))
        for scan, store in zip(scans, stores, strict=True)
    ]


def write_tokens(
    directory: Path,
    scans: Sequence[Scan],
    stores: Sequence[Path],
    config: TokenizerConfig,
    report: OnProgress,
) -> dict[str, Any]:
    """Makes the tokenizer, encodes both splits, and returns what the manifest says of them."""
    training = parts_of(scans, stores, "train")
    if config.kind == "bpe":
        report(f"training a byte-level BPE of {config.vocab_size:,} entries")
    tokenizer = make_tokenizer(config, _to_learn_from(training, scans, report))
    tokenizer.save(directory)
    for part in training:
        part.check(tokenizer)
    train = _SplitWriter(directory, "train", tokenizer)
    stretches, counts = [], []
    for part, scan in zip(training, scans, strict=True):
        report(f"encoding {scan.source.name} ({scan.num_bytes / 1e6:.1f} MB)")
        start, share = train.num_tokens, len(part.rows) / len(scan.keys)
        total = None if part.comes_tokenized else share * scan.num_bytes
        counts.append(train.write(_encoded(part, tokenizer), Pace("encoded", report, total=total)))
        stretches.append([start, train.num_tokens])
    np.save(directory / COUNTS, np.stack(counts))
    held_out = parts_of(scans, stores, "validation")
    validation, copies = _write_unseen(
        directory, "validation", held_out, training, tokenizer, report
    )
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
    part: Part,
    training: Sequence[Part],
    tokenizer: Tokenizer,
    report: OnProgress,
) -> dict[str, Any]:
    """Encodes documents for evaluation, and returns what the manifest says."""
    part.check(tokenizer)
    facts, copies = _write_unseen(directory, SET, [part], training, tokenizer, report)
    dtype = np.dtype(_SplitWriter.dtype_for(tokenizer)).name
    name = part.source.name
    return {"name": name, "dtype": dtype, "splits": {SET: facts}, "near_copies": copies}


def _to_learn_from(
    parts: Sequence[Part], scans: Sequence[Scan], report: OnProgress
) -> Iterator[str]:
    """Training texts for a vocabulary: of large corpora the same share of every part.

    Documents come in the order of their hashes, so that the first ones are a random sample.
    """
    share = LEARNT_FROM / sum(scan.num_bytes for scan in scans)
    for part, scan in zip(parts, scans, strict=True):
        pace = Pace("read for the vocabulary", report, total=min(share, 1) * scan.num_bytes)
        count = len(part.rows) if share >= 1 else int(share * len(part.rows))
        for document in itertools.islice(part.read(), count):
            yield document.content.decode()
            pace.add(len(document.content))


def _write_unseen(
    directory: Path,
    split: str,
    parts: Sequence[Part],
    training: Sequence[Part],
    tokenizer: Tokenizer,
    report: OnProgress,
) -> tuple[dict[str, int], int]:
    """Encodes documents except near copies of training ones; says how many of these there were."""
    copies = near_copies(
        (pair for part in parts for pair in part.texts(tokenizer)),
        _reported((text for part in training for _, text in part.texts(tokenizer)), report),
    )
    writer = _SplitWriter(directory, split, tokenizer)
    encoded = (_encoded(part, tokenizer, copies) for part in parts)
    writer.write(heapq.merge(*encoded, key=lambda each: each.key), Pace("encoded", report))
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


def _reported(texts: Iterable[str], report: OnProgress) -> Iterator[str]:
    pace = Pace("looked for near copies in", report)
    for text in texts:
        yield text
        pace.add(len(text))


class Encoded(NamedTuple):
    """Tokens of a document, without end-of-text."""

    key: bytes
    ids: np.ndarray
    size: int  # bytes of its text


def _encoded(
    part: Part, tokenizer: Tokenizer, without: Set[bytes] = frozenset()
) -> Iterator[Encoded]:
    documents = (document for document in part.read() if document.key not in without)
    for chunk in in_chunks(documents, _ENCODED_AT_ONCE, lambda document: len(document.content)):
        if part.comes_tokenized:
            for document in chunk:
                ids = _given_tokens(document, tokenizer)
                size = int(tokenizer.bytes_per_token[ids].sum(dtype=np.int64))
                yield Encoded(document.key, ids, size)
            continue
        every = tokenizer.encode_batch([document.content.decode() for document in chunk])
        for document, ids in zip(chunk, every, strict=True):
            yield Encoded(document.key, ids, len(document.content))


def _given_tokens(document: StoredDocument, tokenizer: Tokenizer) -> np.ndarray:
    ids = np.frombuffer(document.content, TOKEN_DTYPE)
    if ids.max() >= tokenizer.vocab_size:
        raise ValueError(
            f"{document.name} has the token {ids.max()}, but the tokenizer has "
            f"{tokenizer.vocab_size:,} entries; give the one that made these tokens with "
            "--tokenizer.kind and --tokenizer.directory"
        )
    return ids[:-1] if ids[-1] == tokenizer.end_of_text else ids


class _SplitWriter:
    """Appends encoded documents to the files of one split."""

    def __init__(self, directory: Path, split: str, tokenizer: Tokenizer):
        self.dtype = self.dtype_for(tokenizer)
        self.num_tokens = 0
        self._vocab_size = tokenizer.vocab_size
        self._end_of_text = np.asarray([tokenizer.end_of_text])
        self._offsets = array("q", [0])
        self._num_bytes = 0
        self._paths = split_paths(directory, split)
        self._paths[0].touch()

    @staticmethod
    def dtype_for(tokenizer: Tokenizer) -> type[np.integer]:
        return np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32

    def write(self, documents: Iterable[Encoded], pace: Pace) -> np.ndarray:
        """Appends documents; says how often each token was written, (vocabulary,) int64."""
        counts = np.zeros(self._vocab_size, np.int64)
        with open(self._paths[0], "ab") as file:
            for chunk in in_chunks(documents, _WRITTEN_AT_ONCE, lambda each: len(each.ids)):
                ended = [piece for each in chunk for piece in (each.ids, self._end_of_text)]
                tokens = np.concatenate(ended).astype(self.dtype)
                file.write(tokens.tobytes())
                counts += np.bincount(tokens, minlength=self._vocab_size)
                ends = self.num_tokens + np.cumsum([len(each.ids) + 1 for each in chunk])
                self._offsets.extend(ends.tolist())
                self.num_tokens += len(tokens)
                size = sum(each.size for each in chunk)
                self._num_bytes += size
                pace.add(size)
        return counts

    def finish(self) -> dict[str, int]:
        np.save(self._paths[1], np.frombuffer(self._offsets, np.int64))
        documents = len(self._offsets) - 1
        return {"documents": documents, "tokens": self.num_tokens, "bytes": self._num_bytes}


def split_paths(directory: Path, split: str) -> tuple[Path, Path]:
    """The files of the tokens and of the document offsets."""
    return directory / f"{split}.tokens", directory / f"{split}.offsets.npy"
