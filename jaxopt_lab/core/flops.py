"""Arithmetic of matrix methods, from shapes alone.

A tree of layouts marks the leaves that are matrices, as in `jaxopt_lab.core.matrices`; trees may
hold arrays or shapes. A product of (m, k) and (k, n) counts 2 m k n.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxopt_lab.core.matrices import resolve_layout


def matrix_shapes(params: Any, axes: Any) -> Iterator[tuple[int, int, int]]:
    """(Number of matrices, rows, columns) of every matrix leaf.

    Args:
      params: Tree of arrays or shapes.
      axes: Tree of matrix axes, None for leaves that are no matrices.
    """
    leaves, structure = jax.tree.flatten(params)
    for leaf, layout in zip(leaves, structure.flatten_up_to(axes), strict=True):
        if layout is not None:
            yield resolve_layout(leaf.shape, layout).matrix_shape(leaf.shape)


def total_flops(params: Any, axes: Any, of: Callable[[int, int], float]) -> float:
    """FLOPs of one product or decomposition on every matrix of a tree.

    Args:
      params: Tree of arrays or shapes.
      axes: Tree of matrix axes, None for leaves that are no matrices.
      of: FLOPs for a matrix of so many rows and columns.
    """
    return float(sum(b * of(m, n) for b, m, n in matrix_shapes(params, axes)))


def two_sided_flops(m: int, n: int) -> int:
    """A X B for X of (m, n) and square A, B; as many as G X G^T and G^T Y G together.

    >>> two_sided_flops(2, 3) == 2 * 2 * 2 * 3 + 2 * 2 * 3 * 3
    True
    """
    return 2 * m * n * (m + n)


def power_iteration_flops(d: int) -> float:
    """X Q and its orthogonal factor, (d, d): 2 d^3, and 8/3 d^3 of Householder's QR with Q formed.

    >>> power_iteration_flops(3)
    126.0
    """
    return 14 * d**3 / 3


def newton_root_flops(d: int, iterations: int = 10) -> int:
    """X^(-1/4) by the coupled Newton iteration, (d, d): four products an iteration.

    >>> newton_root_flops(2, iterations=1)
    64
    """
    return iterations * 4 * 2 * d**3
