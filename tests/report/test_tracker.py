import json
import math

import numpy as np
import pytest

from jaxopt_lab.report import Tracker, read_metrics


def write(directory, steps, **options):
    with Tracker(directory, tensorboard=False, **options) as tracker:
        for step in steps:
            tracker.log(step, {"loss": float(step)})


def steps_of(directory):
    return [row["step"] for row in read_metrics(directory)]


def reject_constants(name):
    raise AssertionError(f"{name} is not JSON")


def test_rows_are_strict_json_and_non_finite_values_come_back(tmp_path):
    with Tracker(tmp_path, tensorboard=False) as tracker:
        tracker.log(3, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float32(0.5), "e": 7})
    line = (tmp_path / "metrics.jsonl").read_text()
    json.loads(line, parse_constant=reject_constants)
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf
    assert (row["step"], row["d"], row["e"]) == (3, 0.5, 7)


def test_a_row_is_on_disk_before_the_tracker_is_closed(tmp_path):
    tracker = Tracker(tmp_path, tensorboard=False)
    tracker.log(1, {"loss": 2.0})
    assert steps_of(tmp_path) == [1]
    tracker.close()


@pytest.mark.parametrize("cut", [1, 5, 15])
def test_a_torn_last_line_is_ignored_when_read_and_removed_when_reopened(tmp_path, cut):
    write(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert steps_of(tmp_path) == [1, 2]
    write(tmp_path, [3, 4])
    assert steps_of(tmp_path) == [1, 2, 3, 4]


def test_resuming_drops_later_rows_and_continues_the_clock(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "time": 100.0 * step, "loss": 1.0} for step in range(1, 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "ti')
    write(tmp_path, [4, 5, 6], resume_step=3)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert 300.0 <= read_metrics(tmp_path)[3]["time"] < 400.0


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("row", ["5", "{}", '{"step": "3"}', '{"step": 3, "loss": {}}'])
def test_a_line_that_is_no_row_of_numbers_is_an_error(tmp_path, row):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": "NaN"}}\n{row}\n')
    with pytest.raises(ValueError, match="line 2: not a metrics row"):
        read_metrics(tmp_path)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="no metrics.jsonl here"):
        read_metrics(tmp_path)
    with Tracker(tmp_path, tensorboard=False) as tracker:
        with pytest.raises(ValueError, match="'loss': expected a scalar"):
            tracker.log(1, {"loss": np.zeros(3)})
        with pytest.raises(ValueError, match="'time'"):
            tracker.log(1, {"time": 1.0})
    assert steps_of(tmp_path) == []


def test_rows_are_forwarded_and_tensorboard_events_written(tmp_path):
    seen = []
    with Tracker(tmp_path, forward=lambda step, metrics: seen.append((step, metrics))) as tracker:
        tracker.log(1, {"loss": 2.0})
    assert seen == [(1, {"loss": 2.0})]
    (events,) = (tmp_path / "tensorboard").glob("events.*")
    assert b"loss" in events.read_bytes()
