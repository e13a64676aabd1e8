r"""Losses that perturb their layers inside of their own loop: `probe_fn` in place of `value_fn`.

Perturbed parameters are a second copy of a model. A model whose layers are stacks of arrays needs
one perturbed layer at a time: `probe_fn(params, direction, scale)` is the loss at
$x + \text{scale} \cdot z$, and asks `direction` for the part of $z$ that it is about to use, by
the name of the leaf:

* `direction.layer("layers/kernel", i)`: layer i of a stack;
* `direction.rows("embedding", rows)`, `direction.columns("head", start, size)`: a part of a table;
* `direction.slice("scale")`: a vector.

The numbers are those that engines add to whole trees, so estimates are the same, and the means of
LDSD and the blocks of JAGUAR are in them. `matrix_axes` has to say that first axes count layers.
For decoders of this library, `jaxopt_lab.models.probe_loss(config, batch)` is a `probe_fn`.

`sequential()` evaluates one loss after the other. Other engines put both signs of a direction into
one loop over the layers, which draws once: two perturbed layers, and a draw less.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath
from jaxtyping import Array

from jaxopt_lab.core.keys import path_names
from jaxopt_lab.core.numerics import perturbed
from jaxopt_lab.zeroth_order.directions import Direction, Leaf, Sampler
from jaxopt_lab.zeroth_order.losses import check_loss
from jaxopt_lab.zeroth_order.samplers import gaussian

ProbeFn = Callable[[Any, Direction, Array], Array]


def perturbed_layer(
    name: str, stack: Any, direction: Direction, scale: Array, index: Array | int
) -> Any:
    """One layer of a stack, perturbed: for the body of a scan over layers.

    Args:
      name: Of the stack: the names along its path in the parameters, joined by "/".
      stack: Tree of arrays (layers, ...).
      direction: As `probe_fn` is given it.
      scale: As `probe_fn` is given it.
      index: Of the layer.

    Returns:
      A tree of arrays (...) in their own dtypes.

    Example:
      >>> from jaxopt_lab import zeroth_order as zo
      >>> from optax.contrib import MuonDimensionNumbers
      >>> def probe_fn(params, direction, scale):
      ...     def layer(x, i):
      ...         w = perturbed_layer("layers", params["layers"], direction, scale, i)
      ...         return jnp.tanh(x @ w["kernel"]), None
      ...     return jnp.mean(jax.lax.scan(layer, jnp.ones((2, 4)), jnp.arange(3))[0])
      >>> params = {"layers": {"kernel": jnp.full((3, 4, 4), 0.1)}}
      >>> stacked = {"layers": {"kernel": MuonDimensionNumbers(1, 2)}}
      >>> tx = zo.mezo(1e-2, key=jax.random.key(0), probes=zo.Probes(matrix_axes=stacked))
      >>> updates, state = tx.update(None, tx.init(params), params, probe_fn=probe_fn)
      >>> updates["layers"]["kernel"].shape
      (3, 4, 4)
    """

    def one(path: KeyPath, x: Array) -> Array:
        return perturbed(
            x[index], scale, direction.layer("/".join((name, *path_names(path))), index)
        )

    return jax.tree_util.tree_map_with_path(one, stack)


def check_probe_fn(
    probe_fn: ProbeFn,
    params: optax.Params,
    leaves: Sequence[Leaf],
    sampler: Sampler,
    eps: Any = None,
) -> None:
    """Raise where a loss cannot be evaluated layer by layer, before it is.

    Args:
      probe_fn: The loss.
      params: Where it is to be evaluated.
      leaves: As from `leaves_of`.
      sampler: Of the directions.
      eps: Size of the perturbations.

    Raises:
      ValueError: As for `value_fn`; the model has no stacked layers, or no such leaf.
    """
    # Where directions have no factors, that of another sampler: some draw what looks like dropout.
    sampler = gaussian() if sampler.factors is None else sampler
    direction = Direction(sampler, jax.random.key(0, impl="threefry2x32"), 0, leaves)
    check_loss("probe_fn", lambda p: probe_fn(p, direction, jnp.zeros(())), params, eps)
