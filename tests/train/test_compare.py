import importlib
import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from jaxopt_lab import cli
from jaxopt_lab.data import TextFiles, TokenizerConfig
from jaxopt_lab.report.tracker import read_metrics
from jaxopt_lab.sweep import PAIRED_RULE, StepCost, Tuned
from jaxopt_lab.train import compare as public_compare
from jaxopt_lab.train.arguments import parse_config
from jaxopt_lab.train.compare import compare
from jaxopt_lab.train.compare_report import Outcome, write_report
from jaxopt_lab.train.config.comparison import CompareConfig, Entrant, validate_comparison
from jaxopt_lab.train.config.optimizers import OPTIMIZERS, AdamWConfig, LionMuonConfig
from jaxopt_lab.train.config.schedules import WsdConfig
from jaxopt_lab.train.config.sections import EvalConfig, HeldOutConfig
from jaxopt_lab.train.config.serialize import from_json, to_json
from jaxopt_lab.train.errors import ConfigError
from jaxopt_lab.train.run import pretrain
from tests.train.tiny_run import MODEL, tiny_config

ADAMW, SIGNUM = "adamw", "signum:momentum=0.8"


@pytest.fixture(scope="module")
def config(text, tmp_path_factory):
    return CompareConfig(
        model=MODEL,
        corpus=TextFiles((text,)),
        tokenizer=TokenizerConfig(kind="bytes"),
        validation_fraction=0.2,
        steps=4,
        batch_size=4,
        eval=HeldOutConfig(every=2, batches=2),
        optimizers=(ADAMW, SIGNUM),
        rates=(f"{ADAMW}=1e-3,1e-2",),
        cells=2,
        seeds=(1, 2),
        timing_steps=2,
        run_directory=str(tmp_path_factory.mktemp("runs") / "comparison"),
    )


@pytest.fixture(scope="module")
def finished(config):
    """One comparison: four sweep runs and four final ones."""
    notes = []
    return compare(config, message=notes.append), notes


def test_it_leaves_a_complete_directory(config, finished):
    result, notes = finished
    present = {path.name for path in result.directory.iterdir()}
    assert present == {
        "config.json", "manifest.json", "tokenizer.json", "results", "table.md", "loss.png",
        "summary.json",
    }  # fmt: skip
    assert (result.directory / "loss.png").stat().st_size > 1000
    saved = from_json((result.directory / "config.json").read_text(), CompareConfig)
    assert saved == replace(config, run_directory=None)
    session = json.loads((result.directory / "manifest.json").read_text())["sessions"][0]
    assert session["corpus"]["hash"] and session["versions"]["jax"]
    stated = next(i for i, note in enumerate(notes) if PAIRED_RULE in note)
    assert stated < next(i for i, note in enumerate(notes) if note.startswith("adamw: "))
    assert any("sweep, step" in note or "seeds, step" in note for note in notes)


def test_results_hold_every_run_and_what_a_step_costs(finished):
    directory = finished[0].directory / "results"
    assert sorted(path.name for path in directory.iterdir()) == [
        "adamw.json", "signum-momentum-0.8.json",
    ]  # fmt: skip
    adamw = json.loads((directory / "adamw.json").read_text())
    assert adamw["optimizer"] == {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1,
                                  "b1": 0.9, "b2": 0.95, "eps": 1e-8,
                                  "decay": "matrices"}  # fmt: skip
    assert adamw["rates"] == [1e-3, 1e-2] and len(adamw["sweep_losses"]) == 2
    assert adamw["best_cell"] == int(np.argmin(adamw["sweep_losses"]))
    assert adamw["best_cell_on_rim"] in ("lowest", "highest")
    assert adamw["evaluated_steps"] == [2, 4] and np.shape(adamw["held_out"]) == (2, 2)
    assert np.shape(adamw["held_out_se"]) == np.shape(adamw["train_losses"]) == (2,)
    assert all(0 < error < 1 for error in adamw["held_out_se"])
    assert adamw["runs_at_once"] == 2 and adamw["optimizer_flops_per_step"] > 0
    cost = adamw["cost"]
    assert cost["step_seconds"] > 0 and cost["gradient_seconds"] > 0 and cost["peak_bytes"] > 0
    signum = json.loads((directory / "signum-momentum-0.8.json").read_text())
    # The default grid lies around the optimizer's own rate.
    assert signum["rates"] == [1.5e-4, 3e-4] and signum["optimizer"]["momentum"] == 0.8


