"""What training changes, and the split of parameters into what moves and what is frozen."""

from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree, UInt32

from jaxopt_lab.optim.shardings import state_shardings


class Adapted(NamedTuple):
    """Parameters that stay as they are, and what is trained beside them."""

    base: PyTree
    beside: PyTree  # such as low-rank adapters


class TrainState(NamedTuple):
    """Everything that a run needs to go on; what a checkpoint holds."""

    step: Int[Array, ""]  # optimizer steps taken, skipped ones included
    skipped: Int[Array, ""]  # steps whose update was dropped because something was not finite
    params: PyTree  # what moves; `MaskedNode` where a parameter is frozen
    frozen: PyTree  # what does not, `MaskedNode` elsewhere; () if everything moves; see `split`
    opt_state: PyTree  # of `params` alone
    key: UInt32[Array, " words"]  # data of the key that every step's key is derived from


def split(params: PyTree, trainable: PyTree | None) -> tuple[PyTree, PyTree]:
    """Parameters that move, and parameters that are frozen.

    Both keep the structure around their leaves, with `optax.MaskedNode` in place of the others, so
    that transforms see what they see inside of `optax.masked`. Of `Adapted` parameters the part
    beside them moves, and the base is frozen.

    >>> split({"a": 1.0, "b": 2.0}, {"a": True, "b": False})
    ({'a': 1.0, 'b': MaskedNode()}, {'a': MaskedNode(), 'b': 2.0})

    Args:
      params: Parameters, or anything with a leaf for each of them, such as their shardings.
      trainable: Tree of bools like the parameters; None lets everything move.

    Raises:
      ValueError: If the trees do not match.
    """
    if isinstance(params, Adapted):
        return params.beside, params._replace(beside=())
    if trainable is None:
        return params, ()
    moving = jax.tree.map(lambda moves, x: x if moves else optax.MaskedNode(), trainable, params)
    frozen = jax.tree.map(lambda moves, x: optax.MaskedNode() if moves else x, trainable, params)
    return moving, frozen


def merged(params: PyTree, frozen: PyTree) -> PyTree:
    """All parameters again, as a loss takes them.

    >>> merged(*split({"a": 1.0, "b": 2.0}, {"a": True, "b": False}))
    {'a': 1.0, 'b': 2.0}
    """
    if isinstance(frozen, Adapted):
        return frozen._replace(beside=params)
    if isinstance(frozen, tuple) and not frozen:
        return params

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    return jax.tree.map(lambda x, y: y if is_masked(x) else x, params, frozen, is_leaf=is_masked)


def state_layout(
    tx: optax.GradientTransformation,
    abstract: TrainState,
    param_shardings: PyTree,
    trainable: PyTree | None = None,
) -> TrainState:
    """Where the leaves of a state lie: a `NamedSharding` each; counters and the key everywhere.

    Args:
      tx: The optimizer.
      abstract: The state as shapes and dtypes.
      param_shardings: Tree of NamedSharding, like all parameters.
      trainable: As for `split`.
    """
    moving, frozen = split(param_shardings, trainable)
    everywhere = NamedSharding(jax.tree.leaves(param_shardings)[0].mesh, PartitionSpec())
    layout: Any = jax.tree.map(lambda leaf: everywhere, abstract)
    return layout._replace(
        params=moving, frozen=frozen, opt_state=state_shardings(tx, abstract.params, moving)
    )
