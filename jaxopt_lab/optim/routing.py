"""Which leaves are matrices: layouts given by the user, or decided by role and shape.

A leaf is a matrix where `matrix_axes` gives it a layout. Without `matrix_axes` the rule is:
vectors and scalars, embeddings and output heads are not matrices; everything else with two axes is.
An embedding or a head is recognised by its name (`optim.roles`) or by an axis of vocabulary size; a
bias or a scale is a vector, however many axes it has.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import KeyPath, keystr, tree_leaves_with_path
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab.core.checks import DTYPES, NO_TREE, check_tree
from jaxopt_lab.core.matrices import MatrixAxes, MatrixLayout, resolve_layout
from jaxopt_lab.core.packed import refuse_packed
from jaxopt_lab.optim.options import Routing
from jaxopt_lab.optim.roles import module_names, names_a_table, role_by_name

# A tree, a prefix of one, or a function of the parameters; None routes a leaf to the fallback.
MatrixAxesSpec: TypeAlias = Any

# The group of everything that is not a matrix, in states and tables.
FALLBACK_LABEL = "adamw"


class Route(NamedTuple):
    """Where one leaf goes, and why."""

    path: KeyPath
    axes: MatrixAxes | None  # None: not a matrix
    role: str  # matrix, vector, embedding, head, excluded, unspecified (more than two axes)


def float_leaves(params: optax.Params, like: optax.Params | None = None) -> optax.Params:
    """The tree with its Python and NumPy numbers as arrays; every public factory asks for this.

    Args:
      params: The parameters, or their gradients.
      like: The parameters that the gradients are of. Leaves that only one tree has do not count.

    Raises:
      TypeError: A leaf is no array of real floating-point numbers; the message names it.
      ValueError: A gradient has another shape than its leaf.
    """
    shapes = {path: np.shape(x) for path, x in tree_leaves_with_path(like)}

    def checked(path: KeyPath, x: Any) -> Any:
        if isinstance(x, float | np.ndarray | np.generic):
            x = jnp.asarray(x, jnp.result_type(x) if hasattr(x, "dtype") else float)
        dtype = getattr(x, "dtype", None)
        floating = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
        if floating and x.dtype.itemsize > 1:
            if (shape := np.shape(x)) != (wanted := shapes.get(path, shape)):
                name = f"gradient of leaf {keystr(path)}"
                raise ValueError(f"{name}: got shape {shape}, wanted {wanted}")
            return x
        refuse_packed(params)  # says more than their first array would
        if floating:
            wanted = f"one of {', '.join(DTYPES)}"
        elif dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating):
            wanted = "real numbers: keep real and imaginary part as two leaves"
        else:
            wanted = (
                "arrays of floating-point numbers: leave other leaves out, with "
                "eqx.filter(model, eqx.is_inexact_array) or nnx.state(model, nnx.Param), say"
            )
        got = type(x).__name__ if dtype is None else f"dtype {dtype}"
        raise TypeError(f"leaf {keystr(path)}: got {got}, wanted {wanted}")

    return jax.tree_util.tree_map_with_path(checked, params)


def _is_layout(node: Any) -> bool:
    return node is None or isinstance(node, MatrixLayout)


def _by_shape(path: KeyPath, shape: tuple[int, ...], vocabulary_size: int) -> Route:
    if len(shape) < 2 or (len(shape) > 2 and sum(side > 1 for side in shape) < 2):
        return Route(path, None, "vector")
    named = role_by_name(path)
    if named:
        return Route(path, None, named)
    if max(shape) >= vocabulary_size:
        return Route(path, None, "embedding")
    if len(shape) > 2:
        return Route(path, None, "unspecified")
    return Route(path, resolve_layout(shape, MuonDimensionNumbers()), "matrix")


def _given(path: KeyPath, shape: tuple[int, ...], layout: Any) -> Route:
    if layout is None:
        return Route(path, None, "vector" if len(shape) < 2 else "excluded")
    try:
        if not _is_layout(layout):
            raise ValueError(f"got {layout!r}, wanted MuonDimensionNumbers or None")
        return Route(path, resolve_layout(shape, layout), "matrix")
    except ValueError as error:
        raise ValueError(f"matrix_axes of leaf {keystr(path)}: {error}") from None


def _childless(node: Any) -> bool:
    return jax.tree.structure(node, is_leaf=lambda x: x is not node).num_leaves == 0


def _hides(node: Any) -> bool:
    """Whether a node without children stands for a subtree: Optax's masks and placeholders do."""
    if isinstance(node, optax.MaskedNode):
        return True
    return _childless(node) and not isinstance(node, dict | list | tuple | None)


