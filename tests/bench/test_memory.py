"""State of optimizers against formulas, and the table with their scratch memory."""

import json

import jax
import pytest

from jaxopt_lab.bench import memory, shapes
from jaxopt_lab.bench.command import main
from jaxopt_lab.bench.floors import tree_bytes
from jaxopt_lab.bench.methods import DEFAULT_METHODS, method


@pytest.mark.parametrize("model", ["tiny", "gpt2-124m"])
@pytest.mark.parametrize("name", DEFAULT_METHODS)
def test_states_are_as_large_as_their_formulas_say(name, model):
    tx = method(name).build(shapes.matrix_axes(model))
    state = jax.eval_shape(tx.init, shapes.abstract_params(model))
    counters = tree_bytes(state) - memory.state_bytes_of(name, model)
    assert 0 <= counters < 2000  # a few, and two of each matrix


def test_the_table(toy, monkeypatch, tmp_path, capsys):
    target = tmp_path / "memory.json"
    chosen = ("adamw", "lion_muon_p2")
    report = memory.run_memory(toy, optimizers=chosen)
    adamw, lion_muon = report.rows
    assert adamw.state_bytes > lion_muon.state_bytes
    assert adamw.temp_bytes is not None and adamw.temp_bytes < report.parameter_bytes
    monkeypatch.setattr("jaxopt_lab.bench.command.run_memory", lambda *given, **options: report)
    assert main(["memory", "--json", str(target)]) == 0
    assert json.loads(target.read_text())["rows"][1]["optimizer"] == "lion_muon_p2"
    printed = capsys.readouterr().out
    assert all(name in printed for name in chosen)
