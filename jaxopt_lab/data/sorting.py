"""Documents in the order of the hash of their content, copies dropped, in bounded memory."""

import struct
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path

from jaxopt_lab.data.documents import StoredDocument

_BUCKETS = 256
_MEMORY = 64 << 20  # bytes of all buckets before they go to disk
_HEADER = struct.Struct("<32siIQ")  # key, group, bytes of the name, bytes of the content


class DocumentSorter:
    """Takes documents in any order and gives them back in that of their keys, each key once.

    A bucket holds the documents whose keys begin with the same byte. Buckets are appended to files
    when they have taken the memory that is meant for them, and are sorted one after another:
    memory is that of one bucket, a 256th of the text.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     sorter = DocumentSorter(Path(directory))
    ...     for name, content in (("b", b"same"), ("a", b"same"), ("c", b"other")):
    ...         sorter.add(StoredDocument(content.ljust(32), name, content))
    ...     names = [document.name for document in sorter.take(lambda byte: set())]
    >>> names
    ['c', 'b']

    Args:
        directory: exists; holds the files.
    """

    def __init__(self, directory: Path):
        """Nothing is on disk yet."""
        self._directory, self._held = directory, 0
        self._buckets = [bytearray() for _ in range(_BUCKETS)]

    def add(self, document: StoredDocument) -> None:
        """Takes a document; of equal ones the first is kept."""
        name = document.name.encode("utf-8", "replace")
        header = _HEADER.pack(document.key, document.group, len(name), len(document.content))
        bucket = self._buckets[document.key[0]]
        for part in (header, name, document.content):
            bucket += part
            self._held += len(part)
        if self._held > _MEMORY:
            self._to_disk()

    def _to_disk(self) -> None:
        for number, bucket in enumerate(self._buckets):
            if bucket:
                with open(self._path(number), "ab") as file:
                    file.write(bucket)
                bucket.clear()
        self._held = 0

    def take(self, without: Callable[[int], set[bytes]]) -> Iterator[StoredDocument]:
        """Yields the documents; what was yielded is gone, from the disk as well.

        Args:
            without: (first byte) -> keys with it that are left out.
        """
        for number, bucket in enumerate(self._buckets):
            path, content = self._path(number), bytes(bucket)
            bucket.clear()
            if path.exists():
                content = path.read_bytes() + content
                path.unlink()
            if content:
                seen = without(number)
                for document in sorted(_parsed(content), key=attrgetter("key")):
                    if document.key not in seen:
                        seen.add(document.key)
                        yield document

    def _path(self, number: int) -> Path:
        return self._directory / f"bucket-{number:02x}"


def _parsed(content: bytes) -> Iterator[StoredDocument]:
    at = 0
    while at < len(content):
        key, group, name_size, size = _HEADER.unpack_from(content, at)
        at += _HEADER.size
        name, at = content[at : at + name_size].decode(), at + name_size
        yield StoredDocument(key, name, content[at : at + size], group)
        at += size
