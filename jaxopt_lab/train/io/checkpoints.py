"""Checkpoints of a run: saved in the background, committed by digests, checked before use.

A checkpoint is a directory `<steps taken>` with the training state, the position of the data and
a description of every leaf. Orbax writes it under another name and renames it when it is
complete; then each process writes the digests of its files (`digests`), and with these the
checkpoint is committed. A killed process leaves either a whole checkpoint or none, and whatever
happens to the files later is found before they are used.

Of several processes one may fail where the others do not: at a full disk, or a file that only it
cannot read. All of them agree on the outcome of every save and of every attempt to restore
(`restoring`).
"""

import concurrent.futures
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from jaxopt_lab.report.storage import absolute, is_remote, names_in, path_of
from jaxopt_lab.train.dist.agreement import agreed, from_first, leave_last, told_by_all
from jaxopt_lab.train.errors import CheckpointError
from jaxopt_lab.train.io import digests, retention, stored
from jaxopt_lab.train.io.restoring import DAMAGED, Restored, restore
from jaxopt_lab.train.io.retention import committed_steps, labels
from jaxopt_lab.train.io.stored import DIRECTORY, reason
from jaxopt_lab.train.leaves import describe_leaves


class Checkpoints:
    """The checkpoints of one run directory.

    Only checkpoints that `verify` calls good displace others (`retention`).

    Args:
      run_directory: The run; checkpoints go to `checkpoints/` below it.
      keep_newest: How many of the newest stay.
      keep_best: How many of those with the lowest held-out loss stay.
      message: Receives plain-language notes, for example about a damaged checkpoint.
      publish: Called on the first process before a checkpoint is committed: what is written of the
        run besides checkpoints is then as new as this one.
      check: Called on the first process before anything is written or deleted; raises where the run
        belongs to somebody else by now.
    """

    def __init__(
        self,
        run_directory: str | os.PathLike[str],
        *,
        keep_newest: int = 2,
        keep_best: int = 1,
        message: Callable[[str], None] = lambda text: None,
        publish: Callable[[], None] = lambda: None,
        check: Callable[[], None] = lambda: None,
    ):
        """Opens the directory and clears away what a killed process left unfinished."""
        self.run_directory = path_of(run_directory)
        self.directory = absolute(run_directory) / DIRECTORY
        self._keep = (keep_newest, keep_best)
        self._message, self._publish, self._check = message, publish, check
        self._leads = jax.process_index() == 0
        agreed(self._clear_away)
        # One thread: marks and deletions come after the commit that they belong to.
        self._worker = ThreadPoolExecutor(1, "checkpoints")
        self._saving: tuple[int, Future[None]] | None = None
        self._marking: list[Future[None]] = []
        self._failed = False  # a save, where other processes may go on waiting for it
        # Labels that no finite loss has verified yet -> whether they are doubtful.
        self._unverified: dict[int, bool] = {}
        # Labels not to be saved again. All processes must agree on them at every moment, so the
        # directory, where another process may just be writing its digests, is asked only here.
        self._saved = set(from_first(self.steps))

    def steps(self) -> list[int]:
        """Labels of the committed checkpoints, ascending."""
        return committed_steps(self.directory)

    def exist(self) -> bool:
        """Whether there is any checkpoint, committed or not; the same on all processes."""
        return from_first(lambda: bool(labels(self.directory)))

    def are_all_damaged(self) -> bool:
        """Whether there were checkpoints, and none is left; the same on all processes."""
        return not self.exist() and from_first(lambda: bool(names_in(self.directory / DAMAGED)))

    def save(
        self,
        step: int,
        state: PyTree,
        data: Mapping[str, Any],
        *,
        held_out_loss: float | None = None,
        doubtful: bool = False,
    ) -> None:
        """Starts saving; returns as soon as the arrays have left the devices.

        Args:
          step: Number of optimizer steps taken; a checkpoint of that label is left as it is.
          state: Tree of arrays.
          data: Position of the data; JSON.
          held_out_loss: Ranks the checkpoint among the best; with a value that is not finite it
            is doubtful.
          doubtful: Whether the last loss or gradient was not finite. Such a checkpoint does not
            rank, and until a finite loss follows, it is used only if there is no other.

        Raises:
          CheckpointError: If this or the previous save failed, on any process.
        """
        self.wait()
        if step in self._saved:
            return
        self._saved.add(step)
        items = {"state": state, "data": dict(data), "leaves": describe_leaves(state)}
        if doubtful or (held_out_loss is not None and not np.isfinite(held_out_loss)):
            doubtful, held_out_loss = True, None
        path = str(self.directory / str(step))

        def start() -> Any:
            if self._leads:
                self._check()
            with stored.context():
                return ocp.save_checkpointables_async(path, items, overwrite=True)

        # Not in this thread: orbax waits for the other processes, of which one may fail.
        started = self._worker.submit(start)
        self._must_not_fail(step, started)
        self._unverified[step] = doubtful
        commit = self._worker.submit(self._commit, step, started.result(), held_out_loss)
        self._saving = step, commit

    def verify(self, step: int, finite: bool) -> None:
        """Tells whether loss and gradient of the parameters after `step` steps are finite.

        That verifies all checkpoints up to this one, or makes those doubtful that nothing had
        verified before. Verified ones stay verified.
        """
        found = [label for label in self._unverified if label <= step]
        if finite:
            for label in found:
                del self._unverified[label]
        else:
            found = [label for label in found if not self._unverified[label]]
            self._unverified |= dict.fromkeys(found, True)
        if found and self._leads:
            self._marking.append(self._worker.submit(self._mark, found, finite))

    def wait(self) -> None:
        """Blocks until the last save is committed.

        Raises:
          CheckpointError: If it failed on any process; earlier checkpoints are untouched.
        """
        marking, self._marking = self._marking, []
        if self._saving is not None:
            (step, saving), self._saving = self._saving, None
            self._must_not_fail(step, saving)
        for future in marking:
            future.result()

    def restore(self, abstract_state: Any) -> Restored:
        """Restores the newest checkpoint that is whole: see `restoring.restore`."""
        self.wait()
        found = restore(self.directory, abstract_state, self._message)
        self._saved = {label for label in self._saved if label <= found.step} | {found.step}
        verdict = retention.verdict(self.directory / str(found.step))
        self._unverified = {} if verdict else {found.step: verdict is False}
        return found

    def close(self) -> None:
        """Waits for the last save and releases the directory."""
        try:
            self.wait()
        finally:
            self._release()

    def __enter__(self) -> "Checkpoints":
        """Returns the checkpoints themselves."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Closes; while an exception is on its way, that one matters more than a failed save.

        It may have come to this process alone: then nothing is agreed any more.
        """
        if kind is None:
            self.close()
        else:
            self._release()

    def _release(self) -> None:
        # A save that has failed elsewhere would be waited for in vain.
        self._worker.shutdown(wait=not self._failed, cancel_futures=self._failed)

    def _must_not_fail(self, step: int, work: Future[Any]) -> None:
        """Waits for part of a save; if it failed on one process, all raise."""
        if failures := _failures(work):
            leave_last()
            self._failed = jax.process_count() > 1
            self._saved.discard(step)
            self._unverified.pop(step, None)
            try:
                steps = self.steps()
                intact = f"checkpoint {steps[-1]} is intact" if steps else "there is no earlier one"
            except OSError:
                intact = "earlier ones could not be listed"
            raise CheckpointError(
                f"checkpoint {step} could not be written to {self.directory}: {failures[0]}; "
                f"{intact}"
            )

    def _clear_away(self) -> None:
        """What a killed process left unfinished."""
        if self._leads:
            if not is_remote(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
            retention.remove_leftovers(self.directory)

    def _commit(self, step: int, response: Any, held_out_loss: float | None) -> None:
        """In the background: waits for the files, writes their digests, deletes what is old."""
        # Asking each response for its result also ends the thread that orbax starts for it.
        response.result()
        path = self.directory / str(step)
        if self._leads:
            self._publish()
        # Doubts of by now come before the digests: a process that is killed in between leaves no
        # checkpoint that looks better than it is.
        if self._leads and self._unverified.get(step):
            retention.mark(path, False)
        digests.seal(path, step, held_out_loss, jax.process_index(), jax.process_count())
        if self._leads:
            self._rotate()

    def _mark(self, steps: Sequence[int], finite: bool) -> None:
        """In the background, after the commits that it concerns."""
        try:
            self._check()
        except (OSError, CheckpointError) as error:
            self._message(f"no checkpoint was marked or deleted: {reason(error)}")
            return
        for step in steps:
            try:
                retention.mark(self.directory / str(step), finite)
            except OSError as error:
                verdict = "verified" if finite else "doubtful"
                self._message(f"checkpoint {step} could not be marked {verdict}: {reason(error)}")
        self._rotate()

    def _rotate(self) -> None:
        """Deletes what others have displaced; what cannot be deleted is no failure of a save."""
        try:
            for step in retention.displaced(self.directory, *self._keep):
                try:
                    retention.delete(self.directory / str(step))
                except OSError as error:
                    self._message(f"checkpoint {step} could not be deleted: {reason(error)}")
        except OSError as error:
            self._message(f"old checkpoints could not be deleted: {reason(error)}")


def _failures(work: Future[Any]) -> list[str]:
    """Why `work` failed, on the processes where it did; waits until it has ended on all.

    Where it failed on one, it may never end on the others, which wait for that one.
    """

    def outcome() -> str | None:
        if not work.done():
            return None
        error = work.exception()
        return reason(error) if error else ""

    if jax.process_count() == 1:
        concurrent.futures.wait([work])
        return list(filter(None, [outcome()]))
    told = told_by_all(outcome)
    return [f"process {process}: {text}" for process, text in sorted(told.items()) if text]