def broadcast_prefix(
    name: str, prefix: Any, tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[Any]:
    """One entry of `prefix` for each leaf of `tree`.

    Args:
      name: The argument's name, for the error.
      prefix: A tree with the structure of `tree` or of its upper part, or a function of the tree.
      tree: The tree to match. Where a mask hides a subtree, entries of `prefix` are ignored.
      is_leaf: What counts as a leaf of the prefix.

    Raises:
      ValueError: The prefix does not match the tree.
    """
    # A tree may be callable as well: an Equinox module, say.
    if callable(prefix) and jax.tree_util.treedef_is_leaf(jax.tree.structure(prefix)):
        prefix = prefix(tree)
    given = dict(tree_leaves_with_path(prefix, is_leaf=is_leaf))
    entries: list[Any] = []
    known: set[KeyPath] = set()
    hidden: set[KeyPath] = set()
    for path, node in tree_leaves_with_path(tree, is_leaf=_childless):
        above = [path[:k] for k in range(len(path) + 1)]
        known.update(above)
        if _hides(node):
            hidden.add(path)
        elif not _childless(node):
            entry = next((p for p in above if p in given), None)
            if entry is None:
                reason = f"it has no entry for leaf {keystr(path)}"
                raise ValueError(f"{name} does not match the parameter tree: {reason}")
            entries.append(given[entry])
    for path in given:
        if path not in known and not any(path[:k] in hidden for k in range(len(path))):
            reason = f"there is no leaf for its entry {keystr(path)}"
            raise ValueError(f"{name} does not match the parameter tree: {reason}")
    return entries


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
    leaves = [(path, tuple(jnp.shape(x))) for path, x in tree_leaves_with_path(params)]
    if matrix_axes is None:
        routes = [_by_shape(path, shape, routing.vocabulary_size) for path, shape in leaves]
    else:
        check_matrix_axes(matrix_axes)
        layouts = broadcast_prefix("matrix_axes", matrix_axes, params, _is_layout)
        routes = [_given(p, s, a) for (p, s), a in zip(leaves, layouts, strict=True)]
    if routing.on_uncovered == "error":
        for r, (_, shape) in zip(routes, leaves, strict=True):
            if r.role == "unspecified":
                raise ValueError(
                    f"leaf {keystr(r.path)} of shape {shape} has more than two "
                    "axes and matrix_axes does not say which of them form its matrices"
                )
    return routes


def check_matrix_axes(matrix_axes: MatrixAxesSpec) -> None:
    """Raise `ValueError` for a number: what `optax.inject_hyperparams` makes of a function."""
    if isinstance(matrix_axes, NO_TREE):
        check_tree(
            "matrix_axes",
            matrix_axes,
            "MuonDimensionNumbers and None",
            "optax.inject_hyperparams takes a function for a schedule unless told "
            'static_args=("matrix_axes",), so say that or give the tree',
        )


def warn_unspecified(routes: Sequence[Route], shapes: Sequence[tuple[int, ...]]) -> None:
    """One warning that names the leaves left to AdamW because they have no layout."""
    names = [
        f"{keystr(r.path)} {shape}"
        for r, shape in zip(routes, shapes, strict=True)
        # A list of bare arrays, as in Optax's own tests, has no names that could say more.
        if r.role == "unspecified" and any(module_names(r.path))
    ]
    if names:
        warnings.warn(
            "AdamW updates these leaves, because matrix_axes does not say which of their axes form "
            f"matrices: {', '.join(names)}. Give a layout, or None for leaves that are no "
            "matrices; jaxopt_lab.flax_matrix_axes(params) knows most Flax models",
            stacklevel=3,
        )


def checks_leaves(
    tx: optax.GradientTransformationExtraArgs, matrix_axes: MatrixAxesSpec, routing: Routing
) -> optax.GradientTransformationExtraArgs:
    """`tx`, whose `init` checks leaves and warns of those left to AdamW for want of a layout."""
    check_matrix_axes(matrix_axes)

    def init(params: optax.Params) -> optax.OptState:
        params = float_leaves(params)
        if matrix_axes is None and routing.on_uncovered == "adamw":
            shapes = [tuple(x.shape) for x in jax.tree.leaves(params)]
            warn_unspecified(route(params, None, routing), shapes)
        return tx.init(params)

    def update(updates, state, params=None, **extra_args):
        params = None if params is None else float_leaves(params)
        return tx.update(float_leaves(updates), state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


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
        table = large or names_a_table(module_names(r.path))
        if r.axes is not None:
            routes.append(r)
        elif len(x.shape) == 2 and table and role_by_name(r.path) != "vector":
            axes = resolve_layout(x.shape, MuonDimensionNumbers())
            routes.append(Route(r.path, axes, "embedding"))
    return routes


def require_matrices(params: optax.Params, matrix_axes: MatrixAxesSpec) -> list[Route]:
    """Routes of a tree whose every leaf must be a matrix (what a bare `scale_by_x` works on).

    Raises:
      TypeError: A leaf is no array of real floating-point numbers.
      ValueError: A leaf has no layout; the message names it and the way out.
    """
    check_matrix_axes(matrix_axes)
    params = float_leaves(params)
    layouts = MuonDimensionNumbers() if matrix_axes is None else matrix_axes
    leaves = tree_leaves_with_path(params)
    entries = broadcast_prefix("matrix_axes", layouts, params, _is_layout)
    routes = []
    for (path, x), layout in zip(leaves, entries, strict=True):
        if layout is None or (matrix_axes is None and len(x.shape) != 2):
            raise ValueError(
                f"leaf {keystr(path)} of shape {x.shape} is not a matrix; give its "
                "layout in matrix_axes, or route it elsewhere with optax.partition"
            )
        routes.append(_given(path, x.shape, layout))
    return routes


def partition_labels(
    label: str, matrix_axes: MatrixAxesSpec, routing: Routing
) -> Callable[[optax.Params], Any]:
    """A label function for `optax.partition`: `label` for matrices, "adamw" for the rest."""

    def labels(params: optax.Params) -> Any:
        names = [
            FALLBACK_LABEL if r.axes is None else label for r in route(params, matrix_axes, routing)
        ]
        return jax.tree.unflatten(jax.tree.structure(params), names)

    return labels
