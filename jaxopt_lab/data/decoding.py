"""Bytes of text files to text, whatever wrote them."""

import codecs
import os
from pathlib import Path
from typing import NamedTuple

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# UTF-16 without a mark shows by its zero bytes: every second one in Western text.
_SAMPLE, _SHARE = 4096, 0.4
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Decoded(NamedTuple):
    """The text of some bytes."""

    text: str
    replaced: int  # sequences of bytes that mean nothing, each a replacement character now


def decode(content: bytes) -> Decoded:
    r"""Reads UTF-8, and UTF-16 or UTF-32 where a mark or the zero bytes say so.

    A byte order mark is no part of the text. Bytes that mean nothing become replacement characters
    and are counted.

    >>> decode("\ufeffnaïve".encode("utf-16-le"))
    Decoded(text='naïve', replaced=0)
    >>> decode("naïve".encode("latin-1"))
    Decoded(text='na�ve', replaced=1)
    """
    encoding = "utf-8"
    for mark, marked in _MARKS:
        if content.startswith(mark):
            content, encoding = content[len(mark) :], marked
            break
    else:
        encoding = _unmarked(content)
    try:
        return Decoded(content.decode(encoding), 0)
    except UnicodeDecodeError:
        text = content.decode(encoding, "replace")
        spelled = content.count(_REPLACEMENT.encode(encoding))
        return Decoded(text, max(text.count(_REPLACEMENT) - spelled, 1))


def _unmarked(content: bytes) -> str:
    sample = content[:_SAMPLE]
    even, odd = sample[0::2].count(0), sample[1::2].count(0)
    enough = max(_SHARE * len(sample) / 2, 1)
    if odd >= enough and not even:
        return "utf-16-le"
    return "utf-16-be" if even >= enough and not odd else "utf-8"


def printable(path: str | os.PathLike[str]) -> str:
    r"""A path for people and files: bytes of a name that are no UTF-8 become replacements.

    >>> printable(b"caf\xe9.txt".decode("utf-8", "surrogateescape"))
    'caf�.txt'
    """
    return os.fsencode(Path(path)).decode("utf-8", "replace")
