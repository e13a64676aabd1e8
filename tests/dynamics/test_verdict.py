"""The verdict on loops that are run, and its rule on records that are made up."""

import functools

import jax
import numpy as np
import pytest

from jaxopt_lab.dynamics.loop import verdict as v
from jaxopt_lab.dynamics.loop.config import LoopConfig
from jaxopt_lab.dynamics.loop.data import linear_data
from jaxopt_lab.dynamics.loop.learners import ridge
from jaxopt_lab.dynamics.loop.run import LoopRecord, run_many

ITEMS, SEEDS = 400, 12
# (p, s) and the published reading; the last pair stands just below the critical adherence 1.2533.
PAIRS = [
    (1.0, 0.0, "positive loop"),
    (0.1, 0.9, "neutral"),
    (1.0, 3.0, "error amplification"),
    (1.0, 1.2, "neutral"),
]
CONFIGS = {
    "window": LoopConfig(setup="window", record_every=4),
    "sampling": LoopConfig(setup="sampling", steps=1000, record_every=5),
}


@functools.cache
def records(setup):
    keys = jax.random.split(jax.random.key(3), SEEDS)
    make = functools.partial(linear_data, num_items=ITEMS, num_features=3)
    usage, adherence, _ = zip(*PAIRS, strict=True)
    return run_many(keys, make, ridge(0.0), usage=usage, adherence=adherence, config=CONFIGS[setup])


def record_of(setup, pair):
    return v.record_at(records(setup), pair)


@pytest.mark.parametrize("setup", ["window", "sampling"])
@pytest.mark.parametrize("pair", range(len(PAIRS)))
def test_published_loops(setup, pair):
    usage, adherence, label = PAIRS[pair]
    verdict = v.judge(
        record_of(setup, pair), usage=usage, adherence=adherence, config=CONFIGS[setup],
        items=ITEMS,
    )  # fmt: skip
    assert verdict.label == label == verdict.expected.label
    assert verdict.expected.critical_adherence == pytest.approx(1.2533, abs=1e-4)
    if label != "neutral":
        sign = 1 if label == "error amplification" else -1
        assert sign * verdict.slope.low > 0 and sign * verdict.slope.high > 0
        assert sign * (verdict.mass_start.mean - verdict.mass_end.mean) > 0.2
        # 24 held-out residuals of the window are few for a test of normality.
        assert verdict.normality[1] < min(0.3, verdict.normality[0])
        assert setup == "window" or verdict.normality[1] < 0.05
        # Nor do they fill a histogram.
        assert verdict.pieces is not None
        assert float(verdict.pieces.r2) > (0.7 if setup == "window" else 0.9)
    if adherence == 3.0:
        assert verdict.growth.mean == pytest.approx(verdict.expected.growth, rel=0.15)
    text = str(verdict)
    assert label in text and f"{SEEDS} seeds" in text and "critical 1.253" in text


def made_up(log_growth, *, records=41):
    """A record whose ln dev moves evenly by the given amounts, one for each seed."""
    step = np.arange(records) * 10
    dev = np.exp(np.asarray(log_growth)[:, None] * np.linspace(0.0, 1.0, records))
    given = record_of("sampling", 0).statistics
    statistics = jax.tree.map(
        lambda x: np.ones((len(log_growth), records, *np.shape(x)[2:])), given
    )
    return LoopRecord(step, dev, statistics._replace(dev=dev, density_at_zero=1 / dev), None, None)


def judged(log_growth, **options):
    defaults = dict(usage=1.0, adherence=1.0, config=LoopConfig(steps=400), items=ITEMS)
    return v.judge(made_up(log_growth), **(defaults | options))


@pytest.mark.parametrize(
    "log_growth, label, resolved",
    [
        ([-0.5, -0.6, -0.55, -0.52], "positive loop", True),
        ([0.5, 0.6, 0.55, 0.52], "error amplification", True),
        ([0.05, -0.05, 0.02, -0.02], "neutral", True),
        ([-0.1, -0.1, -0.1, -0.1], "neutral", True),
        ([1.0, -1.0, 0.5, -0.5], "neutral", False),
        ([0.1, 0.35, 0.2, 0.3], "neutral", False),
    ],
)
def test_the_rule(log_growth, label, resolved):
    verdict = judged(log_growth)
    assert (verdict.label, verdict.resolved) == (label, resolved)
    assert ("not resolved" in str(verdict)) == (not resolved)


def test_the_statistic_is_a_t_interval_of_ln_dev():
    # End: the geometric mean of the last two of 41 records, which stand at 1 and 39/40.
    growth = np.array([0.5, 0.7, 0.9]) * (1 + 39 / 40) / 2
    verdict = judged([0.5, 0.7, 0.9])
    half = 4.302653 * growth.std(ddof=1) / np.sqrt(3)
    np.testing.assert_allclose(
        verdict.growth, [growth.mean(), growth.mean() - half, growth.mean() + half], rtol=1e-6
    )
    assert verdict.slope.mean == pytest.approx(0.7 / 400)
    assert verdict.line is not None and float(verdict.line.r2) > 0.99
    assert verdict.deviation.mean[-1] == pytest.approx(np.exp(0.7))


def test_margin_and_level_move_the_decision():
    growth = [-0.5, -0.6, -0.55, -0.52]
    assert judged(growth, margin=1.0).label == "neutral"
    assert judged([0.1, 0.35, 0.2, 0.3], level=0.2).label == "error amplification"


def test_deviations_of_zero_and_infinity_are_decided_too():
    record = made_up([0.0, 0.0, 0.0])
    for value, label in ((0.0, "positive loop"), (np.nan, "error amplification")):
        dev = record.statistics.dev.copy()
        dev[:, 20:] = value
        spoiled = record._replace(
            statistics=record.statistics._replace(dev=dev, density_at_zero=0 * dev)
        )
        verdict = v.judge(
            spoiled, usage=1.0, adherence=1.0, config=LoopConfig(steps=400), items=ITEMS
        )
        assert verdict.label == label and verdict.line is None
        assert "too few finite values" in str(verdict)


def test_theory_beside_the_verdict():
    config = LoopConfig(setup="window", rule="var")
    theory = v.expect(config=config, items=2000, usage=0.5, adherence=1.5, steps=1400)
    assert (theory.critical_adherence, theory.divergence_adherence) == (1.0, 2.0)
    nothing = v.expect(config=config, items=2000, usage=1.0, adherence=0.0, steps=1400)
    assert nothing.growth == -np.inf and nothing.label == "positive loop"


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(margin=-1.0), "margin, level: got -1.0"),
        (dict(level=1.0), "margin, level: got 0.2, 1.0"),
        (dict(kappa=0.7), "kappa: got 0.7, expected one of those recorded"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        judged([0.1, 0.2], **options)


def test_one_seed_is_no_verdict():
    with pytest.raises(ValueError, match="at least 2 seeds"):
        judged([0.1])
