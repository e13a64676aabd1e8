r"""Samplers of directions.

All but `blocks` and `single_coordinate` have entries of variance 1, so that $E\, z z^\top = I$ and
the estimate $D z$ is unbiased for a linear loss: `sphere` includes the factor $\sqrt d$ that a
vector of norm 1 lacks.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxopt_lab.core import counter_noise
from jaxopt_lab.core.keys import purpose_key
from jaxopt_lab.zeroth_order.directions import Leaf, Part, Sampler, folded

# Folded into the key of a slice for its subsets of rows and columns: no row has these numbers.
_BLOCK_AXES = (2**32 - 1, 2**32 - 2)


def gaussian() -> Sampler:
    """Independent standard normal entries."""
    return Sampler("gaussian", _normals)


def signs() -> Sampler:
    r"""Independent random signs: 32 entries from one word, so drawing costs next to nothing.

    For a linear loss $E \lVert g \rVert^2$ is $d \lVert \nabla f \rVert^2$, with `gaussian` it
    is $(d + 2) \lVert \nabla f \rVert^2$.
    """
    return Sampler("signs", _signs)


def sphere() -> Sampler:
    """Uniform on the sphere of radius sqrt(d) of all trainable entries: a normalised Gaussian.

    The norm needs all the noise before any of it is used, so it is drawn twice.
    """

    def radius(step_key: Array, key: Array, leaves: Sequence[Leaf]) -> Array:
        del step_key
        moving = [leaf for leaf in leaves if leaf.moves]
        squares = (jnp.sum(jnp.square(_normals(leaf.whole(key), None))) for leaf in moving)
        entries = sum(math.prod(leaf.shape) for leaf in moving)
        return jnp.sqrt(entries / sum(squares, jnp.zeros(())))

    return Sampler("sphere", lambda part, r: r * _normals(part, None), radius)


def orthogonal() -> Sampler:
    """Matrices with orthonormal rows or columns, uniform; other leaves standard normal.

    The entries of an m x n matrix have variance 1 / max(m, n).
    """

    def slices(part: Part, _: Any) -> Array:
        leaf = part.leaf
        if leaf.axes is None:
            return _normals(part, None)
        m, n = leaf.slice_shape
        x = haar(counter_noise.normals(part.keys, (max(m, n), min(m, n)), leaf.dtype))
        x = x if m >= n else x.mT
        return part.cut(x)

    return Sampler("orthogonal", slices)


def blocks(
    *, rows_ratio: float = 0.1, cols_ratio: float = 0.1, random_signs: bool = False
) -> Sampler:
    """JAGUAR's blocks: 1 on random rows x columns of every matrix at once, 0 elsewhere.

    Of a vector, `rows_ratio` of the entries; a scalar always takes part. At least one row and one
    column are drawn, without replacement.

    Args:
      rows_ratio: Share of the rows.
      cols_ratio: Share of the columns.
      random_signs: Entries -1 or 1. Every entry of the estimate is then unbiased, where ones give
        all of them the sum of the partial derivatives of the whole block.

    Raises:
      ValueError: A ratio is not in (0, 1].
    """
    _check_ratio(rows_ratio=rows_ratio, cols_ratio=cols_ratio)

    def support(part: Part, _: Any) -> Array:
        shape = part.leaf.slice_shape
        if not shape:
            return jnp.ones(part.keys.shape, bool)
        ratios = (rows_ratio, cols_ratio)
        chosen = [
            _subset(folded(part.keys, jnp.array([word], jnp.uint32))[..., 0], size, ratio)
            for word, size, ratio in zip(_BLOCK_AXES, shape, ratios, strict=False)
        ]
        if part.rows is not None:
            chosen[0] = chosen[0][part.rows]
        if part.columns is not None:
            chosen[1] = jax.lax.dynamic_slice_in_dim(chosen[1], *part.columns)
        return chosen[0] if len(shape) == 1 else chosen[0][..., :, None] & chosen[1][..., None, :]

    def ones(part: Part, _: Any) -> Array:
        return jnp.ones(_shape(part), jnp.float32)

    slices = _signs if random_signs else ones
    return Sampler("blocks", slices, support=support, support_of=lambda z: z != 0)


def single_coordinate() -> Sampler:
    """1 at one entry of the whole tree, drawn uniformly; 0 elsewhere."""

    def chosen(step_key: Array, key: Array, leaves: Sequence[Leaf]) -> Array:
        del step_key
        entries = sum(math.prod(leaf.shape) for leaf in leaves if leaf.moves)
        if entries >= 2**31:
            raise ValueError(f"single_coordinate: {entries} entries, at most 2^31 - 1 are possible")
        return jax.random.randint(purpose_key(key, "single coordinate"), (), 0, entries)

    def support(part: Part, entry: Array) -> Array:
        leaf, shape = part.leaf, part.leaf.slice_shape
        inside = part.cut(jnp.arange(math.prod(shape)).reshape(shape))
        start = leaf.entries_before + part.per_slice(part.numbers) * math.prod(shape)
        return start + inside == entry

    def ones(part: Part, _: Any) -> Array:
        return jnp.ones(_shape(part), jnp.float32)

    return Sampler("single_coordinate", ones, chosen, support=support, support_of=lambda z: z != 0)


def sparse(
    *, params_ratio: float = 0.1, per_probe: bool = False, noise: Sampler | None = None
) -> Sampler:
    """Noise on a random subset of the matrices and vectors; 0 on the others.

    A stack of layers counts as its matrices.

    Args:
      params_ratio: Share of them; at least one is drawn.
      per_probe: Each probe has a subset of its own; False: one a step, shared by all of them.
      noise: What is drawn on the subset; None: `gaussian()`.

    Raises:
      ValueError: The ratio is not in (0, 1].
    """
    _check_ratio(params_ratio=params_ratio)
    inner = gaussian() if noise is None else noise

    def subset(step_key: Array, key: Array, leaves: Sequence[Leaf]) -> tuple[Array, Any]:
        total = sum(leaf.slices for leaf in leaves if leaf.moves)
        own = key if per_probe else step_key
        chosen = _subset(purpose_key(own, "sparse subset"), total, params_ratio)
        return chosen, inner.shared(step_key, key, leaves)

    def support(part: Part, shared: tuple[Array, Any]) -> Array:
        return part.per_slice(shared[0][part.leaf.slices_before + part.numbers])

    return Sampler(
        "sparse",
        lambda part, shared: inner.slices(part, shared[1]),
        subset,
        support=support,
        support_of=lambda z: jnp.any(z != 0),
    )


def haar(x: Array) -> Array:
    """Orthonormal columns (..., m, n), uniform if `x` is Gaussian and m >= n."""
    q, r = jnp.linalg.qr(x)
    # Signs of R's diagonal make the factorisation unique, without which Q is not uniform.
    diagonal = jnp.diagonal(r, axis1=-2, axis2=-1)
    return q * jnp.where(diagonal < 0, -1, 1).astype(q.dtype)[..., None, :]


def _noise(draw: Callable[..., Array], part: Part) -> Array:
    shape = part.leaf.slice_shape
    if not part.leaf.by_row:
        return draw(part.keys, shape)
    rows = folded(part.keys, jnp.arange(shape[0]) if part.rows is None else part.rows)
    if part.columns is None:
        return draw(rows, shape[1:])
    start, size = part.columns
    return draw(rows, (size,), offset=(start,), within=shape[1:])


def _normals(part: Part, _: Any) -> Array:
    return _noise(functools.partial(counter_noise.normals, dtype=part.leaf.dtype), part)


def _signs(part: Part, _: Any) -> Array:
    return _noise(counter_noise.signs, part).astype(jnp.float32)


def _shape(part: Part) -> tuple[int, ...]:
    shape = part.leaf.slice_shape
    if part.rows is not None:
        shape = (part.rows.size, *shape[1:])
    if part.columns is not None:
        shape = (*shape[:-1], part.columns[1])
    return *part.keys.shape, *shape


def _subset(keys: Array, size: int, ratio: float) -> Array:
    """(*keys, size) bool: which of `size` are in a random subset, for each key."""
    count = max(1, math.floor(size * ratio))
    orders = jax.vmap(lambda key: jax.random.permutation(key, size))(keys.reshape(-1))
    return orders.reshape((*keys.shape, size)) < count


def _check_ratio(**ratios: float) -> None:
    for name, ratio in ratios.items():
        if not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise ValueError(f"{name} is {ratio!r}; it must be a number in (0, 1]")
