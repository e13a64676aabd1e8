import json
import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab.sweep import Program, Run, Task
from jaxopt_lab.sweep.stored import (
    Budget,
    Entry,
    best_cell,
    cell_in_words,
    read_runs,
    run_entries,
    train_stored,
)


def _loss(params, batch, key):
    loss = jnp.mean(jnp.square(params["w"] - batch["x"]))
    return loss, jnp.float32(1), {"loss": loss}


TASK = Task(
    init_params=lambda key: {"w": jnp.ones(())},
    loss=_loss,
    batches=lambda seed, start, stop: {"x": np.full((stop - start, 1), 0.1 * seed, np.float32)},
    held_out={"x": np.zeros((1, 1), np.float32)},
    steps=20,
    evaluate_every=10,
    tokens_per_step=1,
)
# The second cell of the second entry is the best; the last one of the first diverges.
ENTRIES = [
    Entry("one", lambda cell: optax.sgd(cell[0] * cell[1]), ((0.01, 1.0), (1e9, 1e9)), "family"),
    Entry("two", lambda cell: optax.sgd(cell[0]), ((0.02,), (0.3,), (0.04,)), "family"),
]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    directory = tmp_path_factory.mktemp("study")
    settings = {"sweep_seed": 0, "seeds": (1, 2, 3), "conditions": {"machine": "a test"}}
    first = run_entries(TASK, ENTRIES, directory, Budget(), **settings)
    return directory, settings, first


def test_every_run_has_a_file_and_the_best_cell_of_the_family_goes_on(stored):
    directory, _, done = stored
    names = {path.name for path in directory.iterdir()}
    assert done and names == {
        "one-cell-0.json", "one-cell-1.json", "two-cell-0.json", "two-cell-1.json",
        "two-cell-2.json", "family-seed-1.json", "family-seed-2.json", "family-seed-3.json",
    }  # fmt: skip
    diverged = json.loads((directory / "one-cell-1.json").read_text())
    assert diverged["held_out"][-1] is None
    entry, cell = best_cell(directory, ENTRIES)
    assert (entry.name, cell) == ("two", 1)
    runs = read_runs(directory, "family", (1, 2, 3))
    assert [run["seed"] for run in runs] == [1, 2, 3] and runs[0]["numbers"] == [0.3]
    assert runs[0]["machine"] == "a test" and len(runs[0]["held_out"]) == 2
    # At rest on the text of its seed: the held-out loss is the square of 0.1 times the seed.
    assert [run["held_out"][-1] for run in runs] == pytest.approx([0.01, 0.04, 0.09], rel=1e-2)


def test_files_of_another_grid_are_refused(stored):
    directory, settings, _ = stored
    moved = [ENTRIES[0], Entry("two", ENTRIES[1].build, ((0.02,), (0.5,), (0.04,)), "family")]
    with pytest.raises(ValueError, match=r"two-cell-1.json: numbers: got \[0.3\], wanted \[0.5\]"):
        run_entries(TASK, moved, directory, Budget(), **settings)
    other = settings | {"conditions": {"machine": "another"}}
    with pytest.raises(ValueError, match="one-cell-0.json: machine: got 'a test'"):
        run_entries(TASK, ENTRIES, directory, Budget(), **other)


def test_only_what_lacks_a_file_is_run_again(stored, monkeypatch):
    directory, settings, _ = stored
    trained = []
    keep = Program.train

    def train(self, runs, *rest):
        trained.append(list(runs))
        return keep(self, runs, *rest)

    monkeypatch.setattr(Program, "train", train)
    kept = directory / "two-cell-1.json"
    before = kept.read_bytes()
    (directory / "family-seed-2.json").unlink()
    assert run_entries(TASK, ENTRIES, directory, Budget(), **settings)
    assert trained == [[Run(1, 2)] * 3]  # the group is filled up
    assert kept.read_bytes() == before


def test_a_spent_budget_begins_nothing(tmp_path, capsys):
    program = Program(TASK, lambda rate: optax.sgd(0.1), 1, vectorized=False)
    named = [(Run(1.0, seed), tmp_path / f"{seed}.json") for seed in (0, 1)]
    budget = Budget(1000.0)
    assert not train_stored(program, named, Budget(0.0), lambda run: {})
    budget.took(2000.0)  # what was begun before took longer than what is left
    assert not train_stored(program, named, budget, lambda run: {})
    assert not list(tmp_path.iterdir()) and "stopped" in capsys.readouterr().err
    assert train_stored(program, named, Budget(math.inf), lambda run: {"name": "x"})
    assert json.loads((tmp_path / "1.json").read_text())["name"] == "x"


def test_the_rim_of_every_axis_is_named():
    assert cell_in_words(ENTRIES[0], 1) == "1e+09 (highest) 1e+09 (highest)"
    assert cell_in_words(ENTRIES[1], 1) == "0.3 (highest)"
    assert cell_in_words(ENTRIES[1], 2) == "0.04"
