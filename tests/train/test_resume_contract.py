"""What a resumed run shares with what came before, and what only a fork may change."""

import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxopt_lab import cli
from jaxopt_lab.data import TokenizerConfig, prepare, train_batches
from jaxopt_lab.report.tracker import read_metrics
from jaxopt_lab.train.arguments import parse_config
from jaxopt_lab.train.config.optimizers import AdamWConfig
from jaxopt_lab.train.config.optimizers_kronecker import ShampooConfig
from jaxopt_lab.train.config.run import PretrainConfig
from jaxopt_lab.train.config.sections import EvalConfig
from jaxopt_lab.train.config.serialize import VERSION, from_json, to_json
from jaxopt_lab.train.errors import CheckpointError, ConfigError
from jaxopt_lab.train.io import digests
from jaxopt_lab.train.io.checkpoints import Restored, committed_steps
from jaxopt_lab.train.io.run_directory import read_config
from jaxopt_lab.train.run import pretrain
from tests.train.tiny_run import Killed, restored, tiny_config, write_text

MODULE = "jaxopt_lab.train.run"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Eight steps of four windows, with a tokenizer that was trained on the text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXOPT_LAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        run = tmp_path_factory.mktemp("runs") / "finished"
        config = tiny_config(
            write_text(tmp_path_factory.mktemp("text")), run, steps=8, optimizer=AdamWConfig(),
            tokenizer=TokenizerConfig(vocab_size=300),
            eval=EvalConfig(every=4, batches=2, sample_tokens=0),
        )  # fmt: skip
        config = replace(config, model=replace(config.model, vocab_size=300))
        pretrain(config)
        yield config


def copy_of(finished, tmp_path, **changes):
    shutil.copytree(finished.run_directory, tmp_path / "run")
    return replace(finished, run_directory=str(tmp_path / "run"), resume=True, **changes)


