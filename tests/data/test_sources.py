import gzip
import json
import site
import sysconfig

import numpy as np
import pytest

from jaxopt_lab.data import Mixture, PreparedTfds, PythonSource, TextFiles
from jaxopt_lab.data import prepared as prepared_sources
from jaxopt_lab.data.builder import read_documents, write_documents
from jaxopt_lab.data.documents import StoredDocument
from tests.data.synthetic import key_of, texts


def _names(source):
    return [document.name for document in source.documents()]


def test_the_standard_library_comes_without_its_tests():
    names = _names(PythonSource())
    assert "stdlib/json/decoder.py" in names
    assert len(names) == len(set(names)) > 300
    skipped = {"test", "tests", "site-packages", "dist-packages"}
    assert not [name for name in names if skipped & set(name.split("/"))]


def test_site_packages_adds_installed_packages_to_the_standard_library(tmp_path, monkeypatch):
    library, installed = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    for path in (
        library / "os.py",
        library / "test" / "t.py",
        installed / "pkg" / "tests" / "a.py",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(installed), str(tmp_path / "absent")])
    assert _names(PythonSource()) == ["stdlib/os.py"]
    both = ["stdlib/os.py", "site-packages/pkg/tests/a.py"]
    assert _names(PythonSource(("site-packages",))) == both


def test_a_directory_of_python_files_is_read_in_order_without_hidden_folders(tmp_path):
    for name in ("b/z.py", "b/a.py", "a.py", ".venv/no.py", "note.txt"):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_bytes(b"x = '\xff'\r\n")
    documents = list(PythonSource((str(tmp_path / "src"),)).documents())
    assert [d.name for d in documents] == ["src/a.py", "src/b/a.py", "src/b/z.py"]
    assert documents[0].text == "x = '\ufffd'\r\n"


def test_text_files_of_every_kind(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.md").write_text("markdown")
    (tmp_path / "sub" / "b.rst").write_text("rest")
    (tmp_path / "c.html").write_text("ignored")
    rows = json.dumps({"text": "row \ud800"}) + "\n\n" + json.dumps({"text": "last"})
    (tmp_path / "d.jsonl").write_text(rows)
    with gzip.open(tmp_path / "e.txt.gz", "wb") as file:
        file.write("gz ü".encode())
    with gzip.open(tmp_path / "f.jsonl.gz", "wb") as file:
        file.write(b'{"text": "packed row"}\n')
    found = [document.text for document in TextFiles((str(tmp_path),)).documents()]
    assert found == ["markdown", "row ?", "last", "gz ü", "packed row", "rest"]
    globbed = TextFiles((str(tmp_path / "**" / "*.rst"), str(tmp_path / "*.md")))
    assert [document.text for document in globbed.documents()] == ["markdown", "rest"]
    assert _names(TextFiles((str(tmp_path / "d.jsonl"),)))[1].endswith("d.jsonl:3")


def test_another_jsonl_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "b", "text": "t"}')
    source = TextFiles((str(tmp_path / "a.jsonl"),), text_field="body")
    assert [document.text for document in source.documents()] == ["b"]


@pytest.mark.parametrize(
    ("row", "got"),
    [('{"body": "x"}', r"fields \['body'\]"), ("[1]", "JSON list"), ('{"text": 3}', "text")],
)
def test_a_jsonl_row_without_text_names_file_and_line(tmp_path, row, got):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + row)
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: .*{got}"):
        list(TextFiles((str(tmp_path),)).documents())


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: not JSON"):
        list(TextFiles((str(tmp_path / "a.jsonl"),)).documents())
    whole = gzip.compress(b"text" * 100)
    for damaged in (whole[:-12], b"no gzip"):
        (tmp_path / "b.txt.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"b\.txt\.gz is not a complete gzip"):
            list(TextFiles((str(tmp_path / "b.txt.gz"),)).documents())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            PythonSource(("/absent/root",)),
            r"PythonSource\.roots: '/absent/root' is not a directory",
        ),
        (PythonSource(()), r"PythonSource\.roots is empty"),
        (TextFiles(("/absent/*.txt",)), r"TextFiles\.paths: '/absent/\*\.txt' matches no file"),
        (TextFiles(()), r"TextFiles\.paths is empty"),
        (PreparedTfds("/absent"), r"PreparedTfds\.directory: '/absent' is not a prepared dataset"),
    ],
)
def test_sources_that_lead_nowhere(source, message):
    with pytest.raises(ValueError, match=message):
        list(source.documents())


