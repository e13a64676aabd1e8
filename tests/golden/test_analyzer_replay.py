"""The smoothness analyzer against its stored case."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.golden import harness
from tests.golden.adaptive_warmup_analyzer import replay_analyzer

STEM = Path(__file__).parent / "data" / "adaptive_warmup" / "analyzer"


@pytest.fixture(scope="module")
def case():
    with np.load(STEM.with_suffix(".npz")) as archive:
        arrays = dict(archive)
    sidecar = json.loads(STEM.with_suffix(".json").read_text())
    return harness.Case("adaptive_warmup", "analyzer", sidecar, arrays)


def test_norms_and_fits_are_the_stored_ones(case):
    norms, fits = replay_analyzer(case)
    assert norms.passed and fits.passed, f"{norms}\n{fits}"
    assert (len(norms.checks), len(fits.checks)) == (6, 2)


@pytest.mark.parametrize(
    ("name", "part"), [("cur_grad.3", 0), ("norms.signum", 0), ("fit.rho_free", 1)]
)
def test_a_changed_array_fails(case, name, part):
    arrays = {**case.arrays, name: case.arrays[name] * np.float64(1 + 1e-8)}
    results = replay_analyzer(case._replace(arrays=arrays))
    assert [result.passed for result in results] == [i != part for i in range(2)]


def test_an_array_of_unknown_meaning_is_no_pass(case):
    arrays = {**case.arrays, "fit.rho3": np.zeros(5)}
    with pytest.raises(harness.NotUnderstood, match=r"fit\.rho3"):
        replay_analyzer(case._replace(arrays=arrays))