@pytest.mark.parametrize("batch_size", [8, 2])
def test_another_batch_size_goes_on_where_the_text_was_left(finished, tmp_path, batch_size):
    """No window is skipped or seen twice, and tokens are counted as they are."""
    seen = []

    def look(step, state, metrics, batch):
        seen.append(np.asarray(batch["tokens"]))

    config = copy_of(finished, tmp_path, steps=8 + 16 // batch_size, batch_size=batch_size)
    pretrain(config, callbacks=[look])
    corpus = prepare(config.corpus, config.tokenizer, validation_fraction=0.2)
    with train_batches(corpus, batch_size=4, context=16, seed=0) as batches:
        expected = [batches.batch_at(step)["tokens"] for step in range(8, 12)]
    np.testing.assert_array_equal(np.concatenate(seen), np.concatenate(expected))
    tokens = {row["step"]: row["tokens"] for row in read_metrics(tmp_path / "run")}
    assert (tokens[8], tokens[9]) == (512, 512 + 16 * batch_size)
    assert max(tokens.values()) == 768
    data = json.loads((tmp_path / f"run/checkpoints/{config.steps}/data/data.json").read_text())
    assert data["samples"] == 48
    # The configuration of every start is kept.
    sessions = json.loads((tmp_path / "run/manifest.json").read_text())["sessions"]
    assert [s["start_step"] for s in sessions] == [0, 8]
    assert [s["config"]["batch_size"] for s in sessions] == [4, batch_size]
    assert read_config(tmp_path / "run").batch_size == batch_size


def test_a_checkpoint_that_counted_no_samples_had_one_batch_size(finished):
    run = SimpleNamespace(directory=finished.run_directory)
    samples = sys.modules["jaxopt_lab.train.start"]._samples
    assert samples(run, Restored(8, None, {"step": 8})) == 32
    assert samples(run, Restored(8, None, {"step": 8, "samples": 40})) == 40


def test_a_checkpoint_that_counted_no_samples_and_starts_of_several_batch_sizes(finished, tmp_path):
    """As an earlier version left them: a start before configurations were kept, others after."""
    config = copy_of(finished, tmp_path)
    path = tmp_path / "run/manifest.json"
    session = json.loads(path.read_text())["sessions"][0]
    sessions = [
        session | {"start_step": start, "config": {"batch_size": size}}
        for start, size in [(0, 4), (4, 2), (6, 16), (6, 1)]
    ]
    path.write_text(json.dumps({"sessions": sessions}))
    run = SimpleNamespace(directory=tmp_path / "run")
    samples = sys.modules["jaxopt_lab.train.start"]._samples
    counted = {step: samples(run, Restored(step, None, {"step": step})) for step in (0, 3, 5, 6, 8)}
    assert counted == {0: 0, 3: 12, 5: 18, 6: 20, 8: 22}
    # The first start that keeps configurations adds the one that was meant before.
    del session["config"]
    path.write_text(json.dumps({"sessions": [session]}))
    data = tmp_path / "run/checkpoints/8/data/data.json"
    content = json.loads(data.read_text())
    del content["samples"]
    data.write_text(json.dumps(content))
    digests.seal(tmp_path / "run/checkpoints/8", 8, None)

    def die(*arguments):
        raise Killed

    for size in (8, 2):
        with pytest.raises(Killed):
            pretrain(replace(config, steps=9, batch_size=size), callbacks=[die])
        assert samples(run, Restored(8, None, {"step": 8})) == 32


def test_a_tokenizer_is_compared_by_what_it_does(finished, tmp_path):
    """Not by where its files are."""
    config = copy_of(finished, tmp_path)
    twin, other = tmp_path / "twin", tmp_path / "other"
    for directory in (twin, other):
        directory.mkdir()
        shutil.copy(tmp_path / "run/tokenizer.json", directory)
    changed = json.loads((other / "tokenizer.json").read_text())
    changed["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(changed))
    same = TokenizerConfig("saved", 300, str(twin))
    assert pretrain(replace(config, tokenizer=same)).status == "finished"
    for directory, refusal in ((other, "tokenizer: got .*--fork-from"), (tmp_path, "No such file")):
        with pytest.raises((ConfigError, OSError), match=refusal):
            pretrain(replace(config, tokenizer=replace(same, directory=str(directory))))


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--seed 1", "seed"),
        ("--validation-fraction 0.3", "validation_fraction"),
        ("--tokenizer.vocab-size 290", "tokenizer"),
        ("--model.context 8", "model.context"),
    ],
)
def test_another_text_is_refused_by_name_before_it_is_read(
    finished, tmp_path, monkeypatch, capsys, flag, name
):
    def read(*arguments):
        raise AssertionError("the text was read")

    monkeypatch.setattr(sys.modules[MODULE], "prepare_text", read)
    run = copy_of(finished, tmp_path).run_directory
    before = (tmp_path / "run/config.json").read_bytes()
    assert cli.main(["pretrain", "--resume", "--run-directory", run, *flag.split()]) == 2
    error = capsys.readouterr().err
    assert f"error: {name}: got" in error and "--fork-from RUN" in error and error.count("\n") == 1
    assert (tmp_path / "run/config.json").read_bytes() == before


def test_other_documents_are_refused_and_the_configuration_stays(finished, tmp_path):
    corpus = replace(finished.corpus, paths=(write_text(tmp_path / "t").replace("*", "1*"),))
    config = copy_of(finished, tmp_path, corpus=corpus)
    before = (tmp_path / "run/config.json").read_bytes()
    with pytest.raises(ConfigError, match="corpus: got .*--fork-from RUN"):
        pretrain(config)
    assert (tmp_path / "run/config.json").read_bytes() == before


def test_a_fork_starts_from_the_weights_with_a_new_optimizer_state(finished, tmp_path, capsys):
    source = shutil.copytree(finished.run_directory, tmp_path / "source")
    fork = tmp_path / "fork"
    flags = ["pretrain", "--fork-from", str(source), "--run-directory", str(fork)]
    assert cli.main([*flags, "--seed", "3", "--validation-fraction", "0.2", "--steps", "2"]) == 0
    assert f"starting from the weights of {source}" in capsys.readouterr().err
    last = [row for row in read_metrics(source) if "validation_loss" in row][-1]
    first = read_metrics(fork)[0]
    assert first["step"] == 0 and first["validation_loss"] == last["validation_loss"]
    assert first["tokens"] == 0 and committed_steps(fork / "checkpoints") == [2]
    config = read_config(fork)
    state = restored(config, fork)[1]
    assert int(state.step) == 2 and {int(x) for x in counts(state.opt_state)} == {2}
    # A fork stands on its own: it has a copy of the tokenizer.
    shutil.rmtree(source)
    assert cli.main(["pretrain", "--resume", "--run-directory", str(fork), "--steps", "3"]) == 0


