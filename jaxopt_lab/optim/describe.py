"""What an optimizer does with each leaf, and how much state it keeps for it."""

import math
import warnings
from typing import Any, NamedTuple

import jax
import optax
from jax.tree_util import KeyPath, keystr

from jaxopt_lab.optim.routing import FALLBACK_LABEL, route


class Row(NamedTuple):
    """One parameter leaf."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    role: str  # matrix, vector, embedding, head, excluded, unspecified
    rule: str  # the group that updates it ("outer/inner" in a partition), or the state that does
    state_bytes: int


class Description(NamedTuple):
    """Routing table of an optimizer; `str()` of it is the printed form."""

    rows: tuple[Row, ...]
    total_bytes: int  # whole state
    shared_bytes: int  # state that belongs to no single leaf: counters, keys, injected numbers

    def __str__(self) -> str:
        """The table as aligned text."""
        header = ("path", "shape", "dtype", "role", "rule", "state bytes")
        cells = [
            (r.path, _sides(r.shape), r.dtype, r.role, r.rule, f"{r.state_bytes:,}")
            for r in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]

        def line(row: tuple[str, ...]) -> str:
            *texts, number = row
            padded = [text.ljust(width) for text, width in zip(texts, widths[:-1], strict=True)]
            return "  ".join([*padded, number.rjust(widths[-1])])

        totals = f"total state {self.total_bytes:,} bytes, of which {self.shared_bytes:,} shared"
        notes = [
            f"note: {r.path} has {len(r.shape)} axes and no layout, so it is updated by {r.rule}; "
            "say in matrix_axes which axes form its matrices"
            for r in self.rows
            if r.role == "unspecified"
        ]
        return "\n".join([line(header), *map(line, cells), totals, *notes])


def describe(tx: optax.GradientTransformation, params: optax.Params) -> Description:
    """Tabulate which leaf gets which rule, and the bytes of state it costs.

    The rule is read off the state itself, so this works for any Optax chain: a leaf belongs to the
    `optax.partition` group that keeps state for it (`outer/inner` where partitions are nested) or,
    without a partition, to the states that do.

    Args:
      tx: Any transformation.
      params: The parameters, or `jax.ShapeDtypeStruct`s.

    Returns:
      A `Description`; print it.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.zeros((4, 8)), "bias": jnp.zeros(8)}
      >>> print(describe(optax.adam(1e-3), params))
      path        shape  dtype    role    rule         state bytes
      ['bias']    8      float32  vector  ScaleByAdam           64
      ['kernel']  4x8    float32  matrix  ScaleByAdam          256
      total state 324 bytes, of which 4 shared
    """
    bare = jax.tree_util.treedef_is_leaf(jax.tree.structure(params))
    # Only a path tells the state of a leaf from what all leaves share.
    params = [params] if bare else params
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the notes say it
        state = jax.eval_shape(tx.init, params)
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda p: p, params))
    owners = {path: i for i, (path, _) in enumerate(leaves)}
    sizes: list[int] = [0] * len(leaves)
    rules: list[dict[str, bool]] = [{} for _ in leaves]  # a dict keeps the order of appearance
    shared = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        owner = next((owners[path[k:]] for k in range(len(path)) if path[k:] in owners), None)
        if owner is None:
            shared += _bytes(leaf)
        else:
            sizes[owner] += _bytes(leaf)
            rule, of_matrices = _rule(path, state)
            rules[owner][rule] = of_matrices
    names = [", ".join(rule) or "stateless" for rule in rules]
    roles = [
        "matrix" if len(x.shape) > 1 and any(rule.values()) else _role(r.role, name)
        for r, (_, x), rule, name in zip(route(params), leaves, rules, names, strict=True)
    ]
    rows = tuple(
        Row("" if bare else keystr(path), tuple(x.shape), str(x.dtype), role, name, size)
        for (path, x), role, name, size in zip(leaves, roles, names, sizes, strict=True)
    )
    return Description(rows, shared + sum(sizes), shared)


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "()"


def _bytes(leaf: Any) -> int:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def _role(by_default: str, rule: str) -> str:
    """The default role, corrected where the optimizer was told otherwise."""
    *_, group = rule.split("/")
    if group == FALLBACK_LABEL:
        return "excluded" if by_default == "matrix" else by_default
    return "matrix" if by_default == "unspecified" else by_default


def _rule(path: KeyPath, state: Any) -> tuple[str, bool]:
    """The partition groups on the way to a state leaf or, without one, its innermost state.

    And whether the innermost group holds the matrices of a method: its other group is AdamW's.
    """
    node, name, groups, of_matrices = state, "", [], False
    for depth, entry in enumerate(path):
        if isinstance(node, optax.transforms.PartitionState):
            groups.append(str(getattr(path[depth + 1], "key", path[depth + 1])))
            of_matrices = FALLBACK_LABEL in node.inner_states and groups[-1] != FALLBACK_LABEL
        if type(node).__name__.endswith("State"):
            name = type(node).__name__.removesuffix("State")
        node = _children(node)[entry]
    return "/".join(groups) or name, of_matrices


def _children(node: Any) -> dict[Any, Any]:
    one_level = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node)
    return {path[0]: child for path, child in one_level}
