"""Which checkpoints stay: a good one is displaced by good ones only."""

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from jaxopt_lab.train.io.digests import FINITE, NOT_FINITE, held_out_loss, is_sealed

_DELETED = ".deleting"
_UNFINISHED = ".orbax-checkpoint-tmp"


def labels(directory: Path) -> list[int]:
    """Labels of all checkpoints below a directory, committed or not, ascending."""
    if not directory.is_dir():
        return []
    names = [path.name for path in directory.iterdir() if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def committed_steps(directory: Path) -> list[int]:
    """Labels of the committed checkpoints below a directory, ascending."""
    return [step for step in labels(directory) if is_sealed(directory / str(step))]


def mark(path: Path, finite: bool) -> None:
    """Notes whether the parameters of a checkpoint have a finite loss; the last note counts."""
    if path.is_dir():
        (path / (FINITE if finite else NOT_FINITE)).touch()
        (path / (NOT_FINITE if finite else FINITE)).unlink(missing_ok=True)


def is_doubtful(path: Path) -> bool:
    """Whether the loss of these parameters is known not to be finite."""
    return (path / NOT_FINITE).exists()


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
    last = max((step for step, good in verified.items() if good), default=-1)
    # What led to a finite loss later was finite itself.
    good = sorted(s for s, known in verified.items() if known or (known is None and s < last))
    ranked = sorted((s for s in good if s in losses), key=lambda step: losses[step])
    kept = {*good[-newest:], *ranked[:best]}
    kept |= {step for step, known in verified.items() if known is None and step > last}
    doubtful = [step for step, known in verified.items() if known is False and step > last]
    return verified.keys() - kept - set(doubtful[-1:])


def rotate(directory: Path, newest: int, best: int) -> None:
    """Deletes what is superfluous, and checkpoints that were never committed and are older."""
    sealed = committed_steps(directory)
    verified: dict[int, bool | None] = {step: None for step in sealed}
    for step in sealed:
        path = directory / str(step)
        if (path / FINITE).exists():
            verified[step] = True
        elif is_doubtful(path):
            verified[step] = False
    losses = {step: held_out_loss(directory / str(step)) for step in sealed}
    ranked = {step: loss for step, loss in losses.items() if loss is not None}
    for step in superfluous(verified, ranked, newest, best):
        delete(directory / str(step))
    good = [step for step in sealed if verified[step]]
    if len(good) >= newest:
        for step in set(labels(directory)) - set(sealed):
            if step < good[-newest]:
                delete(directory / str(step))


def delete(path: Path) -> None:
    """Deletes a checkpoint in a way that never leaves half of one under its label."""
    doomed = path.with_name(path.name + _DELETED)
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Completes what a killed process began to delete, and removes what it began to write."""
    for path in directory.iterdir():
        if path.name.endswith(_DELETED) or _UNFINISHED in path.name:
            shutil.rmtree(path, ignore_errors=True)
