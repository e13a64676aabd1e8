"""WeightLoRA and WeightLoRA+: weights of the adapters choose which of them stay."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from jaxopt_lab.core.checks import COUNT, check_decays, check_number, check_rates, given
from jaxopt_lab.core.numerics import Scalar, widened
from jaxopt_lab.lora.pairs import WEIGHTS, labels, rate_at
from jaxopt_lab.lora.rest import adamw_rest, with_rest
from jaxopt_lab.optim.fallback import adam_direction
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.nonfinite import finite_entries, guarded
from jaxopt_lab.optim.options import AdamW

# Below this norm of their gradient the weights say nothing: at the first step, where every `b` is
# zero, the gradient is zero, and a projection would choose by position.
_SILENT = 1e-10


class CountState(NamedTuple):
    """Steps taken."""

    count: Int[Array, ""]  # steps taken


@explains_keywords()
def weight_lora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    keep: Scalar,
    weight_learning_rate: optax.ScalarOrSchedule = 5.0,
    every: Scalar = 1,
    freeze_after: Scalar | None = None,
    threshold: Literal["value", "abs"] = "value",
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    weight_decay: Scalar = 0.0,
    fallback: AdamW = AdamW(),
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW on the factors, and iterative hard thresholding on the weights of the adapters.

    With layers $y = x W_i + \omega_i s (x A_i) B_i$, every step moves $A$ and $B$ by AdamW and
    $\omega \leftarrow \omega - \eta_\omega g_\omega$; every `every`-th step then sets all but the
    `keep` largest weights of the model to zero. An adapter of weight zero has no gradient, but its
    weight has one, and it may come back until the weights are frozen. From then on
    `jaxopt_lab.lora.prune` takes it out of the tree without changing the training of the others.

    Args:
      learning_rate: $\eta$, of the factors.
      keep: Adapters that stay; all, if there are fewer.
      weight_learning_rate: $\eta_\omega$, a number or a schedule. The released code multiplies both
        rates by one schedule.
      every: Steps between projections.
      freeze_after: Steps after which the weights stay, the last of which projects; None: never, as
        in the released code.
      threshold: Keep the largest values, as the released code does, or the largest "abs" values.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment before the bias correction.
      weight_decay: Of the factors, applied to the moved value, as in the released code.
      fallback: AdamW for the leaves that are trained whole; the same numbers unless it says
        otherwise.

    Raises:
      ValueError: At `init`, for adapters without weights.

    Example:
      >>> adapters = {n: {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2)), "weight": jnp.ones(())}
      ...             for n in ("q", "v")}
      >>> grads = jax.tree.map(jnp.ones_like, adapters)
      >>> grads["q"]["weight"] = jnp.array(-0.1)
      >>> tx = weight_lora(1e-3, keep=1, weight_learning_rate=0.5)
      >>> updates, _ = tx.update(grads, tx.init(adapters), adapters)
      >>> new = optax.apply_updates(adapters, updates)
      >>> round(float(new["q"]["weight"]), 3), float(new["v"]["weight"])
      (1.05, 0.0)

    Source: "WeightLoRA: Keep Only Necessary Adapters", arXiv 2506.02724, released code
    (brain-mmo-lab/WLoRA, `WeightAdamW`), whose initial `a` is wider: `LoraConfig(init="wlora")`.
    """
    _check(keep=keep, every=every, **given(freeze_after=freeze_after))
    if threshold not in ("value", "abs"):
        raise ValueError(f'threshold is {threshold!r}; choose "value" or "abs"')

    def new_weights(weights: Array, gradients: Array, count: Array) -> Array:
        moved = weights - rate_at(weight_learning_rate, count) * gradients
        step, last = count + 1, math.inf if freeze_after is None else freeze_after
        due = (step % every == 0) | (step == last)
        speaks = jnp.sqrt(jnp.sum(jnp.square(gradients))) > _SILENT
        stays = largest(jnp.abs(moved) if threshold == "abs" else moved, keep)
        moved = jnp.where(due & speaks & ~stays, 0, moved)
        return jnp.where(step > last, weights, moved)

    pairs = guarded(
        adam_direction(b1=b1, b2=b2, eps=eps),
        _move(learning_rate, weight_decay, lambda count: False),
    )
    own = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay}
    rest = adamw_rest(learning_rate, fallback, **own)
    tx = with_rest("weight_lora", pairs, rest, weights=_weights(new_weights))
    _check_numbers(learning_rate, weight_learning_rate, weight_decay, b1, b2)
    return _needs_weights(tx, "weight_lora")


