"""Checkpoints of a run: saved in the background, committed by a rename, checked before use.

A checkpoint is a directory `<steps taken>` with the training state, the position of the data and
a description of every leaf. Orbax writes it under another name and renames it when it is
complete, so a killed process leaves either a whole checkpoint or none. What the rename cannot
protect against (files cut short later by a copy or a full disk) is caught by the sizes recorded
after the commit.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from jaxopt_lab.train.errors import CheckpointError

DIRECTORY = "checkpoints"
_DAMAGED = "damaged-checkpoints"
_SIZES = "_SIZES.json"
_LONGEST_REASON = 300


class Restored(NamedTuple):
    """What a checkpoint gave back."""

    step: int
    state: PyTree
    data: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run directory.

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
        """Sets damaged checkpoints aside, then opens the directory."""
        self.directory = Path(run_directory).absolute() / DIRECTORY
        self._damaged = Path(run_directory).absolute() / _DAMAGED
        self._message = message
        self._unsealed: list[int] = []
        self._set_damaged_aside()
        policies: Any = ocp.training.preservation_policies
        decisions: Any = ocp.training.save_decision_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: -metrics["held_out_loss"],
            n=keep_best,
            keep_checkpoints_without_metrics=False,
        )
        self._checkpointer = ocp.training.Checkpointer(
            str(self.directory),
            context=_context(),
            # The training loop decides when; every call saves.
            save_decision_policy=decisions.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(keep_newest), best]
            ),
            cleanup_tmp_directories=True,
        )

    def steps(self) -> list[int]:
        """Labels of the committed checkpoints, ascending."""
        return committed_steps(self.directory)

    def are_all_damaged(self) -> bool:
        """Whether there were checkpoints, and none is left."""
        return not self.steps() and self._damaged.is_dir() and any(self._damaged.iterdir())

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
          held_out_loss: Ranks the checkpoint among the best; None or a non-finite value does not.

        Raises:
          CheckpointError: If this or the previous save failed.
        """
        self.wait()
        if step in self.steps():
            return
        ranked = held_out_loss is not None and np.isfinite(held_out_loss)
        items = {"state": state, "data": dict(data), "leaves": describe_leaves(state)}
        try:
            self._checkpointer.save_checkpointables_async(
                step,
                items,
                force=True,
                metrics={"held_out_loss": float(held_out_loss)} if ranked else None,  # pyright: ignore[reportArgumentType]
            )
        except Exception as error:
            raise self._not_written(step, error) from error
        self._unsealed.append(step)

    def wait(self) -> None:
        """Blocks until the last save is committed.

        Raises:
          CheckpointError: If it failed; earlier checkpoints are untouched.
        """
        if not self._unsealed:
            return
        step = self._unsealed.pop()
        try:
            self._checkpointer.wait()
        except Exception as error:
            raise self._not_written(step, error) from error
        if step not in self.steps():
            raise self._not_written(step, OSError("it was not committed"))
        if jax.process_index() == 0:
            _write_sizes(self.directory / str(step))

    def restore(self, abstract_state: PyTree) -> Restored:
        """Restores the newest checkpoint that is whole.

        One that cannot be read is moved to `damaged-checkpoints/`, with a message, and the one
        before it is taken.

        Args:
          abstract_state: Tree of ShapeDtypeStruct with shardings. The mesh may differ from the
            one that saved.

        Raises:
          CheckpointError: If no checkpoint can be read, or the newest belongs to another model
            or optimizer; the first differing leaf is named.
        """
        self.wait()
        for step in reversed(self.steps()):
            path = self.directory / str(step)
            try:
                stored = _load(path, {"leaves": None, "data": None})
                difference = first_difference(describe_leaves(abstract_state), stored["leaves"])
                if difference is None:
                    state = _load(path, {"state": abstract_state})["state"]
                    return Restored(step, state, stored["data"])
            except Exception as error:
                if jax.process_count() > 1:
                    raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from error
                self._set_aside(step, _reason(error))
                continue
            raise CheckpointError(
                f"{path} was written with another model or optimizer: {difference}"
            )
        raise CheckpointError(f"{self.directory}: no checkpoint that can be read")

    def close(self) -> None:
        """Waits for the last save and releases the directory."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

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

    def _set_damaged_aside(self) -> None:
        if jax.process_index() == 0:
            for step in self.steps():
                if reason := _damage(self.directory / str(step)):
                    self._set_aside(step, reason)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")

    def _set_aside(self, step: int, reason: str) -> None:
        self._damaged.mkdir(parents=True, exist_ok=True)
        taken = len(list(self._damaged.glob(f"{step}-*")))
        target = self._damaged / f"{step}-{taken}"
        (self.directory / str(step)).rename(target)
        before = self.steps()
        self._message(
            f"checkpoint {step} is damaged ({reason}); it was moved to {target}, going on with "
            + (f"checkpoint {before[-1]}" if before else "none, as there is no other")
        )

    def _not_written(self, step: int, error: Exception) -> CheckpointError:
        steps = self.steps()
        intact = f"checkpoint {steps[-1]} is intact" if steps else "there is no earlier one"
        return CheckpointError(
            f"checkpoint {step} could not be written to {self.directory}: "
            f"{_reason(error)}; {intact}"
        )


def committed_steps(directory: Path) -> list[int]:
    """Labels of the committed checkpoints below a directory, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def select_step(run_directory: str | os.PathLike[str], step: int | Literal["best"] | None) -> int:
    """Label of the checkpoint that is meant: its number, the best, or None for the newest.

    Raises:
      CheckpointError: If there is none, or not this one.
    """
    directory = Path(run_directory).absolute() / DIRECTORY
    steps = committed_steps(directory)
    if not steps:
        raise CheckpointError(f"{run_directory} has no checkpoint")
    if step is None:
        return steps[-1]
    if step != "best":
        if step not in steps:
            raise CheckpointError(f"{run_directory} has no checkpoint {step}, only {steps}")
        return step
    with ocp.training.Checkpointer(str(directory), context=_context()) as stored:
        metrics: dict[int, Any] = {found.step: found.metrics for found in stored.checkpoints}
    losses = {label: each["held_out_loss"] for label, each in metrics.items() if each}
    if not losses:
        raise CheckpointError(
            f"{run_directory}: none of the checkpoints {steps} was evaluated, so none is the best"
        )
    return min(losses, key=lambda label: losses[label])


