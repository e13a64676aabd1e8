"""The trainable tree: created, read, and put together with the parameters it belongs to."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import tree_map_with_path
from jaxtyping import Array

from jaxopt_lab.core.keys import path_names
from jaxopt_lab.core.matrices import batch_first
from jaxopt_lab.core.numerics import widened
from jaxopt_lab.core.packed import is_packed, unpacked
from jaxopt_lab.lora.config import AdapterSpec, LoraSpec, as_array
from jaxopt_lab.lora.inits import START
from jaxopt_lab.lora.pairs import Names, stacked
from jaxopt_lab.optim.matrix_leaves import LeafLayout

Adapters = dict[str, Any]
"""Nested dict with the paths of the parameters: at each adapted kernel `{"a": ..., "b": ...}`, with
`magnitude` (DoRA) and `weight` (WeightLoRA) where they are wanted, and the leaves trained whole."""


def init(key: Array, spec: LoraSpec, params: optax.Params) -> Adapters:
    r"""The trainable tree.

    Factors are stored as `a` (adapters, inputs, rank) and `b` (adapters, rank, outputs), without
    the leading axis where a kernel is one matrix; several axes of inputs or outputs are merged.
    Initial values depend on the key, the path and the number of the matrix alone.

    | init | a | b |
    |---|---|---|
    | "default" | uniform, $\pm 1 / \sqrt n$ (peft's) | 0 |
    | "gaussian" | normal, $1 / r$ | 0 |
    | "wlora" | uniform, $\pm 1 / \sqrt r$ (the released WeightLoRA's) | 0 |
    | "pissa" | $U_r (S_r / s)^{1/2}$ (arXiv 2404.02948) | $(S_r / s)^{1/2} V_r^\top$ |
    | "olora" | of its QR decomposition (arXiv 2406.01775) | |

    The last two start from a product that is not zero: train beside `unmerge(params, adapters,
    spec)` in place of the parameters, and turn the result into an ordinary adapter with
    `difference`.

    Args:
      key: PRNG key.
      spec: From `resolve`.
      params: The parameters; only the last two inits, DoRA and leaves trained whole read values.
    """
    adapters: Adapters = {}
    found = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_packed)
    leaves = {path_names(path): leaf for path, leaf in found}
    for entry in spec.adapters:
        kernel = leaves[entry.path]
        a, b = START[spec.config.init](key, entry, kernel)
        node = {"a": a.astype(spec.config.dtype), "b": b.astype(spec.config.dtype)}
        if spec.config.dora:
            norms = jnp.sqrt(jnp.sum(jnp.square(widened(matrices(kernel, entry))), 1))
            node["magnitude"] = norms.astype(spec.config.dtype)
        if spec.config.weights:
            node["weight"] = jnp.ones(len(entry.kept), spec.config.dtype)
        if not entry.axes.batch:
            node = {name: x[0] for name, x in node.items()}
        put(adapters, entry.path, node)
    for path in spec.full:
        put(adapters, path, jnp.array(unpacked(leaves[path]), copy=True))
    return adapters


def matrices(kernel: Array, entry: AdapterSpec) -> Array:
    """The matrices of a kernel that have an adapter, (adapters, inputs, outputs)."""
    count, n, m = entry.matrix_shape
    found = batch_first(unpacked(kernel), entry.axes).reshape(count, n, m)
    return found if len(entry.kept) == count else found[as_array(entry.kept)]


def increments(node: Mapping[str, Array], entry: AdapterSpec) -> Array:
    """`scale weight a b` of each adapter, (adapters, inputs, outputs), float32 or wider."""
    a, b = (stacked(widened(node[name])) for name in ("a", "b"))
    product = jnp.einsum("knr,krm->knm", a, b, precision="highest")
    weight = node.get("weight")
    if weight is not None:
        product = product * widened(weight).reshape(-1, 1, 1)
    return entry.scale * product


def effective(params: optax.Params, adapters: Adapters, spec: LoraSpec) -> optax.Params:
    """The parameters of the adapted model: kernels with their increments, leaves trained whole.

    Works with any model function, and is differentiable in the adapters; it forms every adapted
    kernel, and so does its gradient. `jaxopt_lab.lora.side` does neither.
    """
    return _changed(params, adapters, spec, 1.0)


def whole_leaves(params: Any, adapters: Adapters, spec: LoraSpec) -> Any:
    """The parameters with the leaves that are trained whole in place of their own."""

    def leaf(path: Any, x: Array) -> Array:
        names = path_names(path)
        return get(adapters, names) if names in spec.full else x

    return tree_map_with_path(leaf, params)


def merge(
    params: optax.Params, adapters: Adapters, spec: LoraSpec, *, check_finite: bool = True
) -> optax.Params:
    """Parameters that need no adapter any more, in the dtypes of the kernels.

    Sums are formed in float32 or wider and rounded once. Packed kernels, with an adapter or without
    one, become floating-point arrays: packing them again would round the increments away.

    Args:
      params: The base.
      adapters: What was trained on it.
      spec: Theirs.
      check_finite: Refuse results that are not finite. Not possible inside of `jax.jit`.

    Raises:
      ValueError: A merged kernel is not finite; the message names it.
    """
    merged = unpacked(effective(params, adapters, spec))
    if check_finite:
        for path, leaf in jax.tree_util.tree_leaves_with_path(merged):
            if not bool(jnp.all(jnp.isfinite(leaf))):
                name = ".".join(path_names(path))
                raise ValueError(
                    f"merge: {name} is not finite with its adapter; nothing was changed"
                )
    return merged


def unmerge(params: optax.Params, adapters: Adapters, spec: LoraSpec) -> optax.Params:
    """The base again, to rounding; leaves trained whole stay as they are.

    Raises:
      ValueError: With DoRA, whose norms cannot be taken back.
    """
    if spec.config.dora:
        raise ValueError("unmerge: DoRA rescales the kernel, keep the base beside the merged one")
    return _changed(params, adapters, spec, -1.0)


def _changed(params: Any, adapters: Adapters, spec: LoraSpec, sign: float) -> Any:
    entries = {entry.path: entry for entry in spec.adapters}

    def leaf(path: Any, x: Array) -> Array:
        names = path_names(path)
        if names in spec.full and sign > 0:
            return get(adapters, names)
        if names not in entries or get(adapters, names) is None:
            return x
        return _adapted(x, get(adapters, names), entries[names], sign)

    return tree_map_with_path(leaf, params, is_leaf=is_packed)


def _adapted(kernel: Array, node: Mapping[str, Array], entry: AdapterSpec, sign: float) -> Array:
    count, n, m = entry.matrix_shape
    kernel = unpacked(kernel)
    view = widened(batch_first(kernel, entry.axes)).reshape(count, n, m)
    old = view if len(entry.kept) == count else view[as_array(entry.kept)]
    new = old + sign * increments(node, entry)
    if "magnitude" in node:
        new = new * (magnitude_over_norm(node["magnitude"], new))[:, None, :]
    view = new if len(entry.kept) == count else view.at[as_array(entry.kept)].set(new)
    return LeafLayout(kernel, entry.axes).undo_view(view.astype(kernel.dtype))


def magnitude_over_norm(magnitude: Array, kernels: Array) -> Array:
    """DoRA's factor of each output, (adapters, outputs); the norm is a constant to gradients."""
    norms = jnp.sqrt(jnp.sum(jnp.square(jax.lax.stop_gradient(kernels)), 1))
    return widened(magnitude).reshape(norms.shape) / norms


def difference(adapters: Adapters, start: Adapters, spec: LoraSpec) -> tuple[Adapters, LoraSpec]:
    """An ordinary adapter of twice the rank that does on the original base what this one does.

    For adapters that started from a product that is not zero ("pissa", "olora"), trained beside
    `unmerge(params, start, spec)`.

    Args:
      adapters: After training.
      start: What `init` returned.
      spec: Of both.

    Returns:
      The adapters and their spec, whose ranks are doubled and whose scales stay; its init is
      "default", as they need no other base any more.
    """
    out = jax.tree.map(lambda x: x, adapters)
    doubled = []
    for entry in spec.adapters:
        new, old = get(adapters, entry.path), get(start, entry.path)
        weight = 1.0 if "weight" not in new else new["weight"][..., None, None]
        put(
            out,
            entry.path,
            {
                **new,
                "a": jnp.concatenate([new["a"] * weight, old["a"]], -1),
                "b": jnp.concatenate([new["b"], -old["b"]], -2),
                **({"weight": jnp.ones_like(new["weight"])} if "weight" in new else {}),
            },
        )
        doubled.append(entry._replace(rank=2 * entry.rank))
    config = replace(spec.config, init="default")
    return out, replace(spec, config=config, adapters=tuple(doubled))


def shardings(spec: LoraSpec, param_shardings: Any) -> Adapters:
    """A `NamedSharding` for every leaf that `init` makes.

    `a` lies along the inputs of its kernel and `b` along its outputs, so that no kernel moves. The
    rank is replicated, and so is a side of several kernel axes that do not merge in place.

    Args:
      spec: Of the adapters.
      param_shardings: Tree of `NamedSharding` like the parameters.
    """
    given = {path_names(p): s for p, s in jax.tree_util.tree_leaves_with_path(param_shardings)}
    out: Adapters = {}
    for entry in spec.adapters:
        kernel = given[entry.path]
        like = jax.ShapeDtypeStruct(entry.shape, jnp.float32)
        spec_of_view = LeafLayout(like, entry.axes, kernel).matrix.spec
        sides = entry.axes.reduction + entry.axes.output
        batch, *inner = (*spec_of_view, *[None] * (1 + len(sides) - len(spec_of_view)))
        count = len(entry.axes.reduction)
        rows, columns = (_merged(side) for side in (inner[:count], inner[count:]))
        stack = (batch if len(entry.kept) == entry.matrix_shape[0] else None,)
        lead = stack if entry.axes.batch else ()
        specs = {"a": (*lead, rows, None), "b": (*lead, None, columns)}
        if spec.config.dora:
            specs["magnitude"] = (*lead, columns)
        if spec.config.weights:
            specs["weight"] = lead
        node = {k: NamedSharding(kernel.mesh, PartitionSpec(*s)) for k, s in specs.items()}
        put(out, entry.path, node)
    for path in spec.full:
        put(out, path, given[path])
    return out


def _merged(sides: Sequence[Any]) -> Any:
    """How several axes lie after they are merged: only the first may be sharded."""
    return None if any(side is not None for side in sides[1:]) else sides[0]


def nodes(adapters: Adapters, spec: LoraSpec) -> Iterator[tuple[AdapterSpec, Mapping[str, Array]]]:
    """Each kernel's entry in the spec with its factors."""
    for entry in spec.adapters:
        node = get(adapters, entry.path)
        if node is None:
            raise ValueError(f"adapters: nothing at {entry.module}, where the spec has one")
        yield entry, node


def get(tree: Any, path: Names) -> Any:
    """The node at a path of a nested dict, or None."""
    for name in path:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def put(tree: dict[str, Any], path: Names, value: Any) -> None:
    """Set the node at a path of a nested dict."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
