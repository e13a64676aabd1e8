"""Paths in object storage: one line for what is missing, and local copies of what is read."""

import sys
import threading
from pathlib import Path

import pytest

from jaxopt_lab.cli import main
from jaxopt_lab.report import storage
from jaxopt_lab.report.storage import StorageError, staged
from tests.object_store import object_store


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXOPT_LAB_CACHE", str(tmp_path / "cache"))
    return object_store(tmp_path / "store", monkeypatch)


def put(store, name, content="text"):
    file = store.root / "bucket" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    return file


@pytest.mark.parametrize("name", ["s3://bucket/run", "file:///tmp/run", "gs:/bucket/run", "gs://"])
def test_other_schemes_are_refused(name, store):
    with pytest.raises(StorageError, match="expected.*gs://BUCKET/PATH") as caught:
        storage.path_of(name)
    assert str(caught.value).startswith(name)


def test_what_must_be_local_is_refused_by_name(store, monkeypatch, capsys):
    for words in (
        ["dynamics", "sgd", "--out", "gs://bucket/x"],
        ["bench", "optimizers", "--json", "gs://bucket/x"],
        ["data", "fetch", "minilm", "--from", "gs://bucket/x"],
        ["pretrain", "--steps", "1", "--compilation-cache", "gs://bucket/x"],
    ):
        assert main(words) in (1, 2)
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.endswith("gs://bucket/x: expected a local path"), line
    monkeypatch.setenv("JAXOPT_LAB_CACHE", "gs://bucket/cache")
    assert main(["data", "list"]) == 1
    assert "gs://bucket/cache: expected a local path" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["plot"], ["sample"], ["pretrain", "--run-directory"]])
def test_without_the_extra_one_line_says_what_to_install(verb, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setattr(storage, "_file_system", storage._file_system.__wrapped__)
    assert main([*verb, "gs://bucket/run"]) in (1, 2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "gs://bucket/run" in error
    assert "pip install 'jaxopt-lab[gcs]'" in error
    assert not list(tmp_path.iterdir())


def test_a_bucket_that_does_not_answer_is_not_waited_for(store, monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(storage, "_PATIENCE_SECONDS", 0.1)
    store.fail = staticmethod(lambda call, key: never.wait(10))
    with pytest.raises(StorageError, match="gs://bucket/run: no answer within 0.1 s"):
        storage.path_of("gs://bucket/run")
    never.set()


def test_a_refusal_names_the_path(store, capsys):
    class HttpError(Exception):  # of the library, no OSError
        pass

    def fail(call, key):
        raise HttpError("Anonymous caller does not have storage.objects.get access, 401")

    store.fail = staticmethod(fail)
    assert main(["plot", "gs://bucket/run"]) == 2
    error = capsys.readouterr().err
    assert "gs://bucket/run: Anonymous caller does not have" in error and error.count("\n") == 1


def test_copies_follow_their_objects(store):
    put(store, "text/a.txt", "one")
    file = put(store, "text/deep/b[1].txt", "two")
    put(store, "textbook.txt")
    copy = Path(staged("gs://bucket/text"))
    assert [p.read_text() for p in sorted(copy.rglob("*.txt"))] == ["one", "two"]
    seen = (copy / "a.txt").stat().st_ino
    file.write_text("another")
    put(store, "text/c.txt", "three")
    (store.root / "bucket/text/a.txt").rename(store.root / "bucket/text/e.txt")
    staged("gs://bucket/text")
    found = {p.name: p.read_text() for p in copy.rglob("*") if p.is_file()}
    assert found == {"b[1].txt": "another", "c.txt": "three", "e.txt": "one"}
    before = (copy / "c.txt").stat().st_ino
    staged("gs://bucket/text")
    assert (copy / "c.txt").stat().st_ino == before != seen


def test_a_copy_that_was_cut_short_is_made_again(store, monkeypatch):
    put(store, "model/weights", "0123456789")

    def cut(self, source, target):
        Path(target).write_text("01234")
        raise ConnectionError("reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(store, "get_file", cut)
        with pytest.raises(StorageError, match="gs://bucket/model/weights: reset by peer"):
            staged("gs://bucket/model")
    assert Path(staged("gs://bucket/model"), "weights").read_text() == "0123456789"


def test_a_local_name_is_left_as_it_is():
    assert staged("notes/*.md") == "notes/*.md" and storage.path_of("a/b") == Path("a/b")
    assert not storage.is_remote("gs/run")
