"""Reading checkpoints of a run that is not running here: which one, and what of it."""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import jax
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from jaxopt_lab.report.files import read_json
from jaxopt_lab.report.storage import absolute, one_line
from jaxopt_lab.train.errors import CheckpointError
from jaxopt_lab.train.io import digests, retention
from jaxopt_lab.train.io.retention import labels
from jaxopt_lab.train.leaves import describe_leaves, first_difference

DIRECTORY = "checkpoints"
_NOT_FINITE = "the loss was not finite with it"


def select_step(run_directory: str | os.PathLike[str], step: int | Literal["best"] | None) -> int:
    """Label of the checkpoint that is meant: its number, the best, or None for the newest.

    The newest and the best are those that a run would go on from: a doubtful one, with which the
    loss was not finite, or one without digests is meant only where there is no other. What is
    passed over, and the doubt about what is not, is a warning.

    Raises:
      CheckpointError: If there is none, or not this one.
    """
    directory = absolute(run_directory) / DIRECTORY
    every, verdicts = labels(directory), retention.verdicts(directory)
    if not every:
        raise CheckpointError(f"{run_directory} has no checkpoint")
    preferred = retention.by_preference(verdicts) or every[::-1]
    if step is None:
        step = preferred[0]
        passed = [label for label in verdicts if label > step]
        if passed:
            warnings.warn(
                f"{run_directory}: checkpoint {step} is taken, the last before a loss that was "
                f"not finite, and not {_listed(passed)}",
                stacklevel=2,
            )
    elif step == "best":
        step = _best(directory, preferred)
    elif step not in every:
        raise CheckpointError(f"{run_directory} has no checkpoint {step}, only {every}")
    if verdicts.get(step) is False:
        warnings.warn(f"{run_directory}: checkpoint {step}: {_NOT_FINITE}", stacklevel=2)
    return step


def _best(directory: Path, preferred: list[int]) -> int:
    found = {label: digests.held_out_loss(directory / str(label)) for label in preferred}
    losses = {label: loss for label, loss in found.items() if loss is not None}
    if not losses:
        raise CheckpointError(
            f"{directory.parent}: none of the checkpoints {sorted(preferred)} was evaluated, so "
            "none is the best"
        )
    sound = {
        label: loss
        for label, loss in losses.items()
        if retention.verdict(directory / str(label)) is not False
    }
    return min(sound or losses, key=lambda label: losses[label])


def read_leaves(
    run_directory: str | os.PathLike[str], step: int, target: dict[str, PyTree]
) -> dict[str, Any]:
    """Reads leaves of one checkpoint and changes nothing on disk.

    Only what is read has to fit: a state with other leaves beside it, such as that of an earlier
    version, can be read all the same.

    Args:
      run_directory: The run.
      step: Label of the checkpoint.
      target: Fields of the state, arrays where leaves are to be read. Where there are orbax's
        placeholders for others, every field has to be there.

    Raises:
      CheckpointError: If the checkpoint is damaged, or holds something else.
    """
    path = checkpoint_path(run_directory, step)
    others = [label for label in labels(path.parent) if label != step]
    if not digests.is_sealed(path):
        warnings.warn(f"{path} has no digests, so its content cannot be checked", stacklevel=2)
    if damage := digests.damage(path, step):
        raise CheckpointError(f"{path} is damaged: {damage}; other checkpoints: {others or 'none'}")
    try:
        wanted = describe_leaves(target)
        names = {name for name, _, _ in wanted}
        stored = [leaf for leaf in read_item(path, "leaves") if leaf[0] in names]
        difference = first_difference(wanted, stored)
        # Orbax leaves out either what the target does not have, or its placeholders.
        partial = all(leaf is not ... for leaf in jax.tree.leaves(target))
        state = {} if difference else load(path, target, partial=partial)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read: {reason(error)}; other checkpoints: {others or 'none'}"
        ) from error
    if difference:
        raise CheckpointError(f"{path} does not fit the configuration of its run: {difference}")
    return state


def checkpoint_path(run_directory: str | os.PathLike[str], step: int) -> Path:
    """Where the checkpoint of a label lies."""
    return absolute(run_directory) / DIRECTORY / str(step)


def context() -> ocp.Context:
    """How checkpoints are written and read."""
    # By default orbax would spread the few numbers of a JSON item over array files.
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="data")
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="leaves")
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


def read_item(path: Path, name: str) -> Any:
    """Reads what a checkpoint holds besides the state: JSON files."""
    return read_json(path / name / "data.json")


def load(path: Path, target: PyTree, *, partial: bool = False) -> Any:
    """Reads the state of a checkpoint, on this process alone: none waits for another that fails.

    Of arrays that lie on several processes, each reads what is its own.
    """
    options = context()
    options.pytree.loading.partial_load = partial
    if jax.process_count() > 1:
        options.multiprocessing.active_processes = {jax.process_index()}
        options.multiprocessing.primary_host = jax.process_index()
    with options:
        return ocp.load_checkpointables(str(path), {"state": target})["state"]


def reason(error: BaseException) -> str:
    """What went wrong, in one line of bounded length."""
    return one_line(error.__cause__ or error)


def _listed(steps: Iterable[int]) -> str:
    return ", ".join(map(str, steps))