def test_the_verdict_is_that_of_the_curves(finished):
    result = finished[0]
    adamw, signum = (outcome.tuned.held_out[:, -1] for outcome in result.outcomes)
    # Of two optimizers it is the paired t-test.
    error = np.std(signum - adamw, ddof=1) / math.sqrt(len(adamw))
    assert result.noise is not None
    assert result.noise.deviation == pytest.approx(error * math.sqrt(len(adamw) / 2))
    assert result.noise.freedom == len(adamw) - 1
    found = result.difference(SIGNUM, ADAMW)
    assert found is not None
    assert found.value == pytest.approx(signum.mean() - adamw.mean())
    assert found.standard_error == pytest.approx(error)
    chance = stats.ttest_rel(signum, adamw).pvalue
    assert found.counts == (abs(found.value) > 2 * error and chance < 0.05)
    summary = json.loads((result.directory / "summary.json").read_text())
    assert summary["rule"] == PAIRED_RULE and summary["reference"] == ADAMW
    assert summary["noise"]["deviation"] == pytest.approx(result.noise.deviation)
    assert summary["differences"][0]["difference"] == pytest.approx(-found.value)
    assert [row["mean_final_loss"] for row in summary["optimizers"]] == pytest.approx(
        [adamw.mean(), signum.mean()]
    )
    table = (result.directory / "table.md").read_text()
    assert table == result.table + "\n"
    for words in (f"{adamw.mean():.4f}", f"{signum.mean():.4f}", f"{found.value:+.4f}", PAIRED_RULE,
                  "documents", "direction only" if not found.counts else "yes",
                  "last 100 windows", "tokens/s", "optimizer share", "peak MiB",
                  "of its grid"):  # fmt: skip
        assert words in table
    assert "was not tuned" not in table


def test_a_best_rate_on_the_rim_says_where_to_move_the_grid(config, finished, tmp_path):
    result = finished[0]
    table, summary = result.table, json.loads((result.directory / "summary.json").read_text())
    for outcome, row in zip(result.outcomes, summary["optimizers"], strict=True):
        rim, rates = outcome.tuned.rim, outcome.tuned.rates  # of two rates one is always best
        assert rim is not None and row["best_cell_on_rim"] == rim
        assert f"{outcome.tuned.best_rate:.3g} ({rim})" in table
        moved = re.search(rf"--rates '({re.escape(outcome.label)}=[^']*)'", table)
        assert moved is not None
        entrants = validate_comparison(replace(config, rates=(moved[1],)))
        (entrant,) = [each for each in entrants if each.label == outcome.label]
        assert entrant.rates[1] / entrant.rates[0] == pytest.approx(rates[1] / rates[0], rel=0.01)
        assert outcome.tuned.best_rate in entrant.rates
    alone = replace(result.outcomes[0].tuned, rates=(1e-3,), sweep_losses=(2.0,), best=0)
    outcomes = (replace(result.outcomes[0], tuned=alone), result.outcomes[1])
    table = write_report(config, tmp_path, outcomes, 1.0).table
    assert "**adamw** has one rate, so it was not tuned." in table


COST = StepCost(2e-3, 1.5e-3, 32_000.0, None, 1.0)


