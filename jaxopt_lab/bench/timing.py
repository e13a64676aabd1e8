"""Compiling an optimizer step and timing it honestly."""

import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab.optim.shardings import state_shardings


class CompiledStep:
    """`update` followed by `apply_updates`, compiled as one program that reuses its inputs.

    Args:
      tx: The optimizer.
      params: Tree of arrays or shapes.
      param_shardings: Tree of `NamedSharding`; None leaves everything on the default device.
    """

    def __init__(self, tx: optax.GradientTransformation, params: Any, param_shardings: Any = None):
        """Compiles the program and measures how long that took."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        self.abstract_state = jax.eval_shape(tx.init, abstract)
        self._init = jax.jit(tx.init)

        def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        shardings = {}
        if param_shardings is not None:
            state = state_shardings(tx, abstract, param_shardings)
            shardings["in_shardings"] = (param_shardings, state, param_shardings)
            shardings["out_shardings"] = (param_shardings, state)
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=(0, 1), **shardings).lower(
            abstract, self.abstract_state, abstract
        )
        self.compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - start

    def init(self, params: Any) -> Any:
        """The first optimizer state."""
        return jax.block_until_ready(self._init(params))

    def temp_bytes(self) -> int | None:
        """Scratch memory of the program; None where the backend does not say."""
        return program_bytes(self.compiled)["temp"]

    def flops(self) -> float | None:
        """FLOPs as XLA counts them (both branches of a conditional); None where it does not."""
        costs = self.compiled.cost_analysis()
        return None if not costs else float(costs.get("flops", 0.0))


# Averages over the gradients have full rank by then. Before, a decomposition of them takes longer,
# and in a run of thousands of steps that does not count.
_WARM_UP_STEPS = 32


class OptimizerTimer:
    """Times whole periods of one optimizer.

    The loop is the one a user writes: single compiled steps, dispatched from Python without
    waiting, with one wait at the end. Parameters pass from timer to timer, so only the state is
    held once per optimizer.

    Args:
      step: The compiled step.
      period: Steps after which the cost of a step repeats.
      params: Parameters to start the state from.
    """

    def __init__(self, step: CompiledStep, period: int, params: Any):
        """Initialises the state."""
        self._step = step.compiled
        self._period = period
        self._state = step.init(params)
        self._steps = period
        self._taken = 0
        self.amortised: list[float] = []  # seconds a step, one value per round
        self.host: list[float] = []  # the part of it that Python needs to dispatch
        self.single: list[list[float]] = []  # seconds of each step of a period, waited for

    def warm_up(self, params: Any, grads: Sequence[Any], seconds_per_round: float) -> Any:
        """Runs the first steps, then a period that decides how many of them make a round."""
        first = -(-_WARM_UP_STEPS // self._period) * self._period
        params, _ = self._run(params, grads, first)
        params, (seconds, _) = self._run(params, grads, self._period)
        self._steps = self._period * max(1, round(seconds_per_round / max(seconds, 1e-9)))
        return params

    def round(self, params: Any, grads: Sequence[Any]) -> Any:
        """Takes one sample of each kind; returns the parameters."""
        params, (seconds, host_seconds) = self._run(params, grads, self._steps)
        self.amortised.append(seconds / self._steps)
        self.host.append(host_seconds / self._steps)
        single = []
        for _ in range(self._period):
            params, (seconds, _) = self._run(params, grads, 1)
            single.append(seconds)
        self.single.append(single)
        return params

    def worst_step(self) -> float:
        """Seconds of the slowest step of a period: for each position the median over rounds."""
        return float(np.median(self.single, axis=0).max())

    def _run(
        self, params: Any, grads: Sequence[Any], steps: int
    ) -> tuple[Any, tuple[float, float]]:
        state, step = self._state, self._step
        start = time.perf_counter()
        for _ in range(steps):
            params, state = step(params, state, grads[self._taken % len(grads)])
            self._taken += 1
        host = time.perf_counter() - start
        jax.block_until_ready((params, state))
        total = time.perf_counter() - start
        self._state = state
        return params, (total, host)


def interleave(
    timers: Sequence[OptimizerTimer],
    params: Any,
    grads: Sequence[Any],
    *,
    repeats: int,
    seconds_per_round: float,
    each_round: Callable[[], None],
) -> None:
    """Times all optimizers in turn, round after round, so that slow drift hits them alike.

    Args:
      timers: One per optimizer; they keep their samples.
      params: Parameters, donated.
      grads: Gradients, taken in turn.
      repeats: Rounds.
      seconds_per_round: Aimed duration of one optimizer's sample.
      each_round: Called at the start of every round.
    """
    for timer in timers:
        params = timer.warm_up(params, grads, seconds_per_round)
    for _ in range(repeats):
        each_round()
        for timer in timers:
            params = timer.round(params, grads)


class CallTimer:
    """Times a compiled program (carry, *given) -> (carry, result), whose carry it donates.

    Args:
      program: The program, compiled.
      carry: What the first call starts from.
      given: What every call takes besides.
    """

    def __init__(self, program: Any, carry: Any, given: Sequence[Any]):
        """Takes no sample."""
        self.program = program
        self._carry, self._given = carry, given
        self._calls = 1
        self.seconds: list[float] = []  # a call, one value per round

    def warm_up(self, seconds_per_round: float) -> None:
        """Decides how many calls make a round, and forgets the samples before."""
        self._sample()
        self._calls = max(1, round(seconds_per_round / max(self._sample(), 1e-9)))
        self.seconds.clear()

    def round(self) -> None:
        """Takes one sample."""
        self.seconds.append(self._sample())

    def _sample(self) -> float:
        start = time.perf_counter()
        result = None
        for _ in range(self._calls):
            self._carry, result = self.program(self._carry, *self._given)
        jax.block_until_ready((self._carry, result))
        return (time.perf_counter() - start) / self._calls


def call_timers(rows: Sequence[tuple[Callable[..., Any], Any, Sequence[Any]]]) -> list[CallTimer]:
    """Compiles programs (carry, *given) side by side: compilers run outside of Python's lock.

    Args:
      rows: A function, its carry and what else it is given, for each program.
    """
    lowered = [
        jax.jit(function, donate_argnums=0).lower(carry, *given) for function, carry, given in rows
    ]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        compiled = list(pool.map(lambda each: each.compile(), lowered))
    return [
        CallTimer(program, carry, given)
        for program, (_, carry, given) in zip(compiled, rows, strict=True)
    ]


def interleave_calls(timers: Sequence[CallTimer], rounds: int, seconds_per_round: float) -> None:
    """Times all programs in turn, round after round, so that slow drift hits them alike.

    Args:
      timers: They keep their samples.
      rounds: Samples of each.
      seconds_per_round: Aimed duration of a sample.
    """
    for timer in timers:
        timer.warm_up(seconds_per_round)
    for _ in range(rounds):
        for timer in timers:
            timer.round()


def program_bytes(compiled: Any) -> dict[str, int | None]:
    """Memory of a compiled program on one device; None where the backend does not say.

    Args:
      compiled: `jax.jit(f).lower(...).compile()`.

    Returns:
      "temp", scratch alone, and "peak", scratch with arguments and results, shared ones once.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        return {"temp": None, "peak": None}
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak = held - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    return {"temp": int(memory.temp_size_in_bytes), "peak": int(peak)}


