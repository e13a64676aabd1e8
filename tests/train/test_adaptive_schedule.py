"""Adaptive warm-up in the trainer: one loss for all, resumable, and explained at the end."""

import json
import shutil
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab.diagnostics import find_state
from jaxopt_lab.parity.warmup import quadrature_peak_gap
from jaxopt_lab.report.tracker import read_metrics
from jaxopt_lab.schedules import AdaptiveWarmupState, exact_peak_gap, warmup_kappa
from jaxopt_lab.step import accumulated
from jaxopt_lab.train.config.optimizers import OPTIMIZERS, AdamWConfig, LionMuonConfig, ModelInfo
from jaxopt_lab.train.config.optimizers_zeroth_order import ZEROTH_ORDER
from jaxopt_lab.train.config.schedules import AdaptiveWarmupConfig
from jaxopt_lab.train.config.sections import MeshConfig
from jaxopt_lab.train.dist.mesh import make_mesh, to_global
from jaxopt_lab.train.errors import ConfigError
from jaxopt_lab.train.rule import build_rule
from jaxopt_lab.train.run import pretrain
from jaxopt_lab.train.step import make_step
from tests.train import stand_in
from tests.train.tiny_run import restored, tiny_config

SCHEDULE = AdaptiveWarmupConfig(target_loss=1.0, delta_star_rule=0.9)
LOGGED = ("rate", "gap", "peak_gap", "switch_step")


def logged(directory):
    rows = [row for row in read_metrics(directory) if "rate" in row]
    return {name: [row[name] for row in rows] for name in LOGGED}


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n not in ZEROTH_ORDER])
def test_every_optimizer_warms_up(name):
    """Its whole update shrinks by one number, which starts at a share of its peak."""
    params = {"a": jnp.ones((4, 8)), "b": jnp.ones(3)}
    info = ModelInfo({"a": MuonDimensionNumbers(0, 1), "b": None})
    optimizer = OPTIMIZERS[name]()
    rule = build_rule(optimizer, replace(SCHEDULE, delta_star_rule="exact"), info, 100)
    plain = optimizer.build(lambda _: optimizer.learning_rate, info)
    state, other = rule.tx.init(params), plain.init(params)
    scaled, _ = rule.tx.update(params, state, params, value=jnp.asarray(5.0))
    whole, _ = plain.update(params, other, params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b / SCHEDULE.div_factor, rtol=1e-6, atol=1e-12),
        scaled, whole,
    )  # fmt: skip
    np.testing.assert_allclose(
        rule.rates(jnp.asarray(0), state)["rate"], optimizer.learning_rate / 100, rtol=1e-6
    )


def test_replicas_and_microbatches_follow_the_mean_loss_of_the_step():
    """Rows differ, so replicas that looked at their own losses would have other rates."""
    followed = []
    info = ModelInfo({"table": None, "head": MuonDimensionNumbers(0, 1), "bias": None})
    rule = build_rule(AdamWConfig(learning_rate=0.3), SCHEDULE, info, 20)
    for config, accumulation in ((MeshConfig(1), 1), (MeshConfig(2, 2, 2), 4)):
        mesh = make_mesh(config)
        step = make_step(
            stand_in.init_params, stand_in.loss_fn, rule.tx, mesh=mesh, param_specs=stand_in.SPECS,
            gradient=accumulated(accumulation), rates=rule.rates,
        )  # fmt: skip
        state, rates = step.init(jax.random.key(0)), []
        for number in range(8):
            batch = {"tokens": np.sort(stand_in.batch_at(number)["tokens"], axis=0)}
            state, metrics = step.update(state, to_global(mesh, batch, 32))
            rates.append(float(metrics["rate"]))
        followed.append(rates)
        held = find_state(state.opt_state, AdaptiveWarmupState).rate
        assert len({float(shard.data) for shard in held.addressable_shards}) == 1
    # Where the rate is steep it magnifies the rounding of a sum of losses.
    np.testing.assert_allclose(*followed, rtol=2e-3)
    assert len(set(followed[0])) > 4, "the rate moves"


