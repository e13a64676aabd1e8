"""The loop: replays against the slow reference, semantics, many runs as one program."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxopt_lab.dynamics.loop.data import linear_data
from jaxopt_lab.dynamics.loop.learners import Learner, ridge, sgd
from jaxopt_lab.dynamics.loop.replay import RecordedDraws, replay
from jaxopt_lab.dynamics.loop.rounds import uniform_subset
from jaxopt_lab.dynamics.loop.run import run, run_many
from tests.reference import repeated_learning as reference

KEY = jax.random.key(11)
RNG = np.random.default_rng(4)
X = RNG.normal(size=(30, 2))
Y = X @ [3.0, -1.0] + RNG.normal(size=30)
OLS = ridge(0.0)


def recorded(setup, steps, refits, window=12):
    order = RNG.permutation(30)
    active = order[:window] if setup == "window" else order
    # A few rows again and again, so that rounds relabel an item more than once.
    items = order[window : window + steps] if setup == "window" else RNG.integers(0, 6, steps)
    splits = np.stack([RNG.permutation(active.size) for _ in range(refits)])
    return RecordedDraws(active, items, splits, RNG.random(steps), RNG.normal(size=steps))


@pytest.mark.parametrize(
    ("setup", "rule", "usage", "adherence", "alpha", "every", "steps"),
    [
        ("window", "mae", 0.7, 0.8, 0.0, 4, 16),
        ("window", "var", 0.5, 2.0, 0.5, 4, 18),  # the last round is shorter
        ("window", "mae", 1.0, 0.0, 0.0, 12, 18),  # a round replaces the whole window
        ("sampling", "mae", 0.6, 1.5, 0.5, 5, 30),
        ("sampling", "var", 1.0, 3.0, 0.0, 7, 30),
    ],
)
def test_replay_is_the_slow_loop(setup, rule, usage, adherence, alpha, every, steps):
    draws = recorded(setup, steps, -(-steps // every) + 1)
    held_out = 4 if setup == "window" else 10
    got = replay(
        (X, Y), ridge(alpha, standardize=False), draws, usage=usage, adherence=adherence,
        setup=setup, rule=rule, refit_every=every, held_out=0.33,
    )  # fmt: skip
    wanted = reference.repeat(
        X, Y, draws, setup=setup, usage=usage, adherence=adherence, rule=rule, every=every,
        num_held_out=held_out, alpha=alpha,
    )  # fmt: skip
    for mine, theirs in zip((np.column_stack(got.params), *got[1:]), wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-9)


def constant(value):
    """A learner that always says the same."""
    return Learner(lambda key, x, y: jnp.float64(value), lambda h, x: jnp.full(x.shape[0], h))


def test_the_last_adopted_draw_of_an_item_stands_and_others_change_nothing():
    items = np.array([7, 7, 7, 2])
    draws = RecordedDraws(
        active=np.arange(30), items=items, splits=np.tile(np.arange(30), (2, 1)),
        uniforms=np.array([0.1, 0.4, 0.9, 0.8]), normals=np.array([1.0, 2.0, 3.0, 4.0]),
    )  # fmt: skip
    got = replay((X, Y), constant(0.0), draws, usage=0.5, adherence=1.0, refit_every=4)
    labels = got.scale[0] * np.array([1.0, 2.0])
    np.testing.assert_allclose(got.labels, [*labels, labels[1], Y[2]])
    after = Y.copy()
    after[7] = labels[1]
    np.testing.assert_allclose(got.active_targets[1], after)


def test_the_window_drops_its_oldest_item():
    draws = recorded("window", 5, 3)
    got = replay((X, Y), constant(9.0), draws, usage=1.0, adherence=0.0, setup="window",
                 refit_every=3)  # fmt: skip
    first = Y[np.asarray(draws.active)]
    np.testing.assert_array_equal(got.active_targets[0], first)
    np.testing.assert_array_equal(got.active_targets[1], [*first[3:], 9.0, 9.0, 9.0])
    np.testing.assert_array_equal(got.active_targets[2], [*first[5:], *[9.0] * 5])


@pytest.mark.parametrize("setup", ["window", "sampling"])
def test_labels_that_nobody_adopts_change_nothing(setup):
    draws = recorded(setup, 16, 5)
    got = replay((X, Y), OLS, draws, usage=0.0, adherence=2.0, setup=setup, refit_every=4)
    np.testing.assert_array_equal(got.labels, Y[draws.items])


def test_obedient_labels_are_the_predictions():
    draws = recorded("sampling", 16, 5)
    got = replay((X, Y), OLS, draws, usage=1.0, adherence=0.0, refit_every=4)
    for step, row in enumerate(draws.items):
        same_round = slice(step // 4 * 4, step // 4 * 4 + 4)
        np.testing.assert_allclose(
            got.labels[step], X[row] @ got.params.coef[step // 4] + got.params.intercept[step // 4]
        )
        assert row in draws.items[same_round]


# The published loop, small; several tests share the compiled program.
def small(key, noise=1.0):
    return linear_data(key, num_items=100, num_features=2, noise=noise)


SETTINGS: dict[str, Any] = {"steps": 60, "refit_every": 5, "record_every": 5}
KEYS = jax.random.split(KEY, 5)


@pytest.fixture(scope="module")
def many():
    """Axes: (p, s), seed, record."""
    return run_many(
        KEYS, small, OLS, usage=np.array([1.0, 0.5]), adherence=np.array([0.0, 2.0]),
        keep="residuals", **SETTINGS,
    )  # fmt: skip


def assert_same(one, other, rtol=1e-9):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12)


def test_many_runs_are_single_runs(many):
    data_key, loop_key = jax.random.split(KEYS[3])
    with jax.enable_x64(True):
        data = jax.device_get(small(data_key))
    single = run(loop_key, data, OLS, usage=0.5, adherence=2.0, keep="residuals", **SETTINGS)
    assert single.step.tolist() == many.step.tolist() == [0, 25, 50, 60]
    of_many = jax.tree.map(lambda x: x[1, 3], many._replace(step=None))
    assert_same(of_many, single._replace(step=None))


def test_records_hold_the_residuals_they_describe(many):
    assert many.scale.shape == (2, 5, 4) and many.scale.dtype == np.float64
    assert many.residuals.shape == (2, 5, 4, 20)
    np.testing.assert_allclose(many.scale, np.abs(many.residuals).mean(axis=-1))
    np.testing.assert_allclose(many.statistics.dev, many.residuals.std(axis=-1))
    assert many.params.coef.shape == (2, 5, 4, 2)


@pytest.mark.parametrize("batch_size", [3, 64])
def test_batches_and_shards_do_not_change_a_run(many, batch_size):
    mesh = jax.make_mesh((4, 2), ("seeds", "other"))
    sharding = NamedSharding(mesh, PartitionSpec("seeds"))
    other = run_many(
        KEYS, small, OLS, usage=np.array([1.0, 0.5]), adherence=np.array([0.0, 2.0]),
        keep="residuals", batch_size=batch_size, sharding=sharding if batch_size == 3 else None,
        **SETTINGS,
    )  # fmt: skip
    assert_same(many, other)


def test_a_run_does_not_depend_on_its_length(many):
    settings: dict[str, Any] = SETTINGS | {"steps": 25}
    shorter = run_many(KEYS[:1], small, OLS, usage=1.0, adherence=0.0, **settings)
    np.testing.assert_allclose(shorter.statistics.dev[0], many.statistics.dev[0, 0, :2], rtol=1e-9)


def test_noise_levels_and_shared_arrays(many):
    record = run_many(
        KEYS[:2], small, OLS, usage=1.0, adherence=0.0, noise=np.array([1.0, 10.0]), **SETTINGS
    )
    np.testing.assert_allclose(record.scale[0], many.scale[0, :2], rtol=1e-9)
    np.testing.assert_allclose(record.scale[1], 10 * record.scale[0], rtol=1e-6)
    shared = run_many(KEYS[:2], (X, Y), OLS, usage=1.0, adherence=0.0, **SETTINGS)
    alone = run(jax.random.split(KEYS[1])[1], (X, Y), OLS, usage=1.0, adherence=0.0, **SETTINGS)
    np.testing.assert_allclose(shared.scale[1], alone.scale, rtol=1e-9)


def test_fresh_splits_are_other_residuals_of_the_same_run(many):
    fresh = run_many(
        KEYS, small, OLS, usage=1.0, adherence=0.0, record_on="fresh", keep="residuals", **SETTINGS
    )
    assert fresh.residuals is not None
    np.testing.assert_allclose(fresh.scale, many.scale[0], rtol=1e-9)
    assert not np.allclose(fresh.residuals, many.residuals[0])


def test_another_learner_and_the_last_short_round_of_a_window():
    record = run(
        KEY, small(KEY), sgd(3), usage=1.0, adherence=0.5, setup="window", rule="var",
        refit_every=8, record_every=4,
    )  # fmt: skip
    assert record.step.tolist() == [0, 32, 64, 70]
    assert np.isfinite(record.statistics.dev).all()


def test_scale_of_the_variance_rule_is_a_root_mean_square():
    record = run(KEY, (X, Y), OLS, usage=1.0, adherence=1.0, rule="var", keep="residuals", steps=5)
    assert record.residuals is not None
    np.testing.assert_allclose(record.scale, np.sqrt((record.residuals**2).mean(axis=-1)))


def test_subsets_are_uniform():
    keys = jax.random.split(KEY, 6000)
    masks = np.asarray(jax.jit(jax.vmap(lambda key: uniform_subset(key, 5, 2)))(keys))
    counts = [
        int((masks[:, a] & masks[:, b]).sum()) for a, b in itertools.combinations(range(5), 2)
    ]
    assert (masks.sum(axis=1) == 2).all() and sum(counts) == 6000
    # Chi-squared with 9 degrees of freedom exceeds 28 once in a thousand times.
    assert sum((count - 600) ** 2 / 600 for count in counts) < 28


def test_subsets_draw_again_where_words_tie(monkeypatch):
    calls = []

    def bits(key, shape, dtype):
        calls.append(key)
        words = jax.random.randint(key, shape, 0, 3)  # three words for eight slots: ties
        return words.astype(dtype)

    monkeypatch.setattr(jax.random, "bits", bits)
    masks = jax.vmap(lambda key: uniform_subset(key, 8, 3))(jax.random.split(KEY, 50))
    assert calls and (np.asarray(masks).sum(axis=1) == 3).all()


def test_ordering_by_usage_and_adherence():
    usage = np.array([0.1, 0.5, 0.9])
    record = run_many(
        jax.random.split(KEY, 12), small, OLS, usage=usage, adherence=np.array([[0.2], [2.5]]),
        setup="window", refit_every=5, record_every=14,
    )  # fmt: skip
    dev = record.statistics.dev[..., -1].mean(axis=-1)
    assert dev[0, 0] > 1.1 * dev[0, 1] > 1.21 * dev[0, 2]  # low adherence: falls with usage
    assert 1.1 * dev[1, 0] < dev[1, 1] < dev[1, 2] / 1.1  # high: grows
    assert (dev[1] > dev[0]).all()


def test_limits():
    keys = jax.random.split(KEY, 8)
    record = run_many(
        keys, small, OLS, usage=1.0, adherence=np.array([0.0, 3.0]), setup="sampling", steps=600,
        record_every=60, refit_every=10,
    )  # fmt: skip
    mean = jax.tree.map(lambda x: x.mean(axis=1), record.statistics)
    assert mean.density_at_zero[0, -1] > 50 * mean.density_at_zero[0, 0]
    assert mean.mass[0, -1, 0] >= 0.99
    assert mean.mass[1, -1, 2] < 0.05
    assert mean.dev[1, -1] > 50 * mean.dev[1, 0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"usage": 1.2}, r"usage is 1.2; wanted a probability p in \[0, 1\]"),
        ({"usage": float("nan")}, "usage is nan"),
        ({"adherence": -0.1}, "adherence is -0.1"),
        ({"setup": "windows"}, "setup is 'windows'; one of window, sampling"),
        ({"setup": "window", "window": 31}, "window is 31, 31 items, but the data have 30"),
        ({"setup": "window", "steps": 22, "refit_every": 5}, "steps is 22, but the pool outside"),
        ({"setup": "window", "refit_every": 10}, "refit_every is 10, more steps than the window"),
        ({"window": 0.0, "setup": "window"}, "window is 0.0"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"held_out": 0.97}, "leave 0 to train on"),
        ({"steps": -1}, "steps is -1"),
        ({"refit_every": 0}, "refit_every is 0"),
        ({"rule": "std"}, "rule is 'std'"),
        ({"kappas": (-1.0,)}, "kappas are"),
        ({"data": (X, np.ones(30))}, "all 30 values are 1.0"),
        ({"data": (np.where(np.arange(30)[:, None] == 4, np.nan, X), Y)}, "features: row 4"),
    ],
)  # fmt: skip
def test_bad_input(changed, message):
    arguments = {"data": (X, Y), "usage": 0.5, "adherence": 1.0} | changed
    with pytest.raises(ValueError, match=message):
        run(KEY, arguments.pop("data"), OLS, **arguments)


def test_bad_input_of_many_runs_and_replays():
    with pytest.raises(ValueError, match="noise is given, but data are arrays"):
        run_many(KEYS, (X, Y), OLS, usage=0.5, adherence=1.0, noise=1.0)
    with pytest.raises(ValueError, match="window is 200"):
        run_many(KEYS, small, OLS, usage=0.5, adherence=1.0, setup="window", window=200)
    with pytest.raises(ValueError, match=r"adherence is \[ 1 -2\]"):
        run_many(KEYS, small, OLS, usage=0.5, adherence=np.array([1, -2]))
    draws = recorded("sampling", 16, 5)
    with pytest.raises(ValueError, match=r"splits \(5, 30\).*wanted \(3, 30\)"):
        replay((X, Y), OLS, draws, usage=0.5, adherence=1.0, refit_every=8)
    with pytest.raises(ValueError, match="active: a sampling run starts with every item"):
        replay((X, Y), OLS, draws._replace(active=np.zeros(30, int)), usage=0.5, adherence=1.0,
               refit_every=4)  # fmt: skip
