import json

import pytest

from jaxopt_lab.bench import dynamics
from jaxopt_lab.bench.command import main
from jaxopt_lab.bench.dynamics import DynamicsRow, run_dynamics

TINY = {"loop": (2, 40), "ensemble": (4, 6)}


def test_both_cases_are_timed_after_compiling(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(dynamics, "_SIZES", TINY)
    path = tmp_path / "out.json"
    assert main(["dynamics", "--json", str(path)]) == 0
    out, err = capsys.readouterr()
    report = json.loads(path.read_text())
    assert [row["case"] for row in report["rows"]] == ["loop", "ensemble"]
    for row in report["rows"]:
        assert 0 < row["seconds"] < row["first_seconds"]
        assert row["holds"] is True and row["limit_seconds"] in (30.0, 60.0)
        work = row["replicas"] * row["steps"]
        assert row["replica_steps_per_second"] == pytest.approx(work / row["seconds"])
    assert "replica-steps/s" in out and out.count("yes") == 2
    assert "ensemble: 4 x 6 steps, compiling" in err and "round 3 of 3" in err


def test_other_sizes_have_no_limit():
    report = run_dynamics("ensemble", sizes=TINY, rounds=1)
    (row,) = report.rows
    assert row.limit_seconds is None and row.holds is None
    assert str(report).splitlines()[-1].endswith("-      -")


def test_a_slow_case_does_not_hold():
    assert DynamicsRow("loop", 64, 10_000, 40.0, 31.0, 30.0).holds is False


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="only: 'loops' is not one of loop, ensemble"):
        run_dynamics("loops")
    with pytest.raises(ValueError, match="rounds: got 0"):
        run_dynamics("loop", rounds=0)
