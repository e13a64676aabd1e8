"""The replay of repeated learning on references made here, which it must tell from wrong ones."""

import numpy as np
import pytest
import scipy.stats

from tests.golden import dynamics
from tests.golden.harness import Case, NotUnderstood
from tests.reference.repeated_learning import repeat

ITEMS, FEATURES, EVERY, SEEDS = 60, 2, 5, 40
STEPS = [0, 10, 20, 30]
KEYS = ["std", "mae", "f0", "mass0.4", "mass0.6", "p", "nu1", "nu2", "nu3"]
ENTRY = {"setup": "window", "rule": "var", "p": 0.8, "s": 1.5}
DEFAULTS = {"N": ITEMS, "d": FEATURES, "noise": 2.0, "window": 0.5, "T": EVERY, "test": 0.4}


def one_run(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ITEMS, FEATURES))
    y = x @ (100 * rng.random(FEATURES)) + 2.0 * rng.normal(size=ITEMS)
    order = rng.permutation(ITEMS)
    splits = np.stack([rng.permutation(30) for _ in range(7)])
    draws = (order[:30], order[30:], splits, rng.random(30), rng.normal(size=30))
    options = {"setup": "window", "rule": "var", "every": EVERY, "num_held_out": 12, "alpha": 0.3}
    return x, y, draws, repeat(x, y, draws, usage=0.8, adherence=1.5, **options)


def statistics(e):
    heights, edges = np.histogram(e, bins=200, density=True)
    return [
        e.std(), np.abs(e).mean(), np.interp(0.0, edges[:-1], heights, left=0, right=0),
        *(np.mean((e > -k) & (e <= k)) for k in (0.4, 0.6)), scipy.stats.normaltest(e).pvalue,
        *(np.mean(e**k) for k in (1, 2, 3)),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made():
    x, y, draws, (coefs, scales, residuals, targets, labels) = one_run(0)
    arrays = dict(zip(("active0", "ids", "splits", "u", "z"), draws, strict=True))
    arrays |= {"X": x, "y": y, "coef": coefs, "m": scales, "residuals": residuals}
    arrays |= {"y_active": targets, "labels": labels}
    arrays = {f"replay3_{name}": array for name, array in arrays.items()}
    rows = [step // EVERY for step in STEPS]
    table = np.array([[statistics(one_run(s)[3][2][r]) for r in rows] for s in range(SEEDS)])
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = {"lnstd": np.log(table[..., 0]), "lnf0": np.log(table[..., 2])}
        logs["lnf0"][~np.isfinite(logs["lnf0"])] = np.nan
        for name, values in ({"": table} | logs).items():
            for kind, reduced in (("mean", values.mean(axis=0)), ("sd", values.std(axis=0))):
                arrays["_".join(filter(None, ("case7", name, kind)))] = reduced
    recorded = ENTRY | {"id": 3, "T": EVERY, "n_test": 12, "alpha": 0.3}
    counted = ENTRY | {"case": 7, "data": "linear", "steps": STEPS, "seeds": SEEDS}
    sidecar = {"stat_keys": KEYS, "replay": [recorded], "cases": [counted]}
    return Case("dynamics", "made", sidecar | {"defaults": DEFAULTS | {"alpha": 0.3}}, arrays)


def verdicts(case):
    return {str(result.label).rsplit("/", 1)[1]: result for result in dynamics.replay(case)}


def test_right_references_pass(made):
    found = verdicts(made)
    assert list(found) == ["replay3", "case7"]
    for result in found.values():
        assert result.passed, str(result)


def test_wrong_draws_and_wrong_statistics_fail(made):
    labels = made.arrays["replay3_labels"] + 1e-6
    mean = made.arrays["case7_mean"] * 1.5
    wrong = made._replace(arrays=made.arrays | {"replay3_labels": labels, "case7_mean": mean})
    assert not any(result.passed for result in verdicts(wrong).values())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rounds": 3}, "unknown sidecar entries: rounds"),
        ({"defaults": {"momentum": 0.9}}, "unknown defaults: momentum"),
        ({"cases": [{**ENTRY, "case": 7, "data": "sines", "steps": STEPS}]}, "data 'sines'"),
        ({"cases": [{**ENTRY, "case": 7, "data": "linear", "steps": [0, 7, 30]}]}, "rounds of 5"),
    ],
)
def test_what_is_not_understood(made, changed, message):
    with pytest.raises(NotUnderstood, match=message):
        dynamics.replay(made._replace(sidecar=made.sidecar | changed))
