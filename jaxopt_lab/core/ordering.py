"""An order for operations that do not depend on each other."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def after(x: Array, *earlier: Array | None) -> Array:
    """`x` as it is, but not before all of `earlier` is there.

    XLA's CPU runtime starts independent operations at once, and two decompositions (LAPACK calls
    over a batch) that run at once on a machine with two cores wait for each other for ever: each
    holds one of the two threads and asks for more. An optimisation barrier does not help, it is
    gone by then; a number that happens to be zero does. Other backends run operations in order.

    Args:
      x: What shall come later.
      *earlier: What shall come first.
    """
    if jax.default_backend() != "cpu":
        return x
    for each in earlier:
        if each is not None and each.size:
            number = jnp.nan_to_num(each.ravel()[0])
            x = x + jnp.minimum(jnp.abs(number), 0).astype(x.dtype)
    return x
