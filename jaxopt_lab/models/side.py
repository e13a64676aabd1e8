"""What may stand beside the kernel of a linear layer: low-rank adapters, noise, probes.

A side is a registered pytree with three methods. The tree of sides is a nested dict with the paths
of linear modules, `{"layers": {"attention": {"qkv": side}}}`; modules that are not in it work as
always, and cost nothing.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax

from jaxopt_lab.core.packed import is_packed, linear
from jaxopt_lab.models.sharding import OnMesh, is_single_cpu


@runtime_checkable
class Side(Protocol):
    """The product of a linear layer, in place of x @ kernel."""

    def product(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The output before the bias, of shape (*x.shape[:-1], *kernel.shape[1:]).

        Args:
            x: inputs (..., in), in the compute dtype.
            kernel: (in, *out), in the compute dtype. It may be packed: multiply it by
                `jaxopt_lab.core.packed.linear`.
        """
        ...

    def layer(self, index: int) -> "Side | None":
        """Of a stack of layers, what one of them has; None: it works as always."""
        ...

    def scanned(self) -> "Side":
        """Of a stack of layers, the same with a leading layer axis on every leaf."""
        ...


class TableSide(Protocol):
    """What may stand beside an embedding table, and its transpose beside a head that is tied to it.

    In the tree of sides it is at the path of the table, {"embedding": {"tokens": side}}.
    """

    def rows(self, index: jax.Array, table: jax.Array) -> jax.Array:
        """The output of a lookup, in place of table[index]."""
        ...

    def transposed(self) -> Side:
        """The side of the product with the transposed table."""
        ...


def is_side(node: Any) -> bool:
    """Whether a node of a tree is a side, and no dict of them."""
    return isinstance(node, Side)


def looked_up(side: TableSide | None, index: jax.Array, table: jax.Array) -> jax.Array:
    """Rows of a table, or what its side makes of them."""
    return table[index] if side is None else side.rows(index, table)


def matmul(side: Side | None, x: jax.Array, kernel: jax.Array, mesh: OnMesh = None) -> jax.Array:
    """`x @ kernel`, of a kernel that may be packed, or what the side makes of it.

    On a single CPU the product is of two matrices: a gradient that is contracted over rows and
    positions apart is transposed first by XLA's CPU compiler, element by element and together with
    what it is computed from. The barrier keeps a transposition of the kernel's gradient, as under a
    tied head, out of its product, which is slower in that order.

    Args:
        side: what stands beside the kernel.
        x: inputs (..., in).
        kernel: (in, *out).
        mesh: over which `x` is spread; None: not known.
    """
    if side is not None:
        return side.product(x, kernel)
    if is_packed(kernel) or not is_single_cpu(mesh):
        return linear(x, kernel)
    columns = jax.lax.optimization_barrier(kernel).reshape(kernel.shape[0], -1)
    product = linear(x.reshape(-1, x.shape[-1]), columns)
    return product.reshape(*x.shape[:-1], *kernel.shape[1:])


def of_layer(tree: Mapping[str, Any] | None, index: int) -> Any:
    """The sides of one layer of a stack."""
    return jax.tree.map(lambda side: side.layer(index), tree, is_leaf=is_side)


def for_scan(tree: Mapping[str, Any] | None) -> Any:
    """The sides of a stack as a scan over its layers takes them."""
    return jax.tree.map(lambda side: side.scanned(), tree, is_leaf=is_side)
