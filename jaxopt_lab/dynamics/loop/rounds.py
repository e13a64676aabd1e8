"""One round of the loop, a refit and the steps up to the next, as a pure function of its draws."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxopt_lab.dynamics.loop.config import LoopConfig
from jaxopt_lab.dynamics.loop.data import Data, check_data
from jaxopt_lab.dynamics.loop.learners import Learner


def checked_data(data: Any, config: LoopConfig) -> Data:
    """The data in float64, once they and the loop over them have been found sound."""
    features, targets = data
    check_data(features, targets)
    config.check_items(np.shape(targets)[0])
    return Data(jnp.asarray(features, jnp.float64), jnp.asarray(targets, jnp.float64))


class ActiveSet(NamedTuple):
    """What the learner is trained on; in a window slot i holds the item that entered i-th mod W."""

    rows: Float[Array, "features active"]
    """Features, one row a feature: reductions over the items then run over adjacent numbers."""

    targets: Float[Array, " active"]
    """Labels as they are now."""


class Draws(NamedTuple):
    """All that is random in a round."""

    held_out: Bool[Array, " active"]
    """Slots that the learner does not see."""

    items: Int[Array, " steps"]
    """Window: rows of the data that enter. Sampling: slots that may be relabelled."""

    uniforms: Float[Array, " steps"]
    """The model's label is adopted where u < p."""

    normals: Float[Array, " steps"]
    """ξ of the adopted labels."""

    valid: Bool[Array, " steps"]
    """Steps beyond the last one do nothing."""

    key: PRNGKeyArray
    """Of the learner."""


class Round(NamedTuple):
    """What happened."""

    params: Any
    """Of the refit."""

    scale: Float[Array, ""]
    """m: MAE (rule "mae") or RMSE (rule "var") of the held-out residuals."""

    residuals: Float[Array, " active"]
    """Of all slots at the refit, held out or not."""

    labels: Float[Array, " steps"]
    """The label each step gave or left."""


def play_round(
    config: LoopConfig, learner: Learner, data: Data, usage: Float[Array, ""],
    adherence: Float[Array, ""], active: ActiveSet, first_slot: Int[Array, ""], draws: Draws,
) -> tuple[ActiveSet, Round]:  # fmt: skip
    """Refits on the active set, then T steps with the fitted model.

    Args:
      config: Set-up and rule.
      learner: h.
      data: Where the items of a window come from.
      usage: p.
      adherence: s.
      active: Before the refit.
      first_slot: Window: of the oldest item.
      draws: Of this round.
    """
    params = _refit(config, learner, active, draws)
    residuals = active.targets - learner.predict(params, active.rows.T)
    scale = _held_out_scale(config, residuals, draws.held_out)
    spread = adherence * scale if config.rule == "mae" else jnp.sqrt(adherence) * scale
    adopted = (draws.uniforms < usage) & draws.valid
    step = _window_steps if config.setup == "window" else _sampling_steps
    active, labels = step(
        data, active, first_slot, draws, adopted,
        lambda x: learner.predict(params, x) + spread * draws.normals,
    )  # fmt: skip
    return active, Round(params, scale, residuals, labels)


def _refit(config: LoopConfig, learner: Learner, active: ActiveSet, draws: Draws) -> Any:
    if learner.fit_masked is not None:
        return learner.fit_masked(draws.key, active.rows.T, active.targets, ~draws.held_out)
    size = active.targets.shape[0]
    (seen,) = jnp.nonzero(~draws.held_out, size=size - config.num_held_out(size))
    return learner.fit(draws.key, active.rows[:, seen].T, active.targets[seen])


def _held_out_scale(config: LoopConfig, residuals: Array, held_out: Array) -> Array:
    """The m of the rule, from the residuals of all slots."""
    size = config.num_held_out(residuals.shape[0])
    if config.rule == "mae":
        return jnp.sum(jnp.where(held_out, jnp.abs(residuals), 0)) / size
    return jnp.sqrt(jnp.sum(jnp.where(held_out, residuals**2, 0)) / size)


def _window_steps(data, active, first_slot, draws, adopted, predict) -> tuple[ActiveSet, Array]:
    """Every step puts one item in the place of the oldest."""
    size, count = active.targets.shape[0], draws.items.shape[0]
    features = data.features[draws.items]
    labels = jnp.where(adopted, predict(features), data.targets[draws.items])
    slots = (first_slot + jnp.arange(count)) % size
    slots = jnp.where(draws.valid, slots, size)
    rows = active.rows.at[:, slots].set(features.T, mode="drop")
    return ActiveSet(rows, active.targets.at[slots].set(labels, mode="drop")), labels


def _sampling_steps(data, active, first_slot, draws, adopted, predict) -> tuple[ActiveSet, Array]:
    """Every step may relabel one item; of several adopted draws of an item the last one stands."""
    del data, first_slot
    size, count = active.targets.shape[0], draws.items.shape[0]
    offered = predict(active.rows[:, draws.items].T)
    same = draws.items[:, None] == draws.items
    later = jnp.arange(count)[:, None] < jnp.arange(count)
    erased = jnp.any(same & later & adopted, axis=1)
    slots = jnp.where(adopted & ~erased, draws.items, size)
    # The label a step leaves: that of the last adopted draw of its item up to itself, if any.
    up_to_here = same & ~later & adopted
    source = jnp.max(jnp.where(up_to_here, jnp.arange(count), -1), axis=1)
    labels = jnp.where(source >= 0, offered[source], active.targets[draws.items])
    return active._replace(targets=active.targets.at[slots].set(offered, mode="drop")), labels


def uniform_subset(key: PRNGKeyArray, size: int, chosen: int) -> Bool[Array, " size"]:
    """A subset of `chosen` of `size` slots as a mask, every one equally likely.

    The slots with the smallest of independent random words. Their threshold is found by bisection,
    which reads the words 32 times and is much cheaper than sorting them; where the words tie at the
    threshold all of them are drawn again, so that no tie has to be broken by position.
    """

    def count_below(words: Array, bound: Array) -> Array:
        return jnp.sum(words < bound, dtype=jnp.int32)

    def draw(state: tuple[Array, Array]) -> tuple[Array, Array]:
        attempt, _ = state
        words = jax.random.bits(jax.random.fold_in(key, attempt), (size,), jnp.uint32)

        def refine(bit: Array, bound: Array) -> Array:
            raised = bound | (jnp.uint32(1) << (31 - bit).astype(jnp.uint32))
            return jnp.where(count_below(words, raised) <= chosen, raised, bound)

        bound = jax.lax.fori_loop(0, 32, refine, jnp.uint32(0))
        return attempt + 1, words < bound

    def tied(state: tuple[Array, Array]) -> Array:
        return jnp.sum(state[1], dtype=jnp.int32) != chosen

    return jax.lax.while_loop(tied, draw, (jnp.int32(0), jnp.ones(size, bool)))[1]
