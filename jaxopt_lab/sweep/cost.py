"""What one step of one run costs: time with and without the optimizer, and memory."""

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxopt_lab.step import TrainState
from jaxopt_lab.sweep.task import Batch, BuildOptimizer, Task, start, step, step_of
from jaxopt_lab.zeroth_order import recorded

# Part of the memory that runs side by side may fill: what a program of several lanes needs is
# estimated from the program of one.
_USABLE = 0.7


@dataclass(frozen=True)
class StepCost:
    """One run alone on one device, in one process, after a warm-up."""

    step_seconds: float
    """Median over rounds of a whole step."""

    gradient_seconds: float
    """The same for the loss and its clipped gradient alone; for an optimizer that has none, for as
    many losses as it evaluates."""

    tokens_per_second: float
    """Tokens of a batch over the whole step."""

    peak_bytes: int | None
    """Arguments, results and scratch of the compiled step; None where the backend does not say."""

    compile_seconds: float
    """Of the whole step."""

    @property
    def optimizer_seconds(self) -> float:
        """What the update adds to a step; slightly negative where it is lost in the noise."""
        return self.step_seconds - self.gradient_seconds

    @property
    def optimizer_share(self) -> float:
        """The part of the step that the update takes."""
        return self.optimizer_seconds / self.step_seconds


def measure_step(
    task: Task, build: BuildOptimizer, rate: float, *, seed: int = 0, steps: int = 20,
    rounds: int = 3,
) -> StepCost:  # fmt: skip
    """Times compiled steps with and without the optimizer, in turn, dispatched without waiting.

    Args:
      task: The run.
      build: The optimizer of a learning rate.
      rate: Learning rate of the timed steps.
      seed: Of the parameters and the batch, which is the same at every step.
      steps: Steps of a round; whole periods of an optimizer that alternates between kinds of steps.
      rounds: Rounds that count; one before them warms up.
    """
    batch = jax.device_put({name: np.asarray(x)[0] for name, x in task.batches(seed, 0, 1).items()})
    state = jax.jit(functools.partial(start, task, build))(np.float32(rate), np.int32(seed))
    whole = jax.jit(lambda s, b: step(task, build, jnp.float32(rate), s, b), donate_argnums=0)
    # The previous gradient is donated, so that both programs write where they read.
    alone = jax.jit(
        functools.partial(_received, task, build, rate, jax.eval_shape(lambda: state.opt_state)),
        donate_argnums=1,
        keep_unused=True,
    )
    before = time.perf_counter()
    compiled = whole.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - before
    first: Any = jax.tree.map(jnp.copy, state._replace(opt_state=()))
    grads: Any = jax.tree.map(jnp.zeros_like, first.params)
    gradient_only = alone.lower(first, grads, batch).compile()

    def update(state: TrainState) -> TrainState:
        return compiled(state, batch)[0]

    def differentiate(grads: Any) -> Any:
        return gradient_only(first, grads, batch)[1]

    times = np.zeros((rounds + 1, 2))
    for number in range(rounds + 1):
        state, times[number, 0] = _time(update, state, steps)
        grads, times[number, 1] = _time(differentiate, grads, steps)
    step_seconds, gradient_seconds = np.median(times[1:], axis=0)
    return StepCost(
        step_seconds=float(step_seconds),
        gradient_seconds=float(gradient_seconds),
        tokens_per_second=task.tokens_per_step / float(step_seconds),
        peak_bytes=_peak_bytes(compiled),
        compile_seconds=compile_seconds,
    )


def lanes_that_fit(cost: StepCost, wanted: int) -> int:
    """How many runs of this cost may train side by side, at least one and at most `wanted`.

    Args:
      cost: Of one run.
      wanted: Number of runs there are.
    """
    if cost.peak_bytes is None:
        return 1
    return max(1, min(wanted, int(_USABLE * device_memory() / max(cost.peak_bytes, 1))))


def device_memory() -> int:
    """Bytes that the first device may use; on a CPU those of the machine."""
    statistics = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return int(statistics["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _received(
    task: Task,
    build: BuildOptimizer,
    rate: float,
    opt_state: PyTree,
    state: TrainState,
    old: PyTree,
    batch: Batch,
) -> tuple[Array, PyTree]:
    """Loss and gradient as the optimizer receives it, written where the last one was.

    Or the losses that it would evaluate, without its perturbations.
    """
    key = jax.random.wrap_key_data(state.key)
    found, _ = step_of(task, build, rate, key).received(state, batch)
    if found.grads is not None:
        return found.metrics["loss"], found.grads

    def value(number: Array) -> Array:
        # Or one evaluation would serve for all.
        params, _ = jax.lax.optimization_barrier((state.params, number))
        return found.extra["value_fn"](params)

    return jnp.sum(jax.lax.map(value, jnp.arange(recorded(opt_state).size))), old


def _time(f: Callable[[Any], Any], carry: Any, times: int) -> tuple[Any, float]:
    """Seconds a call, over `times` calls that each take the result of the one before."""
    begin = time.perf_counter()
    for _ in range(times):
        carry = f(carry)
    jax.block_until_ready(carry)
    return carry, (time.perf_counter() - begin) / times


def _peak_bytes(compiled: Any) -> int | None:
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return int(held - memory.alias_size_in_bytes + memory.temp_size_in_bytes)
