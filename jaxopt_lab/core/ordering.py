"""When operations run: only if due, and one after the other."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

Carry = TypeVar("Carry")


def cond_without_copy(due: Bool[Array, ""], fn: Callable[[Carry], Carry], carry: Carry) -> Carry:
    """`fn(carry)` if `due`, else `carry`: a conditional, as a loop of at most one round.

    A conditional copies what it hands on unchanged, and under `vmap` it runs both branches where
    `due` differs between the mapped instances. A loop hands on without a copy, and its body runs
    only if it is due for any of them. But a host that comes to a loop waits for everything it has
    started, to learn whether there is a round to run: loops belong where little is under way.

    Args:
      due: A predicate.
      fn: Keeps the structure, shapes and dtypes of its argument.
      carry: A tree of arrays.
    """

    def once(pair):
        return jnp.zeros_like(pair[0]), fn(pair[1])

    return lax.while_loop(lambda pair: pair[0], once, (due, carry))[1]


def serialize_after(later: Sequence[Array | None], earlier: Sequence[Array | None]) -> list[Any]:
    """Arrays as they are, but not before all of `earlier` are there.

    XLA's CPU runtime starts independent operations at once, and two decompositions (LAPACK calls
    over a batch) that run at once on a machine with two cores wait for each other for ever: each
    holds one of the two threads and asks for more. XLA drops optimization barriers before it
    schedules, so we add a data dependency that is always zero. Other backends run operations in
    order, and several devices on one CPU have more threads.

    Args:
      later: What shall come later; not sharded.
      earlier: What shall come first; not sharded.
    """
    if jax.default_backend() != "cpu":
        return list(later)
    numbers = [x[(0,) * x.ndim] for x in earlier if x is not None and x.size]
    zero = sum(jnp.minimum(jnp.abs(jnp.nan_to_num(x)), 0).astype(jnp.float32) for x in numbers)
    return [None if x is None else x + jnp.asarray(zero).astype(x.dtype) for x in later]


def refreshed_share(
    fn: Callable[..., tuple[Array | None, ...]],
    arrays: tuple[Array | None, ...],
    turn: Array,
    parts: int,
) -> tuple[Any, ...]:
    """A stack of which `fn` has renewed one of `parts` shares, so that no step pays for all.

    Args:
      fn: From arrays (k, ...) to new ones, each entry for itself.
      arrays: The stack, (batch, ...); None: there is no such array.
      turn: Which share; those beyond the end of the stack are empty.
      parts: How many.
    """
    batch = next(x.shape[0] for x in arrays if x is not None)
    size = -(-batch // parts)
    first = turn * size

    def renewed(arrays):
        # The last share may be short: its slice then reaches back into the one before.
        start = jnp.minimum(first, batch - size)
        mine = start + jnp.arange(size) >= first
        old = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, size), arrays)

        def updated(x: Array, old: Array, new: Array) -> Array:
            new = jnp.where(jnp.expand_dims(mine, range(1, x.ndim)), new.astype(x.dtype), old)
            return lax.dynamic_update_slice_in_dim(x, new, start, 0)

        return jax.tree.map(updated, arrays, old, fn(*old))

    return cond_without_copy(first < batch, renewed, arrays)
