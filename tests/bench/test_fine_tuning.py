"""The benchmark of fine-tuning steps: its rows, what they are relative to, bad input."""

import json

import pytest

from jaxopt_lab import models
from jaxopt_lab.bench import fine_tuning
from jaxopt_lab.bench.command import main
from jaxopt_lab.bench.fine_tuning import Shape, run_fine_tuning

TOY = Shape(
    models.DecoderConfig(
        vocab_size=64, width=64, depth=1, heads=2, kv_heads=1, hidden=64, context=16,
        param_dtype="bfloat16", compute_dtype="bfloat16",
    ),
    (2, 16),
    models.EncoderConfig(vocab_size=64, width=16, depth=1, heads=2, context=16, classes=2),
    (2, 8),
)  # fmt: skip


@pytest.mark.slow  # compiles a dozen steps
def test_rows_of_one_report():
    report = run_fine_tuning(("decoder", "encoder"), rounds=1, seconds_per_round=0.0, shape=TOY)
    rows = {(row.part, row.name): row for row in report.rows}
    assert [part for part, _ in rows] == ["decoder"] * 7 + ["encoder"] * 5
    for row in report.rows:
        first = next(r for r in report.rows if r.part == row.part)
        assert row.ratio == pytest.approx(row.ms / first.ms)
    promised = rows["encoder", "scaled LoRSum"]
    assert promised.at_most == 1.4 and promised.holds is (promised.ratio <= 1.4)
    # Neither gradient nor state of what is frozen; blocks of four bits in place of numbers.
    full, adapters = rows["decoder", "full, AdamW"], rows["decoder", "q and v, AdamW"]
    assert adapters.gflop < 0.8 * full.gflop
    scanned, packed = (
        rows["decoder", f"all linear, AdamW, {how}"] for how in ("scanned", "packed")
    )
    assert packed.peak_bytes - packed.temp_bytes < scanned.peak_bytes - scanned.temp_bytes
    assert json.dumps(report.to_json()) and "scaled LoRSum, no clip" in str(report)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"parts: \['heads'\] not among decoder, encoder"):
        run_fine_tuning(["heads"])
    with pytest.raises(ValueError, match="rounds: got 0, wanted at least 1"):
        run_fine_tuning(rounds=0)


def test_the_verb(monkeypatch, capsys):
    given = {}

    def run(parts, **options):
        given.update(options, parts=parts)
        return "table"

    monkeypatch.setattr(fine_tuning, "run_fine_tuning", run)
    assert main(["fine-tuning", "--only", "decoder", "--rounds", "3"]) == 0
    del given["on_progress"]
    assert given == {"parts": ["decoder"], "rounds": 3, "seconds_per_round": 0.3}
    assert capsys.readouterr().out == "table\n"
