"""Which leaves are matrices: layouts given by the user, or decided by role and shape.

A leaf is a matrix where `matrix_axes` gives it a layout. Without `matrix_axes` the rule is:
vectors and scalars, embeddings and output heads are not matrices; everything else with two axes is.
An embedding or a head is recognised by an axis of vocabulary size, or by the name `embedding` that
Flax gives the table of its `Embed` layers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import optax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, KeyPath
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab.core.matrices import MatrixAxes, resolve_layout
from jaxopt_lab.optim.options import Routing

# A tree, a prefix of one, or a function of the parameters; None routes a leaf to the fallback.
MatrixAxesSpec: TypeAlias = Any

# Modules and leaves that hold a table of the vocabulary, whatever its size.
_TABLE_NAMES = {"embedding", "head", "lm_head"}

# The group of everything that is not a matrix, in states and tables.
FALLBACK_LABEL = "adamw"


class Route(NamedTuple):
    """Where one leaf goes, and why."""

    path: KeyPath
    axes: MatrixAxes | None  # None: not a matrix
    role: str  # matrix, vector, embedding, unspecified (no layout for more than two axes)


def _is_layout(node: Any) -> bool:
    return node is None or (hasattr(node, "reduction_axis") and hasattr(node, "output_axis"))


def _names(path: KeyPath) -> list[str]:
    """The names in a path; NNX variables end in their `value`, which is not one."""
    names = []
    for entry in path:
        if isinstance(entry, DictKey | FlattenedIndexKey):
            names.append(str(entry.key))
        elif isinstance(entry, GetAttrKey) and entry.name != "value":
            names.append(entry.name)
    return names


def _last_name(path: KeyPath) -> str:
    names = _names(path)
    return names[-1] if names else ""


def _by_shape(path: KeyPath, shape: tuple[int, ...], vocabulary_size: int) -> Route:
    if len(shape) < 2:
        return Route(path, None, "vector")
    if _last_name(path) == "embedding" or max(shape) >= vocabulary_size:
        return Route(path, None, "embedding")
    if len(shape) > 2:
        return Route(path, None, "unspecified")
    return Route(path, resolve_layout(shape, MuonDimensionNumbers()), "matrix")


def _given(path: KeyPath, shape: tuple[int, ...], layout: Any) -> Route:
    if layout is None:
        return Route(path, None, "vector" if len(shape) < 2 else "excluded")
    try:
        return Route(path, resolve_layout(shape, layout), "matrix")
    except ValueError as error:
        raise ValueError(f"matrix_axes of leaf {jax.tree_util.keystr(path)}: {error}") from None


def broadcast_prefix(
    name: str, prefix: Any, tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[Any]:
    """One entry of `prefix` for each leaf of `tree`.

    Args:
      name: The argument's name, for the error.
      prefix: A tree with the structure of `tree` or of its upper part, or a function of the tree.
      tree: The tree to match; leaves that Optax masked are not leaves.
      is_leaf: What counts as a leaf of the prefix.

    Raises:
      ValueError: The prefix does not match the tree.
    """
    # A tree may be callable as well: an Equinox module, say.
    if callable(prefix) and jax.tree_util.treedef_is_leaf(jax.tree.structure(prefix)):
        prefix = prefix(tree)
    entries: list[Any] = []

    def fill(entry: Any, subtree: Any) -> None:
        entries.extend([entry] * len(jax.tree.leaves(subtree)))

    try:
        jax.tree.map(fill, prefix, tree, is_leaf=is_leaf)
    except ValueError as error:
        reason = _mismatch(prefix, tree, is_leaf) or error
        raise ValueError(f"{name} does not match the parameter tree: {reason}") from None
    return entries


def _mismatch(prefix: Any, tree: Any, is_leaf: Callable[[Any], bool] | None) -> str | None:
    """The first place where a prefix does not match; None if only container types differ."""
    entries = [path for path, _ in jax.tree_util.tree_leaves_with_path(prefix, is_leaf=is_leaf)]
    leaves = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    for leaf in leaves:
        if not any(leaf[: len(entry)] == entry for entry in entries):
            return f"it has no entry for leaf {jax.tree_util.keystr(leaf)}"
    for entry in entries:
        if not any(leaf[: len(entry)] == entry for leaf in leaves):
            return f"there is no leaf for its entry {jax.tree_util.keystr(entry)}"
    return None


def route(
    params: optax.Params,
    matrix_axes: MatrixAxesSpec = None,
    routing: Routing = Routing(),
) -> list[Route]:
    """Decide for every leaf whether it is a matrix, and by which axes.

    Args:
      params: The parameter tree (arrays or `jax.ShapeDtypeStruct`).
      matrix_axes: `MuonDimensionNumbers` for the matrix leaves and None for the others: a tree like
        `params`, a prefix of one, or a function that returns one. None: by role and shape.
      routing: How leaves without a layout are told apart.

    Returns:
      One route a leaf, in the order of `jax.tree.leaves(params)`.

    Raises:
      ValueError: A layout does not fit its leaf, or a leaf is unspecified and that is an error.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if matrix_axes is None:
        routes = [_by_shape(path, x.shape, routing.vocabulary_size) for path, x in leaves]
    else:
        layouts = broadcast_prefix("matrix_axes", matrix_axes, params, _is_layout)
        routes = [_given(p, x.shape, a) for (p, x), a in zip(leaves, layouts, strict=True)]
    if routing.on_uncovered == "error":
        for r, (_, x) in zip(routes, leaves, strict=True):
            if r.role == "unspecified":
                raise ValueError(
                    f"leaf {jax.tree_util.keystr(r.path)} of shape {x.shape} has more than two "
                    "axes and matrix_axes does not say which of them form its matrices"
                )
    return routes


