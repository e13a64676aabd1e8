import numpy as np

from jaxopt_lab.data import PythonSource, TextFiles, TokenizerConfig, prepare
from jaxopt_lab.data.groups import held_out_documents, held_out_groups, of_installed
from tests.data.synthetic import texts

BYTES = TokenizerConfig("bytes")


def _write(root, folders, files=3):
    for folder in range(folders):
        (root / f"package{folder}").mkdir(parents=True)
        for number, text in enumerate(texts(files, seed=folder)):
            (root / f"package{folder}" / f"{number}.txt").write_text(text)
    return TextFiles((str(root),))


def _packages(corpus, split):
    """Numbers of the packages that a split has documents of; a document begins with its own."""
    text = corpus.tokenizer.decode(np.asarray(split.tokens))
    return [int(piece.split(".")[0]) for piece in text.split("# ")[1:]]


def test_a_directory_is_on_one_side_whole(tmp_path):
    said = []
    corpus = prepare(
        _write(tmp_path / "text", 40), BYTES, cache_dir=tmp_path / "cache",
        validation_fraction=0.2, on_progress=said.append,
    )  # fmt: skip
    train, held_out = (_packages(corpus, split) for split in (corpus.train, corpus.validation))
    assert not set(train) & set(held_out) and len({*train, *held_out}) == 40
    assert all(held_out.count(package) == 3 for package in held_out)
    assert (
        0.15 < corpus.validation.num_bytes / (40 * corpus.train.num_bytes / len(set(train))) < 0.3
    )
    assert corpus.summary()["held_out_by_group"] == [True]
    assert any("40 packages or directories, whole" in line for line in said)


def test_with_too_few_directories_documents_are_held_out_one_by_one(tmp_path):
    said = []
    corpus = prepare(
        _write(tmp_path / "text", 3, files=20), BYTES, cache_dir=tmp_path / "cache",
        validation_fraction=0.2, on_progress=said.append,
    )  # fmt: skip
    assert set(_packages(corpus, corpus.train)) & set(_packages(corpus, corpus.validation))
    assert corpus.summary()["held_out_by_group"] == [False]
    assert any("too few to be held out whole" in line for line in said)


def test_another_directory_is_another_corpus(tmp_path):
    """Which documents are held out depends on the names of directories, and so does the hash."""
    source, options = _write(tmp_path / "text", 40), {"validation_fraction": 0.2}
    first = prepare(source, BYTES, cache_dir=tmp_path / "cache", **options)
    for folder in range(40):
        (tmp_path / "text" / f"package{folder}").rename(tmp_path / "text" / f"renamed{folder}")
    second = prepare(source, BYTES, cache_dir=tmp_path / "cache", **options)
    assert first.hash != second.hash and first.path != second.path


def test_files_of_a_distribution_belong_together(tmp_path):
    files = ["one/a.py", "one/sub/b.py", "_one.py", "shared/one.py", "shared/two.py", "two/c.py"]
    files += ["loose/d.py", "alone.py"]
    for name, recorded in {"One": files[:4], "two": files[4:6]}.items():
        info = tmp_path / f"{name.lower()}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in recorded))
    found = of_installed(tmp_path, [tmp_path / file for file in files])
    assert found == ["One"] * 4 + ["two"] * 2 + ["loose", ""]


def test_the_share_of_the_text_is_kept_where_packages_differ_in_size():
    sizes = {f"package {i}": int(1000 * 1.05**i) for i in range(200)}
    for fraction in (0.02, 0.05, 0.2):
        chosen = held_out_groups(sizes, fraction)
        share = sum(sizes[group] for group in chosen) / sum(sizes.values())
        assert fraction <= share < 1.5 * fraction
    assert held_out_groups(sizes, 0.0) == set()


def test_documents_that_are_alone_are_chosen_by_their_own_hash():
    keys = {f"{i:016x}" for i in range(0, 2**64, 2**58)}
    out, by_group = held_out_documents({key: key for key in keys}, dict.fromkeys(keys, 1), 0.25)
    assert not by_group and out == {f"{i:016x}" for i in range(0, 2**62, 2**58)}


def test_python_files_have_groups(tmp_path):
    for name in ("a/x.py", "a/y/z.py", "b/u.py", "top.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass")
    documents = PythonSource((str(tmp_path),)).documents()
    found = {document.name.split("/", 1)[1]: document.group for document in documents}
    assert found == {"a/x.py": "a", "a/y/z.py": "a", "b/u.py": "b", "top.py": ""}