def test_one_command_runs_only_what_lacks_a_result(config, finished, monkeypatch):
    directory = finished[0].directory
    kept = directory / "results" / "adamw.json"
    before = kept.stat().st_mtime_ns
    (directory / "results" / "signum-momentum-0.8.json").unlink()
    asked = []

    def stand_in(task, build, rates, **settings):
        asked.append(rates)
        return finished[0].outcomes[1].tuned

    # The package's attribute of that name is the function.
    module = importlib.import_module("jaxopt_lab.train.compare")
    monkeypatch.setattr(module, "tune", stand_in)
    monkeypatch.setattr(module, "measure_step", lambda *args, **settings: COST)
    again = compare(replace(config, vectorize="never"), message=lambda text: None)
    assert asked == [(1.5e-4, 3e-4)] and kept.stat().st_mtime_ns == before
    assert [o.label for o in again.outcomes] == [ADAMW, SIGNUM]
    assert json.loads(kept.read_text())["held_out"] == again.outcomes[0].tuned.held_out.tolist()
    compare(config, message=lambda text: None)
    assert len(asked) == 1


def test_results_of_other_settings_are_not_mixed(config, finished):
    with pytest.raises(ConfigError, match=r"rates: got .* but .*adamw.json was made with"):
        compare(replace(config, rates=()), message=lambda text: None)
    with pytest.raises(ConfigError, match="batch_size: got 8, but .* was made with 4; delete it"):
        compare(replace(config, batch_size=8), message=lambda text: None)


def test_results_of_an_earlier_measure_are_refused_by_name(config, finished, tmp_path):
    shutil.copytree(finished[0].directory, tmp_path / "older")
    for path in (tmp_path / "older" / "results").iterdir():
        result = json.loads(path.read_text())
        del result["common"]["measure"], result["held_out_se"]
        path.write_text(json.dumps(result))
    with pytest.raises(ConfigError, match="measure: got 2, but .* was made with None; delete it"):
        compare(replace(config, run_directory=str(tmp_path / "older")), message=lambda text: None)


def test_a_run_of_a_comparison_is_the_run_of_pretrain(config, text, finished, tmp_path):
    adamw = finished[0].outcomes[0].tuned
    pretrain(
        tiny_config(
            text, tmp_path / "run", model=config.model, steps=4, seed=2,
            optimizer=AdamWConfig(learning_rate=adamw.best_rate),
            eval=EvalConfig(every=2, batches=2, sample_tokens=0),
        ),
        message=lambda text: None,
    )  # fmt: skip
    rows = read_metrics(tmp_path / "run")
    curve = [row["validation_loss"] for row in rows if "validation_loss" in row and row["step"]]
    np.testing.assert_allclose(adamw.held_out[1], curve, rtol=1e-5)
    errors = [row["validation_loss_se"] for row in rows if "validation_loss_se" in row]
    np.testing.assert_allclose(adamw.errors[1], errors[-1], rtol=1e-4)


def outcome(label, finals, sweep=(3.0, 2.0, 4.0), best=1):
    curves = np.asarray([[5.0, final] for final in finals]).reshape(len(finals), 2)
    tuned = Tuned((1.0, 2.0, 4.0), sweep, best, (1, 2), (2, 4), curves, (), (), 3, 1.0, 0.5)
    return Outcome(label, {"name": label}, tuned, COST, 1.0)


def test_what_diverged_takes_no_part(config, tmp_path):
    nan = math.nan
    outcomes = (
        outcome("good", [2.0, 2.2], sweep=(3.0, 2.0, nan)),
        outcome("bad", [2.0, nan]),
        outcome("worse", [], sweep=(nan, nan, nan), best=None),
        outcome("better", [1.0, 1.2]),
    )
    result = write_report(config, tmp_path, outcomes, 1.0)
    assert result.noise is not None and result.noise.deviation == pytest.approx(0, abs=1e-12)
    assert result.difference("bad", "good") is None
    found = result.difference("better", "good")
    assert found is not None and found.counts and found.value == pytest.approx(-1.0)
    rows = {line.split("|")[1].strip(): line for line in result.table.splitlines() if "|" in line}
    assert "diverged" in rows["bad"] and "-1.0000" in rows["better"] and "25.0 %" in rows["good"]
    assert "good diverged at 4." in result.table
    assert "**bad** diverged on 1 of 2 seeds" in result.table
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [row["diverged_seeds"] for row in summary["optimizers"]] == [0, 1, 0, 0]
    assert [(d["optimizer"], d["minus"]) for d in summary["differences"]] == [("good", "better")]
    alone = write_report(config, tmp_path, outcomes[2:3], 1.0)
    assert alone.noise is None and "diverged" in alone.table


