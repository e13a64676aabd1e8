"""The repeated-learning loop: one run, and many runs as one program."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from jaxopt_lab.dynamics.loop.config import LoopConfig, check_rates, merge_settings
from jaxopt_lab.dynamics.loop.data import Data
from jaxopt_lab.dynamics.loop.learners import Learner
from jaxopt_lab.dynamics.loop.metrics import Statistics, statistics
from jaxopt_lab.dynamics.loop.rounds import (
    ActiveSet,
    Draws,
    Round,
    checked_data,
    play_round,
    uniform_subset,
)

MakeData = Callable[..., Data | tuple[Array, Array]]


class LoopRecord(NamedTuple):
    """A run at its recorded refits, as NumPy arrays in float64.

    All but `step` have the axes of the runs in front.
    """

    step: Int[np.ndarray, " records"]
    """Steps taken before the refit; 0 is the first fit."""

    scale: Float[Array, "*runs records"]
    """m of the noise rule: held-out MAE ("mae") or RMSE ("var")."""

    statistics: Statistics
    """Of the residuals that are recorded."""

    params: Any
    """Of the learner."""

    residuals: Float[Array, "*runs records held_out"] | None
    """With `keep="residuals"`."""


def run(
    key: PRNGKeyArray, data: Data | tuple[ArrayLike, ArrayLike], learner: Learner, *,
    usage: float, adherence: float, config: LoopConfig | None = None, **settings: Any,
) -> LoopRecord:  # fmt: skip
    """Trains a learner again and again on data that its own predictions replace.

    Every T steps the learner is refitted on a random part of the active set, and the error m on the
    rest is measured. In a step an item (x, y) is drawn; with probability p its user adopts the
    model's label h(x) + σ_z ξ, ξ ~ N(0, 1), σ_z = s·MAE (rule "mae") or √s·RMSE (rule "var").
    Window: the item comes from a pool, without replacement, and takes the place of the oldest
    active one. Sampling: the item is an active one, and keeps its label unless the user adopts.

    Computes in float64: contracting loops reach residuals of 1e-6 of |y|, which float32 would hide
    behind a plateau of its own rounding.

    Args:
      key: Typed PRNG key. The draws of refit r are functions of (key, r) alone.
      data: (features (N, d), targets (N,)).
      learner: What is trained.
      usage: p in [0, 1].
      adherence: s ≥ 0; 0 is exact obedience.
      config: The loop.
      **settings: Fields of `LoopConfig`, instead of or on top of `config`.

    Returns:
      Statistics of the residuals at the recorded refits.

    Raises:
      ValueError: p or s out of range, data with a row that is not finite or with a constant target,
        a window or a number of steps that the data do not have.

    >>> from jaxopt_lab.dynamics.loop import data, learners
    >>> x, y = data.linear_data(jax.random.key(0), num_items=40, num_features=2)
    >>> record = run(jax.random.key(1), (x, y), learners.ridge(0.0), usage=1.0, adherence=0.0,
    ...              steps=200, record_every=10)
    >>> record.step
    array([  0, 100, 200])
    >>> bool(record.statistics.dev[-1] < record.statistics.dev[0] / 10)
    True

    Source: A. Veprikov, A. Afanasiev, A. Khritankov, "A Mathematical Model of the Hidden Feedback
    Loop Effect in Machine Learning Systems", arXiv 2405.02726. The released code held out 25 %,
    ended windows 150 steps earlier, recorded fresh splits (`record_on="fresh"`) and let labels leak
    from one trial into the next.
    """
    chosen = merge_settings(config, settings)
    with jax.enable_x64(True):
        given = checked_data(data, chosen)
        check_rates(usage, adherence)
        record = jax.device_get(
            _run_one(chosen, learner, key, given, jnp.float64(usage), jnp.float64(adherence))
        )
    return record._replace(step=chosen.recorded_steps(given.targets.shape[0]))


def run_many(
    keys: PRNGKeyArray, data: MakeData | Data | tuple[ArrayLike, ArrayLike], learner: Learner, *,
    usage: ArrayLike, adherence: ArrayLike, noise: ArrayLike | None = None,
    config: LoopConfig | None = None, batch_size: int = 16,
    sharding: NamedSharding | None = None, **settings: Any,
) -> LoopRecord:  # fmt: skip
    """Many runs as one program: seeds × settings (p, s), and noise levels of the data.

    `usage`, `adherence` and `noise` are broadcast against each other to the axes of the settings;
    a record has these axes first, then the seeds, then the refits. All settings of a seed share its
    draws, so that differences between settings are less noisy than either. A run does not depend on
    what runs beside it, on `batch_size`, or on `sharding`.

    Args:
      keys: (seeds,) typed PRNG keys.
      data: A function key -> (features, targets), which gives every seed data of its own (and takes
        `noise=` if noise levels are given), or arrays that all seeds share.
      learner: What is trained.
      usage: p, any shape.
      adherence: s, any shape.
      noise: σ of the data, any shape; None leaves the default of `data`.
      config: The loop.
      batch_size: Runs that a device computes side by side; the others wait, for memory.
      sharding: Of the runs, over the mesh axes that its spec names first; None for one device.
      **settings: Fields of `LoopConfig`, instead of or on top of `config`.

    Raises:
      ValueError: As `run`; noise levels for data that are given as arrays.
    """
    chosen = merge_settings(config, settings)
    with jax.enable_x64(True):
        check_rates(usage, adherence)
        if callable(data):
            items = jax.eval_shape(data, keys[0])[1].shape[0]
            chosen.check_items(items)
        else:
            if noise is not None:
                raise ValueError("noise is given, but data are arrays, not a function of a key")
            data = checked_data(data, chosen)
            items = data.targets.shape[0]
        levels = () if noise is None else (noise,)
        grid = np.broadcast_arrays(*(np.asarray(x, float) for x in (usage, adherence, *levels)))
        shape = (*grid[0].shape, keys.shape[0])
        count, shards = math.prod(shape), _num_shards(sharding)
        batch_size = min(batch_size, -(-count // shards))
        # Whole batches on every device: a remainder would be compiled a second time.
        lane = np.arange(count + -count % (shards * batch_size)) % count
        flat = [jnp.asarray(np.broadcast_to(x[..., None], shape).ravel()[lane]) for x in grid]
        lanes = (keys[lane % shape[-1]], *flat)
        make, arrays = (data, None) if callable(data) else (None, data)
        if sharding is not None:
            lanes = jax.device_put(lanes, NamedSharding(sharding.mesh, _runs(sharding)))
            arrays = jax.device_put(arrays, NamedSharding(sharding.mesh, PartitionSpec()))
        record = _run_lanes(chosen, learner, make, batch_size, sharding, arrays, lanes)
        record = jax.device_get(record)
        record = jax.tree.map(lambda x: x[:count].reshape(*shape, *x.shape[1:]), record)
    return record._replace(step=chosen.recorded_steps(items))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_one(
    config: LoopConfig, learner: Learner, key: PRNGKeyArray, data: Data, usage: Array,
    adherence: Array,
) -> LoopRecord:  # fmt: skip
    num_items = data.targets.shape[0]
    size = config.num_active(num_items)
    start_key, rounds_key = jax.random.split(key)
    if config.setup == "window":
        order = jax.random.permutation(start_key, num_items)
        data = Data(data.features[order], data.targets[order])
    active = ActiveSet(data.features[:size].T, data.targets[:size])
    recorded = config.recorded_rounds(num_items)
    is_recorded = np.isin(np.arange(config.num_rounds(num_items) + 1), recorded)

    def step(active: ActiveSet, inputs: tuple[Array, Array]) -> tuple[ActiveSet, Any]:
        number, keep = inputs
        round_key = jax.random.fold_in(rounds_key, number)
        draws = _draw(config, round_key, number, size, num_items)
        first_slot = number * config.refit_every % size
        after, played = play_round(
            config, learner, data, usage, adherence, active, first_slot, draws
        )
        recording = functools.partial(_record, config, learner, active, draws, played)
        # The number of the round is the same in all runs: the branch is really skipped.
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(recording))
        return after, jax.lax.cond(keep, recording, lambda: blank)

    inputs = (jnp.arange(is_recorded.size), jnp.asarray(is_recorded))
    every = jax.lax.scan(step, active, inputs)[1]
    return jax.tree.map(lambda x: x[recorded], every)


def _draw(config: LoopConfig, key: PRNGKeyArray, number: Array, size: int, num_items: int) -> Draws:
    split_key, user_key, label_key, fit_key = jax.random.split(key, 4)
    count = config.refit_every
    at = number * count + jnp.arange(count)
    # One call for both, and a single axis, for the time of compilation.
    uniforms, places = jax.random.uniform(user_key, (2 * count,), jnp.float64).reshape(2, count)
    if config.setup == "window":
        items = jnp.minimum(size + at, num_items - 1)
    else:
        items = (places * size).astype(jnp.int32)
    return Draws(
        held_out=uniform_subset(split_key, size, config.num_held_out(size)),
        items=items,
        uniforms=uniforms,
        normals=jax.random.normal(label_key, (count,), jnp.float64),
        valid=at < config.num_steps(num_items),
        key=fit_key,
    )


def _record(
    config: LoopConfig, learner: Learner, active: ActiveSet, draws: Draws, played: Round
) -> LoopRecord:
    held_out = draws.held_out
    size = held_out.shape[0]
    count = config.num_held_out(size)
    if config.record_on == "fresh":
        held_out = uniform_subset(jax.random.fold_in(draws.key, 1), size, count)
    residuals = played.residuals[jnp.nonzero(held_out, size=count)[0]]
    return LoopRecord(
        step=None,  # pyright: ignore[reportArgumentType]  (the caller knows it)
        scale=played.scale,
        statistics=statistics(residuals, kappas=config.kappas, density=config.density),
        params=played.params,
        residuals=residuals if config.keep == "residuals" else None,
    )


@functools.partial(jax.jit, static_argnums=range(5))
def _run_lanes(
    config: LoopConfig, learner: Learner, make: MakeData | None, batch_size: int,
    sharding: NamedSharding | None, arrays: Data | None, lanes: tuple,
) -> LoopRecord:  # fmt: skip
    def lane(data: Data | None, inputs: tuple) -> LoopRecord:
        key, usage, adherence, *noise = inputs
        data_key, loop_key = jax.random.split(key)
        if make is not None:
            made = make(data_key, noise=noise[0]) if noise else make(data_key)
            data = Data(*(jnp.asarray(x, jnp.float64) for x in made))
        assert data is not None
        return _run_one(config, learner, loop_key, data, usage, adherence)

    def many(arrays: Data | None, lanes: tuple) -> LoopRecord:
        return jax.lax.map(functools.partial(lane, arrays), lanes, batch_size=batch_size)

    if sharding is None:
        return many(arrays, lanes)
    # No run needs another: a manual map keeps any collective out.
    return jax.shard_map(
        many, mesh=sharding.mesh, in_specs=(PartitionSpec(), _runs(sharding)),
        out_specs=_runs(sharding), check_vma=False,
    )(arrays, lanes)  # fmt: skip


def _runs(sharding: NamedSharding) -> PartitionSpec:
    return PartitionSpec(*sharding.spec[:1])


def _num_shards(sharding: NamedSharding | None) -> int:
    if sharding is None or not sharding.spec or sharding.spec[0] is None:
        return 1
    names = sharding.spec[0]
    names = (names,) if isinstance(names, str) else names
    return math.prod(sharding.mesh.shape[name] for name in names)
