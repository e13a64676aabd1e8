"""Several runs of one optimizer as one compiled program, advanced from evaluation to evaluation."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxopt_lab.data import standard_error
from jaxopt_lab.step import TrainState, merged
from jaxopt_lab.sweep.task import Batch, BuildOptimizer, Task, held_out_loss, start, step

OnEvaluation = Callable[[int, np.ndarray], None]
"""Receives the number of steps taken and the held-out loss of every run."""


class Run(NamedTuple):
    """What tells two runs of one optimizer apart."""

    rate: float
    seed: int


class Curves(NamedTuple):
    """Losses of several runs; NaN after a program in which no run was finite any more."""

    train: np.ndarray  # (runs, steps), the loss of each batch before its step
    held_out: np.ndarray  # (runs, evaluations)
    error: np.ndarray  # (runs,), of the last held-out loss, over documents; NaN where not told


class Program:
    """Trains a fixed number of runs at once.

    With `vectorized`, the runs are the lanes of one vmapped program. The optimizer state is made
    inside the vmap and every leaf that does not depend on the lane, above all a step counter,
    stays unbatched from chunk to chunk: a `lax.cond` on it remains a branch, where a batched
    predicate would make every lane pay for both sides at every step.

    Args:
      task: What every run shares.
      build: The optimizer of a learning rate.
      lanes: Number of runs at once.
      vectorized: Whether to vmap; False only for a single lane.
      one_seed: Whether all runs have one seed. Batches and keys then are no lanes: what an
        optimizer draws from its key is drawn once for all of them.
    """

    def __init__(
        self,
        task: Task,
        build: BuildOptimizer,
        lanes: int,
        *,
        vectorized: bool = True,
        one_seed: bool = False,
    ):
        """Traces the step to find the batched leaves; compiles nothing."""
        if lanes < 1 or (lanes > 1 and not vectorized):
            raise ValueError(f"lanes: got {lanes} with vectorized={vectorized}")
        self.lanes = lanes
        self.compile_seconds = 0.0
        self._task, self._vectorized, self._one_seed = task, vectorized, one_seed
        begin: Any = functools.partial(start, task, build)
        advance: Any = functools.partial(_advance, task, build)
        if vectorized:
            of_seed = None if one_seed else 0
            axes = self.state_axes = _state_axes(task, build, lanes, of_seed)
            begin = jax.vmap(begin, in_axes=(0, of_seed), out_axes=axes)
            out_axes = (axes, 0, (0, 0))
            advance = jax.vmap(advance, in_axes=(0, axes, of_seed, None), out_axes=out_axes)
        self.begin = jax.jit(begin)
        self.advance = jax.jit(advance, donate_argnums=1)
        self._compiled: dict[int, Any] = {}

    def train(self, runs: Sequence[Run], on_evaluation: OnEvaluation | None = None) -> Curves:
        """Trains the runs from their seeds to the end, or until none of them is finite.

        Args:
          runs: Exactly `lanes` runs, of one seed where the program is for one.
          on_evaluation: Called after every evaluation.
        """
        if len(runs) != self.lanes:
            raise ValueError(f"runs: got {len(runs)}, expected {self.lanes}")
        if self._one_seed and len({run.seed for run in runs}) > 1:
            raise ValueError(f"runs: got {list(runs)}, expected one seed")
        rates = np.asarray([run.rate for run in runs], np.float32)
        seeds = np.asarray([run.seed for run in runs], np.int32)
        rates = rates if self._vectorized else rates[0]
        seeds = seeds if self._has_seeds else seeds[0]
        task, taken = self._task, 0
        held_out = jax.device_put(dict(task.held_out))
        state = self.begin(rates, seeds)
        steps = task.evaluated_steps()
        train = np.full((self.lanes, task.steps), np.nan)
        evaluated = np.full((self.lanes, len(steps)), np.nan)
        targets, by_document = task.targets_by_document(), np.zeros(0)
        for index, stop in enumerate(steps):
            batches = self._batches(runs, taken, stop)
            compiled = self._compile(stop - taken, (rates, state, batches, held_out))
            state, losses, (value, by_document) = compiled(rates, state, batches, held_out)
            train[:, taken:stop] = jax.device_get(losses).reshape(self.lanes, -1)
            evaluated[:, index] = jax.device_get(value).reshape(self.lanes)
            taken = stop
            if on_evaluation is not None:
                on_evaluation(taken, evaluated[:, index])
            if not np.isfinite(evaluated[:, index]).any():
                break
        nats = np.asarray(by_document, np.float64).reshape(self.lanes, len(targets))
        return Curves(train, evaluated, standard_error(nats, targets))

    @property
    def _has_seeds(self) -> bool:
        return self._vectorized and not self._one_seed

    def _batches(self, runs: Sequence[Run], begin: int, end: int) -> Batch:
        fixed = self._task.data_seed
        of_seed = {
            seed: self._task.batches(seed if fixed is None else fixed, begin, end)
            for seed in {run.seed for run in runs}
        }
        if not self._has_seeds:
            return of_seed[runs[0].seed]
        lanes = [of_seed[run.seed] for run in runs]
        return {name: np.stack([lane[name] for lane in lanes]) for name in lanes[0]}

    def _compile(self, steps: int, arguments: tuple[Any, ...]) -> Any:
        if steps not in self._compiled:
            before = time.perf_counter()
            self._compiled[steps] = self.advance.lower(*arguments).compile()
            self.compile_seconds += time.perf_counter() - before
        return self._compiled[steps]


def _advance(
    task: Task,
    build: BuildOptimizer,
    rate: Array,
    state: TrainState,
    batches: Batch,
    held_out: Batch,
) -> tuple[TrainState, Array, tuple[Array, Array]]:
    """Steps over the leading axis of the batches, then one evaluation."""
    state, losses = jax.lax.scan(functools.partial(step, task, build, rate), state, batches)
    params = merged(state.params, state.frozen)
    return state, losses, held_out_loss(task, params, held_out)


def _state_axes(
    task: Task, build: BuildOptimizer, lanes: int, of_seed: Literal[0] | None
) -> TrainState:
    """0 for the leaves of the state that differ between lanes, None for the others."""
    rates = jax.ShapeDtypeStruct((lanes,), jnp.float32)
    several = () if of_seed is None else (lanes,)
    seeds = jax.ShapeDtypeStruct(several, jnp.int32)
    one_batch = {name: np.asarray(x)[0] for name, x in task.batches(0, 0, 1).items()}
    batches = {n: jax.ShapeDtypeStruct((*several, *x.shape), x.dtype) for n, x in one_batch.items()}
    begin = functools.partial(start, task, build)
    state, batched = _batched_leaves(begin, (0, of_seed), (rates, seeds))

    def one_step(rate: Array, state: TrainState, batch: Batch) -> TrainState:
        return step(task, build, rate, state, batch)[0]

    # A leaf that starts the same everywhere may come to depend on its lane: at most once each.
    while True:
        axes = jax.tree.unflatten(jax.tree.structure(state), [0 if b else None for b in batched])
        leaves = [
            jax.ShapeDtypeStruct((lanes, *x.shape), x.dtype) if b else x
            for x, b in zip(jax.tree.leaves(state), batched, strict=True)
        ]
        arguments = (rates, jax.tree.unflatten(jax.tree.structure(state), leaves), batches)
        _, after = _batched_leaves(one_step, (0, axes, of_seed), arguments)
        grown = [a or b for a, b in zip(batched, after, strict=True)]
        if grown == batched:
            return axes
        batched = grown


def _batched_leaves(f: Callable[..., Any], in_axes: Any, arguments: Any) -> tuple[PyTree, Any]:
    """Shapes of one lane's results, and which of their leaves depend on the lane.

    vmap itself knows which values it batches, but only tells a function with its own batching rule.
    """
    found: list[bool] = []
    shapes: list[PyTree] = []

    @jax.custom_batching.custom_vmap
    def ask(*leaves: Array) -> tuple[Array, ...]:
        return leaves

    @ask.def_vmap
    def _(axis_size: int, batched: Sequence[bool], *leaves: Array) -> Any:
        del axis_size
        found[:] = list(batched)
        return leaves, tuple(batched)

    def asked(*args: Any) -> Any:
        out = f(*args)
        shapes[:] = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), out)]
        return ask(*jax.tree.leaves(out))

    jax.eval_shape(jax.vmap(asked, in_axes=in_axes), *arguments)
    # Where nothing depends on the lane, nobody is asked.
    return shapes[0], found or [False] * len(jax.tree.leaves(shapes[0]))