def test_directories_without_a_readable_file(tmp_path):
    (tmp_path / "a.html").write_text("x")
    with pytest.raises(ValueError, match=r"no \*\.py file below"):
        list(PythonSource((str(tmp_path),)).documents())
    with pytest.raises(ValueError, match=r"matches 1 files, none of them with one of the suffixes"):
        list(TextFiles((str(tmp_path),)).documents())


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.0), (1.0, -1.0), (1.0, float("nan"))])
def test_mixture_weights_are_checked(weights):
    with pytest.raises(ValueError, match=r"Mixture\.weights"):
        Mixture((PythonSource(), PythonSource()), weights)


def test_a_mixture_needs_parts():
    with pytest.raises(ValueError, match=r"Mixture\.parts is empty"):
        Mixture((), ())


def _stored(documents):
    """Rows of the store, in the order of their keys."""
    rows = [(key_of(text), f"doc {i}", text) for i, text in enumerate(documents)]
    return [
        StoredDocument(bytes.fromhex(key), name, text.encode()) for key, name, text in sorted(rows)
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A directory that TFDS prepared, and its documents."""
    directory = tmp_path_factory.mktemp("tfds")
    documents = texts(20)
    write_documents(directory, _stored(documents))
    return directory, documents


def test_stored_documents_come_back_in_the_order_of_their_keys(prepared):
    directory, documents = prepared
    wanted = _stored(documents)
    assert list(read_documents(directory)) == wanted
    assert list(read_documents(directory, np.asarray([1, 7]))) == [wanted[1], wanted[7]]


def test_storing_is_silent(tmp_path, capfd):
    write_documents(tmp_path, _stored(["text"]))
    assert capfd.readouterr() == ("", "")


def test_a_prepared_dataset_is_a_source(prepared):
    directory, documents = prepared
    version = str(directory / "text_documents" / "2.0.0")
    wanted = [row.content.decode() for row in _stored(documents)]
    source = PreparedTfds(version, split="documents")
    assert [document.text for document in source.documents()] == wanted
    first = PreparedTfds(version, split="documents[:5]+documents[15:]")
    assert [document.text for document in first.documents()] == wanted[:5] + wanted[15:]
    names = PreparedTfds(version, text_field="name", split="documents").documents()
    assert {document.text for document in names} == {f"doc {i}" for i in range(20)}


def test_mocked_rows_hold_str(monkeypatch):
    class Rows(list):
        def __getitems__(self, numbers):
            return [self[number] for number in numbers]

    source = PreparedTfds("/data/mocked/1.0.0")
    rows = Rows([{"text": "str"}, {"text": b"bytes"}])
    monkeypatch.setattr(prepared_sources, "_rows", lambda *arguments: rows)
    assert [document.text for document in source.documents()] == ["str", "bytes"]


def test_wrong_fields_of_a_prepared_dataset(prepared):
    version = prepared[0] / "text_documents" / "2.0.0"
    with pytest.raises(ValueError, match=r"text_field: 'body' is not a feature of .*'text'"):
        list(PreparedTfds(str(version), text_field="body").documents())
    with pytest.raises(ValueError, match=r"split: 'dev' of .* splits \['documents'\]"):
        list(PreparedTfds(str(version), split="dev").documents())
    with pytest.raises(ValueError, match="is not a prepared dataset"):
        list(PreparedTfds(str(version.parent)).documents())
