"""Engines: how the losses of several probes are evaluated. All give the same numbers.

| engine | memory beside the parameters | when |
|---|---|---|
| `sequential` | one perturbed copy, activations of one loss | large models (default) |
| `chunked` | as many copies and activations as a chunk has losses | small models, adapters |
| `vmapped` | copies and activations of all losses at once | very small models |
| `sharded` | those of an engine in each group of devices | a mesh axis of probes |

With `probe_fn` a copy is one of a layer, and all but `sequential` draw once for both sides. With
`low_rank` directions and `beside` there are no copies: `vmapped` then is for large models too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
from jaxtyping import Array


@dataclass(frozen=True, eq=False)
class Engine:
    """How many directions are evaluated at once."""

    name: str
    """For messages."""

    chunk: int | None
    """Directions at once; None: all."""

    both_sides: bool = True
    """Whether losses of one direction are evaluated together."""

    @property
    def one_by_one(self) -> bool:
        """Whether each loss is known before the next one is evaluated."""
        return self.chunk == 1 and not self.both_sides

    def check(self, num_directions: int) -> None:
        """Raise `ValueError` where chunks do not divide the directions."""
        if self.chunk is not None and num_directions % self.chunk:
            raise ValueError(f"{num_directions} directions do not divide into {self.name}")

    def map(self, fn: Callable[..., Array], *columns: Array, sides: int = 1) -> Array:
        """`fn` of each row of the columns.

        Args:
          fn: From one row to a number.
          *columns: (rows,) each.
          sides: Rows a direction.
        """
        if self.chunk is None:
            return jax.vmap(fn)(*columns)
        # A row at a time: +eps and -eps share one perturbed copy.
        size = self.chunk * sides if self.both_sides else None
        return jax.lax.map(lambda row: fn(*row), columns, batch_size=size)


def sequential() -> Engine:
    """One loss after the other."""
    return Engine("sequential()", 1, both_sides=False)


def vmapped() -> Engine:
    """All losses at once."""
    return Engine("vmapped()", None)


def chunked(size: int) -> Engine:
    """Some directions at once, one chunk after the other.

    Args:
      size: Directions in a chunk; divides their number.

    Raises:
      ValueError: Below 1.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"chunked: got size {size!r}, wanted an integer of at least 1")
    return Engine(f"chunked({size})", size)
