"""One step of Shampoo, from top to bottom, as a direction that says NaN where it was refused."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxopt_lab.core.numerics import Scalar, one_minus_power, wide_dtype, widened
from jaxopt_lab.core.ordering import cond_without_copy
from jaxopt_lab.core.spectral import trace_in_range
from jaxopt_lab.optim.kronecker.blocks import MAX_ORDER, BlockedLeaf, blocked_leaves
from jaxopt_lab.optim.kronecker.grafting import (
    average_gradient,
    graft_decay,
    graft_direction,
    keeps_squares,
)
from jaxopt_lab.optim.kronecker.roots import (
    Factors,
    gram_matrices,
    precondition,
    refreshed_roots,
)
from jaxopt_lab.optim.options import Graft, InverseRoot, MeshWork
from jaxopt_lab.optim.routing import MatrixAxesSpec

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

    def init(params: optax.Params) -> ShampooState:
        leaves = blocked(params)
        arrays, treedef = jax.tree.flatten(params)
        dtypes = [wide_dtype(x) for x in arrays]

        def zeros() -> optax.Updates:  # buffers of its own at every call, or none could be donated
            return treedef.unflatten([jnp.zeros_like(x, dtype=d) for x, d in _zip(arrays, dtypes)])

        factors = [leaf.new_factors(d) for leaf, d in _zip(leaves, dtypes)]
        roots = [leaf.new_factors(d, identity=True) for leaf, d in _zip(leaves, dtypes)]
        return ShampooState(
            count=jnp.zeros([], jnp.int32),
            notfinite_count=treedef.unflatten([leaf.new_counter() for leaf in leaves]),
            mu=zeros(),
            nu=zeros() if keeps_squares(rule.graft) else optax.MaskedNode(),
            factors=_by_mode(treedef, factors),
            roots=_by_mode(treedef, roots),
        )

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        leaves = blocked(updates, param_shardings=rule.mesh.param_shardings)
        gradients, treedef = jax.tree.flatten(updates)
        factors, roots = (_by_leaf(treedef, leaves, x) for x in (state.factors, state.roots))
        t = jnp.asarray(optax.safe_increment(state.count))

        g = [widened(x) for x in gradients]
        usable = [_finite(leaf, x) for leaf, x in _zip(leaves, g)]
        g = [jnp.where(ok, x, 0) for ok, x in _zip(usable, g)]
        factors, usable = _accumulated(rule, leaves, g, factors, usable)
        refused = [
            n + ~leaf.per_matrix(ok)
            for n, leaf, ok in _zip(treedef.flatten_up_to(state.notfinite_count), leaves, usable)
        ]
        steps = [_steps(leaf, t, n, x.dtype) for leaf, n, x in _zip(leaves, refused, g)]
        roots = _roots_of_step(rule, t, leaves, factors, steps, roots)

        mu = jax.tree.leaves(state.mu)
        nu = jax.tree.leaves(state.nu) if keeps_squares(rule.graft) else mu
        averages, new_mu = _averages(rule, mu, g, steps)
        grafts, new_nu = _grafts(rule, averages, nu, g, steps)
        if rule.graft.kind is None:
            direction = precondition(leaves, averages, None, roots)
        else:
            direction = precondition(leaves, averages, grafts, roots)
            direction = [jnp.where(t < rule.start, *pair) for pair in _zip(grafts, direction)]
        direction = [jnp.where(ok, x, jnp.nan) for ok, x in _zip(usable, direction)]

        keep = partial(_chosen, treedef, usable)
        return treedef.unflatten(direction), ShampooState(
            count=t,
            notfinite_count=treedef.unflatten(refused),
            mu=keep(new_mu, mu),
            nu=keep(new_nu, nu) if keeps_squares(rule.graft) else state.nu,
            factors=_by_mode(treedef, factors),
            roots=_by_mode(treedef, roots),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _finite(leaf: BlockedLeaf, g: Array) -> Array:
    """Which matrices may enter the state: (*batch) with 1 for the axes that span a matrix."""
    # The sum of squares bounds every entry of the Gram matrices, so that these are finite.
    return jnp.isfinite(jnp.sum(jnp.square(g), axis=leaf.inner_axes, keepdims=True))


def _steps(leaf: BlockedLeaf, t: Array, refused: Array, dtype: Any) -> Array:
    """Gradients that each matrix has taken in, at least 1; broadcasts against the leaf."""
    taken_in = jnp.expand_dims(t - refused, leaf.inner_axes)
    return jnp.maximum(taken_in, 1).astype(dtype)


def _accumulated(
    rule: ShampooRule,
    leaves: Sequence[BlockedLeaf],
    g: Sequence[Array],
    factors: Factors,
    usable: Sequence[Array],
) -> tuple[list[list[Array]], Sequence[Array]]:
    """The factors with this step's Gram matrices, and which matrices did not overflow by it."""
    b2 = rule.b2
    weight = jnp.where(b2 == 1, 1, 1 - b2)
    mixed = [
        [b2 * x + weight.astype(x.dtype) * y for x, y in _zip(old, new)]
        for old, new in _zip(factors, gram_matrices(leaves, g))
    ]
    # Averages of squares that are finite stay finite; plain sums may not.
    if not isinstance(b2, int | float) or b2 == 1:
        usable = [
            ok & jnp.expand_dims(_fits(leaf, modes), leaf.inner_axes)
            for ok, leaf, modes in _zip(usable, leaves, mixed)
        ]
    out = []
    for leaf, ok, new, old in _zip(leaves, usable, mixed, factors):
        flag = leaf.per_matrix(ok)[..., None, None, None]
        out.append([jnp.where(flag, x, y) for x, y in _zip(new, old)])
    return out, usable


