r"""Optimizers that ask for values and get them told, from anything that can compute one.

`ask` and `tell` do one value each. `step` does a whole iteration with a function that JAX can
trace, inside `jit` or `scan`; the numbers are the same. An *estimator* turns values into a
direction (`differences.py`), a *move* goes along it (`frank_wolfe.py`, `descent.py`).

What an iteration draws depends on the key and the number of the iteration, on nothing else: a
restored state goes on as if it had never been saved.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from jaxopt_lab.core.keys import purpose_key, threefry_key
from jaxopt_lab.zeroth_order.constraints import ConstraintSet, checked_start, point_shape
from jaxopt_lab.zeroth_order.differences import Estimator, Feedback, Found, differences, parts

# `(x, direction, count, d) -> x`, in the shape of the point if that is one leaf, flat otherwise.
Move = Callable[[Array, Array, Array, int], Array]
# Values of a step that are computed together; a larger number is a loop over chunks of it.
_CHUNK = 64
_THREEFRY = "threefry2x32"


class BlackBoxDraws(NamedTuple):
    """Given instead of drawn, in replays and tests.

    Attributes:
      probes: What the estimator's `draw` returns.
      samples: What `f` gets as its second argument; leading axis: the values of an iteration.
    """

    probes: Any
    samples: Any = None


class BlackBoxState(NamedTuple):
    """Where an optimizer stands."""

    key: UInt32[Array, "2"]  # data of a key
    x: Any  # the iterate, in the shape of the start, float32 or wider
    memory: Any  # the estimator's
    count: Int[Array, ""]  # finished iterations
    # Coordinates that the memory holds. Below d, the next values are for the memory.
    filled: Int[Array, ""]
    # Values of this iteration, those in front of `position`: high and low parts
    values: Float[Array, "2 n"]
    position: Int[Array, ""]  # how many of them were told
    asked: Bool[Array, ""]  # whether a point is out whose value was not told yet
    calls: Int[Array, ""]  # values told in all
    # Differences left out because one of their values was not finite
    notfinite_count: Int[Array, ""]


class BlackBox(NamedTuple):
    """An optimizer of a function of which only values are known.

    Attributes:
      init: `x0 -> state`.
      ask: `state -> (state, x)`: where a value is wanted next. Asking again returns the same point.
      tell: `(state, value) -> state`. A value that is not finite is left out and counted.
      step: `(state, f) -> state`: one iteration, and whatever the memory needs before it, with an
        `f` that JAX can trace. Call it inside `jit` or `scan`.
      sample_key: `state -> key` of the sample, noise or minibatch, with which the value asked for
        is to be computed. Values of one sample get equal keys. `jax.random.key_data(key)` is a seed
        for others.
      feedback: See `jaguar_frank_wolfe`. Unless it is deterministic, `f` is called as `f(x, key)`.
    """

    init: Callable[[Any], BlackBoxState]
    ask: Callable[..., tuple[BlackBoxState, Any]]
    tell: Callable[..., BlackBoxState]
    step: Callable[..., BlackBoxState]
    sample_key: Callable[[BlackBoxState], Key[Array, ""]]
    feedback: Feedback

    def minimize(
        self, f: Callable[..., Any], x0: Any, *, num_calls: int
    ) -> tuple[BlackBoxState, np.ndarray]:
        """Ask, compute and tell.

        Args:
          f: `x -> value`, or `(x, key) -> value`; need not be JAX.
          x0: Start.
          num_calls: Number of values.

        Returns:
          The state, whose `x` is the result, and the values in order.
        """
        state, values = self.init(x0), []
        for _ in range(num_calls):
            state, x = self.ask(state)
            sample = () if self.feedback == "deterministic" else (self.sample_key(state),)
            values.append(f(x, *sample))
            state = self.tell(state, values[-1])
        return state, np.array(values)


def ask_tell(
    estimator: Estimator, move: Move, key: Array, constraint: ConstraintSet | None = None
) -> BlackBox:
    """An optimizer from an estimator and a move.

    Args:
      estimator: What to ask for.
      move: What to do with the direction.
      key: A typed threefry key.
      constraint: In which the start has to lie.

    Raises:
      ValueError: The key is of another kind; from `init` and `tell`: the start or the value does
        not fit, before anything is computed with it.
    """
    data = jax.random.key_data(threefry_key(key))
    told = jax.jit(lambda state, value, draws: _tell(estimator, move, state, value, draws))

    def init(x0: Any) -> BlackBoxState:
        x = checked_start(x0, estimator.eps, constraint)
        flat, _ = ravel_pytree(x)
        size = max(2, estimator.num_values(flat.size))
        # An array of its own for each field, so that a state can be donated.
        return BlackBoxState(
            key=jnp.array(data),
            x=x,
            memory=estimator.init(flat.size, flat.dtype),
            count=jnp.zeros((), jnp.int32),
            filled=jnp.full((), 0 if estimator.fill_first else flat.size, jnp.int32),
            values=jnp.zeros((2, size), flat.dtype),
            position=jnp.zeros((), jnp.int32),
            asked=jnp.zeros((), bool),
            calls=jnp.zeros((), jnp.int32),
            notfinite_count=jnp.zeros((), jnp.int32),
        )

    @jax.jit
    def ask(state: BlackBoxState, draws: BlackBoxDraws | None = None) -> tuple[BlackBoxState, Any]:
        x, unravel = ravel_pytree(state.x)
        point = _point(estimator, state, _probes(estimator, state, draws), state.position)
        point = jnp.where(_filling(estimator, state), _fill_point(estimator, x, state), point)
        return state._replace(asked=jnp.ones((), bool)), unravel(point)

    def tell(state: BlackBoxState, value: Any, draws: BlackBoxDraws | None = None) -> BlackBoxState:
        if not isinstance(state.asked, Tracer) and not state.asked:
            raise ValueError(
                "tell: no value is expected; ask first:\n"
                "  state, x = opt.ask(state)\n"
                "  state = opt.tell(state, f(x))"
            )
        return told(state, parts(value, state.values.dtype, "tell"), draws)

    def step(
        state: BlackBoxState, f: Callable, draws: BlackBoxDraws | None = None
    ) -> BlackBoxState:
        return _step(estimator, move, state, f, draws)

    def sample_key(state: BlackBoxState) -> Array:
        return _sample_key(estimator, state, state.position, _filling(estimator, state))

    return BlackBox(init, ask, tell, step, sample_key, estimator.feedback)


def _tell(
    estimator: Estimator,
    move: Move,
    state: BlackBoxState,
    value: Array,
    draws: BlackBoxDraws | None,
) -> BlackBoxState:
    filling = _filling(estimator, state)
    state = state._replace(
        values=state.values.at[:, state.position].set(value),
        position=state.position + 1,
        asked=jnp.zeros((), bool),
        calls=state.calls + 1,
    )
    d = ravel_pytree(state.x)[0].size
    wanted = jnp.where(filling, 2, estimator.num_values(d))
    whole = state._replace(position=jnp.zeros((), jnp.int32))
    branches = [
        lambda: state,
        lambda: _fill(estimator, whole, whole.filled[None], whole.values[:, :2]),
        lambda: _finish(estimator, move, whole, draws),
    ]
    return lax.switch(jnp.where(state.position < wanted, 0, jnp.where(filling, 1, 2)), branches)


def _step(
    estimator: Estimator, move: Move, state: BlackBoxState, f: Callable, draws: BlackBoxDraws | None
) -> BlackBoxState:
    x, unravel = ravel_pytree(state.x)
    # Whatever was asked for and not told is asked for again.
    state = state._replace(position=jnp.zeros((), jnp.int32), asked=jnp.zeros((), bool))

    def values(points: Callable[[Array], Array], samples: Any, number: int) -> Array:
        """(2, number) values in two parts."""

        def one(given: tuple[Array, Any]) -> Array:
            sample = () if estimator.feedback == "deterministic" else (given[1],)
            return parts(f(unravel(points(given[0])), *sample), state.values.dtype, "f")

        return lax.map(one, (jnp.arange(number), samples), batch_size=min(number, _CHUNK)).T

    def keys(number: int, filling: bool) -> Array:
        return jax.vmap(lambda j: _sample_key(estimator, state, j, filling))(jnp.arange(number))

    def fill(state: BlackBoxState) -> BlackBoxState:
        at = lambda j: _fill_point(estimator, x, state._replace(filled=j // 2, position=j % 2))  # noqa: E731
        found = values(at, keys(2 * x.size, True), 2 * x.size)
        return _fill(estimator, state, jnp.arange(x.size), found)._replace(
            calls=state.calls + 2 * x.size
        )

    if estimator.fill is not None:
        # The predicate is a counter, the same for all instances of a vmap: it stays a branch.
        state = lax.cond(state.filled < x.size, fill, lambda state: state, state)
    number = estimator.num_values(x.size)
    samples = keys(number, False) if draws is None or draws.samples is None else draws.samples
    probes = _probes(estimator, state, draws)
    found = values(lambda j: _point(estimator, state, probes, j), samples, number)
    state = state._replace(
        values=state.values.at[:, :number].set(found), calls=state.calls + number
    )
    return _finish(estimator, move, state, draws)


def _finish(
    estimator: Estimator, move: Move, state: BlackBoxState, draws: BlackBoxDraws | None
) -> BlackBoxState:
    """The end of an iteration. Without a single finite difference, point and memory stay."""
    x, unravel = ravel_pytree(state.x)
    number = estimator.num_probes(x.size)
    found, finite = differences(
        state.values[:, : estimator.num_values(x.size)], estimator.eps, estimator.values_each
    )
    found, finite = found.reshape(-1, number), finite.reshape(-1, number).all(axis=0)
    found = jnp.where(finite, found, 0)
    before = () if estimator.other is None else found[1]
    probes = _probes(estimator, state, draws)
    direction, memory = estimator.estimate(
        state.memory, probes, Found(found[0], before, finite, state.count, x)
    )
    shape = point_shape(state.x)
    moved = move(x.reshape(shape), direction.reshape(shape), state.count, x.size)
    new = unravel(moved.ravel().astype(x.dtype)), memory
    old = state.x, state.memory
    kept_x, memory = jax.tree.map(lambda a, b: jnp.where(finite.any(), a, b), new, old)
    filled = state.filled
    if estimator.refill:
        again = jax.random.bernoulli(_draw_key(state, "refill"), estimator.refill)
        filled = jnp.where(again, 0, filled)
    return state._replace(
        x=kept_x,
        memory=memory,
        count=state.count + 1,
        filled=filled,
        notfinite_count=state.notfinite_count + number - jnp.sum(finite, dtype=jnp.int32),
    )


def _fill(
    estimator: Estimator, state: BlackBoxState, coordinates: Array, values: Array
) -> BlackBoxState:
    if estimator.fill is None:
        return state
    found, finite = differences(values, estimator.eps, 2)
    lost = coordinates.size - jnp.sum(finite, dtype=jnp.int32)
    return state._replace(
        memory=estimator.fill(state.memory, coordinates, found, finite),
        filled=coordinates[-1].astype(jnp.int32) + 1,
        notfinite_count=state.notfinite_count + lost,
    )


def _filling(estimator: Estimator, state: BlackBoxState) -> Array:
    d = ravel_pytree(state.x)[0].size
    return jnp.asarray(estimator.fill is not None) & (state.filled < d)


def _point(estimator: Estimator, state: BlackBoxState, probes: Any, position: Array) -> Array:
    x, _ = ravel_pytree(state.x)
    each = estimator.values_each
    probe, side = position // each, position % each
    if estimator.other is not None:
        number = estimator.num_probes(x.size)
        x = jnp.where(probe < number, x, estimator.other(state.memory, x))
        probe = probe % number
    return estimator.point(x, probes, probe, ((1 - 2 * side) * estimator.eps).astype(x.dtype))


def _fill_point(estimator: Estimator, x: Array, state: BlackBoxState) -> Array:
    return x.at[state.filled].add(jnp.where(state.position == 0, 1, -1) * estimator.eps)


def _probes(estimator: Estimator, state: BlackBoxState, draws: BlackBoxDraws | None) -> Any:
    if draws is not None:
        return draws.probes
    d = ravel_pytree(state.x)[0].size
    return estimator.draw(_draw_key(state, "probes"), d)


def _draw_key(state: BlackBoxState, purpose: str) -> Array:
    key = jax.random.wrap_key_data(state.key, impl=_THREEFRY)
    return purpose_key(jax.random.fold_in(key, state.count), purpose)


def _sample_key(
    estimator: Estimator, state: BlackBoxState, position: Array, filling: Array | bool
) -> Array:
    """One sample for a whole filling of the memory, for a pair, or for a value."""
    d = ravel_pytree(state.x)[0].size
    position = position % (estimator.num_probes(d) * estimator.values_each)
    pair = position // 2 if estimator.feedback == "two_point" else position
    keys = (_draw_key(state, "memory"), jax.random.fold_in(_draw_key(state, "samples"), pair))
    data = jnp.where(filling, *map(jax.random.key_data, keys))
    return jax.random.wrap_key_data(data, impl=_THREEFRY)
