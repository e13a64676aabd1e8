"""Hooks: measurements of one's own along a run."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxopt_lab.step import Batch, TrainState
from jaxopt_lab.train.errors import TrainingError


class View(NamedTuple):
    """What a hook sees of a step: to read, not to change.

    Arrays are on the devices. Reading one waits for the step, and the next step overwrites those of
    the state, so a hook that wants to compare keeps copies.
    """

    step: int
    """Number of the step, 1 for the first."""
    state: TrainState
    """After the step."""
    metrics: Mapping[str, ArrayLike]
    """What the step reports: `loss`, `grad_norm`, the learning rates, `weight` (tokens), ..."""
    batch: Batch
    """What it was taken on."""


class Due(Protocol):
    """Knows which steps are its own, as `jaxopt_lab.diagnostics.Every` does."""

    def due(self, step: int) -> bool:
        """Whether the step (1 for the first) is one of them."""
        ...


@dataclass(frozen=True)
class Hook:
    """A measurement along a run, for `pretrain(config, hooks=[...])`.

    What `measure` returns is logged with the step. Scalars on the device are read with the step's
    own metrics, after the next step has been dispatched, so a hook that returns them does not make
    training wait. With several processes every one of them calls the hook, in the same order.

    A hook that raises, or returns something else than scalars under new names, ends the run as
    SIGTERM would: it is saved and can be resumed, and the error names the hook.

    >>> import jax, optax
    >>> from jaxopt_lab.step import Step
    >>> def weights(view: View):
    ...     return {"weight_norm": optax.tree.norm(view.state.params)}
    >>> hook = Hook(weights, every=10)
    >>> [step for step in range(1, 31) if hook.due(step)]
    [10, 20, 30]
    >>> state = Step(lambda *_: None, optax.sgd(0.1)).start({"w": jnp.ones(4)}, jax.random.key(0))
    >>> hook.measure(View(10, state, {"loss": jnp.ones(())}, {}))
    {'weight_norm': Array(2., dtype=float32)}

    Args:
      measure: (view) -> scalars by the names in the log, or None.
      every: Steps between two calls, or something that knows which steps are due.
      before: Whether it is called before its step is taken: with the state before it and its batch,
        and without metrics.
      name: For messages; that of the function by default.

    Raises:
      ValueError: If `every` is below 1.
    """

    measure: Callable[[View], Mapping[str, ArrayLike] | None]
    every: int | Due = 1
    before: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        """Checks the interval."""
        if isinstance(self.every, int) and self.every < 1:
            raise ValueError(f"{self}: every: got {self.every}, expected at least 1 step")

    def due(self, step: int) -> bool:
        """Whether it is called at this step."""
        return step % self.every == 0 if isinstance(self.every, int) else self.every.due(step)

    def __str__(self) -> str:
        """Its name in messages."""
        return f"hook {self.name or getattr(self.measure, '__qualname__', repr(self.measure))}"


class Callback(Protocol):
    """A hook for every step, as a plain function."""

    def __call__(
        self, step: int, state: TrainState, metrics: Mapping[str, Any], batch: Batch
    ) -> Mapping[str, float] | None:
        """Called with the number of steps taken and what the last one produced and consumed."""
        ...


def hook_of(callback: Callback) -> Hook:
    """The hook that a callback is."""
    name = getattr(callback, "__qualname__", repr(callback))
    return Hook(lambda view: callback(*view), name=name)


class Hooks:
    """The hooks of a run. After one has failed, none is called any more.

    Args:
      hooks: In the order of their calls.
      reserved: Names that are taken in the log.
    """

    def __init__(self, hooks: Sequence[Hook], reserved: Collection[str]):
        """Calls nothing yet."""
        self._hooks, self._reserved = tuple(hooks), frozenset(reserved)
        self.failure: tuple[str, Exception] | None = None  # what failed and where, and how

    def measure(self, view: View, *, before: bool = False) -> dict[str, ArrayLike]:
        """What those return that are due."""
        found: dict[str, ArrayLike] = {}
        for hook in self._hooks:
            if self.failure is None and hook.before is before and hook.due(view.step):
                # Copies: nothing that a hook adds or removes there reaches the run.
                seen = view._replace(metrics=dict(view.metrics), batch=dict(view.batch))
                try:
                    values = hook.measure(seen) or {}
                    _check(values, {*self._reserved, *view.metrics, *found})
                except Exception as error:  # whatever it is, it is no reason to lose the run
                    self.failure = f"{hook} failed at step {view.step}", error
                else:
                    found |= values
        return found

    def raise_failure(self, outcome: str) -> None:
        """Raises what a hook raised, if one did; the outcome says how the run ended.

        Raises:
          TrainingError: Names the hook and the step.
        """
        if self.failure:
            where, error = self.failure
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise TrainingError(f"{where}: {reason}; {outcome}") from error


def _check(values: Mapping[str, Any], taken: Collection[str]) -> None:
    for name, value in values.items():
        if name in taken:
            raise ValueError(f"the metric {name!r} is there already; choose another name")
        # Without reading the value, which would wait for the device.
        dtype: Any = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
        real = any(jnp.issubdtype(dtype, kind) for kind in (np.floating, np.integer, np.bool_))
        if np.ndim(value) or not real:
            raise ValueError(f"the metric {name!r} is {value!r}, expected a scalar")
