"""Random keys that depend on what is drawn, not on the order of drawing."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, KeyPath, SequenceKey
from jaxtyping import Array


def path_names(path: KeyPath) -> tuple[str, ...]:
    """The names along a path: fields, dictionary keys and positions.

    The `value` that NNX variables and Linen boxes end in is left out: it names no part of a model.
    """
    names = []
    for entry in path:
        match entry:
            case DictKey(key=name) | FlattenedIndexKey(key=name):
                names.append(str(name))
            case GetAttrKey(name=name) | SequenceKey(idx=name):
                names.append(str(name))
            case other:
                names.append(str(other))
    if path and isinstance(path[-1], GetAttrKey) and names[-1] == "value":
        names.pop()
    return tuple(names)


def leaf_key(key: Array, path: KeyPath) -> Array:
    """The key of one leaf: a function of the names along its path.

    The same leaf gets the same noise whether other leaves are masked, sharded or absent, whatever
    kind of container holds it, and with every version of jax.

    Args:
      key: A typed PRNG key.
      path: Path of the leaf in the parameter tree, as `jax.tree_util` gives it.
    """
    high, low = _digest(path)
    return jax.random.fold_in(jax.random.fold_in(key, high), low)


def purpose_key(key: Array, purpose: str) -> Array:
    """The key of a draw that belongs to no leaf, such as which leaves take part in a step.

    Args:
      key: A typed PRNG key.
      purpose: What the draw is for.
    """
    # The path () is that of a tree which is one array; a word follows it, where a leaf's slices
    # are small numbers.
    return leaf_key(leaf_key(key, ()), (DictKey(purpose),))


def threefry_key(key: Any) -> Array:
    """A typed key of the generator whose draws are the same in batches, loops and on meshes.

    Args:
      key: A typed key, or the uint32 data of one.

    Raises:
      ValueError: The key is of another generator, or no single key.
    """
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", ())
    if dtype == "uint32" and shape[-1:] == (2,):
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
    elif dtype is None or not jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        raise ValueError(f"key: got {key!r}, wanted a key, as from jax.random.key(0)")
    if key.ndim:
        raise ValueError(f"key: got keys of shape {key.shape}, wanted a single key")
    if (found := str(jax.random.key_impl(key))) != "threefry2x32":
        raise ValueError(
            f"key: got one of {found!r}, wanted 'threefry2x32': rbg draws from the first key only "
            "under vmap and the whole array on each device of a mesh, and folding numbers into "
            "unsafe_rbg keys commutes. Write jax.random.key(seed, impl='threefry2x32')"
        )
    return key


def leaf_keys(key: Array, paths: Iterable[KeyPath]) -> list[Array]:
    """`leaf_key` of every leaf of a tree.

    Raises:
      ValueError: Two leaves would draw the same noise.
    """
    seen: dict[Sequence[int], KeyPath] = {}
    for path in paths:
        other = seen.setdefault(_digest(path), path)
        if other is not path:
            first, second = map(jax.tree_util.keystr, (other, path))
            raise ValueError(f"leaves {first} and {second} would draw the same noise; rename one")
    return [leaf_key(key, path) for path in seen.values()]


def _digest(path: KeyPath) -> tuple[int, int]:
    """64 bits of the names: with as many as a billion leaves, a collision has odds of 3 %."""
    # The lengths keep ("ab", "c") and ("a", "bc") apart.
    text = "".join(f"{len(name)}:{name}" for name in path_names(path))
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return number >> 32, number & 0xFFFFFFFF