def test_a_resumed_run_has_the_rates_of_the_straight_one(text, tmp_path):
    straight = tiny_config(
        text, tmp_path / "straight", schedule=SCHEDULE, optimizer=LionMuonConfig(),
    )  # fmt: skip
    pretrain(straight)
    shutil.copytree(tmp_path / "straight", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped/checkpoints/6")
    pretrain(replace(straight, run_directory=str(tmp_path / "stopped"), resume=True))
    assert logged(tmp_path / "stopped") == logged(tmp_path / "straight")
    states = [restored(straight, tmp_path / name)[1] for name in ("straight", "stopped")]
    jax.tree.map(np.testing.assert_array_equal, *states)
    summary = json.loads((tmp_path / "straight/summary.json").read_text())
    assert set(summary["schedule"]) == {
        "warmup_steps", "initial_gap", "peak_gap", "losses_ignored",
    }  # fmt: skip
    assert (tmp_path / "straight/figures/schedule.png").stat().st_size > 10_000


OUTCOMES = {
    "peak reached after 30 of 100 steps, at a training loss of 2.500": {"switch_step": 30},
    "a training loss of 2.500 was not reached, the rate never came to its peak": {},
    "was not reached within 50 of 100 steps; the rate decayed from 0.2": {
        "switch_step": 50, "decay_from": 0.2,
    },
    "the first loss was at or below the target 1.0; there was no warm-up": {
        "switch_step": 0, "peak_gap": 0.0, "initial_gap": -0.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("words", OUTCOMES)
def test_the_end_is_told_in_plain_words(words):
    info = ModelInfo({"a": MuonDimensionNumbers(0, 1)})
    rule = build_rule(AdamWConfig(learning_rate=0.5), SCHEDULE, info, 100)
    assert rule.outcome is not None
    state = rule.tx.init({"a": jnp.ones((2, 2))})
    held = find_state(state, AdaptiveWarmupState)
    changes = {"initial_gap": 4.0, "peak_gap": 1.5, **OUTCOMES[words]}
    changed = held._replace(**{name: jnp.asarray(value) for name, value in changes.items()})
    numbers, sentence = rule.outcome(changed)
    assert words in sentence and numbers["losses_ignored"] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_loss": None}, "schedule.target_loss: got None, expected the loss that"),
        ({"div_factor": 0.5}, "div_factor"),
        ({"delta_star_rule": 1.5}, "delta_star_rule"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"fallback_after": 0.0}, "fallback_after"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, words):
    with pytest.raises(ConfigError, match=words):
        replace(SCHEDULE, **changes).validate(100)


def test_the_official_rule_changes_the_search_alone():
    info = ModelInfo({"a": MuonDimensionNumbers(0, 1)})
    params = {"a": jnp.ones((256, 256))}
    tx = {}
    for name in ("exact", "official"):
        config = replace(SCHEDULE, delta_star_rule=name)
        config.validate(100)
        tx[name] = build_rule(AdamWConfig(learning_rate=1e-3), config, info, 100).tx
    states = {}
    for name, rule in tx.items():
        states[name] = []
        state = rule.init(params)
        for _ in range(2):
            states[name].append(find_state(state, AdaptiveWarmupState))
            _, state = rule.update(params, state, params, value=jnp.float32(8.78))
    (start, official), (other, exact) = states["official"], states["exact"]
    np.testing.assert_allclose(start.rate, 1e-3 / SCHEDULE.div_factor, rtol=1e-6)
    chex.assert_trees_all_equal(start, other)
    kappa = warmup_kappa(params, AdamWConfig().step_norm(), info.matrix_axes)
    gaps = (7.78, kappa * 1e-3, SCHEDULE.div_factor)
    np.testing.assert_allclose(official.peak_gap, quadrature_peak_gap(*gaps, 1e-3), rtol=1e-5)
    np.testing.assert_allclose(exact.peak_gap, exact_peak_gap(*gaps), rtol=1e-5)
    assert official.peak_gap != exact.peak_gap
