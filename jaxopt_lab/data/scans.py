"""What is known of the documents of a source: their hashes, and which of them are held out.

A source is read once, into the store of its documents (`documents/` in the cache) and an index of
their hashes (`scans/`), whose key are size, time and inode of every file: while these are the same,
a start costs looking them up. What a fraction holds out is a third, small entry (`splits/`).
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxopt_lab.data import cache
from jaxopt_lab.data.documents import StoredDocument
from jaxopt_lab.data.groups import ALONE, KEY_DTYPE, held_out_documents
from jaxopt_lab.data.pace import OnProgress, Pace
from jaxopt_lab.data.sorting import DocumentSorter
from jaxopt_lab.data.sources import SinglePart

# Part of the keys of the three entries: raise it when their layout or the document rules change.
_FORMAT = 1
# Another change within so many nanoseconds might show in neither size nor time.
_TICK_NS = 2 * 10**9
_DAY_NS = 86_400 * 10**9
_CHUNK = 1 << 20  # hashes
_COLUMNS = {"keys": KEY_DTYPE, "groups": np.dtype("<i4"), "sizes": np.dtype("<i8")}


@dataclass(frozen=True)
class Scan:
    """The documents that a source contributes; their texts are in `documents`."""

    source: SinglePart
    keys: np.ndarray
    """(documents,) SHA-256 of their content, sorted; memory-mapped."""
    held_out: np.ndarray
    """(documents,) whether it is of the validation split; memory-mapped."""
    by_group: bool
    """Whether whole groups are held out."""
    hash: str
    num_bytes: int
    duplicates: int
    documents: Path
    """The store, a TFDS dataset; there when `store_documents` has run."""

    def rows_of(self, split: str) -> np.ndarray:
        """Numbers of the documents that belong to a split."""
        return np.flatnonzero(self.held_out == (split == "validation"))

    def are_trained(self, keys: np.ndarray) -> np.ndarray:
        """Which of some hashes are those of training documents."""
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return (self.keys[at] == keys) & ~self.held_out[at]


def scan_documents(
    sources: Sequence[SinglePart], validation_fraction: float, root: Path, report: OnProgress
) -> list[Scan]:
    """Hashes every document and splits them; one of two parts stays with the first.

    Args:
        sources: the parts.
        validation_fraction: share to hold out.
        root: the cache.
        report: receives lines of text.

    Raises:
        ValueError: a source cannot be read or contributes nothing.
    """
    started = time.time_ns()
    files = [_files_of(source) for source in sources]
    about = [[type(source).__name__, dataclasses.asdict(source)] for source in sources]
    key = hash_json([_FORMAT, about, [each.digest for each in files]])
    newest = max((each.newest for each in files), default=0)
    entry = root / "scans" / key[:24]

    def write(directory: Path) -> dict[str, Any]:
        parts = []
        for number, source in enumerate(sources):
            part = directory / str(number)
            earlier = [_column(directory / str(other), "keys") for other in range(number)]
            parts.append(_read(source, files[number].size, part, earlier, report))
            _keep(part / "documents", root, parts[-1])
        return {"parts": parts, "started": started}

    def is_settled(manifest: cache.Manifest) -> bool:
        # Clocks of file servers are minutes ahead; a time days ahead is not that of a change now.
        return not -_TICK_NS <= newest - manifest["started"] <= _DAY_NS

    manifest = cache.open_or_build(entry, write, report, is_settled)
    if manifest["started"] != started:
        report(f"{', '.join(source.name for source in sources)}: unchanged, not read again")
    scans = []
    for number, (source, facts) in enumerate(zip(sources, manifest["parts"], strict=True)):
        scan = _split(source, entry / str(number), facts, validation_fraction, root)
        _describe(scan, facts, validation_fraction, report)
        scans.append(scan)
    return scans


class _Files(NamedTuple):
    """What the files of a source are, without reading them."""

    digest: str  # of path, size, time and inode of each
    size: int | None  # bytes in all; None where some are compressed: their text is larger
    newest: int  # time of the last change, ns


def _files_of(source: SinglePart) -> _Files:
    digest, total, newest, is_plain = hashlib.sha256(), 0, 0, True
    for path in source.files():
        size, changed, inode = cache.stat_of(path)
        digest.update(json.dumps([os.path.abspath(path), size, changed, inode]).encode())
        total, newest = total + size, max(newest, changed)
        is_plain = is_plain and not str(path).endswith(".gz") and ".array_record" not in path.name
    return _Files(digest.hexdigest(), total if is_plain else None, newest)


def _read(
    source: SinglePart,
    size: int | None,
    directory: Path,
    earlier: Sequence[np.ndarray],
    report: OnProgress,
) -> dict[str, Any]:
    """Reads a source into `directory`: columns of hashes, groups and sizes, and `documents`."""
    from jaxopt_lab.data.builder import write_documents

    documents, spill = directory / "documents", directory / "spill"
    documents.mkdir(parents=True)
    spill.mkdir()
    sorter = DocumentSorter(spill)
    facts = _collect(source, size, sorter, report)
    report(f"storing the documents of {source.name}")
    pace = Pace(f"{source.name}: stored", report, total=facts["bytes"])
    rest = _with_columns(sorter.take(_by_first_byte(earlier)), directory, pace)
    if (first := next(rest, None)) is None:
        why = "all its documents are in other parts too" if facts["read"] else "it has no text"
        raise ValueError(f"the corpus {source.name} is empty: {why}")
    write_documents(documents, itertools.chain([first], rest))
    spill.rmdir()
    return facts | {"name": source.name, "hash": _hash_keys(_column(directory, "keys"))}


def _collect(
    source: SinglePart, size: int | None, sorter: DocumentSorter, report: OnProgress
) -> dict[str, Any]:
    """Hands all documents to the sorter; says what the manifest keeps of them."""
    report(f"reading {source.name}")
    pace = Pace(f"{source.name}: read", report, total=size)
    names: dict[str, int] = {}
    count, total, replaced = 0, 0, [0, 0, 0, ""]
    for document in source.documents():
        content = document.content
        if not content:
            continue
        count, total = count + 1, total + len(content)
        if document.replaced:
            _count_replaced(replaced, document.name, document.replaced)
        group = names.setdefault(document.group, len(names)) if document.group else ALONE
        key = hashlib.sha256(content).digest()
        sorter.add(StoredDocument(key, document.name, content, group))
        pace.add(len(content))
    return {"read": count, "bytes": total, "replaced": replaced, "groups": list(names)}


def _by_first_byte(columns: Sequence[np.ndarray]) -> Callable[[int], set[bytes]]:
    """(first byte) -> the hashes that begin with it."""
    bytes_of = [column.view(np.uint8)[:: KEY_DTYPE.itemsize] for column in columns]
    ends = [np.searchsorted(first, np.arange(256, dtype=np.uint8), "right") for first in bytes_of]

    def keys(byte: int) -> set[bytes]:
        found: set[bytes] = set()
        for column, end in zip(columns, ends, strict=True):
            start = end[byte - 1] if byte else 0
            found |= {column[i : i + 1].tobytes() for i in range(start, end[byte])}
        return found

    return keys


def _with_columns(
    documents: Iterable[StoredDocument], directory: Path, pace: Pace
) -> Iterator[StoredDocument]:
    """Yields the documents, and appends hash, group and size of each to the files of `_column`."""
    with (
        open(directory / "keys", "wb") as keys,
        open(directory / "groups", "wb") as groups,
        open(directory / "sizes", "wb") as sizes,
    ):
        for document in documents:
            keys.write(document.key)
            groups.write(_COLUMNS["groups"].type(document.group).tobytes())
            sizes.write(_COLUMNS["sizes"].type(len(document.content)).tobytes())
            yield document
            pace.add(len(document.content))


def _column(directory: Path, name: str) -> np.ndarray:
    return np.memmap(directory / name, _COLUMNS[name], "r")


def _count_replaced(counts: list[Any], name: str, replaced: int) -> None:
    total, documents, most, worst = counts
    most, worst = max((most, worst), (replaced, name), key=lambda pair: pair[0])
    counts[:] = [total + replaced, documents + 1, most, worst]


def _hash_keys(keys: np.ndarray, held_out: np.ndarray | None = None) -> str:
    """SHA-256 of the sorted hashes as text, and after them of those held out by group."""
    digest = hashlib.sha256()
    masks = [np.ones(len(keys), bool)] + ([] if held_out is None else [held_out])
    for mask in masks:
        for start in range(0, len(keys), _CHUNK):
            chunk = keys[start : start + _CHUNK][mask[start : start + _CHUNK]]
            digest.update(chunk.tobytes().hex().encode())
    return digest.hexdigest()


def _store(root: Path, content_hash: str) -> Path:
    return root / "documents" / hash_json([_FORMAT, content_hash])[:24]


def _keep(documents: Path, root: Path, facts: dict[str, Any]) -> None:
    """Moves documents that were read into the store, unless it has them."""

    def write(directory: Path) -> dict[str, Any]:
        for path in documents.iterdir():
            os.rename(path, directory / path.name)
        return {"name": facts["name"], "hash": facts["hash"]}

    cache.open_or_build(_store(root, facts["hash"]), write, lambda message: None)
    shutil.rmtree(documents)


def store_documents(root: Path, scan: Scan, earlier: Sequence[Scan], report: OnProgress) -> Path:
    """The stored documents of a part; reads the source again if they were lost or damaged.

    Args:
        root: the cache.
        scan: of the part.
        earlier: of the parts before it.
        report: receives lines of text.

    Raises:
        ValueError: the source has changed since.
    """

    def write(directory: Path) -> dict[str, Any]:
        part, before = directory / "part", [other.keys for other in earlier]
        facts = _read(scan.source, None, part, before, report)
        if not np.array_equal(_column(part, "keys"), scan.keys):
            raise ValueError(
                f"the files of {scan.source.name} changed while they were read; prepare the corpus "
                "again"
            )
        for path in (part / "documents").iterdir():
            os.rename(path, directory / path.name)
        shutil.rmtree(part)
        return {"name": facts["name"], "hash": facts["hash"]}

    cache.open_or_build(scan.documents, write, report)
    return scan.documents


def _split(
    source: SinglePart, directory: Path, facts: dict[str, Any], fraction: float, root: Path
) -> Scan:
    keys, groups, sizes = (_column(directory, name) for name in _COLUMNS)
    key = hash_json([_FORMAT, directory.parent.name, directory.name, facts["hash"], fraction])
    entry = root / "splits" / key[:24]

    def write(building: Path) -> dict[str, Any]:
        held_out, by_group = held_out_documents(keys, groups, sizes, facts["groups"], fraction)
        held_out.tofile(building / "held_out")
        # Groups come from paths, so that the text alone does not say which documents these are.
        content = _hash_keys(keys, held_out) if by_group else facts["hash"]
        alone = int((np.asarray(groups) == ALONE).sum())
        return {
            "by_group": by_group,
            "hash": content,
            "bytes": int(sizes.sum()),
            "groups": len(np.unique(groups)) - bool(alone) + alone,
        }

    found = cache.open_or_build(entry, write, lambda message: None)
    facts |= {"groups": found["groups"], "bytes": found["bytes"]}
    held_out = np.memmap(entry / "held_out", bool, "r")
    copies = facts["read"] - len(keys)
    store = _store(root, facts["hash"])
    return Scan(
        source, keys, held_out, found["by_group"], found["hash"], found["bytes"], copies, store
    )


def _describe(scan: Scan, facts: dict[str, Any], fraction: float, report: OnProgress) -> None:
    count, groups = len(scan.keys), facts["groups"]
    report(f"{count:,} documents, {scan.num_bytes / 1e6:.1f} MB, {scan.duplicates} duplicates")
    if fraction and groups < count:
        out = f"{int(scan.held_out.sum()):,} of {count:,} documents"
        how = "whole" if scan.by_group else "too few to be held out whole: single documents are"
        report(f"held out: {out}; {groups:,} packages or directories, {how}")
    replaced, documents, _, worst = facts["replaced"]
    if replaced:
        report(
            f"{replaced:,} sequences of bytes in {documents:,} documents are no UTF-8 and became "
            f"replacement characters, most of them in {worst}"
        )


def hash_json(value: Any) -> str:
    """A hash of JSON values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
