"""Checkpoints of a run: saved in the background, committed by digests, checked before use.

A checkpoint is a directory `<steps taken>` with the training state, the position of the data and
a description of every leaf. Orbax writes it under another name and renames it when it is
complete; then each process writes the digests of its files (`digests`), and with these the
checkpoint is committed. A killed process leaves either a whole checkpoint or none, and whatever
happens to the files later is found before they are used.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from jaxopt_lab.train.errors import CheckpointError
from jaxopt_lab.train.io import digests, retention
from jaxopt_lab.train.io.leaves import describe_leaves, first_difference
from jaxopt_lab.train.io.retention import committed_steps, labels

DIRECTORY = "checkpoints"
DAMAGED = "damaged-checkpoints"
_LONGEST_REASON = 300


class Restored(NamedTuple):
    """What a checkpoint gave back."""

    step: int
    state: PyTree
    data: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run directory.

    Only checkpoints that `verify` calls good displace others (`retention`).

    Args:
      run_directory: The run; checkpoints go to `checkpoints/` below it.
      keep_newest: How many of the newest stay.
      keep_best: How many of those with the lowest held-out loss stay.
      message: Receives plain-language notes, for example about a damaged checkpoint.
    """

    def __init__(
        self,
        run_directory: str | os.PathLike[str],
        *,
        keep_newest: int = 2,
        keep_best: int = 1,
        message: Callable[[str], None] = lambda text: None,
    ):
        """Opens the directory and clears away what a killed process left unfinished."""
        self.directory = Path(run_directory).absolute() / DIRECTORY
        self._damaged = Path(run_directory).absolute() / DAMAGED
        self._keep = (keep_newest, keep_best)
        self._message = message
        self._leads = jax.process_index() == 0
        # One thread: marks and deletions come after the commit that they belong to.
        self._worker = ThreadPoolExecutor(1, "checkpoints")
        self._saving: tuple[int, Future[None]] | None = None
        if self._leads:
            self.directory.mkdir(parents=True, exist_ok=True)
            retention.remove_leftovers(self.directory)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("the checkpoint directory is clean")
        # Labels not to be saved again. All processes must agree on them at every moment, so the
        # directory, where another process may just be writing its digests, is asked only here.
        self._saved = set(self.steps())

    def steps(self) -> list[int]:
        """Labels of the committed checkpoints, ascending."""
        return committed_steps(self.directory)

    def exist(self) -> bool:
        """Whether there is any checkpoint, committed or not."""
        return bool(labels(self.directory))

    def are_all_damaged(self) -> bool:
        """Whether there were checkpoints, and none is left."""
        return not self.exist() and self._damaged.is_dir() and any(self._damaged.iterdir())

    def save(
        self,
        step: int,
        state: PyTree,
        data: Mapping[str, Any],
        *,
        held_out_loss: float | None = None,
    ) -> None:
        """Starts saving; returns as soon as the arrays have left the devices.

        Args:
          step: Number of optimizer steps taken; a checkpoint of that label is left as it is.
          state: Tree of arrays.
          data: Position of the data; JSON.
          held_out_loss: Ranks the checkpoint among the best; with a value that is not finite it
            is doubtful.

        Raises:
          CheckpointError: If this or the previous save failed.
        """
        self.wait()
        if step in self._saved:
            return
        self._saved.add(step)
        items = {"state": state, "data": dict(data), "leaves": describe_leaves(state)}
        try:
            with _context():
                response = ocp.save_checkpointables_async(
                    str(self.directory / str(step)), items, overwrite=True
                )
        except Exception as error:
            self._saved.discard(step)
            raise self._not_written(step, error) from error
        self._saving = step, self._worker.submit(self._commit, step, response, held_out_loss)

    def verify(self, step: int, finite: bool) -> None:
        """Tells whether loss and gradient of the parameters saved as `step` are finite."""
        if self._leads:
            self._worker.submit(self._mark, step, finite)

    def wait(self) -> None:
        """Blocks until the last save is committed.

        Raises:
          CheckpointError: If it failed; earlier checkpoints are untouched.
        """
        if self._saving is None:
            return
        (step, saving), self._saving = self._saving, None
        try:
            saving.result()
        except Exception as error:
            self._saved.discard(step)
            raise self._not_written(step, error) from error

    def restore(self, abstract_state: PyTree) -> Restored:
        """Restores the newest checkpoint that is whole.

        One that cannot be read is moved to `damaged-checkpoints/`, with a message, and the one
        before it is taken. A doubtful one is taken only if no other is committed, one without
        digests only if nothing else exists; both are said, and newer ones of these kinds are
        deleted, because the run goes on from before them.

        Args:
          abstract_state: Tree of ShapeDtypeStruct with shardings. The mesh may differ from the
            one that saved.

        Raises:
          CheckpointError: If no checkpoint can be read, or the newest belongs to another model
            or optimizer; the first differing leaf is named.
        """
        self.wait()
        while (step := self._choose()) is not None:
            path = self.directory / str(step)
            try:
                stored = _load(path, {"leaves": None, "data": None})
                if stored["data"].get("step", step) != step:
                    raise ValueError(f"it is called {step} and holds step {stored['data']['step']}")
                difference = first_difference(describe_leaves(abstract_state), stored["leaves"])
                state = None if difference else _load(path, {"state": abstract_state})["state"]
            except Exception as error:
                # Files that fit their digests are not damaged: memory or a device is missing, say.
                intact = digests.is_sealed(path) and not isinstance(error, ValueError | KeyError)
                if intact or jax.process_count() > 1:
                    raise CheckpointError(f"{path} cannot be restored: {_reason(error)}") from error
                self._set_aside(step, _reason(error))
                continue
            if difference:
                raise CheckpointError(
                    f"{path} holds the state of another model or optimizer, or of another version "
                    f"of this package: {difference}; --fork-from RUN starts a new run from its "
                    "weights"
                )
            self._go_on_from(step)
            self._saved = {label for label in self._saved if label <= step} | {step}
            return Restored(step, state, stored["data"])
        if self.are_all_damaged():
            raise CheckpointError(f"{self.directory}: every checkpoint is damaged")
        raise CheckpointError(f"{self.directory}: no checkpoint that can be read")

    def close(self) -> None:
        """Waits for the last save and releases the directory."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()

    def __enter__(self) -> "Checkpoints":
        """Returns the checkpoints themselves."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Closes; while an exception is on its way, that one matters more than a failed save."""
        try:
            self.close()
        except Exception:
            if kind is None:
                raise

    def _commit(self, step: int, response: Any, held_out_loss: float | None) -> None:
        """In the background: waits for the files, writes their digests, deletes what is old."""
        # Asking each response for its result also ends the thread that orbax starts for it.
        response.result()
        finite = held_out_loss is not None and bool(np.isfinite(held_out_loss))
        path, loss = self.directory / str(step), held_out_loss if finite else None
        digests.seal(path, step, loss, jax.process_index(), jax.process_count())
        if self._leads and held_out_loss is not None and not finite:
            retention.mark(path, False)
        if self._leads:
            retention.rotate(self.directory, *self._keep)

    def _mark(self, step: int, finite: bool) -> None:
        retention.mark(self.directory / str(step), finite)
        retention.rotate(self.directory, *self._keep)

    def _choose(self) -> int | None:
        """The newest checkpoint that is whole; all processes get the same answer."""
        chosen = self._choose_here() if self._leads else None
        if jax.process_count() > 1:
            label = np.asarray(-1 if chosen is None else chosen, np.int32)
            label = int(multihost_utils.broadcast_one_to_all(label))
            return None if label < 0 else label
        return chosen

    def _choose_here(self) -> int | None:
        while candidates := self._candidates():
            step = candidates[0]
            if reason := digests.damage(self.directory / str(step), step):
                self._set_aside(step, reason)
                continue
            return step
        return None

    def _candidates(self) -> list[int]:
        """Labels in the order in which a run would go on from them."""
        sealed = self.steps()
        doubtful = [s for s in sealed if retention.is_doubtful(self.directory / str(s))]
        sound = [step for step in sealed if step not in doubtful]
        unsealed = [step for step in labels(self.directory) if step not in sealed]
        return [*reversed(sound), *reversed(doubtful), *reversed(unsealed)]

    def _go_on_from(self, step: int) -> None:
        """Says what the choice of a checkpoint means, and deletes those that it passes over."""
        if not self._leads:
            return
        path = self.directory / str(step)
        if not digests.is_sealed(path):
            self._message(
                f"checkpoint {step} has no digests, so its content cannot be checked; it is used "
                "because there is no other"
            )
            digests.seal(path, step, None)
        elif retention.is_doubtful(path):
            self._message(
                f"checkpoint {step} is used because there is no other, although the loss was not "
                "finite with it"
            )
        for other in labels(self.directory):
            if other > step:
                reason = (
                    "the loss was not finite with it"
                    if digests.is_sealed(self.directory / str(other))
                    else "it was not committed"
                )
                self._message(f"checkpoint {other} is deleted ({reason}), going on with {step}")
                retention.delete(self.directory / str(other))

    def _set_aside(self, step: int, reason: str) -> None:
        self._damaged.mkdir(parents=True, exist_ok=True)
        taken = len(list(self._damaged.glob(f"{step}-*")))
        target = self._damaged / f"{step}-{taken}"
        (self.directory / str(step)).rename(target)
        others = self._candidates()
        self._message(
            f"checkpoint {step} is damaged ({reason}); it was moved to {target}, going on with "
            + (f"checkpoint {others[0]}" if others else "none, as there is no other")
        )

    def _not_written(self, step: int, error: Exception) -> CheckpointError:
        steps = self.steps()
        intact = f"checkpoint {steps[-1]} is intact" if steps else "there is no earlier one"
        return CheckpointError(
            f"checkpoint {step} could not be written to {self.directory}: "
            f"{_reason(error)}; {intact}"
        )


