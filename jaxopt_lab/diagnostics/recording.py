"""The interface between a training loop and its diagnostics.

A loop asks `recorder.due(step)`, a comparison of integers, and only when that is true keeps the
gradients and the state of the step and calls `recorder.record(snapshot)`. Switched off, a
diagnostic adds nothing to the compiled step.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import optax
from jax.typing import ArrayLike


class Snapshot(NamedTuple):
    """One optimizer step: everything is from before the update, except the updates themselves."""

    step: int  # 1 for the first step
    params: optax.Params
    grads: optax.Updates  # as the optimizer received them
    opt_state: optax.OptState
    updates: optax.Updates  # what is added to the parameters
    loss: ArrayLike | None = None  # of this step's minibatch
    # (loss, gradients) of this step's minibatch at other parameters, before any clipping.
    value_and_grad: Callable[[optax.Params], tuple[ArrayLike, optax.Updates]] | None = None


class Recorder(Protocol):
    """A diagnostic that a training loop can call."""

    @property
    def name(self) -> str:
        """Prefix of its metrics."""
        ...

    def due(self, step: int) -> bool:
        """Whether the step (1 for the first) is to be recorded."""
        ...

    def record(self, snapshot: Snapshot) -> dict[str, float]:
        """The metrics of one step; NaN where a quantity is undefined."""
        ...


class Every:
    """Steps whose 1-based number leaves one of some residues modulo an interval.

    A method that alternates between two kinds of steps with a period that divides the interval is
    only ever seen in one of them: with period 2 and an even interval, residue 0 samples sign steps
    alone. `residues=(0, 1)` then records both kinds.

    >>> [step for step in range(1, 9) if Every(4, residues=(0, 1)).due(step)]
    [1, 4, 5, 8]

    Args:
      interval: distance between two records of one residue, in steps.
      residues: step numbers modulo the interval that are recorded.

    Raises:
      ValueError: when the interval is not positive or a residue is outside 0 ... interval - 1.
    """

    def __init__(self, interval: int, residues: Sequence[int] = (0,)):
        """See the class."""
        if interval < 1:
            raise ValueError(f"interval: got {interval}, expected at least 1 step")
        if not residues or not all(0 <= r < interval for r in residues):
            raise ValueError(
                f"residues: got {tuple(residues)}, expected numbers from 0 to {interval - 1}"
            )
        self.interval = interval
        self.residues = tuple(sorted(set(residues)))

    def due(self, step: int) -> bool:
        """Whether the step is one of them."""
        return step % self.interval in self.residues


class Recorders:
    """Several recorders as one, with the name of each in front of its metrics.

    >>> Recorders([]).due(1)
    False
    """

    def __init__(self, recorders: Sequence[Recorder]):
        """See the class."""
        names = [recorder.name for recorder in recorders]
        if len(set(names)) != len(names):
            raise ValueError(f"recorders: two share a name in {names}")
        self.recorders = tuple(recorders)

    def due(self, step: int) -> bool:
        """Whether any of them records this step."""
        return any(recorder.due(step) for recorder in self.recorders)

    def record(self, snapshot: Snapshot) -> dict[str, float]:
        """The metrics of those that are due, as `name/metric`."""
        return {
            f"{recorder.name}/{metric}": value
            for recorder in self.recorders
            if recorder.due(snapshot.step)
            for metric, value in recorder.record(snapshot).items()
        }


def find_state(opt_state: optax.OptState, kind: type) -> Any:
    """The first state of a given type inside the state of any chain or partition.

    Raises:
      ValueError: when there is none.
    """
    for node in jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kind)):
        if isinstance(node, kind):
            return node
    raise ValueError(f"the optimizer state holds no {kind.__name__}")
