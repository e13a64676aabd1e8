"""Where the factors of an adapter start."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxopt_lab.core.keys import leaf_key
from jaxopt_lab.core.matrices import batch_first
from jaxopt_lab.core.numerics import widened
from jaxopt_lab.core.packed import unpacked
from jaxopt_lab.lora.config import AdapterSpec, as_array

Start = Callable[[Array, AdapterSpec, Any], tuple[Array, Array]]


def _drawn(draw: Callable[[Array, int, int], Array]) -> Start:
    """A start with `a` drawn for each matrix by its own key, and `b` zero."""

    def start(key: Array, entry: AdapterSpec, kernel: Any) -> tuple[Array, Array]:
        del kernel
        _, n, m = entry.matrix_shape
        path = tuple(jax.tree_util.DictKey(name) for name in entry.path)
        own = jax.vmap(jax.random.fold_in, (None, 0))(leaf_key(key, path), as_array(entry.kept))
        a = jax.vmap(lambda key: draw(key, n, entry.rank))(own)
        return a, jnp.zeros((len(entry.kept), entry.rank, m))

    return start


def _uniform(key: Array, n: int, rank: int, bound: float) -> Array:
    return jax.random.uniform(key, (n, rank), minval=-bound, maxval=bound)


def _of_kernel(split: Callable[[Array, int, float], tuple[Array, Array]]) -> Start:
    def start(key: Array, entry: AdapterSpec, kernel: Any) -> tuple[Array, Array]:
        del key
        count, n, m = entry.matrix_shape
        found = widened(batch_first(unpacked(kernel), entry.axes).reshape(count, n, m))
        return split(found[as_array(entry.kept)], entry.rank, entry.scale)

    return start


def balanced(matrix: Array, rank: int) -> tuple[Array, Array]:
    r"""The best approximation of a rank, $U_r S_r^{1/2}$ and $S_r^{1/2} V_r^\top$; takes stacks."""
    u, s, vt = jnp.linalg.svd(widened(matrix), full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    return u[..., :rank] * root[..., None, :], root[..., None] * vt[..., :rank, :]


def _principal(matrix: Array, rank: int, scale: float) -> tuple[Array, Array]:
    a, b = balanced(matrix, rank)
    return a / math.sqrt(scale), b / math.sqrt(scale)


def _orthonormal(matrix: Array, rank: int, scale: float) -> tuple[Array, Array]:
    # As peft: the scale is not divided out. Decomposed is (outputs, inputs).
    del scale
    q, r = jnp.linalg.qr(jnp.matrix_transpose(matrix))
    return jnp.matrix_transpose(r[..., :rank, :]), jnp.matrix_transpose(q[..., :rank])


FROM_KERNEL = {"pissa", "olora"}
"""Starts from a product that is not zero, which the base has to lose."""

START: dict[str, Start] = {
    "default": _drawn(lambda key, n, r: _uniform(key, n, r, 1 / math.sqrt(n))),
    "gaussian": _drawn(lambda key, n, r: jax.random.normal(key, (n, r)) / r),
    "wlora": _drawn(lambda key, n, r: _uniform(key, n, r, 1 / math.sqrt(r))),
    "pissa": _of_kernel(_principal),
    "olora": _of_kernel(_orthonormal),
}
