"""The stored subset of the trajectories, replayed."""

from pathlib import Path

import pytest

from tests.golden import harness

DATA = Path(__file__).parent / "data"
CASES = list(harness.find_cases(DATA))


@pytest.mark.parametrize(("family", "stem"), CASES, ids=[f"{f}/{s.name}" for f, s in CASES])
def test_trajectory(family, stem):
    results = harness.replay_case(family, stem)
    assert results
    assert all(result.passed for result in results), "\n".join(map(str, results))


def test_low_precision_runs_are_replayed_too():
    # Without this, a sidecar that no longer names its as-is arrays would pass in silence.
    (result,) = [
        result
        for result in harness.replay_case("lion_muon", DATA / "lion_muon" / "muon_nesterov1_wd0.1")
        if "as-is" in result.label
    ]
    assert result.passed and 0 < result.checks[0].error < 1e-5
