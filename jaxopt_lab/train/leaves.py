"""Descriptions of the leaves of a state: what a checkpoint says about itself, compared by name."""

from typing import Any

import jax
from jaxtyping import PyTree


def describe_leaves(tree: PyTree) -> list[list[Any]]:
    """Path, shape and dtype of every leaf, as JSON; without orbax's placeholders.

    >>> describe_leaves({"a": jax.ShapeDtypeStruct((2, 3), "float32")})
    [['a', [2, 3], 'float32']]
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [
        [jax.tree_util.keystr(path, simple=True, separator="/"), list(x.shape), str(x.dtype)]
        for path, x in leaves
        if x is not ...
    ]


def first_difference(wanted: list[list[Any]], found: list[list[Any]]) -> str | None:
    """Names the first leaf that two descriptions do not share; None if they are equal.

    >>> first_difference([["w", [2], "float32"]], [["w", [3], "float32"]])
    'w is float32(3) in the checkpoint and float32(2) in this run'
    """
    stored = {path: (tuple(shape), dtype) for path, shape, dtype in found}
    for path, shape, dtype in wanted:
        if path not in stored:
            return f"{path} is missing in the checkpoint"
        if stored[path] != (tuple(shape), dtype):
            there, here = _leaf_text(*stored[path]), _leaf_text(shape, dtype)
            return f"{path} is {there} in the checkpoint and {here} in this run"
    known = {path for path, _, _ in wanted}
    extra = next((path for path, _, _ in found if path not in known), None)
    return None if extra is None else f"{extra} is in the checkpoint and not in this run"


def _leaf_text(shape: Any, dtype: str) -> str:
    return f"{dtype}({','.join(map(str, shape))})"
