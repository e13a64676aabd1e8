"""One document, as sources give it and as it is stored."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np

Item = TypeVar("Item")

TOKEN_DTYPE = np.dtype("<i4")
"""Of the stored tokens of a document that comes tokenized."""


class Document(NamedTuple):
    """One document: a name for people, and its text or its tokens."""

    name: str
    text: str
    replaced: int = 0  # sequences of bytes that were no text, each a replacement character now
    group: str = ""  # of what stays on one side of a split, see `groups`; empty: itself
    tokens: np.ndarray | None = None  # of a document that has no text

    @property
    def content(self) -> bytes:
        """What is hashed and stored: UTF-8, or tokens of `TOKEN_DTYPE`."""
        if self.tokens is None:
            return self.text.encode()
        return self.tokens.astype(TOKEN_DTYPE).tobytes()


def encodable(text: str) -> str:
    """The text without lone surrogates, which JSON can spell and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


class StoredDocument(NamedTuple):
    """A document as it is stored, in the order of the keys."""

    key: bytes  # SHA-256 of the content
    name: str
    content: bytes
    group: int = -1  # its number while it is read, see `groups.ALONE`; not stored


def in_chunks(
    items: Iterable[Item], size: int, size_of: Callable[[Item], int]
) -> Iterator[list[Item]]:
    """Groups items until they have a size together.

    >>> list(in_chunks(["a", "bc", "d", "e"], 3, len))
    [['a', 'bc'], ['d', 'e']]
    """
    chunk: list[Item] = []
    total = 0
    for item in items:
        chunk.append(item)
        total += size_of(item)
        if total >= size:
            yield chunk
            chunk, total = [], 0
    if chunk:
        yield chunk
