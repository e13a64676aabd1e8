"""Zero-order steps against the forward passes that they consist of."""

import json

import pytest

from jaxopt_lab import models
from jaxopt_lab.bench.command import main
from jaxopt_lab.bench.zeroth_order import ROWS, run_zeroth_order
from tests.bench.test_models import TOY


def test_rows_are_timed_with_what_they_are_compared_with(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(models.PRESETS, "tiny", TOY)
    path = tmp_path / "out.json"
    words = ["--rows", "draw signs;MeZO, signs", "--repeats", "2", "--batch", "2"]
    assert main(["zeroth-order", *words, "--context", "16", "--json", str(path)]) == 0
    out, err = capsys.readouterr()
    report = json.loads(path.read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["evaluation", "draw normals", "draw signs", "MeZO, signs"]
    assert rows["evaluation"]["ratio"] == 1 and rows["evaluation"]["holds"] is None
    assert report["loop"] in err and report["batch"] == 2
    mezo, signs = rows["MeZO, signs"], rows["draw signs"]
    # Of medians, and a median of ratios: the same but for the noise of two rounds.
    assert mezo["ratio"] == pytest.approx(mezo["ms"] / 2 / rows["evaluation"]["ms"], rel=0.9)
    assert signs["reference"] == "draw normals" and signs["holds"] is (signs["ratio"] <= 0.5)
    # One perturbed copy.
    assert mezo["temp_bytes"] > 4 * models.parameter_count(TOY)
    assert "2 x evaluation" in out and "draw normals" in out


def test_what_a_row_is_compared_with_stands_above_it():
    names = list(ROWS)
    for number, name in enumerate(names[1:], 1):
        assert ROWS[name].reference in names[:number]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="model: 'gpt5' is not one of tiny"):
        run_zeroth_order("gpt5")
    with pytest.raises(ValueError, match="repeats: got 0, wanted at least 1"):
        run_zeroth_order("tiny", repeats=0)
    with pytest.raises(ValueError, match=r"rows: \['MeZO'\] not among evaluation; draw normals"):
        run_zeroth_order("tiny", rows=["MeZO"])