def route_with_embeddings(params: optax.Params, matrix_axes: MatrixAxesSpec = None) -> list[Route]:
    """All matrices of a model: those of `route`, and the tables of embeddings and output heads.

    What norms over a whole model count. A leaf without a layout is a table if it has two axes and
    its name or size says so; stacked vectors have two axes as well and are none.

    Args:
      params: The parameter tree (arrays or `jax.ShapeDtypeStruct`).
      matrix_axes: As in `route`.

    Returns:
      One route for each leaf that holds matrices.

    Raises:
      ValueError: A layout does not fit its leaf.
    """
    leaves = jax.tree.leaves(params)
    routes = []
    for r, x in zip(route(params, matrix_axes), leaves, strict=True):
        large = max(x.shape, default=0) >= Routing().vocabulary_size
        if r.axes is not None:
            routes.append(r)
        elif len(x.shape) == 2 and (large or _TABLE_NAMES & set(_names(r.path))):
            axes = resolve_layout(x.shape, MuonDimensionNumbers())
            routes.append(Route(r.path, axes, "embedding"))
    return routes


def require_matrices(params: optax.Params, matrix_axes: MatrixAxesSpec) -> list[Route]:
    """Routes of a tree whose every leaf must be a matrix (what a bare `scale_by_x` works on).

    Raises:
      ValueError: A leaf has no layout; the message names it and the way out.
    """
    layouts = MuonDimensionNumbers() if matrix_axes is None else matrix_axes
    leaves = jax.tree_util.tree_leaves_with_path(params)
    entries = broadcast_prefix("matrix_axes", layouts, params, _is_layout)
    routes = []
    for (path, x), layout in zip(leaves, entries, strict=True):
        if layout is None or (matrix_axes is None and len(x.shape) != 2):
            raise ValueError(
                f"leaf {jax.tree_util.keystr(path)} of shape {x.shape} is not a matrix; give its "
                "layout in matrix_axes, or route it elsewhere with optax.partition"
            )
        routes.append(_given(path, x.shape, layout))
    return routes


def partition_labels(
    label: str, matrix_axes: MatrixAxesSpec, routing: Routing
) -> Callable[[optax.Params], Any]:
    """A label function for `optax.partition`: `label` for matrices, "adamw" for the rest.

    Args:
      label: The label of the matrices.
      matrix_axes: As in `route`.
      routing: As in `route`.
    """

    def labels(params: optax.Params) -> Any:
        names = [
            FALLBACK_LABEL if r.axes is None else label for r in route(params, matrix_axes, routing)
        ]
        return jax.tree.unflatten(jax.tree.structure(params), names)

    return labels