def _fits(leaf: BlockedLeaf, factors: Sequence[Array]) -> Array:
    """(*batch) whether the factors of all modes and blocks are far enough from overflowing."""
    fits = jnp.ones(leaf.batch_shape, bool)
    for x in factors:
        fits = fits & jnp.all(trace_in_range(x), axis=-1)
    return fits


def _roots_of_step(
    rule: ShampooRule,
    t: Array,
    leaves: Sequence[BlockedLeaf],
    factors: Factors,
    steps: Sequence[Array],
    roots: Factors,
) -> Factors:
    """The roots of step t: computed anew where that is due, else the last ones."""
    b2 = rule.b2 if rule.released.bias_correction else 1
    # How far the factors are filled: 1 for sums.
    filled = [jnp.where(b2 == 1, 1, one_minus_power(b2, n.reshape(-1))) for n in steps]
    first, frequency, stagger = rule.start, rule.precondition_frequency, rule.inverse_root.stagger
    refreshed = partial(
        refreshed_roots,
        rule.inverse_root,
        rule.eps,
        rule.mesh.replicated_work,
        leaves,
        factors,
        filled,
    )
    if isinstance(first, int) and first == 1 and not stagger:
        return refreshed(roots)
    if not stagger:
        due = (t == first) | ((t > first) & (t % frequency == 0))
        return cond_without_copy(due, refreshed, roots)
    assert isinstance(frequency, int)
    roots = cond_without_copy(t == first, refreshed, roots)
    share = t % frequency, frequency
    return cond_without_copy(t > first, partial(refreshed, share=share), roots)


def _averages(
    rule: ShampooRule, mu: Sequence[Array], g: Sequence[Array], steps: Sequence[Array]
) -> tuple[list[Array], list[Array]]:
    b3, correct = rule.released.b3, rule.released.bias_correction
    pairs = [
        average_gradient(m, x, n, b1=rule.b1, b3=b3, bias_correction=correct)
        for m, x, n in _zip(mu, g, steps)
    ]
    return [a for a, _ in pairs], [m for _, m in pairs]


def _grafts(
    rule: ShampooRule,
    averages: Sequence[Array],
    nu: Sequence[Array],
    g: Sequence[Array],
    steps: Sequence[Array],
) -> tuple[list[Array], list[Array]]:
    b2 = graft_decay(rule.graft, rule.b2)
    pairs = [
        graft_direction(rule.graft, a, v, x, n, b2=b2)
        for a, v, x, n in _zip(averages, nu, g, steps)
    ]
    return [d for d, _ in pairs], [v for _, v in pairs]


def _chosen(
    treedef: Any, usable: Sequence[Array], new: Sequence[Array], old: Sequence[Array]
) -> Any:
    return treedef.unflatten([jnp.where(ok, x, y) for ok, x, y in _zip(usable, new, old)])


def _by_mode(treedef: Any, factors: Factors) -> tuple[Any, ...]:
    """From a list a leaf to a tree a mode, absent modes masked."""
    absent = optax.MaskedNode()
    return tuple(
        treedef.unflatten([modes[k] if k < len(modes) else absent for modes in factors])
        for k in range(MAX_ORDER)
    )


def _by_leaf(
    treedef: Any, leaves: Sequence[BlockedLeaf], trees: tuple[Any, ...]
) -> list[list[Array]]:
    """Inverse of `_by_mode`."""
    modes = [treedef.flatten_up_to(tree) for tree in trees]
    return [[modes[k][i] for k in range(leaf.blocks.order)] for i, leaf in enumerate(leaves)]
