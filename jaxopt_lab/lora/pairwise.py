"""From a rule for one pair of factors to an Optax transformation of a tree of adapters."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jaxopt_lab.core.keys import leaf_key
from jaxopt_lab.core.low_rank_sum import Pair
from jaxopt_lab.core.numerics import widened
from jaxopt_lab.lora.pairs import (
    PairAt,
    require_pairs,
    stacked,
    unflatten_pairs,
    with_auto_axes,
    zero_count,
)
from jaxopt_lab.lora.tap import Tap
from jaxopt_lab.optim.nonfinite import finite_entries, guarded


class PairwiseState(NamedTuple):
    """State of a rule, in the shape of the adapters."""

    count: Int[Array, ""]  # steps taken
    notfinite_count: optax.Updates  # int32 at every `a`: refused steps of each adapter
    of_pairs: Mapping[str, optax.Updates]  # what the rule keeps, by name, at `a` and `b`


class Given(NamedTuple):
    """What a rule sees of one adapter in one step; everything float32 or wider."""

    pair: Pair
    gradient: Pair  # of the two factors
    tap: Pair | None  # (X^T, S), whose product is the gradient of the kernel
    tap_factor: Any  # of that product
    scale: float  # of the adapter: its layer adds scale * (x a) b
    state: Mapping[str, Pair]
    count: Int[Array, ""]  # steps before this one


class Rule(NamedTuple):
    """How one pair of factors moves."""

    init: Callable[[Any, Any, Array], Mapping[str, Pair]]  # of the leaves a, b and a key
    step: Callable[[Given], tuple[Pair, Mapping[str, Pair]]]  # to the move and the new state
    needs_taps: bool


def pairwise(rule: Rule, who: str, seed: int = 0) -> optax.GradientTransformationExtraArgs:
    """Lift a rule for one pair to a tree of adapters; stacks of pairs are one batched program.

    The moves of the two factors of a pair belong together. An adapter whose step is not finite
    does not move, its state stays, and it is counted. `with_rest` makes an optimizer of whole
    adapter trees of it.

    Args:
      rule: The rule.
      who: Name of the optimizer, for errors.
      seed: Of what the rule draws at `init`; every adapter draws by its path.
    """
    return guarded(pair_direction(rule, who, seed))


def pair_direction(rule: Rule, who: str, seed: int = 0) -> optax.GradientTransformationExtraArgs:
    """`pairwise` with NaN in both factors where an adapter takes no step (`nonfinite.guarded`)."""

    def init(params: optax.Params) -> PairwiseState:
        leaves, treedef = jax.tree.flatten(params)
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        pairs = require_pairs(params, who)
        kept = [
            rule.init(
                leaves[p.left], leaves[p.right], leaf_key(jax.random.key(seed), paths[p.left])
            )
            for p in pairs
        ]

        def tree(values: list[Any]) -> Any:
            return unflatten_pairs(treedef, len(leaves), pairs, values)

        counts = [(zero_count(leaves[p.left]), optax.MaskedNode()) for p in pairs]
        return PairwiseState(
            jnp.zeros([], jnp.int32),
            tree(counts),
            {name: tree([state[name] for state in kept]) for name in kept[0]},
        )

    def run(updates, state, params, taps):
        leaves, treedef = jax.tree.flatten(params)
        gradients = jax.tree.leaves(updates)
        pairs = require_pairs(params, who)
        found = [None] * len(pairs) if taps is None else taps

        def at(tree: Any) -> list[Any]:
            # `MaskedNode`s must stay in place for the numbers to fit.
            return treedef.flatten_up_to(tree)

        old_counts = at(state.notfinite_count)
        old_states = {name: at(tree) for name, tree in state.of_pairs.items()}
        moves, counts, states = [], [], []
        for pair, tap in zip(pairs, found, strict=True):
            kept = {name: Pair(v[pair.left], v[pair.right]) for name, v in old_states.items()}
            factors = Pair(leaves[pair.left], leaves[pair.right])
            gradient = Pair(gradients[pair.left], gradients[pair.right])
            move, refused, new = _moved(rule, factors, gradient, tap, kept, state.count)
            moves.append(move)
            counts.append((old_counts[pair.left] + refused, optax.MaskedNode()))
            states.append(new)

        def tree(values: list[Any]) -> Any:
            return unflatten_pairs(treedef, len(leaves), pairs, values)

        new_state = PairwiseState(
            jnp.asarray(optax.safe_increment(state.count)),
            tree(counts),
            {name: tree([new[name] for new in states]) for name in old_states},
        )
        return tree(moves), new_state

    def update(updates, state, params=None, *, taps=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(f"{who} needs the factors: call update(updates, state, params)")
        found = None
        if rule.needs_taps:
            found = taps_of(require_pairs(params, who), taps, who, jax.tree.leaves(params))
        return with_auto_axes(run, (updates, state, params, found), like=(updates, state))

    return optax.GradientTransformationExtraArgs(init, update)


def taps_of(pairs: list[PairAt], taps: Any, who: str, leaves: list[Array]) -> list[Tap]:
    """The tap of each pair of some leaves.

    Raises:
      ValueError: `taps` is missing, has no entry for a pair, or one of other shapes.
    """
    if taps is None:
        raise ValueError(
            f"{who} needs taps=..., the inputs of the adapted layers and the gradients at their "
            "outputs; jaxopt_lab.lora.value_grad_and_taps returns them"
        )
    out = []
    for pair in pairs:
        node = taps
        for name in pair.path:
            node = node.get(name) if isinstance(node, Mapping) else None
        if not isinstance(node, Tap):
            raise ValueError(f"taps has no entry for adapter {'.'.join(pair.path)}")
        x, s = node.x.shape, node.s.shape
        wanted = leaves[pair.left].shape[-2], leaves[pair.right].shape[-1]
        if x[-2:-1] != s[-2:-1] or (x[-1], s[-1]) != wanted:
            raise ValueError(
                f"tap of adapter {'.'.join(pair.path)}: got x {x} and s {s}, wanted as many rows "
                f"of {wanted[0]} and of {wanted[1]}"
            )
        out.append(node)
    return out


def _moved(
    rule: Rule,
    factors: Pair,
    gradient: Pair,
    tap: Tap | None,
    state: Mapping[str, Pair],
    count: Array,
) -> tuple[Pair, Array, Mapping[str, Pair]]:
    """Updates of two leaves, which adapters were refused, and the new state."""
    single, whole = factors.left.ndim == 2, tap
    # Adapters of one layer that share its inputs: (layers, sharing, ...).
    layers = 1 if single else len(factors.left if tap is None else tap.x)

    def split(x: Array) -> Array:
        x = widened(x[None] if single else x)
        return x.reshape(layers, -1, *x.shape[1:])

    def joined(x: Array) -> Array:
        return x[0, 0] if single else x.reshape(-1, *x.shape[2:])

    old = jax.tree.map(split, (factors, gradient, dict(state)))
    rows = None
    if tap is not None:
        rows = Pair(jnp.matrix_transpose(widened(stacked(tap.x))), split(tap.s))

    def one(pair: Pair, gradient: Pair, kept: Mapping[str, Pair], tap: Pair | None):
        about = (1.0, 1.0) if whole is None else (whole.factor, whole.scale)
        move, new_state = rule.step(Given(pair, gradient, tap, *about, kept, count))
        # Gradients that a rule does not use are looked at too: who drops a step spoils them all.
        # Taps are the largest arrays here, and a bad one spoils the move.
        seen = (gradient, move, new_state)
        good = jnp.stack([jnp.all(finite_entries(x)) for x in jax.tree.leaves(seen)]).all()

        def keep(x: Array, y: Array) -> Array:
            return jnp.where(good, x, y)

        move = jax.tree.map(lambda x: jnp.where(good, x, jnp.nan), move)
        return move, ~good, jax.tree.map(keep, dict(new_state), dict(kept))

    axes: Any = (None, 0)
    shared = None if rows is None else Pair(*axes)
    inner = jax.vmap(one, in_axes=(0, 0, 0, shared))
    move, refused, new = jax.vmap(inner)(old[0], old[1], old[2], rows)
    move, refused, new = jax.tree.map(joined, (move, refused, new))
    new = jax.tree.map(lambda x, y: x.astype(y.dtype), new, dict(state))
    return move, refused.astype(jnp.int32), new
