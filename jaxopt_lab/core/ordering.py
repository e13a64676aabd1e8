"""When operations run: only if due, and one after the other."""

from collections.abc import Callable
from typing import TypeVar

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


def serialize_after(x: Array, *earlier: Array | None) -> Array:
    """`x` as it is, but not before all of `earlier` is there.

    XLA's CPU runtime starts independent operations at once, and two decompositions (LAPACK calls
    over a batch) that run at once on a machine with two cores wait for each other for ever: each
    holds one of the two threads and asks for more. An optimisation barrier does not help, it is
    gone by then; a number that happens to be zero does. Other backends run operations in order, and
    several devices on one CPU have more threads.

    Args:
      x: What shall come later; not sharded.
      *earlier: What shall come first; not sharded.
    """
    if jax.default_backend() != "cpu":
        return x
    for each in earlier:
        if each is not None and each.size:
            number = jnp.nan_to_num(each[(0,) * each.ndim])
            x = x + jnp.minimum(jnp.abs(number), 0).astype(x.dtype)
    return x
