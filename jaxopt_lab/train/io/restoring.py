"""From which checkpoint a run goes on: all processes take the same one, or none."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from jaxopt_lab.report.storage import is_remote, names_in
from jaxopt_lab.train.dist.agreement import agreed, from_first, gather
from jaxopt_lab.train.errors import CheckpointError
from jaxopt_lab.train.io import digests, retention, stored
from jaxopt_lab.train.io.retention import labels
from jaxopt_lab.train.io.stored import reason
from jaxopt_lab.train.leaves import describe_leaves, first_difference

# Below the checkpoints, so that moving there is a change of name on any file system.
DAMAGED = "damaged"

Message = Callable[[str], None]


class Restored(NamedTuple):
    """What a checkpoint gave back."""

    step: int
    state: PyTree
    data: dict[str, Any]


def restore(directory: Path, abstract_state: Any, say: Message) -> Restored:
    """Restores the newest checkpoint that is whole.

    One that cannot be read is moved to `damaged/`, with a message, and the one before it is taken.
    After a doubt the last verified one comes first; one without digests is taken only if nothing
    else exists. Both are said, and newer ones of these kinds are deleted, because the run goes on
    from before them.

    Args:
      directory: Of the checkpoints.
      abstract_state: Tree of ShapeDtypeStruct with shardings, or a function to it from what else
        the checkpoint holds. The mesh may differ from the one that saved.
      say: Receives plain-language notes.

    Raises:
      CheckpointError: If no checkpoint can be read, or the newest belongs to another model or
        optimizer; the first differing leaf is named.
    """
    while (step := from_first(partial(_choose, directory, say))) is not None:
        path, state = directory / str(step), None
        # One after the other: orbax counts what it loads, the same number on all processes.
        found, damage = _attempt(path, partial(_read_data, path, step, abstract_state))
        if not damage:
            state, damage = _attempt(path, partial(stored.load, path, found[1]))
        if not damage:
            _on_first(partial(_go_on_from, directory, step, say))
            return Restored(step, state, found[0])
        _on_first(partial(_set_aside, directory, step, damage, say))
    if names_in(directory / DAMAGED):
        raise CheckpointError(f"{directory}: every checkpoint is damaged")
    raise CheckpointError(f"{directory}: no checkpoint that can be read")


def _on_first(work: Callable[[], None]) -> None:
    agreed(lambda: work() if jax.process_index() == 0 else None)


def _choose(directory: Path, say: Message) -> int | None:
    """The first checkpoint, in the order of preference, whose files are what was written."""
    while candidates := _candidates(directory):
        step = candidates[0]
        if damage := digests.damage(directory / str(step), step):
            _set_aside(directory, step, damage, say)
            continue
        return step
    return None


def _candidates(directory: Path) -> list[int]:
    """Labels in the order in which a run would go on from them."""
    committed = retention.by_preference(retention.verdicts(directory))
    unsealed = [step for step in labels(directory) if step not in committed]
    return [*committed, *reversed(unsealed)]


def _attempt(path: Path, read: Callable[[], Any]) -> tuple[Any, str]:
    """What was read of a checkpoint, and how it is damaged on any of the processes.

    Raises:
      CheckpointError: If it cannot be used although it is not damaged.
    """

    def attempt() -> tuple[Any, str]:
        try:
            return read(), ""
        except CheckpointError:
            raise
        except Exception as error:
            # Files that fit their digests are not damaged: memory or a device is missing, say.
            if digests.is_sealed(path) and not isinstance(error, ValueError | KeyError):
                raise CheckpointError(f"{path} cannot be restored: {reason(error)}") from error
            return None, reason(error)

    found, damage = agreed(attempt)
    return found, next(filter(None, gather(damage)), "")


def _read_data(path: Path, step: int, abstract_state: Any) -> tuple[dict[str, Any], PyTree]:
    """Position of the data, of a checkpoint with such a state, and the state's shapes."""
    data = stored.read_item(path, "data")
    if data.get("step", step) != step:
        raise ValueError(f"it is called {step} and holds step {data['step']}")
    abstract = abstract_state(data) if callable(abstract_state) else abstract_state
    difference = first_difference(describe_leaves(abstract), stored.read_item(path, "leaves"))
    if difference:
        raise CheckpointError(
            f"{path} holds the state of another model or optimizer, or of another version of this "
            f"package: {difference}; --fork-from RUN starts a new run from its weights"
        )
    return data, abstract


def _go_on_from(directory: Path, step: int, say: Message) -> None:
    """Says what the choice of a checkpoint means, and deletes those that it passes over."""
    path = directory / str(step)
    if not digests.is_sealed(path):
        say(
            f"checkpoint {step} has no digests, so its content cannot be checked; it is used "
            "because there is no other"
        )
        digests.seal(path, step, None)
    elif retention.verdict(path) is False:
        say(
            f"checkpoint {step} is used because there is no other, although the loss was not "
            "finite with it"
        )
    for other in labels(directory):
        if other > step:
            sealed = digests.is_sealed(directory / str(other))
            why = "the loss was not finite with it" if sealed else "it was not committed"
            say(f"checkpoint {other} is deleted ({why}), going on with {step}")
            retention.delete(directory / str(other))


def _set_aside(directory: Path, step: int, damage: str, say: Message) -> None:
    aside = directory / DAMAGED
    if not is_remote(aside):
        aside.mkdir(exist_ok=True)
    taken, names = names_in(aside), (f"{step}-{number}" for number in itertools.count())
    target = aside / next(name for name in names if name not in taken)
    retention.move(directory / str(step), target)
    others = _candidates(directory)
    say(
        f"checkpoint {step} is damaged ({damage}); it was moved to {target}, going on with "
        + (f"checkpoint {others[0]}" if others else "none, as there is no other")
    )