def read_state(
    run_directory: str | os.PathLike[str], step: int, abstract_state: PyTree, target: PyTree
) -> PyTree:
    """Reads leaves of one checkpoint and changes nothing on disk.

    Args:
      run_directory: The run.
      step: Label of the checkpoint.
      abstract_state: What the checkpoint should hold, as shapes and dtypes.
      target: The same tree with arrays where leaves are to be read, orbax's placeholder elsewhere.

    Raises:
      CheckpointError: If the checkpoint is damaged, or holds something else.
    """
    path = Path(run_directory).absolute() / DIRECTORY / str(step)
    others = [label for label in committed_steps(path.parent) if label != step]
    if reason := _damage(path):
        raise CheckpointError(f"{path} is damaged: {reason}; other checkpoints: {others or 'none'}")
    try:
        leaves = _load(path, {"leaves": None})["leaves"]
        difference = first_difference(describe_leaves(abstract_state), leaves)
        state = None if difference else _load(path, {"state": target})["state"]
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read: {_reason(error)}; other checkpoints: {others or 'none'}"
        ) from error
    if difference:
        raise CheckpointError(f"{path} does not fit the configuration of its run: {difference}")
    return state


def describe_leaves(tree: PyTree) -> list[list[Any]]:
    """Path, shape and dtype of every leaf, as JSON.

    >>> describe_leaves({"a": np.zeros((2, 3), np.float32)})
    [['a', [2, 3], 'float32']]
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [
        [jax.tree_util.keystr(path, simple=True, separator="/"), list(x.shape), str(x.dtype)]
        for path, x in leaves
    ]


def first_difference(wanted: list[list[Any]], found: list[list[Any]]) -> str | None:
    """Names the first leaf that two descriptions do not share; None if they are equal.

    >>> first_difference([["w", [2], "float32"]], [["w", [3], "float32"]])
    'w is float32(3) in the checkpoint and float32(2) in this run'
    """
    stored = {path: (tuple(shape), dtype) for path, shape, dtype in found}
    for path, shape, dtype in wanted:
        if path not in stored:
            return f"{path} is missing in the checkpoint"
        if stored[path] != (tuple(shape), dtype):
            there, here = _leaf_text(*stored[path]), _leaf_text(shape, dtype)
            return f"{path} is {there} in the checkpoint and {here} in this run"
    known = {path for path, _, _ in wanted}
    extra = next((path for path, _, _ in found if path not in known), None)
    return None if extra is None else f"{extra} is in the checkpoint and not in this run"


def _leaf_text(shape: Any, dtype: str) -> str:
    return f"{dtype}({','.join(map(str, shape))})"


def _context() -> ocp.Context:
    # By default orbax would spread the few numbers of a JSON item over array files.
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="data")
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="leaves")
    context = ocp.Context()
    context.checkpointables.registry = registry
    return context


def _load(path: Path, items: dict[str, Any]) -> dict[str, Any]:
    with _context():
        return ocp.load_checkpointables(str(path), items)


def _file_sizes(path: Path) -> dict[str, int]:
    files = (file for file in path.rglob("*") if file.is_file() and file.name != _SIZES)
    return {str(file.relative_to(path)): file.stat().st_size for file in files}


def _write_sizes(path: Path) -> None:
    partial = path / f"{_SIZES}.partial"
    partial.write_text(json.dumps(_file_sizes(path)))
    partial.rename(path / _SIZES)


def _damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None also if no sizes were recorded."""
    sizes = path / _SIZES
    if not sizes.is_file():
        return None  # killed right after the commit: reading it will tell
    try:
        recorded = json.loads(sizes.read_text())
    except ValueError:
        return f"{_SIZES} is not JSON"
    present = _file_sizes(path)
    for name, size in recorded.items():
        if present.get(name) != size:
            found = "missing" if name not in present else f"{present[name]} bytes long"
            return f"{name} should have {size} bytes and is {found}"
    return None


def _reason(error: BaseException) -> str:
    root = error.__cause__ or error
    text = " ".join(str(root).split()) or type(root).__name__
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."
