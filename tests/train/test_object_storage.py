"""Runs in object storage: what holds for a local run directory holds there, or is refused."""

import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxopt_lab import lora
from jaxopt_lab.data import TextFiles
from jaxopt_lab.models import load_huggingface
from jaxopt_lab.report import storage
from jaxopt_lab.report.figures import loss_figure
from jaxopt_lab.report.tracker import read_metrics
from jaxopt_lab.train import export_run, load_params, pretrain
from jaxopt_lab.train.arguments import parse_config
from jaxopt_lab.train.errors import CheckpointError, ConfigError
from jaxopt_lab.train.io import lease, mirror
from jaxopt_lab.train.io.checkpoints import Checkpoints
from jaxopt_lab.train.io.lease import LEASE_FILE
from tests.object_store import object_store
from tests.train.tiny_run import Killed, losses_of, tiny_config

RUN = "gs://bucket/runs/one"


@pytest.fixture
def store(tmp_path, monkeypatch, text):
    monkeypatch.setattr(lease, "_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lease, "_WATCH_SECONDS", 0.3)
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(lease, "_SETTLE_SECONDS", 0.1)
    monkeypatch.setattr(mirror.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "store").mkdir()
    return object_store(tmp_path / "store", monkeypatch)


def killed_at(step):
    def callback(at, state, metrics, batch):
        if at == step:
            raise Killed

    return callback


def objects(store, prefix=""):
    root = store.root / "bucket" / "runs" / "one"
    return sorted(p.relative_to(root).as_posix() for p in root.rglob(f"{prefix}*") if p.is_file())


def test_a_run_is_killed_resumed_and_read(store, text, tmp_path):
    config = tiny_config(text, RUN, tensorboard=True)
    with pytest.raises(Killed):
        pretrain(config, callbacks=[killed_at(6)], message=lambda line: None)
    # Rows after the checkpoint are uploaded as well; the run that goes on drops them.
    before = losses_of(RUN)
    assert max(before) == 4
    lines = []
    again = parse_config(["--resume", "--run-directory", RUN], "pretrain")
    result = pretrain(again, message=lines.append)
    assert result.status == "finished" and str(result.directory) == RUN
    assert f"run directory: {RUN}" in lines and f"figure: {RUN}/figures/loss.png" in lines
    assert len(read_metrics(RUN)) == 3 + len(losses_of(RUN)) == 9
    assert losses_of(RUN).items() > before.items()
    names = objects(store)
    assert {"config.json", "manifest.json", "summary.json", "tokenizer.json"} <= set(names)
    assert sum(name.startswith("tensorboard/") for name in names) == 2
    assert LEASE_FILE not in names and not any("partial" in name for name in names)
    # Nothing of it stays on this machine, and nothing is called gs: here.
    assert not list(tmp_path.glob("jaxopt-lab-*")) and not list(tmp_path.rglob("gs:*"))
    _read_by_other_verbs(tmp_path)


def _read_by_other_verbs(tmp_path):
    model = export_run(RUN, "gs://bucket/models/one", step="best")
    assert "model.safetensors" in storage.names_in(model)
    with pytest.raises(ConfigError, match="gs://bucket/models/one.*already holds a model"):
        export_run(RUN, "gs://bucket/models/one")
    _, wanted, _ = load_params(RUN, step="best")
    jax.tree.map(np.testing.assert_array_equal, load_huggingface(model)[1], wanted)
    started = ["--init-from", "gs://bucket/models/one", "--run-directory", "gs://bucket/x"]
    config = parse_config(started, "pretrain")
    assert config.tokenizer.directory == config.init_from == "gs://bucket/models/one"
    forked = parse_config(["--fork-from", RUN, "--run-directory", "gs://bucket/x"], "pretrain")
    assert forked.model == config.model
    figure = loss_figure([RUN], "gs://bucket/figures/loss.png")
    assert figure.read_bytes()[1:4] == b"PNG"
    assert not list(tmp_path.glob("jaxopt-lab-*"))


def state_at(step):
    return {"w": np.full((40, 30), float(step), np.float32), "step": np.int32(step)}


def saved(store, *steps, **options):
    with Checkpoints(RUN, keep_newest=3, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, jax.tree.map(jax.numpy.asarray, state_at(step)), {"step": step})
            checkpoints.verify(step, finite=True)
        checkpoints.wait()
    return store.root / "bucket/runs/one/checkpoints"


def restored(notes):
    with Checkpoints(RUN, message=notes.append) as checkpoints:
        abstract = jax.eval_shape(lambda: jax.tree.map(jax.numpy.asarray, state_at(1)))
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract
        )
        found = checkpoints.restore(target)
    jax.tree.map(np.testing.assert_array_equal, found.state, state_at(found.step))
    return found.step