def test_grids_have_the_same_number_of_rates():
    for cells in (1, 4, 5):
        config = CompareConfig(optimizers=tuple(OPTIMIZERS), cells=cells, spacing=1.5)
        for entrant in validate_comparison(config):
            assert len(entrant.rates) == cells and entrant.optimizer.learning_rate in entrant.rates
            assert np.allclose(np.diff(np.log(entrant.rates)), math.log(1.5))


def test_command_line_and_json(tmp_path):
    words = (
        "--optimizers adamw lion-muon:period=inf,b2=0.95 --rates adamw=1e-3,2e-3 --cells 2 "
        "--model.depth 2 --schedule wsd --seeds 4 5 6 --eval.every 7 --vectorize=never --clip None"
    )
    config = parse_config(words.split(), "compare", CompareConfig)
    assert config.optimizers == ("adamw", "lion-muon:period=inf,b2=0.95")
    assert config.schedule == WsdConfig() and config.seeds == (4, 5, 6) and config.clip is None
    assert from_json(to_json(config), CompareConfig) == config
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    assert parse_config(["--config", str(path)], "compare", CompareConfig) == config
    adamw, lion = validate_comparison(config)
    assert adamw == Entrant("adamw", AdamWConfig(1e-3), (1e-3, 2e-3))
    assert lion.optimizer == LionMuonConfig(period="inf", b2=0.95)
    assert public_compare is compare


BAD = {
    "--optimizers nope": "optimizers: got 'nope', expected one of lion-muon",
    "--optimizers lion-muon:period=0": "optimizer.period: got 0",
    "--optimizers lion-muon:perod=2": "optimizers.lion-muon.perod: got 2, but there is no such "
    "setting; did you mean period?",
    "--optimizers lion-muon:b2=high": "optimizers.lion-muon.b2: got 'high', expected float",
    "--optimizers lion-muon:5": "expected NAME or NAME:setting=value",
    "--optimizers adamw adamw": "optimizers: got 'adamw', which is there twice",
    "--optimizers": "optimizers",
    "--optimizer adamw": "--optimizer",
    "--resume": "--resume",
    "--cells 0": "cells: got 0, expected at least 1",
    "--cells 3 --rates adamw=1,2": "rates: got 'adamw=1,2', with 2 rates, expected cells = 3",
    "--rates sgd=1,2": "rates: got 'sgd=1,2', expected OPTIMIZER=rate,rate,... of one of adamw",
    "--rates adamw=2,1": "rates: got 'adamw=2,1', expected increasing positive numbers",
    "--rates adamw=1,x": "rates: got 'adamw=1,x'",
    "--spacing 1": "spacing: got 1.0, expected above 1 and at most 1000",
    "--spacing nan": "spacing: got nan",
    "--seeds 1": "seeds: got [1], expected at least two different ones",
    "--seeds 0 1": "besides the sweep's 0",
    "--seeds 1 1": "seeds: got [1, 1]",
    "--seeds 1 -1": "seeds: got -1, expected at least 0",
    "--vectorize maybe": "--vectorize",
    "--timing-steps 0": "timing_steps: got 0",
    "--steps 0": "steps: got 0",
    "--eval.every 0": "eval.every: got 0",
    "--corpus text-files --corpus.paths /no/such/*.txt": "corpus: ",
}


@pytest.mark.parametrize("arguments", BAD)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", *arguments.split()]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("jaxopt-lab: error: ") and BAD[arguments] in last


def test_a_directory_of_something_else_is_left_alone(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"optimizer": {"name": "adamw"}}')
    assert cli.main(["compare", "--run-directory", str(tmp_path)]) == 2
    assert "which is not empty and holds no comparison" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