def random_like(abstract: Any, seed: int, scale: float) -> Any:
    """Normal random arrays in the shapes of a tree of float32 leaves."""
    leaves, structure = jax.tree.flatten(abstract)
    drawn = _draw(jax.random.key(seed), scale, tuple(x.shape for x in leaves))
    return jax.block_until_ready(structure.unflatten(drawn))


@functools.partial(jax.jit, static_argnums=2)
def _draw(key: jax.Array, scale: float, shapes: tuple[tuple[int, ...], ...]) -> list[jax.Array]:
    # One draw cut into pieces compiles in a fraction of the time of one draw per leaf.
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    pieces = jnp.split(scale * jax.random.normal(key, (int(ends[-1]),)), ends[:-1].tolist())
    return [x.reshape(shape) for x, shape in zip(pieces, shapes, strict=True)]


_LONG_AXIS = 64
# So many that the averages over them have full rank in the wide matrices of a transformer.
_GRADIENTS = 8


def random_gradients(abstract: Any) -> list[Any]:
    """Random gradients for successive steps, in the shapes of a tree of float32 leaves.

    The cost of an eigenbasis depends on what it is of. As in training, entries differ in size: they
    fall with the root of their position along each long axis.
    """

    def graded(x: jax.Array) -> jax.Array:
        for axis, size in enumerate(x.shape):
            if size >= _LONG_AXIS:
                falling = jax.lax.rsqrt(1.0 + jnp.arange(size, dtype=x.dtype))
                x = x * jnp.expand_dims(falling, [a for a in range(x.ndim) if a != axis])
        return x

    grade = jax.jit(lambda tree: jax.tree.map(graded, tree))
    return [grade(random_like(abstract, seed=2 + i, scale=1e-3)) for i in range(_GRADIENTS)]