def test_a_save_that_is_cut_short_is_no_checkpoint(store):
    """Orbax writes under the last name there, and what it had written by then is removed."""
    directory = saved(store, 1)

    def fail(call, key):
        if call == "write" and "/2/" in key and key.endswith("commit_success.txt"):
            raise ConnectionError("the network is down")

    store.fail = staticmethod(fail)
    with pytest.raises(CheckpointError, match="checkpoint 2 could not.*checkpoint 1 is intact"):
        saved(store, 2)
    assert (directory / "2").is_dir()
    store.fail = staticmethod(lambda call, key: None)
    notes = []
    assert restored(notes) == 1 and not notes
    assert not any(path.is_file() for path in (directory / "2").rglob("*"))


def test_a_damaged_checkpoint_is_copied_aside_and_kept(store):
    directory = saved(store, 1, 2)
    file = next(path for path in (directory / "2" / "state").rglob("*") if path.is_file())
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    before = {p.relative_to(directory / "2") for p in (directory / "2").rglob("*") if p.is_file()}
    notes = []
    assert restored(notes) == 1
    assert f"moved to {RUN}/checkpoints/damaged/2-0, going on with checkpoint 1" in notes[0]
    aside = directory / "damaged" / "2-0"
    assert {p.relative_to(aside) for p in aside.rglob("*") if p.is_file()} == before
    assert not any(path.is_file() for path in (directory / "2").rglob("*"))
    # Its label is free again.
    saved(store, 2)
    assert restored([]) == 2


@pytest.mark.parametrize("gone", ["commit_success.txt", "state/manifest.ocdbt"])
def test_a_committed_checkpoint_that_lacks_an_object_is_damaged(store, gone):
    directory = saved(store, 1, 2)
    (directory / "2" / gone).unlink()
    notes = []
    assert restored(notes) == 1
    assert f"{gone} is missing" in notes[0]


def test_an_old_checkpoint_ceases_to_be_committed_before_it_is_deleted(store):
    directory = saved(store, 1)
    store.calls.clear()
    with Checkpoints(RUN, keep_newest=1, keep_best=0) as checkpoints:
        checkpoints.save(2, jax.tree.map(jax.numpy.asarray, state_at(2)), {"step": 2})
        checkpoints.verify(2, finite=True)
        checkpoints.wait()
    gone = [key.partition("/1/")[2] for call, key in store.calls if call == "delete"]
    gone = [name for name in gone if name]
    assert gone[:3] == ["_DIGESTS-0-of-1.json", "_FINITE", "commit_success.txt"]
    assert not any(path.is_file() for path in (directory / "1").rglob("*"))


def test_a_listing_that_fails_is_no_empty_directory(store):
    """Or a run would start from the beginning, over its checkpoints."""
    saved(store, 1)

    def fail(call, key):
        if key.endswith("checkpoints"):
            raise ConnectionError("the network is down")

    store.fail = staticmethod(fail)
    with pytest.raises(storage.StorageError, match=f"{RUN}/checkpoints: the network is down"):
        Checkpoints(RUN)


def test_a_second_writer_is_refused_and_a_dead_one_succeeded(store):
    directory = storage.path_of(RUN)
    with lease.only_launcher(directory, print):
        with pytest.raises(ConfigError, match=f"{RUN}.*process .* on .* is writing"):
            with lease.only_launcher(directory, print):
                pass
        held = (directory / LEASE_FILE).read_bytes()
    assert LEASE_FILE not in objects(store)
    (directory / LEASE_FILE).write_bytes(held)  # of a process that was killed
    notes = []
    with lease.only_launcher(directory, notes.append) as check:
        assert "has died" in notes[1]
        # Someone else takes it over, with whose lease this one commits nothing.
        (directory / LEASE_FILE).write_bytes(held)
        time.sleep(0.3)
        with pytest.raises(CheckpointError, match="taken over the lease.*commits nothing more"):
            saved(store, 1, publish=check)
    assert storage.names_in(directory / "checkpoints" / "1") and not Checkpoints(RUN).steps()
    assert LEASE_FILE in objects(store)


def test_what_cannot_be_uploaded_at_the_end_is_kept(store, tmp_path):
    directory = storage.path_of(RUN)

    def fail(call, key):
        if call == "write" and key.endswith("metrics.jsonl"):
            raise ConnectionError("the network is down")

    store.fail = staticmethod(fail)
    with pytest.raises(storage.StorageError, match="could not be uploaded and is in") as caught:
        with mirror.run_files(directory, writes=True, below=(), say=print) as files:
            (files.local / "metrics.jsonl").write_text("a row\n")
    kept = str(caught.value).partition("is in ")[2].partition(":")[0]
    assert (tmp_path / kept / "metrics.jsonl").read_text() == "a row\n"


