"""One step of Shampoo, from top to bottom, as a direction that says NaN where it was refused."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxopt_lab.core.numerics import Scalar, one_minus_power, wide_dtype, widened
from jaxopt_lab.core.ordering import cond_without_copy
from jaxopt_lab.core.spectral import trace_in_range
from jaxopt_lab.core.stacks import Slot, Stacks
from jaxopt_lab.optim.kronecker.blocks import (
    MAX_ORDER,
    blocked_leaves,
    gram_matrices,
    precondition,
)
from jaxopt_lab.optim.kronecker.grafting import (
    average_gradient,
    graft_decay,
    graft_direction,
    keeps_squares,
)
from jaxopt_lab.optim.kronecker.roots import refreshed_roots
from jaxopt_lab.optim.matrix_leaves import LeafLayout, MatrixLeaves
from jaxopt_lab.optim.options import Graft, InverseRoot, MeshWork
from jaxopt_lab.optim.routing import MatrixAxesSpec

# Names of the arrays of each mode.
FACTORS, ROOTS = (tuple(f"{what}.{k}" for k in range(MAX_ORDER)) for what in ("factor", "root"))

Trees = dict[str, Any]  # of the factors or roots of each mode, by name

_zip = partial(zip, strict=True)


class ShampooState(NamedTuple):
    """State of `scale_by_shampoo`.

    `batch` are the batch axes of a leaf, () without a layout; `blocks` is the number of blocks of
    one matrix and d their edge along a mode. All arrays but the counters are float32 or wider.
    """

    count: Array  # shape=(), dtype=int32: gradients seen
    notfinite_count: optax.Updates  # (*batch,) int32: gradients refused, of each matrix
    mu: optax.Updates  # shapes of the parameters: first moment
    nu: Any  # shapes of the parameters: second moment of the graft; MaskedNode() without one
    # One tree a mode, (*batch, blocks, d, d); MaskedNode() where a leaf has fewer modes.
    factors: tuple[Any, ...]
    roots: tuple[Any, ...]  # like the factors: their inverse roots, the identity at first


class ReleasedCode(NamedTuple):
    """What only the released code does (`jaxopt_lab.parity.shampoo`)."""

    merge_matrices: bool = False  # see `Blocks.of`
    b3: Scalar | None = None  # see `average_gradient`
    bias_correction: bool = True  # of the first moment and the factors
    start: int | None = None  # step of the first roots; None: `precondition_frequency`


class ShampooRule(NamedTuple):
    """Every choice that does not change during a run; named as in `scale_by_shampoo`."""

    b1: Scalar
    b2: Scalar
    eps: Scalar
    precondition_frequency: Scalar
    inverse_root: InverseRoot
    graft: Graft
    mesh: MeshWork
    released: ReleasedCode = ReleasedCode()

    @property
    def start(self) -> Scalar:
        """Step of the first roots."""
        given = self.released.start
        return self.precondition_frequency if given is None else given


def shampoo_direction(
    rule: ShampooRule, matrix_axes: MatrixAxesSpec
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_shampoo` with NaN where a gradient was refused (`nonfinite.guarded`)."""
    blocked = partial(
        blocked_leaves,
        matrix_axes=matrix_axes,
        limit=rule.inverse_root.max_precond_dim,
        merge_matrices=rule.released.merge_matrices,
    )
    squares = keeps_squares(rule.graft)
    b3, correct = rule.released.b3, rule.released.bias_correction
    average = partial(average_gradient, b1=rule.b1, b3=b3, bias_correction=correct)
    graft = partial(graft_direction, rule.graft, b2=graft_decay(rule.graft, rule.b2))

    def init(params: optax.Params) -> ShampooState:
        layouts, members, treedef = blocked(params)

        def zeros() -> optax.Updates:  # buffers of its own at every call, or none could be donated
            return jax.tree.map(lambda x: jnp.zeros_like(x, dtype=wide_dtype(x)), params)

        def modes(name: str, value: Callable[[int, Any], Array]) -> optax.Updates:
            def one(x: LeafLayout, slots: Mapping[str, Slot]) -> Any:
                if name not in slots:
                    return optax.MaskedNode()
                return x.initial(slots[name], value(slots[name].inner[-1], x.dtype))

            return treedef.unflatten([one(x, y.slots) for x, y in _zip(layouts, members)])

        counts = [x.initial(x.number(), jnp.zeros([], jnp.int32)) for x in layouts]
        return ShampooState(
            count=jnp.zeros([], jnp.int32),
            notfinite_count=treedef.unflatten(counts),
            mu=zeros(),
            nu=zeros() if squares else optax.MaskedNode(),
            factors=tuple(
                modes(name, lambda d, dtype: jnp.zeros((d, d), dtype)) for name in FACTORS
            ),
            roots=tuple(modes(name, lambda d, dtype: jnp.eye(d, dtype=dtype)) for name in ROOTS),
        )

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        leaves = blocked(updates, param_shardings=rule.mesh.param_shardings)
        layouts, members, treedef = leaves
        old_factors = dict(_zip(FACTORS, state.factors))
        arrays = leaves.stacked(old_factors)
        t = jnp.asarray(optax.safe_increment(state.count))

        # The sum of squares bounds every entry of the Gram matrices, so that these are finite.
        g = [widened(x) for x in jax.tree.leaves(updates)]
        usable = [
            jnp.isfinite(jnp.sum(jnp.square(x), axis=layout.inner_axes, keepdims=True))
            for layout, x in _zip(layouts, g)
        ]
        g = [jnp.where(ok, x, 0) for ok, x in _zip(usable, g)]
        arrays["gradient"] = leaves.views(g)
        stacks = Stacks(members, arrays)
        grams = stacks.map(gram_matrices, arrays, ("gradient",), FACTORS)
        grams = leaves.unstacked(grams, old_factors)
        factors, usable = _accumulated(rule, treedef, old_factors, grams, usable)

        counts = treedef.flatten_up_to(state.notfinite_count)
        refused = [n + ~ok.reshape(n.shape) for n, ok in _zip(counts, usable)]
        # Gradients that each matrix has taken in, at least 1; broadcasts against the leaf.
        steps = [jnp.maximum((t - n).reshape(ok.shape), 1).astype(x.dtype)
                 for n, ok, x in _zip(refused, usable, g)]  # fmt: skip
        roots = _roots_of_step(rule, t, leaves, factors, dict(_zip(ROOTS, state.roots)), steps)
        arrays |= leaves.stacked(roots)

        mu = jax.tree.leaves(state.mu)
        nu = jax.tree.leaves(state.nu) if squares else mu
        averages, new_mu = _pairs(average, mu, g, steps)
        grafts, new_nu = _pairs(graft, averages, nu, g, steps)
        grafted = rule.graft.kind is not None
        arrays["average"] = leaves.views(averages)
        arrays["graft"] = leaves.views(grafts) if grafted else [None] * len(g)
        arrays |= stacks.map(precondition, arrays, ("average", "graft", *ROOTS), ("direction",))
        direction = jax.tree.leaves(leaves.unstacked(arrays, {"direction": updates}))
        if grafted:
            direction = [jnp.where(t < rule.start, *pair) for pair in _zip(grafts, direction)]
        direction = [jnp.where(ok, x, jnp.nan) for ok, x in _zip(usable, direction)]

        def kept(new: Sequence[Array], old: Sequence[Array]) -> Any:
            return treedef.unflatten([jnp.where(ok, x, y) for ok, x, y in _zip(usable, new, old)])

        return treedef.unflatten(direction), ShampooState(
            count=t,
            notfinite_count=treedef.unflatten(refused),
            mu=kept(new_mu, mu),
            nu=kept(new_nu, nu) if squares else state.nu,
            factors=tuple(factors.values()),
            roots=tuple(roots.values()),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _accumulated(
    rule: ShampooRule, treedef: Any, old: Trees, grams: Trees, usable: Sequence[Array]
) -> tuple[Trees, Sequence[Array]]:
    """The factors with this step's Gram matrices, and which matrices did not overflow by it."""
    b2 = rule.b2
    weight = jnp.where(b2 == 1, 1, 1 - b2)

    def mixed(x: Array, y: Array) -> Array:
        return b2 * x + weight.astype(x.dtype) * y

    new = jax.tree.map(mixed, old, grams)
    before, after = ({name: treedef.flatten_up_to(tree) for name, tree in trees.items()}
                     for trees in (old, new))  # fmt: skip
    # Averages of squares that are finite stay finite; plain sums may not.
    if not isinstance(b2, int | float) or b2 == 1:
        for leaves in after.values():
            usable = [ok if isinstance(x, optax.MaskedNode)
                      else ok & jnp.all(trace_in_range(x), -1).reshape(ok.shape)
                      for ok, x in _zip(usable, leaves)]  # fmt: skip

    def chosen(ok: Array, x: Any, y: Any) -> Any:
        if isinstance(x, optax.MaskedNode):
            return x
        return jnp.where(ok.reshape((*x.shape[:-3], 1, 1, 1)), x, y)

    return {name: treedef.unflatten(map(chosen, usable, after[name], before[name]))
            for name in old}, usable  # fmt: skip


def _roots_of_step(
    rule: ShampooRule,
    t: Array,
    leaves: MatrixLeaves,
    factors: Trees,
    roots: Trees,
    steps: Sequence[Array],
) -> Trees:
    """The roots of step t, trees by name: computed anew where that is due, else the last ones."""
    b2 = rule.b2 if rule.released.bias_correction else 1
    # How far the factors are filled: 1 for sums.
    filled = [jnp.where(b2 == 1, 1, one_minus_power(b2, n.reshape(-1))) for n in steps]
    first, frequency, stagger = rule.start, rule.precondition_frequency, rule.inverse_root.stagger
    replicated_work = rule.mesh.replicated_work

    # In the shapes of the state: a loop that is given others copies them at every step.
    def refreshed(roots: Trees, share: tuple[Array, int] | None = None) -> Trees:
        old = leaves.stacked(factors | roots)
        options = rule.inverse_root, rule.eps, replicated_work, share
        return leaves.unstacked(refreshed_roots(leaves.members, old, filled, *options), roots)

    if isinstance(first, int) and first == 1 and not stagger:
        return refreshed(roots)
    if not stagger:
        due = (t == first) | ((t > first) & (t % frequency == 0))
        return cond_without_copy(due, refreshed, roots)
    assert isinstance(frequency, int)
    roots = cond_without_copy(t == first, refreshed, roots)
    return cond_without_copy(t > first, partial(refreshed, share=(t % frequency, frequency)), roots)


def _pairs(fn: Callable[..., tuple[Array, Array]], *each: Any) -> tuple[list[Array], list[Array]]:
    """Two lists from a function of one entry of each."""
    done = [fn(*entries) for entries in _zip(*each)]
    return [first for first, _ in done], [second for _, second in done]
