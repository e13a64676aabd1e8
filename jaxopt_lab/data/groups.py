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
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path

# With fewer groups on either side documents are held out one by one.
_FEWEST = 3


def of_files(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
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


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a hash falls below a share of the range of hashes."""
    return int(key[:16], 16) < fraction * 2**64


def held_out_groups(sizes: Mapping[str, int], fraction: float) -> set[str]:
    """Groups to hold out, about a share of the text.

    They are taken in the order of their hashes until they have that share. A group with more than
    half of it stays in training: packages differ in size by orders of magnitude, and one of them
    must not be all that is held out.

    >>> sizes = {f"package {number}": 100 for number in range(40)}
    >>> sorted(held_out_groups(sizes | {"a large one": 4000}, 0.05))
    ['package 0', 'package 30', 'package 35', 'package 36']

    Args:
        sizes: group -> bytes.
        fraction: share of all bytes to hold out.

    Returns:
        The groups; none where fewer than three would be on either side.
    """
    left = fraction * sum(sizes.values())
    largest, chosen = left / 2, set()
    for group in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if left <= 0:
            break
        if sizes[group] <= largest:
            chosen.add(group)
            left -= sizes[group]
    return chosen if min(len(chosen), len(sizes) - len(chosen)) >= _FEWEST else set()


def held_out_documents(
    groups: Mapping[str, str], sizes: Mapping[str, int], fraction: float
) -> tuple[frozenset[str], bool]:
    """Documents to hold out, and whether whole groups are.

    By groups where some document shares one and there are enough, else those whose own hash falls
    below the fraction, so that adding documents never moves another one.

    Args:
        groups: hash of a document -> its group; that hash itself for one that is alone.
        sizes: group -> bytes.
        fraction: share to hold out.
    """
    chosen = held_out_groups(sizes, fraction) if len(sizes) < len(groups) else set()
    if chosen:
        return frozenset(key for key, group in groups.items() if group in chosen), True
    return frozenset(key for key in groups if is_held_out(key, fraction)), False
