"""What moves beside the pairs: magnitudes, heads, norms. And clipping by the norm of everything."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jaxopt_lab.core.low_rank_sum import Pair, product_norm_squared
from jaxopt_lab.core.numerics import Scalar, wide_dtype, widened
from jaxopt_lab.lora.pairs import (
    PAIRS,
    REST,
    WEIGHTS,
    labels,
    require_pairs,
    stacked,
    with_auto_axes,
)
from jaxopt_lab.lora.pairwise import taps_of
from jaxopt_lab.lora.tap import Tap
from jaxopt_lab.optim.fallback import adam_direction
from jaxopt_lab.optim.nonfinite import finite_entries, guarded
from jaxopt_lab.optim.options import AdamW, Routing
from jaxopt_lab.optim.rates import decayed_weights, scaled_rate
from jaxopt_lab.optim.routing import float_leaves


class HeavyBallState(NamedTuple):
    """State of `heavy_ball_rest`."""

    count: Int[Array, ""]
    trace: optax.Updates  # float32 or wider


def adamw_rest(
    learning_rate: optax.ScalarOrSchedule, fallback: AdamW, **defaults: Scalar
) -> optax.GradientTransformationExtraArgs:
    """AdamW with the numbers of `fallback`, or else the defaults b1, b2, eps, weight_decay."""

    def given(name: str) -> Any:
        own = getattr(fallback, name)
        return defaults[name] if own is None else own

    direction = adam_direction(b1=given("b1"), b2=given("b2"), eps=given("eps"))
    rate = scaled_rate(learning_rate, fallback.lr_ratio)
    rate = rate if fallback.learning_rate is None else fallback.learning_rate
    decay = decayed_weights(given("weight_decay"), None, Routing())
    return guarded(direction, decay, optax.scale_by_learning_rate(rate))


def heavy_ball_rest(
    learning_rate: optax.ScalarOrSchedule, momentum: Scalar, dampening: Scalar
) -> optax.GradientTransformationExtraArgs:
    r"""$m \leftarrow \mu m + (1 - d) g$, the first $m$ being $g$; entries that are bad wait."""

    def init(params: optax.Params) -> HeavyBallState:
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=wide_dtype(p)), params)
        return HeavyBallState(jnp.zeros([], jnp.int32), zeros)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        count, trace = state

        def step(g: Array, m: Array) -> tuple[Array, Array]:
            new = jnp.where(count == 0, widened(g), momentum * m + (1 - dampening) * widened(g))
            good = finite_entries(g) & jnp.isfinite(new)
            return jnp.where(good, new, jnp.nan), jnp.where(good, new, m).astype(m.dtype)

        leaves, treedef = jax.tree.flatten(updates)
        out = [step(g, m) for g, m in zip(leaves, jax.tree.leaves(trace), strict=True)]
        steps, trace = (treedef.unflatten([x[k] for x in out]) for k in range(2))
        return steps, HeavyBallState(jnp.asarray(optax.safe_increment(count)), trace)

    direction = optax.GradientTransformationExtraArgs(init, update)
    return guarded(direction, optax.scale_by_learning_rate(learning_rate))


def with_rest(
    who: str,
    pairs_tx: optax.GradientTransformationExtraArgs,
    rest: optax.GradientTransformation,
    *,
    weights: optax.GradientTransformation | None = None,
    clip: Scalar | None = None,
    clip_scales_stats: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""`pairs_tx` on the pairs of an adapter tree, `rest` on what else it holds.

    Args:
      who: Name of the optimizer, for errors.
      pairs_tx: Moves the factors.
      rest: Moves the other leaves.
      weights: Moves the weights of the adapters; None: `rest`.
      clip: Largest norm of the gradient of the kernels, $\sum \lVert X^\top S \rVert^2$, and of the
        other leaves together. Needs taps. Factor gradients are not looked at.
      clip_scales_stats: Multiply the layer inputs by the clip factor; False gives it to the rule as
        a factor of the gradient.
    """
    tx = optax.partition({PAIRS: pairs_tx, WEIGHTS: weights or rest, REST: rest}, labels)

    def init(params: optax.Params) -> optax.OptState:
        params = float_leaves(params)
        require_pairs(params, who)
        return tx.init(params)

    def update(updates, state, params=None, *, taps=None, **extra_args):
        updates = float_leaves(updates, params)
        if params is not None:
            params = float_leaves(params)
        if clip is not None and taps is not None:
            updates, taps = _clipped(updates, taps, clip, clip_scales_stats, who)
        return tx.update(updates, state, params, taps=taps, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def _clipped(updates: Any, taps: Any, clip: Scalar, scales_stats: bool, who: str) -> Any:
    pairs = require_pairs(updates, who)
    of_pairs = {i for pair in pairs for i in pair[1:]}
    leaves, treedef = jax.tree.flatten(updates)
    found = taps_of(pairs, taps, who, leaves)
    others = [g for i, g in enumerate(leaves) if i not in of_pairs]
    factor = with_auto_axes(_clip_factor, (found, others, clip), like=None)
    scaled = [g if i in of_pairs else g * factor.astype(g.dtype) for i, g in enumerate(leaves)]

    def clipped(tap: Tap) -> Tap:
        if scales_stats:
            return Tap(widened(tap.x) * factor, tap.s, tap.scale, tap.factor)
        return Tap(tap.x, tap.s, tap.scale, tap.factor * factor)

    taps = jax.tree.map(clipped, taps, is_leaf=lambda node: isinstance(node, Tap))
    return treedef.unflatten(scaled), taps


def _clip_factor(taps: list[Tap], others: list[Array], clip: Scalar) -> Array:
    squares = [_norm_squared(tap) for tap in taps]
    squares += [jnp.sum(jnp.square(widened(g))) for g in others]
    # What is not finite is refused where it stands and must not stop the others.
    norm = jnp.sqrt(sum((jnp.where(jnp.isfinite(x), x, 0) for x in squares), jnp.zeros(())))
    return jnp.minimum(1.0, clip / (norm + 1e-6))


def _norm_squared(tap: Tap) -> Array:
    x, s = stacked(tap.x), stacked(tap.s)
    s = s.reshape(x.shape[0], -1, *s.shape[1:])
    norms = jax.vmap(lambda x, s: jax.vmap(lambda s: product_norm_squared(Pair(x.T, s)))(s))
    found = norms(x, s)
    return jnp.sum(jnp.where(jnp.isfinite(found), found, 0))
