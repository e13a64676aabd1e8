"""Weights of four or eight bits in blocks of 32, unpacked where they are used.

The blocks are those of GGUF files: Q8_0 holds 32 signed bytes c and stands for d c, Q4_1 holds 32
numbers 0 <= c < 16 and stands for d c + m, with d and m in float16. Both are exact in float32.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_leaves_with_path

BLOCK = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """An array in blocks: a pytree that stands where the floating-point array would.

    `packed[i]` is an entry of the leading axis, and `astype` says in what precision it unpacks.

    >>> codes = jnp.arange(-16, 16, dtype=jnp.int8).reshape(1, 1, 32)
    >>> packed = Packed(codes, jnp.full((1, 1), 0.5, jnp.float16), None, axis=-2)
    >>> packed.shape, packed.unpacked()[:2, 0].tolist(), packed.nbytes
    ((32, 1), [-8.0, -7.5], 34)
    """

    codes: Any  # int8 (..., blocks, 32) of Q8_0; uint8 (..., blocks, 16) of Q4_1: entries i, i + 16
    scale: Any  # float16 (..., blocks)
    minimum: Any  # float16 (..., blocks) of Q4_1; None for Q8_0
    axis: int = dataclasses.field(default=-1, metadata={"static": True})
    """Axis of the floating-point array that blocks lie along, counted from its end."""
    dtype: Any = dataclasses.field(default=jnp.dtype("float32"), metadata={"static": True})
    """Of the floating-point array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the floating-point array."""
        *others, blocks = self.scale.shape
        others.insert(len(others) + 1 + self.axis, BLOCK * blocks)
        return tuple(others)

    @property
    def ndim(self) -> int:
        """Of the floating-point array."""
        return self.scale.ndim

    @property
    def T(self) -> "Packed":
        """The transposed matrix, of one that has two axes."""
        assert self.ndim == 2
        return dataclasses.replace(self, axis=-3 - self.axis)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self))

    def __getitem__(self, index: Any) -> "Packed":
        """Entries of leading axes."""
        return jax.tree.map(lambda x: x[index], self)

    def astype(self, dtype: Any) -> "Packed":
        """The same, to be unpacked in another precision."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def unpacked(self) -> jax.Array:
        """The floating-point array."""
        codes = self.codes
        if self.minimum is not None:
            codes = jnp.concatenate([codes & 15, codes >> 4], -1)
        blocks = codes.astype(jnp.float32) * self.scale[..., None].astype(jnp.float32)
        if self.minimum is not None:
            blocks = blocks + self.minimum[..., None].astype(jnp.float32)
        whole = blocks.reshape(*blocks.shape[:-2], -1).astype(self.dtype)
        return jnp.moveaxis(whole, -1, self.axis)


def is_packed(node: Any) -> bool:
    """Whether a node of a tree is a packed array."""
    return isinstance(node, Packed)


def unpacked(tree: Any) -> Any:
    """An array or a tree with floating-point arrays in place of packed ones."""
    return jax.tree.map(lambda x: x.unpacked() if is_packed(x) else x, tree, is_leaf=is_packed)


def as_shapes(tree: Any) -> Any:
    """The tree with shapes and dtypes of floating-point arrays in place of packed ones."""

    def shape(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_packed(x) else x

    return jax.tree.map(shape, tree, is_leaf=is_packed)


def linear(x: jax.Array, kernel: Any) -> jax.Array:
    """Product over the last axis of `x` and the first of the kernel, packed or not.

    A packed kernel is unpacked again for the backward pass. Otherwise every layer would keep its
    floating-point kernel from the forward pass on, which is what packing is to save.

    Args:
      x: Inputs (..., in).
      kernel: (in, *out): an array, or `Packed`.
    """
    return _unpacked_product(x, kernel) if is_packed(kernel) else jnp.tensordot(x, kernel, axes=1)


def refuse_packed(tree: Any) -> None:
    """Check that everything in a tree can be trained.

    Raises:
      TypeError: A leaf is packed; names it, and says what to do.
    """
    for path, leaf in tree_leaves_with_path(tree, is_leaf=is_packed):
        if is_packed(leaf):
            raise TypeError(
                f"leaf {keystr(path)}: got packed weights, which cannot be trained; train adapters "
                "beside them (jaxopt_lab.lora), or load the model with packed=False"
            )


def packed_shardings(params: Any, shardings: Any) -> Any:
    """Where parameters lie, the arrays of packed ones included.

    They lie as the floating-point array would. Blocks are never cut: the axis they lie along is
    replicated where the mesh does not divide the number of blocks.

    Args:
      params: Parameters, some of them packed.
      shardings: Tree with a `NamedSharding` for each of them, packed or not.

    Returns:
      A tree with a `NamedSharding` for every array, as `jax.device_put` and `jax.jit` take it.
    """

    def place(x: Any, sharding: NamedSharding) -> Any:
        if not is_packed(x):
            return sharding
        mesh, at = sharding.mesh, x.ndim + x.axis
        entries = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
        along = entries.pop(at)
        names = (along,) if isinstance(along, str) else along or ()
        if x.scale.shape[-1] % math.prod(mesh.shape[name] for name in names):
            along = None
        of_blocks = NamedSharding(mesh, PartitionSpec(*entries, along))
        of_codes = NamedSharding(mesh, PartitionSpec(*entries, along, None))
        minimum = None if x.minimum is None else of_blocks
        return dataclasses.replace(x, codes=of_codes, scale=of_blocks, minimum=minimum)

    return jax.tree.map(place, params, shardings, is_leaf=is_packed)


@jax.checkpoint
def _unpacked_product(x: jax.Array, kernel: Packed) -> jax.Array:
    return jnp.tensordot(x, kernel.unpacked(), axes=1)
