"""Runs of the repeated-learning loop again, from recorded draws."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from jaxopt_lab.dynamics.loop.config import LoopConfig, check_rates, merge_settings
from jaxopt_lab.dynamics.loop.data import Data
from jaxopt_lab.dynamics.loop.learners import Learner
from jaxopt_lab.dynamics.loop.rounds import ActiveSet, Draws, Round, checked_data, play_round


class RecordedDraws(NamedTuple):
    """The draws of a run, recorded elsewhere. R = refits, the first and the last included."""

    active: Int[np.ndarray, " active"]
    """Rows of the data that are active at first, oldest first."""

    items: Int[np.ndarray, " steps"]
    """Row of the data of every step."""

    splits: Int[np.ndarray, "refits active"]
    """Permutations of the positions in the active set, oldest first; the first are held out."""

    uniforms: Float[np.ndarray, " steps"]
    """u; the model's label is adopted where u < p."""

    normals: Float[np.ndarray, " steps"]
    """ξ."""


class Replay(NamedTuple):
    """Everything that a recorded run went through."""

    params: Any
    """Of the learner, with a leading axis of refits."""

    scale: Float[np.ndarray, " refits"]
    """m."""

    residuals: Float[np.ndarray, "refits held_out"]
    """In the order of the split."""

    active_targets: Float[np.ndarray, "refits active"]
    """Labels just before the refit, oldest item first."""

    labels: Float[np.ndarray, " steps"]
    """Given or left by each step."""


def replay(
    data: Data | tuple[ArrayLike, ArrayLike], learner: Learner, draws: RecordedDraws, *,
    usage: float, adherence: float, config: LoopConfig | None = None, **settings: Any,
) -> Replay:  # fmt: skip
    """Repeats a run from its recorded draws, by the same rounds as `run`, in float64.

    Args:
      data: (features (N, d), targets (N,)).
      learner: What is trained; its key is fixed.
      draws: All that was random. The number of steps and of active items is theirs.
      usage: p.
      adherence: s.
      config: The loop.
      **settings: Fields of `LoopConfig`, instead of or on top of `config`.

    Raises:
      ValueError: As `run`; draws whose shapes do not belong together.
    """
    with jax.enable_x64(True):
        active, items, splits, u, z = (np.asarray(x) for x in draws)
        size, steps = active.shape[0], items.shape[0]
        chosen = merge_settings(config, settings | {"steps": steps, "window": max(size, 1)})
        given = checked_data(data, chosen)
        check_rates(usage, adherence)
        rounds, every = chosen.num_rounds(given.targets.shape[0]), chosen.refit_every
        if splits.shape != (rounds + 1, size) or u.shape != (steps,) or z.shape != (steps,):
            raise ValueError(
                f"splits {splits.shape}, uniforms {u.shape}, normals {z.shape}; wanted "
                f"{(rounds + 1, size)}, {(steps,)}, {(steps,)}"
            )
        if chosen.setup == "sampling":
            if not np.array_equal(np.sort(active), np.arange(given.targets.shape[0])):
                raise ValueError("active: a sampling run starts with every item, each of them once")
            items = np.argsort(active)[items]  # the slot of a row
        taken = np.minimum(np.arange(rounds + 1) * every, steps)
        oldest = (taken if chosen.setup == "window" else 0 * taken)[:, None]
        slots = (splits + oldest) % size
        held_out = np.zeros(splits.shape, bool)
        count = chosen.num_held_out(size)
        np.put_along_axis(held_out, slots[:, :count], True, axis=1)
        pad = (0, (rounds + 1) * every - steps)
        per_round = [np.pad(x, pad).reshape(rounds + 1, every) for x in (items, u, z)]
        played, targets = jax.device_get(_replay(
            chosen, learner, given, jnp.float64(usage), jnp.float64(adherence),
            jnp.asarray(active), jnp.asarray(held_out), *map(jnp.asarray, per_round),
        ))  # fmt: skip
        order = (np.arange(size) + oldest) % size
        return Replay(
            params=played.params,
            scale=played.scale,
            residuals=np.take_along_axis(played.residuals, slots[:, :count], axis=1),
            active_targets=np.take_along_axis(targets, order, axis=1),
            labels=played.labels.ravel()[:steps],
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _replay(
    config: LoopConfig, learner: Learner, data: Data, usage: Array, adherence: Array, first: Array,
    held_out: Array, items: Array, uniforms: Array, normals: Array,
) -> tuple[Round, Array]:  # fmt: skip
    """(every round, targets by slot before its refit)."""
    size, count = first.shape[0], config.refit_every

    def step(active: ActiveSet, inputs: tuple[Array, ...]) -> tuple[ActiveSet, Any]:
        number, held_out, items, uniforms, normals = inputs
        valid = number * count + jnp.arange(count) < config.num_steps(0)
        draws = Draws(held_out, items, uniforms, normals, valid, jax.random.key(0))
        first_slot = number * count % size
        after, played = play_round(
            config, learner, data, usage, adherence, active, first_slot, draws
        )
        return after, (played, active.targets)

    active = ActiveSet(data.features[first].T, data.targets[first])
    numbers = jnp.arange(held_out.shape[0])
    return jax.lax.scan(step, active, (numbers, held_out, items, uniforms, normals))[1]
