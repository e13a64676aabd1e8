import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxopt_lab import data, models
from jaxopt_lab.data import TextFiles
from jaxopt_lab.report.tracker import read_metrics
from jaxopt_lab.tasks import Evaluation
from jaxopt_lab.train.config.run import PretrainConfig, validate
from jaxopt_lab.train.config.sections import EvalConfig, MeshConfig
from jaxopt_lab.train.dist.mesh import make_mesh
from jaxopt_lab.train.errors import ConfigError
from jaxopt_lab.train.evaluation import HeldOut
from jaxopt_lab.train.run import pretrain
from jaxopt_lab.train.text import open_text
from jaxopt_lab.train.trained import load_params
from tests.train.tiny_run import tiny_config


def silent(text):
    del text


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("notes")
    for number in range(3):
        (directory / f"{number}.md").write_text(f"Note {number}: " + "buy milk and bread. " * 10)
    return f"{directory}/*.md"


@pytest.fixture(scope="module")
def evaluated(text, notes, tmp_path_factory):
    """A run that evaluates three sets; checkpoints are ranked by one of them."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    sets = (f"notes=text-files:{notes}", "seen=train")
    evaluation = EvalConfig(every=2, batches=3, sample_tokens=0, sets=sets, best="notes")
    config = tiny_config(text, directory, ema=0.5, eval=evaluation)
    told = []
    return config, pretrain(config, message=told.append), told


def test_every_set_is_logged_under_its_name(evaluated):
    _, result, told = evaluated
    rows = [row for row in read_metrics(result.directory) if "validation_loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    for row in rows:
        for name in ("validation_loss", "notes/loss", "seen/loss"):
            assert row[name] > 0 and row[f"{name}_ema"] > 0
        assert row["notes/bits_per_byte"] < row["notes/loss"] * 1.5
    assert result.summary["notes/loss"] == rows[-1]["notes/loss"]
    assert sum(line.startswith("held out, notes: ") for line in told) == 1


def test_scores_are_exact_sums_over_tokens_and_their_bytes(evaluated):
    config, result, _ = evaluated
    _, params, tokenizer = load_params(result.directory)
    held_out = open_text(config, config.eval, 5, silent, config.eval.sets).held_out
    row = [row for row in read_metrics(result.directory) if "notes/loss" in row][-1]
    for name, loss, bits in (
        ("validation", "validation_loss", "bits_per_byte"),
        ("notes", "notes/loss", "notes/bits_per_byte"),
    ):
        nats, tokens, size = 0.0, 0, 0
        of_documents: dict[int, list[float]] = {}
        for batch in held_out[name]:
            logits = models.apply(config.model, params, batch["tokens"][:, :-1])
            targets = batch["tokens"][:, 1:]
            losses = -np.take_along_axis(
                np.asarray(jax.nn.log_softmax(logits)), targets[..., None], axis=-1
            )[..., 0]
            counted = batch["mask"] == 1
            nats += losses[counted].sum(dtype=np.float64)
            tokens += counted.sum()
            for document, lost in zip(batch["documents"][counted], losses[counted], strict=True):
                of_documents.setdefault(int(document), []).append(float(lost))
            size += tokenizer.bytes_per_token[targets[counted]].sum()
        assert row[loss] == pytest.approx(nats / tokens, rel=1e-5)
        assert row[bits] == pytest.approx(nats / (np.log(2) * size), rel=1e-5)
        rest = [sum(x) - nats / tokens * len(x) for x in of_documents.values()]
        error = np.sqrt(np.square(rest).sum() * len(rest) / (len(rest) - 1)) / tokens
        assert len(rest) > 1 and row[f"{loss}_se"] == pytest.approx(error, rel=1e-4)
        assert row[f"{bits}_se"] == pytest.approx(error * row[bits] / row[loss], rel=1e-4)
        assert row[f"{loss}_ema_se"] > 0


def test_the_best_checkpoint_is_that_of_the_named_set(evaluated):
    _, result, _ = evaluated
    losses = {row["step"]: row["notes/loss_ema"] for row in read_metrics(result.directory)
              if "notes/loss_ema" in row}  # fmt: skip
    stored = json.loads((result.directory / "config.json").read_text())["eval"]
    assert stored["best"] == "notes" and len(stored["sets"]) == 2
    seal = [path for path in (result.directory / "checkpoints/6").rglob("*") if path.is_file()
            and b"held_out_loss" in path.read_bytes()]  # fmt: skip
    assert json.loads(seal[0].read_text())["held_out_loss"] == losses[6]


def test_another_ranking_is_refused_on_resume(evaluated):
    config, result, _ = evaluated
    other = replace(config.eval, best="validation")
    with pytest.raises(ConfigError, match="eval.best: got 'validation', but the run to resume"):
        pretrain(replace(config, eval=other, resume=True))


@pytest.mark.parametrize("name", ["validation", "seen"])
def test_the_text_that_is_evaluated_does_not_depend_on_the_batch(text, name):
    def targets(batch_size, accumulation):
        config = tiny_config(text, None, batch_size=batch_size, accumulation=accumulation)
        evaluation = EvalConfig(batches=3, sets=("seen=train",))
        rows = batch_size // accumulation
        opened = open_text(config, evaluation, rows, silent, evaluation.sets)
        return np.concatenate([b["tokens"][:, 1:][b["mask"] > 0] for b in opened.held_out[name]])

    wanted = targets(4, 1)
    assert len(wanted) == 3 * 8 * 16
    for batch_size, accumulation in ((4, 2), (7, 1), (64, 2)):
        np.testing.assert_array_equal(targets(batch_size, accumulation), wanted)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("notes",), "got 'notes', expected NAME=SOURCE"),
        (("a b=train",), "expected NAME=SOURCE"),
        (("a=train", "a=train"), "there is a set a already"),
        (("validation=train",), "there is a set validation already"),
        (("a=books:x",), "a: parts: got 'books:x', expected python-source"),
    ],
)
def test_bad_sets_are_named_before_anything_is_read(sets, message):
    with pytest.raises(ConfigError, match=f"eval.sets: .*{message}"):
        validate(replace(PretrainConfig(), eval=EvalConfig(sets=sets)), 1)


def test_the_ranking_set_must_be_there(text):
    with pytest.raises(ConfigError, match="eval.best: got 'a', expected one of validation, b"):
        validate(replace(PretrainConfig(), eval=EvalConfig(sets=("b=train",), best="a")), 1)
    with pytest.raises(ConfigError, match="eval.sets: none: .*no file"):
        config = tiny_config(text, None, corpus=TextFiles((text,)))
        open_text(config, config.eval, 4, silent, ("none=text-files:/nowhere/*.txt",))
    assert data.sets_from_text([]) == {}


def test_a_process_builds_the_held_out_rows_of_its_devices_alone(monkeypatch):
    built, placed = [], {}

    def build(numbers):
        built.extend(int(number) for number in numbers)
        return {"x": 10 * np.asarray(numbers)}

    def place(shape, sharding, at):
        assert shape == (16,)
        placed.update({start: at((slice(start, start + 2),)).tolist() for start in own[::2]})

    # As in a process whose devices are these.
    own = [0, 1, 4, 5, 10, 11]
    monkeypatch.setattr("jaxopt_lab.train.evaluation.rows_of_process", lambda *_: np.asarray(own))
    monkeypatch.setattr(jax, "make_array_from_callback", place)
    mesh = make_mesh(MeshConfig(4, 2, 1))
    batches = [data.RowsOnDemand(16, build), {"x": 10 * np.arange(16)}]
    for batch in batches:
        placed.clear()
        HeldOut({"set": Evaluation([batch], None, {})}, mesh, None)
        assert placed == {start: [10 * start, 10 * start + 10] for start in own[::2]}
    assert built == own
