"""Rows of the scaling benchmark; what they measure is not looked at."""

import gc

import pytest

from jaxopt_lab.bench import scaling


@pytest.fixture
def states(monkeypatch):
    """Steps that are alive at once, noted whenever one is made."""
    alive, seen = [], []

    class Step:
        collectives = {"all-gather": 1}

        def __init__(self, config, chosen, mesh, rows):
            gc.collect()
            seen.append((len(alive), rows))
            alive.append(self.__class__)

        def seconds(self, steps):
            return 0.5

        def __del__(self):
            alive.pop()

    monkeypatch.setattr(scaling, "_Step", Step)
    return seen


def test_the_state_of_a_row_is_freed_before_the_next_is_made(states):
    names = ("adamw", "lion_muon_p2")
    report = scaling.run_scaling("tiny", optimizers=names, batch_per_device=2, steps=1)
    assert states == [(0, 2), (0, 16), (0, 16)] * 2
    assert [row.mesh for row in report.rows] == ["one device", "data", "fsdp"] * 2
    assert {row.efficiency for row in report.rows} == {1.0}
