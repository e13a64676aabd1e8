"""The benchmark of low-rank probes: its rows, what they are relative to, bad input."""

import json

import pytest

from jaxopt_lab.bench import low_rank
from jaxopt_lab.bench.command import main
from jaxopt_lab.bench.low_rank import run_low_rank
from jaxopt_lab.models import DecoderConfig

TOY = DecoderConfig(
    vocab_size=64, width=16, depth=1, heads=2, hidden=16, context=16, loop="scanned"
)


@pytest.mark.slow  # compiles for half a minute
def test_rows_of_one_report():
    report = run_low_rank(TOY, losses=4, batch=1, tokens=8, head_chunks=2, rounds=1)
    first, *others = report.rows
    assert first.name == "batched inference" and first.of_inference == 1
    assert [row.name.split()[0] for row in others] == ["low-rank", "dense"] * 2
    for row in report.rows:
        assert row.losses_per_second == pytest.approx(4 / (row.ms / 1e3))
        assert row.of_inference == pytest.approx(first.ms / row.ms)
        assert row.temp_bytes > 0
    assert "of inference" in str(report) and json.dumps(report.to_json())


def test_an_odd_number_of_losses():
    with pytest.raises(ValueError, match="losses: got 3, wanted an even number"):
        run_low_rank(TOY, losses=3)


def test_the_verb(monkeypatch, capsys):
    given = {}
    monkeypatch.setattr(
        low_rank, "run_low_rank", lambda config, **options: given.update(config=config, **options)
    )
    assert main(["low-rank", "--model", "tiny", "--losses", "8", "--dtype", "float32"]) == 0
    config = given.pop("config")
    assert (config.width, config.loop, config.compute_dtype) == (256, "scanned", "float32")
    del given["on_progress"]
    assert given == {"losses": 8, "batch": 16, "tokens": 48, "rank": 1, "chunk": None}