def select_step(run_directory: str | os.PathLike[str], step: int | Literal["best"] | None) -> int:
    """Label of the checkpoint that is meant: its number, the best, or None for the newest.

    Raises:
      CheckpointError: If there is none, or not this one.
    """
    directory = Path(run_directory).absolute() / DIRECTORY
    steps = committed_steps(directory) or labels(directory)
    if not steps:
        raise CheckpointError(f"{run_directory} has no checkpoint")
    if step is None:
        return steps[-1]
    if step != "best":
        if step not in steps:
            raise CheckpointError(f"{run_directory} has no checkpoint {step}, only {steps}")
        return step
    found = {label: digests.held_out_loss(directory / str(label)) for label in steps}
    losses = {label: loss for label, loss in found.items() if loss is not None}
    if not losses:
        raise CheckpointError(
            f"{run_directory}: none of the checkpoints {steps} was evaluated, so none is the best"
        )
    return min(losses, key=lambda label: losses[label])


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
    path = Path(run_directory).absolute() / DIRECTORY / str(step)
    others = [label for label in labels(path.parent) if label != step]
    if not digests.is_sealed(path):
        warnings.warn(f"{path} has no digests, so its content cannot be checked", stacklevel=2)
    if reason := digests.damage(path, step):
        raise CheckpointError(f"{path} is damaged: {reason}; other checkpoints: {others or 'none'}")
    try:
        wanted = describe_leaves(target)
        names = {name for name, _, _ in wanted}
        stored = [leaf for leaf in _load(path, {"leaves": None})["leaves"] if leaf[0] in names]
        difference = first_difference(wanted, stored)
        # Orbax leaves out either what the target does not have, or its placeholders.
        partial = all(leaf is not ... for leaf in jax.tree.leaves(target))
        state = {} if difference else _load(path, {"state": target}, partial=partial)["state"]
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read: {_reason(error)}; other checkpoints: {others or 'none'}"
        ) from error
    if difference:
        raise CheckpointError(f"{path} does not fit the configuration of its run: {difference}")
    return state


def _context() -> ocp.Context:
    # By default orbax would spread the few numbers of a JSON item over array files.
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="data")
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="leaves")
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


def _load(path: Path, items: dict[str, Any], *, partial: bool = False) -> dict[str, Any]:
    context = _context()
    context.pytree.loading.partial_load = partial
    with context:
        return ocp.load_checkpointables(str(path), items)


def _reason(error: BaseException) -> str:
    root = error.__cause__ or error
    text = " ".join(str(root).split()) or type(root).__name__
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."