def test_a_start_that_is_stopped_while_files_are_brought_changes_nothing(store, monkeypatch):
    log = store.root / "bucket/runs/one/metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("whole\n")

    def half(source, file):
        file.write_text("who")
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "download", half)
    options = {"writes": True, "below": (), "say": lambda line: None}
    with (
        pytest.raises(KeyboardInterrupt),
        mirror.run_files(storage.path_of(RUN), **options),
    ):
        pass
    assert log.read_text() == "whole\n"


def test_a_log_that_grows_while_it_is_uploaded(store, tmp_path, monkeypatch):
    put = storage.upload

    def upload(file, target):
        size = file.stat().st_size
        with open(files.local / "metrics.jsonl", "a") as log:
            log.write("more\n")
        assert file.stat().st_size == size  # the store was told so many bytes
        put(file, target)

    monkeypatch.setattr(storage, "upload", upload)
    options = {"writes": True, "below": (), "say": lambda line: None}
    with mirror.run_files(storage.path_of(RUN), **options) as files:
        (files.local / "metrics.jsonl").write_text("first\n")
    assert (store.root / "bucket/runs/one/metrics.jsonl").read_text() == "first\n"


def test_who_has_lost_the_lease_writes_and_deletes_nothing(store):
    saved(store, 1, 2)
    before = objects(store)

    def lost():
        raise CheckpointError("somebody else has it")

    notes = []
    with Checkpoints(RUN, keep_newest=1, keep_best=0, message=notes.append, check=lost) as mine:
        mine.verify(2, finite=True)
        mine.wait()
        with pytest.raises(CheckpointError, match="3 could not be written.*somebody else has it"):
            mine.save(3, state_at(3), {})
    assert objects(store) == before and len(notes) <= 1


def test_text_of_several_patterns_is_grouped_as_it_is_here(store, tmp_path):
    names = ["a/1.md", "a/2.md", "b/3.md", "4.md"]
    for root in (tmp_path / "here", store.root / "bucket" / "x"):
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(f"text {name}")

    def groups(root):
        source = TextFiles((f"{root}/*/*.md", f"{root}/4.md"))
        return {document.text: document.group for document in source.documents()}

    assert groups("gs://bucket/x") == groups(tmp_path / "here")
    assert set(groups(tmp_path / "here").values()) == {"a", "b", ""}


def test_a_run_that_is_refused_leaves_nothing(store, text):
    config = tiny_config(text, RUN, tokenizer=replace(tiny_config(text, RUN).tokenizer, kind="bpe"))
    config = replace(config, tokenizer=replace(config.tokenizer, vocab_size=300))
    with pytest.raises(ConfigError, match="vocab_size"):
        pretrain(config, message=lambda line: None)
    assert objects(store) == []
    with pytest.raises(ConfigError, match=f"{RUN}.*there is no run there"):
        parse_config(["--resume", "--run-directory", RUN], "pretrain")


def test_text_and_adapters(store, tmp_path, monkeypatch):
    from jaxopt_lab.data import TextFiles, TokenizerConfig, prepare

    folder = store.root / "bucket" / "text"
    folder.mkdir(parents=True)
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"This is document {number}.")
    (folder / "notes.pdf").write_bytes(b"%PDF")

    def hash_of(*paths):
        return prepare(
            TextFiles(paths), TokenizerConfig("bytes"), cache_dir=tmp_path, validation_fraction=0.3
        ).hash

    whole = hash_of("gs://bucket/text")
    assert whole == hash_of(str(folder)) == hash_of("gs://bucket/text/*.txt")
    (folder / "3.txt").unlink()
    assert hash_of("gs://bucket/text") == hash_of(str(folder)) != whole
    with pytest.raises(ValueError, match="matches no file"):
        hash_of("gs://bucket/none/*.txt")

    params = {"layer": {"kernel": jax.numpy.ones((4, 6))}}
    spec = lora.resolve(lora.LoraConfig(rank=2), params)
    adapters = lora.init(jax.random.key(0), spec, params)
    lora.save("gs://bucket/adapter", adapters, spec, base=params)
    found, _ = lora.load("gs://bucket/adapter", params)
    jax.tree.map(np.testing.assert_array_equal, found, adapters)
    with pytest.raises(FileExistsError, match="gs://bucket/adapter/adapter_config.json"):
        lora.save("gs://bucket/adapter", adapters, spec)
