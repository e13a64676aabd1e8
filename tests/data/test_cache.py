import fcntl
import json
import shutil
import threading
import time

import pytest

from jaxopt_lab.data import cache


def _silent(message):
    del message


def _writer(calls, text="content"):
    def write(directory):
        calls.append(1)
        (directory / "sub").mkdir()
        (directory / "sub" / "file").write_text(text)
        return {"about": text}

    return write


def _open(entry, calls, report=_silent):
    return cache.open_or_build(entry, _writer(calls), report)


def test_an_entry_is_built_once(tmp_path):
    calls = []
    first = _open(tmp_path / "kind" / "key", calls)
    assert first["about"] == "content"
    assert _open(tmp_path / "kind" / "key", calls) == first
    assert len(calls) == 1


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "no manifest", "bad manifest"])
def test_a_damaged_entry_is_built_again_and_says_so(tmp_path, damage):
    entry, calls, messages = tmp_path / "key", [], []
    _open(entry, calls)
    file = entry / "sub" / "file"
    match damage:
        case "truncate":
            file.write_text("conte")
        case "flip":
            file.write_text("Content")
        case "delete":
            file.unlink()
        case "no manifest":
            (entry / "entry.json").unlink()
        case "bad manifest":
            (entry / "entry.json").write_text('{"files": ')
    manifest = _open(entry, calls, messages.append)
    assert len(calls) == 2
    assert "damaged" in messages[0]
    assert file.read_text() == "content"
    assert cache.is_intact(entry, manifest)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock"]


def test_a_failing_writer_leaves_nothing(tmp_path):
    def write(directory):
        (directory / "half").write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        cache.open_or_build(tmp_path / "key", write, _silent)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".key-abc").mkdir()
    (tmp_path / ".key-abc" / "half").write_text("half")
    (tmp_path / ".other-abc").mkdir()
    _open(tmp_path / "key", [])
    assert sorted(p.name for p in tmp_path.iterdir()) == [".other-abc", "key", "key.lock"]


def test_leftovers_of_other_entries_go_unless_they_are_at_work(tmp_path):
    for name in ("dead", "alive"):
        (tmp_path / f".{name}-abc").mkdir()
        (tmp_path / f"{name}.lock").touch()
    with open(tmp_path / "alive.lock", "r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        _open(tmp_path / "key", [])
    assert [path.name for path in tmp_path.glob(".*")] == [".alive-abc"]


def test_an_intact_entry_that_does_not_fit_is_built_again(tmp_path):
    calls, messages = [], []
    _open(tmp_path / "key", calls)
    for fits in (True, False):
        cache.open_or_build(
            tmp_path / "key", _writer(calls), messages.append, lambda manifest, fits=fits: fits
        )
    assert len(calls) == 2 and not messages


def test_a_copy_of_the_cache_is_compared_by_its_hash(tmp_path):
    calls = []
    _open(tmp_path / "key", calls)
    shutil.copytree(tmp_path / "key", tmp_path / "copy")
    _open(tmp_path / "copy", calls)
    assert len(calls) == 1
    (tmp_path / "copy" / "sub" / "file").write_text("Content")
    _open(tmp_path / "copy", calls)
    assert len(calls) == 2


def test_concurrent_openers_build_once(tmp_path):
    calls, results = [], []

    def slow(directory):
        time.sleep(0.1)
        return _writer(calls)(directory)

    def run():
        results.append(cache.open_or_build(tmp_path / "key", slow, _silent))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(results) == 4 and all(result == results[0] for result in results)


def test_without_locks_the_first_to_finish_wins(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    entry = tmp_path / "key"

    def overtaken(directory):
        # Another process finishes the same entry while this one is at work.
        _open(entry, [])
        return _writer([])(directory)

    manifest = cache.open_or_build(entry, overtaken, _silent)
    assert cache.is_intact(entry, manifest)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key", "key.lock"]


def test_the_manifest_lists_every_file(tmp_path):
    _open(tmp_path / "key", [])
    manifest = json.loads((tmp_path / "key" / "entry.json").read_text())
    assert list(manifest["files"]) == ["sub/file"]


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("JAXOPT_LAB_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.cache_root(None) == tmp_path / ".cache" / "jaxopt-lab"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root(None) == tmp_path / "xdg" / "jaxopt-lab"
    monkeypatch.setenv("JAXOPT_LAB_CACHE", "~/own")
    assert cache.cache_root(None) == tmp_path / "own"
    assert cache.cache_root("~/given") == tmp_path / "given"
