"""From documents to memory-mapped tokens, cached by content."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxopt_lab.data import cache
from jaxopt_lab.data.pace import OnProgress
from jaxopt_lab.data.preparation import (
    COUNTS,
    FORMAT,
    LEARNT_FROM,
    SET,
    Part,
    check_splits,
    parts_of,
    split_paths,
    write_set,
    write_tokens,
)
from jaxopt_lab.data.prepared import PreparedTokens
from jaxopt_lab.data.scans import Scan, hash_json, scan_documents, store_documents
from jaxopt_lab.data.sources import Mixture, SinglePart, Source
from jaxopt_lab.data.tokenizer import Tokenizer, TokenizerConfig

_BLOCK, _BLOCKS = 4096, 64  # tokens of a block, and blocks, that stand for a file


@dataclass(frozen=True)
class TokenSplit:
    """The tokens of one split: documents one after another, each followed by end-of-text."""

    tokens: np.ndarray
    """(num_tokens,) uint16 or int32, memory-mapped."""
    document_offsets: np.ndarray
    """(num_documents + 1,) int64: where each document starts, and the end."""
    num_bytes: int
    """UTF-8 bytes of the documents."""

    @property
    def num_tokens(self) -> int:
        """Tokens, end-of-text included."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Documents."""
        return len(self.document_offsets) - 1


