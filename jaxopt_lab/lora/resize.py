"""Changes of shape between steps: adapters that leave, adapters that grow, weights folded in.

Plain functions of adapters, spec and optimizer state, outside of `jax.jit`; a compiled step is
compiled once more for the new shapes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import tree_flatten_with_path
from jaxtyping import Array

from jaxopt_lab.core.keys import leaf_key, path_names
from jaxopt_lab.lora.adapters import Adapters, nodes, put
from jaxopt_lab.lora.config import AdapterSpec, LoraSpec, as_array
from jaxopt_lab.lora.pairs import Names, find_pairs, stacked
from jaxopt_lab.lora.weight_lora import largest

Growth = Literal["smart", "dummy", "restart"]


class Resized(NamedTuple):
    """What training goes on with."""

    adapters: Adapters
    spec: LoraSpec
    state: optax.OptState


def selection(adapters: Adapters, spec: LoraSpec) -> list[tuple[str, float]]:
    """(name of the matrix, weight) of each adapter whose weight is not zero; for a log."""
    found = []
    for entry, node in nodes(adapters, spec):
        weights = np.atleast_1d(np.asarray(node["weight"], np.float64))
        names = [entry.names[i] for i in entry.kept]
        found += [(n, float(w)) for n, w in zip(names, weights, strict=True) if w != 0]
    return found


def prune(
    adapters: Adapters,
    spec: LoraSpec,
    tx: optax.GradientTransformation,
    state: optax.OptState,
    *,
    keep: Mapping[Names, Sequence[int]] | None = None,
) -> Resized:
    """Take adapters and their optimizer state out of the tree.

    After `freeze_after` steps of `weight_lora` this changes nothing for those that stay.

    Args:
      adapters: With weights, unless `keep` is given.
      spec: Theirs.
      tx: The optimizer.
      state: Its state.
      keep: For each kernel, by path, the positions in its stack that stay; None: those whose weight
        is not zero.

    Raises:
      ValueError: Nothing would be left.
    """
    positions = _active(adapters, spec) if keep is None else dict(keep)
    if not any(len(p) for p in positions.values()):
        raise ValueError("prune: no adapter would be left; at least one must stay")
    smaller: Adapters = _without(adapters, {entry.path for entry in spec.adapters})
    entries, taken = [], {}
    for entry, node in nodes(adapters, spec):
        stay = [int(i) for i in positions.get(entry.path, ())]
        if stay:
            single = not entry.axes.batch
            kept = dict(node) if single else {k: x[as_array(stay)] for k, x in node.items()}
            put(smaller, entry.path, kept)
            entries.append(entry._replace(kept=tuple(entry.kept[i] for i in stay)))
            if not single:
                taken[entry.path] = as_array(stay)
    return Resized(
        smaller, spec.with_adapters(entries), carried(tx, state, adapters, smaller, taken)
    )


def grow(
    adapters: Adapters,
    spec: LoraSpec,
    tx: optax.GradientTransformation,
    state: optax.OptState,
    key: Array,
    *,
    growth: Growth = "smart",
    rescale: bool = False,
    max_rank: int | None = None,
    draws: Mapping[Names, Array] | None = None,
) -> Resized:
    r"""Double the rank of every adapter, without a change of the function it computes.

    With uniform draws N from [0, 1):

    - "smart": $A = Q R$; $A \leftarrow [Q, (I - Q Q^\top) N]$, $B \leftarrow [R B; 0]$;
    - "dummy": $A \leftarrow [A, N]$, $B \leftarrow [B; 0]$;
    - "restart": $A \leftarrow [N_1, N_2]$, $B \leftarrow 0$, which does change it.

    Adam states that hold moments of factors start anew, count included: in the optimizers of this
    package those of the factors alone. Everything else in the state is kept.

    Args:
      adapters: To grow.
      spec: Theirs.
      tx: The optimizer.
      state: Its state.
      key: Of the draws; each adapter draws by its path and the number of its matrix.
      growth: See above.
      rescale: Let the scale follow alpha over the new rank, with `b` multiplied to make up for it;
        otherwise it stays, as in the released code.
      max_rank: An adapter that would exceed it stays as it is; None: the smaller side of a matrix,
        which the released code does not respect.
      draws: Values to take instead, (adapters, inputs, rank) by path; twice the rank for "restart".
    """
    if growth not in ("smart", "dummy", "restart"):
        raise ValueError(f'growth is {growth!r}; choose "smart", "dummy" or "restart"')
    larger, entries = jax.tree.map(lambda x: x, adapters), []
    for entry, node in nodes(adapters, spec):
        limit = min(entry.matrix_shape[1:]) if max_rank is None else max_rank
        if 2 * entry.rank > limit:
            entries.append(entry)
            continue
        noise = _noise(key, entry, growth) if draws is None else draws[entry.path]
        a, b = _grown(stacked(node["a"]), stacked(node["b"]), noise, growth)
        factor = 2.0 if rescale else 1.0
        if not entry.axes.batch:
            a, b = a[0], b[0]
        put(larger, entry.path, {**node, "a": a, "b": factor * b})
        entries.append(entry._replace(rank=2 * entry.rank, scale=entry.scale / factor))
    new_state = _fresh_moments(carried(tx, state, adapters, larger, {}), tx.init(larger))
    return Resized(larger, spec.with_adapters(entries), new_state)


def select_and_grow(
    adapters: Adapters,
    spec: LoraSpec,
    tx: optax.GradientTransformation,
    state: optax.OptState,
    key: Array,
    **options: Any,
) -> Resized:
    """What follows the selecting steps of `weight_lora_plus`: half the adapters, twice the rank.

    Those stay whose weights are among the larger half, by value, and positive; one always does.

    Args:
      adapters: With weights.
      spec: Theirs.
      tx: From `weight_lora_plus`.
      state: Its state.
      key: Of the draws.
      **options: Of `grow`.
    """
    found = [np.atleast_1d(np.asarray(node["weight"])) for _, node in nodes(adapters, spec)]
    values = np.concatenate(found)
    stays = np.array(largest(jnp.asarray(values), max(1, len(values) // 2)))
    stays &= (values > 0) | (np.arange(len(values)) == np.argmax(values))
    parts = np.split(stays, np.cumsum([len(f) for f in found])[:-1])
    keep = {e.path: np.flatnonzero(p).tolist() for e, p in zip(spec.adapters, parts, strict=True)}
    smaller = prune(adapters, spec, tx, state, keep=keep)
    return grow(smaller.adapters, smaller.spec, tx, smaller.state, key, **options)


def fold(adapters: Adapters, spec: LoraSpec) -> tuple[Adapters, LoraSpec]:
    """Multiply the weights into `b` and take them out of the tree; the function stays.

    For what `weight_lora` has trained, before it is saved or trained on by another optimizer.
    """
    out: Adapters = _without(adapters, {entry.path for entry in spec.adapters})
    for entry, node in nodes(adapters, spec):
        weight = node["weight"][..., None, None]
        others = {name: x for name, x in node.items() if name not in ("b", "weight")}
        put(out, entry.path, {**others, "b": weight * node["b"]})
    return out, replace(spec, config=replace(spec.config, weights=False))


def carried(
    tx: optax.GradientTransformation,
    state: optax.OptState,
    before: Adapters,
    adapters: Adapters,
    taken: Mapping[Names, np.ndarray],
) -> optax.OptState:
    """The state for adapters of other shapes: old leaves where they fit, new ones elsewhere.

    Args:
      tx: The optimizer.
      state: Its state before the change.
      before: The adapters before it.
      adapters: After it.
      taken: For each stack that lost adapters, the positions that stay.

    Raises:
      ValueError: The state is not that of `tx` for these adapters.
    """
    if jax.tree.structure(jax.eval_shape(tx.init, before)) != jax.tree.structure(state):
        raise ValueError("state: it is not one of tx for these adapters; nothing was changed")
    old = {path_names(path): leaf for path, leaf in tree_flatten_with_path(state)[0]}
    fresh, treedef = tree_flatten_with_path(tx.init(adapters))
    leaves = []
    for path, new in fresh:
        names = path_names(path)
        value = old.get(names)
        owner = next((p for p in taken if _inside(p, names)), None)
        if value is not None and owner is not None:
            value = value[taken[owner]]
        leaves.append(value if value is not None and value.shape == new.shape else new)
    return treedef.unflatten(leaves)


def _inside(path: Names, names: Names) -> bool:
    """Whether a state leaf belongs to the kernel at a path: it ends in the path and a factor."""
    return names[-len(path) - 1 : -1] == path


def _fresh_moments(state: Any, fresh: Any) -> Any:
    """The state with new Adam states where they hold moments of factors, count included."""

    def is_adam(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    def pick(old: Any, new: Any) -> Any:
        return new if is_adam(old) and find_pairs(new.mu) else old

    return jax.tree.map(pick, state, fresh, is_leaf=is_adam)


def _active(adapters: Adapters, spec: LoraSpec) -> dict[Names, np.ndarray]:
    for entry, node in nodes(adapters, spec):
        if "weight" not in node:
            raise ValueError(f"prune: {entry.module} has no weight; say in keep= what stays")
    return {
        entry.path: np.flatnonzero(np.atleast_1d(np.asarray(node["weight"])))
        for entry, node in nodes(adapters, spec)
    }


def _noise(key: Array, entry: AdapterSpec, growth: Growth) -> Array:
    _, n, _ = entry.matrix_shape
    path = tuple(jax.tree_util.DictKey(name) for name in entry.path)
    own = jax.vmap(jax.random.fold_in, (None, 0))(leaf_key(key, path), as_array(entry.kept))
    rank = entry.rank * (2 if growth == "restart" else 1)
    return jax.vmap(lambda key: jax.random.uniform(key, (n, rank)))(own)


def _grown(a: Array, b: Array, noise: Array, growth: Growth) -> tuple[Array, Array]:
    noise, zeros = noise.astype(a.dtype), jnp.zeros_like(b)
    if growth == "restart":
        return noise, jnp.concatenate([zeros, zeros], 1)
    if growth == "dummy":
        return jnp.concatenate([a, noise], 2), jnp.concatenate([b, zeros], 1)
    q, r = jnp.linalg.qr(a)
    inside = jnp.einsum("knr,kmr,kms->kns", q, q, noise, precision="highest")
    rotated = jnp.einsum("krs,ksm->krm", r, b, precision="highest")
    return jnp.concatenate([q, noise - inside], 2), jnp.concatenate([rotated, zeros], 1)


def _without(tree: Any, paths: set[Names], at: Names = ()) -> Any:
    """A nested dict without the nodes at these paths, and without dicts that are empty then."""
    if not isinstance(tree, Mapping):
        return tree
    kept = {
        name: _without(node, paths, (*at, name))
        for name, node in tree.items()
        if (*at, name) not in paths
    }
    return {name: node for name, node in kept.items() if not (isinstance(node, dict) and not node)}