@explains_keywords()
def weight_lora_plus(
    learning_rate: optax.ScalarOrSchedule,
    *,
    every: int = 10,
    halvings: int = 2,
    weight_learning_rate: optax.ScalarOrSchedule = 5.0,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-6,
    weight_decay: Scalar = 0.0,
    fallback: AdamW = AdamW(),
) -> optax.GradientTransformationExtraArgs:
    r"""WeightLoRA whose survivors grow: twice the rank each time that their number is halved.

    Steps move factors and weights as in `weight_lora`, without projections. Each of the steps
    `every`, 2 `every`, ..., `halvings` `every` moves the weights alone; after it call
    `jaxopt_lab.lora.select_and_grow`, which halves the adapters and doubles the ranks. Weights are
    frozen after the last of them. The number of parameters in adapters stays what it was.

    Args:
      learning_rate: $\eta$, of the factors.
      every: Steps between selections.
      halvings: Number of selections.
      weight_learning_rate: $\eta_\omega$.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment before the bias correction.
      weight_decay: Of the factors, applied to the moved value.
      fallback: AdamW for the leaves that are trained whole.

    Raises:
      ValueError: At `init`, for adapters without weights.

    Source: arXiv 2506.02724, released code (`FatAdamW`), which selects after growing. For the
    adapters that survive both orders are the same; this one never holds twice the parameters.
    """
    _check(every=every, halvings=halvings)

    def selects(count: Array) -> Bool[Array, ""]:
        return ((count + 1) % every == 0) & (count < every * halvings)

    def new_weights(weights: Array, gradients: Array, count: Array) -> Array:
        moved = weights - rate_at(weight_learning_rate, count) * gradients
        return jnp.where(count < every * halvings, moved, weights)

    pairs = guarded(
        adam_direction(b1=b1, b2=b2, eps=eps), _move(learning_rate, weight_decay, selects)
    )
    own = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay}
    rest = adamw_rest(learning_rate, fallback, **own)
    tx = with_rest("weight_lora_plus", pairs, rest, weights=_weights(new_weights))
    _check_numbers(learning_rate, weight_learning_rate, weight_decay, b1, b2)
    return _needs_weights(tx, "weight_lora_plus")


def largest(values: Array, keep: Scalar) -> Bool[Array, " n"]:
    """Which entries are among the `keep` largest; of equal ones the first.

    >>> largest(jnp.array([1.0, -3.0, 2.0, 1.0]), 2).tolist()
    [True, False, True, False]
    """
    # Not `top_k`: `keep` may be traced.
    order = jnp.argsort(-values, stable=True)
    return jnp.zeros(values.shape, bool).at[order].set(jnp.arange(values.size) < keep)


def _weights(
    new_weights: Callable[[Array, Array, Array], Array],
) -> optax.GradientTransformationExtraArgs:
    """A rule for the vector of all weights, in the order of their leaves."""

    def init(params: optax.Params) -> CountState:
        del params
        return CountState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        gradients, treedef = jax.tree.flatten(updates)
        if not gradients:
            return updates, CountState(jnp.asarray(optax.safe_increment(state.count)))
        weights = jax.tree.leaves(params)
        flat = jnp.concatenate([widened(g).reshape(-1) for g in gradients])
        old = jnp.concatenate([widened(w).reshape(-1) for w in weights])
        good = finite_entries(flat)
        moves = new_weights(old, jnp.where(good, flat, 0), state.count) - old
        parts = jnp.split(moves, list(_ends(gradients)))
        out = [u.reshape(g.shape).astype(g.dtype) for u, g in zip(parts, gradients, strict=True)]
        return treedef.unflatten(out), CountState(jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformationExtraArgs(init, update)


def _ends(leaves: list[Array]) -> list[int]:
    ends, total = [], 0
    for leaf in leaves[:-1]:
        total += leaf.size
        ends.append(total)
    return ends


def _move(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Scalar,
    waits: Callable[[Array], Bool[Array, ""] | bool],
) -> optax.GradientTransformationExtraArgs:
    r"""$p \leftarrow p - \eta d$, then $p \leftarrow p - \eta \lambda p$; 0 where it waits."""

    def init(params: optax.Params) -> CountState:
        del params
        return CountState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        rate, still = rate_at(learning_rate, state.count), waits(state.count)

        def move(d: Array, p: Array) -> Array:
            moved = -rate * d
            return jnp.where(still, 0, moved - rate * weight_decay * (widened(p) + moved))

        moves = jax.tree.map(move, updates, params)
        return moves, CountState(jnp.asarray(optax.safe_increment(state.count)))

    return optax.GradientTransformationExtraArgs(init, update)


def _needs_weights(
    tx: optax.GradientTransformationExtraArgs, who: str
) -> optax.GradientTransformationExtraArgs:
    def init(params: optax.Params) -> optax.OptState:
        state = tx.init(params)
        if WEIGHTS not in jax.tree.leaves(labels(params)):
            raise ValueError(
                f"{who}: the adapters have no weights; make them with LoraConfig(weights=True)"
            )
        return state

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(f"{who} needs the factors: call update(updates, state, params)")
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def _check(**numbers: Any) -> None:
    for name, value in numbers.items():
        check_number(name, value, COUNT)


def _check_numbers(learning_rate, weight_learning_rate, weight_decay, b1, b2) -> None:
    check_rates(learning_rate=learning_rate, weight_learning_rate=weight_learning_rate)
    check_rates(weight_decay=weight_decay)
    check_decays(b1=b1, b2=b2)