def _sample_digest(tokens: np.ndarray) -> str:
    """A hash of blocks spread evenly over tokens, the first and the last among them."""
    digest = hashlib.sha256(f"{tokens.dtype} {len(tokens)}".encode())
    last = max(len(tokens) - _BLOCK, 0)
    for start in np.unique(np.linspace(0, last, _BLOCKS).astype(np.int64)):
        digest.update(tokens[start : start + _BLOCK].tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class CorpusPart:
    """One source of a corpus and its stretch of the training tokens."""

    name: str
    hash: str
    weight: float
    """Share of the training windows."""
    start: int
    stop: int


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus, split by document."""

    name: str
    hash: str
    """Hash of the documents' content, independent of paths and of the tokenizer; where packages or
    directories are held out whole, also of which documents these are."""
    tokenizer: Tokenizer
    train: TokenSplit
    """Part after part, documents in the order of their content hash."""
    validation: TokenSplit
    """All parts together, in the order of their content hash: a beginning of it is a random sample
    of documents."""
    parts: tuple[CorpusPart, ...]
    """One entry, or the parts of a mixture."""
    path: Path
    manifest: dict[str, Any]
    duplicates: int
    """Documents dropped because an equal one was there."""
    sets: Mapping[str, TokenSplit] = field(default_factory=dict)
    """What else is evaluated, by the names given to `prepare`."""
    counts: np.ndarray | None = None
    """(parts, vocabulary) int64: how often each token occurs in training; None: not counted yet."""

    def summary(self) -> dict[str, Any]:
        """What identifies and describes the corpus, as JSON values."""
        about = ("hash", "validation_fraction", "held_out_by_group", "tokenizer", "splits")
        return {
            "name": self.name,
            **{key: self.manifest[key] for key in about},
            "duplicates_dropped": self.duplicates,
            "near_copies_dropped": self.manifest["near_copies"],
            "parts": [
                {"name": part.name, "hash": part.hash, "weight": part.weight} for part in self.parts
            ],
            "train_tokens_sha256": self.manifest["files"]["train.tokens"],
        }

    def fingerprint(self) -> dict[str, Any]:
        """What has to be equal wherever the corpus is opened, as JSON values.

        The tokens themselves count by blocks spread over their file, so that it costs little.
        """
        about = ("hash", "validation_fraction", "tokenizer", "splits")
        splits = {"train": self.train, "validation": self.validation, **self.sets}
        return {
            **{key: self.manifest[key] for key in about},
            "train_tokens_sha256": self.manifest["files"]["train.tokens"],
            "written": {name: _sample_digest(split.tokens) for name, split in splits.items()},
        }


def prepare(
    source: Source,
    tokenizer: TokenizerConfig | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    validation_fraction: float = 0.05,
    sets: Mapping[str, SinglePart | None] | None = None,
    on_progress: OnProgress | None = None,
) -> Corpus:
    """Reads, splits and tokenizes a source, or opens the cached result.

    Documents are decoded as UTF-8 with replacement; empty ones and exact duplicates are dropped.
    Packages and directories are held out whole (`groups`), in the order of the hashes of their
    names, until they have `validation_fraction` of the text. Of sources without them, and where
    there are too few, a document belongs to the validation split when its content hash falls below
    that fraction of the hash range, so adding documents never moves another one. One that training
    has mostly seen (`preparation.near_copies`) is held out, but not evaluated. The cache
    is keyed by the documents' content and the tokenizer. A source whose files have the size, time
    and inode of then is not read again; neither are tokens, which are memory-mapped.

    Args:
        source: where the documents come from.
        tokenizer: which tokenizer; by default a BPE of 4096 entries. A BPE is trained on the
            training documents of all parts.
        cache_dir: by default `$JAXOPT_LAB_CACHE`, else `$XDG_CACHE_HOME/jaxopt-lab`, else
            `~/.cache/jaxopt-lab`.
        validation_fraction: share of the text held out, in [0, 1); 0 holds out none.
        sets: more text to evaluate, by names: of a source, all documents that are neither training
            documents nor near copies of some, so of a part of a mixture its held-out ones; None
            stands for the training documents themselves.
        on_progress: called with a line of text now and then.

    Raises:
        ValueError: a field of the source or tokenizer is wrong, the corpus is empty, or one of
            the splits has no document; `SetError` where it is one of the sets.

    Example:
        >>> import tempfile
        >>> from jaxopt_lab.data import TextFiles, TokenizerConfig, prepare, train_batches
        >>> with tempfile.TemporaryDirectory() as home:
        ...     for number in range(40):
        ...         _ = Path(home, f"{number}.txt").write_text(f"This is document {number}.")
        ...     corpus = prepare(TextFiles((home,)), TokenizerConfig("bytes"), cache_dir=home)
        ...     with train_batches(corpus, batch_size=4, context=22, seed=0) as batches:
        ...         tokens = next(batches)["tokens"]
        >>> corpus.train.num_documents + corpus.validation.num_documents, tokens.shape
        (40, (4, 23))
    """
    tokenizer = tokenizer or TokenizerConfig()
    report = on_progress or (lambda message: None)
    if not 0 <= validation_fraction < 1:
        raise ValueError(
            f"validation_fraction = {validation_fraction}; give a share of the text in [0, 1)"
        )
    sources = source.parts if isinstance(source, Mixture) else (source,)
    weights = source.weights if isinstance(source, Mixture) else (1.0,)
    _check_tokenizer([*sources, *(sets or {}).values()], tokenizer)
    identity = tokenizer.identity()
    root = cache.cache_root(cache_dir)
    scans = scan_documents(sources, validation_fraction, root, report)
    check_splits(source.name, scans, validation_fraction)
    parts_hash = [scan.hash for scan in scans]
    if tokenizer.kind == "bpe" and sum(scan.num_bytes for scan in scans) > LEARNT_FROM:
        identity |= {"learnt_from": LEARNT_FROM}
    key = hash_json([FORMAT, parts_hash, validation_fraction, identity])
    entry = root / "tokens" / key[:24]

    def stores() -> list[Path]:
        return [
            store_documents(root, scan, scans[:number], report) for number, scan in enumerate(scans)
        ]

    def training() -> list[Part]:
        return parts_of(scans, stores(), "train")

    def write(directory: Path) -> dict[str, Any]:
        facts = write_tokens(directory, scans, stores(), tokenizer, report)
        return {
            "name": source.name,
            "hash": parts_hash[0] if len(scans) == 1 else hash_json(parts_hash),
            "validation_fraction": validation_fraction,
            "held_out_by_group": [scan.by_group for scan in scans],
            **facts,
        }

    manifest = cache.open_or_build(entry, write, report)
    parts = [
        CorpusPart(scan.source.name, scan.hash, weight / sum(weights), *stretch)
        for scan, weight, stretch in zip(scans, weights, manifest["stretches"], strict=True)
    ]
    corpus = Corpus(
        name=source.name,
        hash=manifest["hash"],
        tokenizer=Tokenizer.load(entry),
        train=_open_split(entry, "train", manifest),
        validation=_open_split(entry, "validation", manifest),
        parts=tuple(parts),
        path=entry,
        manifest=manifest,
        duplicates=sum(scan.duplicates for scan in scans),
        counts=np.load(entry / COUNTS, mmap_mode="r") if (entry / COUNTS).exists() else None,
    )

    def open_set(name: str, part: SinglePart | None) -> TokenSplit:
        if part is None:
            return corpus.train
        try:
            (scan,) = scan_documents([part], 0.0, root, report)
            trained = np.logical_or.reduce([each.are_trained(scan.keys) for each in scans])
            return _open_set(scan, np.flatnonzero(~trained), corpus, training, report)
        except ValueError as error:
            raise SetError(f"{name}: {error}") from error

    return replace(corpus, sets={name: open_set(name, part) for name, part in (sets or {}).items()})


class SetError(ValueError):
    """A set to evaluate that cannot be read or has no text of its own."""


def _open_set(
    scan: Scan,
    rows: np.ndarray,
    corpus: Corpus,
    training: Callable[[], list[Part]],
    report: OnProgress,
) -> TokenSplit:
    if not len(rows):
        raise ValueError(f"all documents of {scan.source.name} are training documents")
    root = corpus.path.parents[1]
    entry = root / "sets" / hash_json([corpus.path.name, scan.hash])[:24]

    def write(directory: Path) -> dict[str, Any]:
        report(f"encoding {scan.source.name} for evaluation")
        part = Part(scan.source, store_documents(root, scan, [], report), rows)
        return write_set(directory, part, training(), corpus.tokenizer, report)

    return _open_split(entry, SET, cache.open_or_build(entry, write, report))


def _check_tokenizer(sources: Sequence[SinglePart | None], tokenizer: TokenizerConfig) -> None:
    tokens = [source.name for source in sources if isinstance(source, PreparedTokens)]
    if tokens and tokenizer.kind == "bpe":
        raise ValueError(
            f"{tokens[0]} holds tokens, and no vocabulary can be learnt from them: give the "
            "tokenizer that made them with --tokenizer.kind saved (or gpt2) and "
            "--tokenizer.directory, or --tokenizer.kind bytes"
        )


def list_corpora(cache_dir: str | os.PathLike[str] | None = None) -> list[dict[str, Any]]:
    """The tokenized corpora of a cache directory.

    Returns:
        One row per corpus: name, hash, tokenizer, documents, tokens, bytes (both splits together)
        and path, sorted by name.
    """
    rows = []
    for entry in sorted((cache.cache_root(cache_dir) / "tokens").glob("[!.]*/")):
        manifest = cache.read_manifest(entry)
        if manifest is None:
            continue
        splits = manifest["splits"].values()
        totals = {
            key: sum(split[key] for split in splits) for key in ("documents", "tokens", "bytes")
        }
        tokenizer = f"{manifest['tokenizer']['kind']}-{manifest['tokenizer']['vocab_size']}"
        about = {"name": manifest["name"], "hash": manifest["hash"], "tokenizer": tokenizer}
        rows.append({**about, **totals, "path": str(entry)})
    return sorted(rows, key=lambda row: (row["name"], row["path"]))


def _open_split(entry: Path, split: str, manifest: dict[str, Any]) -> TokenSplit:
    tokens_path, offsets_path = split_paths(entry, split)
    dtype = np.dtype(manifest["dtype"])
    facts = manifest["splits"][split]
    # An empty file cannot be mapped.
    tokens = np.memmap(tokens_path, dtype, "r") if facts["tokens"] else np.empty(0, dtype)
    return TokenSplit(tokens, np.load(offsets_path, mmap_mode="r"), facts["bytes"])
