"""Real English text over an alphabet of 25 symbols, for the character model."""

import os
from pathlib import Path

import numpy as np
from jaxtyping import Int

# The space and the letters of the printers' old alphabet, in which i and j, u and v are one letter.
ALPHABET = " abcdefghiklmnopqrstuwxyz"
_MERGED = str.maketrans("jv", "iu")


def read_text(path: str | os.PathLike[str] | None = None, *, limit: int | None = 6000) -> str:
    """Text in lower case over the 25 symbols of the alphabet.

    j is written as i and v as u; whatever is not one of the 26 letters separates words.

    Args:
      path: UTF-8 text file; None reads the language reference that comes with Python (the text
        depends on the version of Python).
      limit: Number of characters to keep, from the start; None keeps all.

    Raises:
      ValueError: The file holds no letters.

    >>> read_text(limit=20)
    'the assert statement'
    """
    if path is None:
        from pydoc_data.topics import topics

        raw = "\n".join(topics[name] for name in sorted(topics))
    else:
        raw = Path(path).read_text(encoding="utf-8")
    text = normalise(raw)[:limit]
    if not text:
        raise ValueError(f"path: {path} holds no letters")
    return text


def normalise(raw: str) -> str:
    """The text over the alphabet, words separated by one space.

    >>> normalise("Don't Judge,  love!")
    'don t iudge loue'
    """
    letters = raw.lower().translate(_MERGED)
    return " ".join("".join(c if c in ALPHABET else " " for c in letters).split())


def encode(text: str) -> Int[np.ndarray, "characters"]:
    """Position of every character in the alphabet.

    Raises:
      ValueError: A character outside the alphabet.
    """
    places = {symbol: place for place, symbol in enumerate(ALPHABET)}
    unknown = sorted(set(text) - set(places))
    if unknown:
        raise ValueError(f"text: {unknown[0]!r} is not in the alphabet; `normalise` the text first")
    return np.asarray([places[c] for c in text], dtype=np.int32)
