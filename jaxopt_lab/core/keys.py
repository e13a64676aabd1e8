"""Random keys that depend on what is drawn, not on the order of drawing."""

import zlib

import jax
from jax.tree_util import KeyPath
from jaxtyping import Array


def leaf_key(key: Array, path: KeyPath) -> Array:
    """The key of one leaf: a function of the leaf's path.

    The same leaf gets the same noise whether other leaves are masked, sharded or absent.

    Args:
      key: A typed PRNG key.
      path: Path of the leaf in the parameter tree, as `jax.tree_util` gives it.
    """
    return jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
