r"""Directions of low rank, and losses that never form them.

$$z = \tfrac{1}{\sqrt r} A B^\top, \qquad
x (W + \epsilon z) = x W + \tfrac{\epsilon}{\sqrt r} (x A) B^\top.$$

Evaluated together, probes share the products with $W$ as rows of one batch do: a probe costs
activations and $r (m + n)$ numbers of noise a matrix, and no copy of a matrix.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array

from jaxopt_lab.core import counter_noise
from jaxopt_lab.core.keys import path_names
from jaxopt_lab.core.matrices import MatrixAxes
from jaxopt_lab.core.numerics import perturbed, widened
from jaxopt_lab.zeroth_order.directions import Direction, Leaf, Part, Sampler, folded
from jaxopt_lab.zeroth_order.layerwise import ProbeFn
from jaxopt_lab.zeroth_order.probes import check_integer
from jaxopt_lab.zeroth_order.samplers import gaussian

# Folded into the key of a slice for its two factors: no row has these numbers.
_ROWS, _COLUMNS = 2**32 - 1, 2**32 - 2


def low_rank(rank: int = 1) -> Sampler:
    r"""Matrices $A B^\top / \sqrt r$ with standard normal factors; other leaves standard normal.

    The entries of a matrix have variance 1 and are uncorrelated, so the estimate is unbiased for a
    linear loss. On one matrix $W$ of $n \times m$,

    $$\frac{E \lVert g \rVert^2}{\lVert \nabla f \rVert^2}
    = \frac{(n + 2)(m + 2) + (r - 1)(n m + 2)}{r},$$

    where `gaussian` has $n m + 2$. An estimate is the sum of its probes, so its rank is $q r$.

    Any engine takes it with `value_fn`, which sees whole matrices. With `beside` no matrix is
    formed.

    Args:
      rank: $r$.

    Raises:
      ValueError: Below 1.

    Source: Sarkar et al., "Evolution Strategies at the Hyperscale", arXiv 2511.16652.

    Differs from the released code in: embeddings, tied heads and stacked layers; draws that do not
    depend on how many probes are evaluated together.
    """
    check_integer("rank", rank)
    vectors = gaussian()

    def factors(part: Part) -> tuple[Array, Array]:
        leaf = part.leaf
        n, m = leaf.slice_shape

        def normals(keys: Array, size: int) -> Array:
            return counter_noise.normals(keys, (size, rank), leaf.dtype)

        b = normals(_side(part.keys, _COLUMNS), m)
        if part.columns is not None:
            b = lax.dynamic_slice_in_dim(b, *part.columns, -2)
        if leaf.by_row:
            rows = jnp.arange(n) if part.rows is None else part.rows
            a = normals(folded(part.keys, rows), 1)[..., 0, :]
        else:
            a = normals(_side(part.keys, _ROWS), n)
        return a / math.sqrt(rank), b

    def slices(part: Part, shared: Any) -> Array:
        if part.leaf.axes is None:
            return vectors.slices(part, shared)
        a, b = factors(part)
        return jnp.matmul(a, b.mT, precision=lax.Precision.HIGHEST)

    return Sampler("low_rank", slices, factors=factors)


def _side(keys: Array, word: int) -> Array:
    return folded(keys, jnp.array([word], jnp.uint32))[..., 0]


def beside(value_fn: Callable[[Any, Mapping[str, Any]], Array]) -> ProbeFn:
    """The `probe_fn` of a loss that takes low-rank perturbations beside its matrices.

    `value_fn(params, sides)` gets the parameters with their vectors perturbed and their matrices as
    they are, and for each matrix a `LowRankSide`, in a nested dict by its path without a last name
    "kernel". For the decoder of `jaxopt_lab.models`:

        probe_fn = beside(lambda p, sides: models.loss(config, p, batch, side=sides)[0])
        updates, state = tx.update(None, state, params, probe_fn=probe_fn)

    The loss has to use every side. Leaves that it has none for are vectors where `matrix_axes` says
    None; with `vmapped()` each probe then holds a copy of them.

    Args:
      value_fn: The loss.

    Returns:
      A function of parameters, direction and scale, for the `update` of any method of this package
      whose directions have no mean.

    Example:
      >>> from jaxopt_lab import zeroth_order as zo
      >>> tx = zo.estimate(low_rank(), num_directions=8, key=jax.random.key(0), engine=zo.vmapped())
      >>> params, x = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}, jnp.ones((4, 3))
      >>> probe_fn = beside(lambda p, sides: jnp.sum(sides["w"].product(x, p["w"]) + p["b"]))
      >>> update = jax.jit(lambda s, p: tx.update(None, s, p, probe_fn=probe_fn))
      >>> update(tx.init(params), params)[0]["w"].shape
      (3, 2)
    """

    def probe_fn(params: optax.Params, direction: Direction, scale: Array) -> Array:
        leaves, treedef = jax.tree.flatten(params)
        sides: dict[str, Any] = {}
        for i, (x, leaf) in enumerate(zip(leaves, direction.leaves, strict=True)):
            found = direction.factors_of(i)
            if found is not None:
                _put(sides, leaf, scale.astype(leaf.dtype) * found[0], found[1])
            elif leaf.moves:
                leaves[i] = perturbed(x, scale, direction.of(i))
        if not sides:
            raise ValueError(
                "beside: no leaf has factors; it goes with zeroth_order.low_rank(), matrices, and "
                "directions that have no mean and are not given as draws"
            )
        return value_fn(treedef.unflatten(leaves), sides)

    return probe_fn


def _static() -> Any:
    return field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRankSide:
    """What `a @ b.mT` adds to a matrix, or to a stack of them (`jaxopt_lab.models.side`)."""

    a: Array  # (*batch, inputs, rank), times the scale of the perturbation
    b: Array  # (*batch, outputs, rank)
    shape: tuple[int, ...] = _static()  # of the kernel
    axes: MatrixAxes = _static()

    def product(self, x: Array, kernel: Array) -> Array:
        """`x @ (kernel + a @ b.mT)`, in the dtype of `x`."""
        a, b, lead = self.a.astype(x.dtype), self.b.astype(x.dtype), x.ndim - 1
        hidden = jnp.einsum("...n,knr->...kr", x, a.reshape(-1, *a.shape[-2:]))
        b = b.reshape(-1, *b.shape[-2:])
        part = jnp.einsum("...kr,kmr->...km", hidden, b)
        order = self.axes.batch + self.axes.output
        part = part.reshape(*x.shape[:-1], *(self.shape[axis] for axis in order))
        back = [lead + order.index(axis) for axis in sorted(order)]
        return jnp.tensordot(x, kernel, axes=1) + part.transpose([*range(lead), *back])

    def rows(self, index: Array, table: Array) -> Array:
        """`(table + a @ b.mT)[index]`, in float32 or wider."""
        return widened(table[index]) + jnp.einsum(
            "...r,mr->...m", self.a[index], self.b, precision=lax.Precision.HIGHEST
        )

    def transposed(self) -> "LowRankSide":
        """What stands beside the transposed table: the head that is tied to an embedding."""
        return replace(self, a=self.b, b=self.a, shape=self.shape[::-1])

    def layer(self, index: int) -> "LowRankSide":
        """Of a stack over axis 0 of the kernel, the part of one layer."""
        one = self.scanned()
        return replace(one, a=one.a[index], b=one.b[index])

    def scanned(self) -> "LowRankSide":
        """Of a stack over axis 0 of the kernel, the same as a scan over its layers slices it."""
        inner = MatrixAxes(*(tuple(axis - 1 for axis in axes if axis) for axes in self.axes))
        return replace(self, shape=self.shape[1:], axes=inner)


def _put(sides: dict[str, Any], leaf: Leaf, a: Array, b: Array) -> None:
    *names, last = path_names(leaf.path) or ("kernel",)
    axes = leaf.axes
    assert axes is not None
    if axes.reduction != ((1,) if 0 in axes.batch else (0,)):
        raise ValueError(
            f"beside: leaf {'/'.join((*names, last))}: got inputs on axes {axes.reduction}, "
            "wanted the first axis alone (that of a layer stack not counted). Give None in "
            "matrix_axes, or pass value_fn"
        )
    names = names if last == "kernel" and names else [*names, last]
    for name in names[:-1]:
        sides = sides.setdefault(name, {})
    sides[names[-1]] = LowRankSide(a, b, leaf.shape, axes)
