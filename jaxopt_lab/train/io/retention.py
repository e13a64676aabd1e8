"""Which checkpoints stay, and which is used: a good one is displaced by good ones only."""

import contextlib
import errno
import shutil
from collections.abc import Mapping
from pathlib import Path

from jaxopt_lab.report.files import naming
from jaxopt_lab.report.storage import copy_below, delete_below, files_below, is_remote, names_in
from jaxopt_lab.train.io.digests import (
    FINITE,
    NOT_FINITE,
    held_out_loss,
    is_digests,
    is_ours,
    is_sealed,
)

_DELETED = ".deleting"
_UNFINISHED = ".orbax-checkpoint-tmp"
# In a store orbax writes under the last name, and this object when it is complete.
_COMPLETE = "commit_success.txt"


def labels(directory: Path) -> list[int]:
    """Labels of all checkpoints below a directory, committed or not, ascending."""
    names = [name for name in names_in(directory) if name.isdecimal() and name == str(int(name))]
    return sorted(int(name) for name in names if _is_complete(directory / name))


def _is_complete(path: Path) -> bool:
    """Whether all of a checkpoint was written, and nobody has begun to delete it."""
    if not is_remote(path):
        return path.is_dir()
    names = names_in(path)
    # Without that object but with digests, which come later, a checkpoint is damaged.
    return _COMPLETE in names or any(map(is_digests, names))


def committed_steps(directory: Path) -> list[int]:
    """Labels of the committed checkpoints below a directory, ascending."""
    return [step for step in labels(directory) if is_sealed(directory / str(step))]


def mark(path: Path, finite: bool) -> None:
    """Notes whether the parameters of a checkpoint have a finite loss; the last note counts."""
    if names_in(path):
        with naming(path):
            (path / (FINITE if finite else NOT_FINITE)).touch()
            (path / (NOT_FINITE if finite else FINITE)).unlink(missing_ok=True)


def verdict(path: Path) -> bool | None:
    """Whether a checkpoint is verified (True), doubtful (False), or nothing is known yet."""
    names = names_in(path)
    return True if FINITE in names else False if NOT_FINITE in names else None


def verdicts(directory: Path) -> dict[int, bool | None]:
    """The verdict on every committed checkpoint, by its label."""
    return {step: verdict(directory / str(step)) for step in committed_steps(directory)}


def by_preference(verified: Mapping[int, bool | None]) -> list[int]:
    """Labels in the order in which a run would go on from them.

    The newest comes first, unless a doubt was recorded after the last verified one: then this and
    what came before it are preferred, because whatever led to the doubt may be in all later ones.

    >>> by_preference({1: True, 2: True, 3: None})
    [3, 2, 1]
    >>> by_preference({1: True, 2: None, 3: False})
    [1, 2, 3]
    """
    last = _last_verified(verified)
    later = [step for step in verified if step > last]
    if all(verified[step] is None for step in later):
        later = []
    doubtful = [step for step in verified if verified[step] is False]
    rest = verified.keys() - set(later) - set(doubtful)
    unknown = set(later) - set(doubtful)
    return [step for group in (rest, unknown, doubtful) for step in sorted(group, reverse=True)]


def superfluous(
    verified: Mapping[int, bool | None], losses: Mapping[int, float], newest: int, best: int
) -> set[int]:
    """Labels that others have displaced.

    A checkpoint is verified by a finite loss of its parameters. Only verified ones displace. One
    of which nothing is known yet stays; of the doubtful ones only the newest does, and only while
    nothing newer is verified.

    Args:
      verified: label -> True, False (doubtful) or None (not known yet).
      losses: label -> held-out loss, of those that were evaluated.
      newest: How many of the newest verified ones stay.
      best: How many verified ones with the lowest loss stay.

    >>> sorted(superfluous({1: True, 2: True, 3: True, 4: None}, {1: 0.5}, 1, 1))
    [2]
    >>> sorted(superfluous({1: True, 2: False, 3: False}, {}, 1, 0))
    [2]
    """
    last = _last_verified(verified)
    # What led to a finite loss later was finite itself.
    good = sorted(s for s, known in verified.items() if known or (known is None and s < last))
    ranked = sorted((s for s in good if s in losses), key=lambda step: losses[step])
    kept = {*good[-newest:], *ranked[:best]}
    kept |= {step for step, known in verified.items() if known is None and step > last}
    doubtful = [step for step, known in verified.items() if known is False and step > last]
    return verified.keys() - kept - set(doubtful[-1:])


def displaced(directory: Path, newest: int, best: int) -> list[int]:
    """Labels below a directory that can go: superfluous ones, and older ones never committed."""
    verified = verdicts(directory)
    losses = {step: held_out_loss(directory / str(step)) for step in verified}
    ranked = {step: loss for step, loss in losses.items() if loss is not None}
    found = superfluous(verified, ranked, newest, best)
    good = [step for step, known in verified.items() if known]
    if len(good) >= newest:
        uncommitted = set(labels(directory)) - verified.keys()
        found |= {step for step in uncommitted if step < good[-newest]}
    return sorted(found)


def delete(path: Path) -> None:
    """Deletes a checkpoint in a way that never leaves half of one under its label.

    Raises:
      OSError: If some of it could not be deleted.
    """
    if is_remote(path):
        # First what makes it committed, then what makes it complete.
        delete_below(path, [*filter(is_ours, names_in(path)), _COMPLETE])
        if files_below(path):
            raise OSError(errno.ENOTEMPTY, "not all of it could be deleted", str(path))
        return
    doomed = path.with_name(path.name + _DELETED)
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
    if doomed.exists():
        raise OSError(errno.ENOTEMPTY, "not all of it could be deleted", str(doomed))


def move(path: Path, target: Path) -> None:
    """Gives a checkpoint another place; in a store by copying, which a kill may interrupt."""
    if is_remote(path):
        copy_below(path, target)
        delete(path)
    else:
        path.rename(target)


def remove_leftovers(directory: Path) -> None:
    """Completes what a killed process began to delete, and removes what it began to write."""
    if is_remote(directory):
        for name in names_in(directory):
            if name.isdecimal() and not _is_complete(directory / name):
                delete_below(directory / name)
        return
    for path in directory.iterdir():
        if path.name.endswith(_DELETED) or _UNFINISHED in path.name:
            shutil.rmtree(path, ignore_errors=True)


def _last_verified(verified: Mapping[int, bool | None]) -> int:
    return max((step for step, good in verified.items() if good), default=-1)
