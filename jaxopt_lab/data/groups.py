"""Which documents belong together, and which of them are held out: whole groups.

| source | group of a document |
|---|---|
| installed packages | the distribution that its file belongs to, else as for other files |
| other files | the first directory of its path below the one that all files share |
| rows (jsonl, TFDS), files directly in that one | the document itself |

Files of one package repeat each other's lines; on two sides of a split they would tell a model
what it is asked.
"""

import hashlib
import itertools
import math
import os
from collections.abc import Iterable, Sequence
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Num

KEY_DTYPE = np.dtype("S32")
"""Of SHA-256 hashes; NumPy compares them byte by byte."""
# With fewer groups on either side documents are held out one by one.
_FEWEST = 3


def of_files(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Groups of files, as names; empty for a file that is its own group.

    >>> of_files(["notes/a/1.md", "notes/a/x/2.md", "notes/b/3.md", "notes/4.md"])
    ['a', 'a', 'b', '']
    """
    parents = [os.path.dirname(os.path.abspath(path)) for path in paths]
    shared = os.path.commonpath(parents) if parents else ""
    below = [Path(parent).relative_to(shared).parts for parent in parents]
    return [parts[0] if parts else "" for parts in below]


def of_installed(directory: Path, paths: Sequence[Path]) -> list[str]:
    """Groups of files below a directory of installed packages, such as `site-packages`."""
    owner: dict[str, str] = {}
    for found in distributions(path=[str(directory)]):
        files = (file.as_posix() for file in found.files or () if file.suffix == ".py")
        owner |= dict.fromkeys(files, found.metadata["Name"] or "")
    inside = [path.relative_to(directory) for path in paths]
    return [
        owner.get(path.as_posix()) or (path.parts[0] if len(path.parts) > 1 else "")
        for path in inside
    ]


ALONE = -1
"""Number of the group of a document that is its own."""


def held_out_groups(
    names: Num[np.ndarray, " groups"], sizes: Num[np.ndarray, " groups"], fraction: float
) -> Bool[np.ndarray, " groups"]:
    """Groups to hold out, about a share of the text.

    They are taken in the order of their hashes until they have that share. A group with more than
    half of it stays in training: packages differ in size by orders of magnitude, and one of them
    must not be all that is held out.

    >>> names = [hash_name(f"package {number}") for number in range(40)]
    >>> sizes = np.array([100] * 40 + [4000])
    >>> chosen = held_out_groups(np.array([*names, hash_name("a large one")]), sizes, 0.05)
    >>> np.flatnonzero(chosen).tolist()
    [0, 30, 35, 36]

    Args:
        names: SHA-256 of the names.
        sizes: bytes.
        fraction: share of all bytes to hold out.

    Returns:
        Which of the groups; none where fewer than three would be on either side.
    """
    share = fraction * float(sizes.sum())
    order = np.argsort(names, kind="stable")
    fits = sizes[order] <= share / 2
    taken = np.where(fits, sizes[order], 0)
    chosen = np.zeros(len(names), bool)
    chosen[order] = fits & (share - (np.cumsum(taken) - taken) > 0)
    count = int(chosen.sum())
    return chosen if min(count, len(names) - count) >= _FEWEST else np.zeros_like(chosen)


def hash_name(name: str) -> bytes:
    """The hash that puts groups in order."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def held_out_documents(
    keys: Num[np.ndarray, " documents"],
    groups: Num[np.ndarray, " documents"],
    sizes: Num[np.ndarray, " documents"],
    names: Sequence[str],
    fraction: float,
) -> tuple[Bool[np.ndarray, " documents"], bool]:
    """Documents to hold out, and whether whole groups are.

    By groups where some document shares one and there are enough, else those whose own hash falls
    below the fraction, so that adding documents never moves another one.

    Args:
        keys: SHA-256 of the documents, sorted.
        groups: number of the group of each in `names`, or `ALONE`.
        sizes: bytes of each.
        names: of the groups.
        fraction: share to hold out.
    """
    alone = np.asarray(groups == ALONE)
    counts = np.bincount(groups[~alone], minlength=len(names))
    if (counts > 1).any():
        of_groups = np.bincount(groups[~alone], sizes[~alone], len(names)).astype(np.int64)
        # A document that is alone is a group by the name of its hash.
        own = (keys[i : i + 1].tobytes().hex() for i in np.flatnonzero(alone))
        there = np.concatenate([counts > 0, np.ones(int(alone.sum()), bool)])
        hashes = map(hash_name, itertools.chain(names, own))
        hashes = np.fromiter(hashes, KEY_DTYPE, len(there))
        every = np.concatenate([of_groups, sizes[alone]])
        chosen = np.zeros(len(there), bool)
        chosen[there] = held_out_groups(hashes[there], every[there], fraction)
        if chosen.any():
            held_out = np.zeros(len(keys), bool)
            held_out[alone] = chosen[len(names) :]
            held_out[~alone] = chosen[groups[~alone]]
            return held_out, True
    # The share of the range of the first eight bytes.
    first = np.ndarray(len(keys), ">u8", keys, strides=(KEY_DTYPE.itemsize,))
    return first < math.ceil(fraction * 2**64), False
