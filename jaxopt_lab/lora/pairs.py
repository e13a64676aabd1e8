"""The two factors of an adapter, found in a tree and updated together.

An adapter is a pair of leaves beside each other: `a` (inputs, rank) and `b` (rank, outputs), or
stacks of them. `lora_a`, `lora_b` (Flax NNX) and `kernel_lora_a`, `kernel_lora_b` (Qwix) are known
as well, in any kind of container.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxopt_lab.core.keys import path_names
from jaxopt_lab.optim.matrix_leaves import known_sharding

PAIRS = "pairs"
"""The group of the factors, in states and tables."""

WEIGHTS = "weights"
"""The group of the weights of WeightLoRA."""

REST = "adamw"
"""The group of everything else, as elsewhere in the library."""

_RIGHT_OF = {"a": "b", "lora_a": "lora_b", "kernel_lora_a": "kernel_lora_b"}

Names = tuple[str, ...]


class PairAt(NamedTuple):
    """Where a pair stands in the flattened tree."""

    path: Names  # of the kernel
    left: int
    right: int


def find_pairs(tree: Any) -> list[PairAt]:
    """All pairs of a tree, in the order of their left factors.

    >>> find_pairs({"up": {"kernel": {"a": 0.0, "b": 1.0}}, "bias": 2.0})
    [PairAt(path=('up', 'kernel'), left=1, right=2)]
    """
    paths = [path_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    at = {path: number for number, path in enumerate(paths)}
    found = []
    for number, path in enumerate(paths):
        right = (*path[:-1], _RIGHT_OF.get(path[-1], "")) if path else ()
        if right in at:
            found.append(PairAt(path[:-1], number, at[right]))
    return found


def require_pairs(tree: Any, who: str) -> list[PairAt]:
    """`find_pairs`, and their shapes fit.

    Raises:
      ValueError: There is none, or the ranks of two factors differ.
    """
    found, leaves = find_pairs(tree), jax.tree.leaves(tree)
    if not found:
        raise ValueError(
            f"{who} moves pairs of low-rank factors, and the parameters have none; give it the "
            "adapters that jaxopt_lab.lora.init returns, or use an optimizer for all parameters"
        )
    for pair in found:
        a, b = (tuple(leaves[i].shape) for i in pair[1:])
        fits = len(a) in (2, 3) and len(b) == len(a) and a[-1] == b[-2] and a[:-2] == b[:-2]
        if not fits or 0 in a + b:
            raise ValueError(
                f"adapter {'.'.join(pair.path)}: got factors of shapes {a} and {b}, wanted "
                "(inputs, rank) and (rank, outputs), or stacks of as many of both, all above 0"
            )
    return found


def labels(params: optax.Params) -> Any:
    """The group of each leaf, for `optax.partition`: factors, weights, the rest."""
    pairs = find_pairs(params)
    of_pairs, owners = {i for pair in pairs for i in pair[1:]}, {pair.path for pair in pairs}

    def label(number: int, path: Names) -> str:
        if number in of_pairs:
            return PAIRS
        return WEIGHTS if path[-1:] == ("weight",) and path[:-1] in owners else REST

    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    return treedef.unflatten([label(i, path_names(path)) for i, (path, _) in enumerate(paths)])


def stacked(x: Array) -> Array:
    """A factor with a leading axis, also if it is a single one."""
    return x if x.ndim == 3 else x[None]


def laid_out(array: Array, like: Any, axes: Sequence[int | None]) -> Array:
    """An array each of whose axes lies as one axis of a leaf does, or as none (replicated).

    It says so in its type, which `jaxopt_lab.state_shardings` reads.
    """
    sharding = known_sharding(like, None)
    if sharding is None:
        return array
    spec = (*sharding.spec, *[None] * (len(like.shape) - len(sharding.spec)))
    placed = PartitionSpec(*(None if axis is None else spec[axis] for axis in axes))
    return jax.sharding.reshard(array, NamedSharding(sharding.mesh, placed))


def with_auto_axes(fn: Callable[..., Any], arguments: Sequence[Any], like: Any) -> Any:
    """`fn(*arguments)`, with the partitioner at work inside where mesh axes are Explicit.

    All products here contract over sides of a factor or over rows of a batch, sharded or not, and
    their results are small.

    Args:
      fn: Of trees of arrays.
      arguments: The trees.
      like: Tree of arrays that lie as the results shall; None for a replicated result.
    """
    kinds = [getattr(jax.typeof(x), "sharding", None) for x in jax.tree.leaves(arguments)]
    meshes = [s.mesh for s in kinds if s is not None and AxisType.Explicit in s.mesh.axis_types]
    if not meshes:
        return fn(*arguments)
    everywhere = NamedSharding(meshes[0], PartitionSpec())

    def layout(x: Any) -> Any:
        return everywhere if x is None else jax.typeof(x).sharding

    out = jax.tree.map(layout, like, is_leaf=lambda x: x is None)
    return jax.sharding.auto_axes(fn, out_sharding=out)(*arguments)


def unflatten_pairs(
    treedef: Any, size: int, pairs: Sequence[PairAt], values: Sequence[tuple[Any, Any]]
) -> Any:
    """A tree with the two values of each pair in place of its factors."""
    leaves: list[Any] = [optax.MaskedNode()] * size
    for pair, (left, right) in zip(pairs, values, strict=True):
        leaves[pair.left], leaves[pair.right] = left, right
    return treedef.unflatten(leaves)


def rate_at(rate: optax.ScalarOrSchedule, count: Array) -> Any:
    """The rate of a step."""
    return rate(count) if callable(rate) else rate


def zero_count(a: Any) -> Array:
    """An int32 zero for each adapter of a stack, laid out as the stack."""
    shape = a.shape[:-2]
    return laid_out(jnp.zeros(shape, jnp.int32), a, tuple(range(len(shape))))