def counts(opt_state):
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    return [leaf for path, leaf in leaves if jax.tree_util.keystr(path).endswith("count")]


def test_a_fork_of_something_else_is_refused(finished, tmp_path, capsys):
    source, run = finished.run_directory, str(tmp_path / "run")
    fork = replace(finished, run_directory=run, fork_from=source)
    other = replace(fork, tokenizer=TokenizerConfig(vocab_size=280))
    with pytest.raises(ConfigError, match=r"tokenizer: .*kind='saved', directory="):
        pretrain(other)
    with pytest.raises(CheckpointError, match="has another model: layers/mlp/down/kernel is"):
        pretrain(replace(fork, model=replace(fork.model, hidden=32)))
    with pytest.raises(ConfigError, match="fork_from: .*there is no run there"):
        pretrain(replace(fork, fork_from=str(tmp_path)))
    assert not (tmp_path / "run").exists()
    flags = ["pretrain", "--resume", "--run-directory", source, "--fork-from", source]
    assert cli.main(flags) == 2 and "leave out --resume" in capsys.readouterr().err


def test_resume_takes_the_configuration_of_the_run_whatever_config_says(finished, tmp_path):
    run, other = copy_of(finished, tmp_path).run_directory, tmp_path / "other.json"
    other.write_text(to_json(replace(finished, batch_size=16)))
    flags = ["--config", str(other), "--resume", "--run-directory", run, "--steps", "9"]
    expected = replace(read_config(run), resume=True, run_directory=run, steps=9)
    assert parse_config(flags, "pretrain") == expected != read_config(run)


def test_a_configuration_of_before_goes_on_decaying_every_parameter():
    values = json.loads(to_json(PretrainConfig()))
    assert from_json(json.dumps(values)).optimizer.decay == "matrices"
    del values["optimizer"]["decay"]
    for version in (0, 1):
        assert from_json(json.dumps(values | {"version": version})).optimizer.decay == "all"


def test_old_names_of_shampoo_are_read():
    values = json.loads(to_json(PretrainConfig(optimizer=ShampooConfig(eps=1e-9))))
    settings = values["optimizer"]
    settings["epsilon"] = settings.pop("eps")
    settings["max_preconditioner_dim"] = settings.pop("max_precond_dim") // 2
    for version in (0, 1, 2):
        found = from_json(json.dumps(values | {"version": version})).optimizer
        assert found == replace(ShampooConfig(eps=1e-9), max_precond_dim=512)
    with pytest.raises(ConfigError, match="optimizer.epsilon"):
        from_json(json.dumps(values | {"version": VERSION}))
    values = json.loads(to_json(PretrainConfig(optimizer=AdamWConfig())))
    values["optimizer"]["epsilon"] = 1e-9  # it never had such a setting
    with pytest.raises(ConfigError, match="optimizer.epsilon"):
        from_json(json.dumps(values | {"version": 1}))


def test_a_rule_that_split_nothing_is_read():
    values = json.loads(to_json(PretrainConfig())) | {"version": VERSION - 1}
    values["mesh"]["rules"]["stream"] = []
    assert from_json(json.dumps(values)) == PretrainConfig()
    values["mesh"]["rules"]["stream"] = ["tensor"]
    with pytest.raises(ConfigError, match=r"mesh.rules.stream: .*no such setting"):
        from_json(json.dumps(values))


def test_a_configuration_has_a_version():
    values = json.loads(to_json(PretrainConfig()))
    assert values["version"] == VERSION
    assert from_json(json.dumps({"steps": 5})).steps == 5  # before there were versions
    for version in (VERSION + 1, -1, "one", True):
        with pytest.raises(ConfigError, match=f"version: got .*at most {VERSION}"):
            from_json(json.dumps({"version": version}))


def test_flags_of_a_fork_change_the_configuration_of_the_run(finished):
    config = parse_config(["--fork-from", finished.run_directory, "--steps", "5"], "pretrain")
    tokenizer = TokenizerConfig("saved", 300, finished.run_directory)
    assert config == replace(
        finished, fork_from=finished.run_directory, run_directory=None, steps=5,
        tokenizer=tokenizer,
    )  # fmt: skip
