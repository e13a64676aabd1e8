"""What the memory of a fine-tuning step depends on, at a small size: compiled, never run."""

import dataclasses
import json

import pytest

from jaxopt_lab import models
from jaxopt_lab.bench.adapter_memory import Case, run_adapter_memory

CONFIG = models.EncoderConfig(vocab_size=64, width=64, depth=2, heads=4, classes=2)
BATCH, LENGTH = 8, 64
CASES = {
    "one": Case(1, 4, 0.05, "bottom", "adamw"),
    "three": Case(3, 4, 0.05, "bottom", "adamw"),
    "six": Case(6, 4, 0.05, "bottom", "adamw"),
    "wide": Case(1, 16, 0.05, "bottom", "adamw"),
    "top": Case(1, 4, 0.05, "top", "adamw"),
    "taps": Case(6, 4, 0.0, "bottom", "scaled_lorsum"),
}


@pytest.fixture(scope="module")
def rows():
    chosen = list(CASES.values())
    report = run_adapter_memory(batch=BATCH, length=LENGTH, chosen=chosen, config=CONFIG)
    assert [dataclasses.asdict(case) for case in chosen] == [
        {name: value for name, value in row.items() if name in dataclasses.asdict(chosen[0])}
        for row in json.loads(json.dumps(report.to_json()))["rows"]
    ]
    assert "scaled_lorsum" in str(report)
    return dict(zip(CASES, report.rows, strict=True))


def test_adapters_cost_their_inputs(rows):
    one, three, six, wide = (rows[name].scratch_bytes for name in ("one", "three", "six", "wide"))
    inputs = 4 * BATCH * LENGTH * CONFIG.width
    assert one < three < six
    # Each adapter of a layer keeps an input of its own.
    assert three - one >= 1.5 * inputs
    # Beside it a bit of the mask for each entry, and not the random numbers that it is made of.
    assert six - one <= 7 * inputs
    # Four times the rank of one adapter costs less than two more.
    assert wide - one < three - one


def test_the_backward_pass_ends_at_the_lowest_adapter(rows):
    assert rows["top"].scratch_bytes < 0.75 * rows["one"].scratch_bytes


def test_state_and_taps(rows):
    n = m = CONFIG.width
    for name in ("one", "six", "wide"):
        case = CASES[name]
        assert rows[name].parameters == case.adapters * case.rank * (m + n)
        assert rows[name].state_numbers == case.adapters * 2 * case.rank * (m + n)
    assert rows["taps"].state_numbers == 6 * (4 + 1) * (m + n)
    assert rows["taps"].tap_bytes == 4 * 6 * BATCH * LENGTH * (m + n)
