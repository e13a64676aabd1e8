import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_lab.data import PythonSource, TextFiles, TokenizerConfig, prepare
from jaxopt_lab.data.groups import (
    ALONE,
    KEY_DTYPE,
    hash_name,
    held_out_documents,
    held_out_groups,
    of_installed,
)
from tests.data.synthetic import is_held_out, key_of, texts

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
    sizes = (1000 * 1.05 ** np.arange(200)).astype(int)
    names = np.asarray([hash_name(f"package {i}") for i in range(200)], KEY_DTYPE)
    for fraction in (0.02, 0.05, 0.2):
        share = sizes[held_out_groups(names, sizes, fraction)].sum() / sizes.sum()
        assert fraction <= share < 1.5 * fraction
    assert not held_out_groups(names, sizes, 0.0).any()


def test_documents_that_are_alone_are_chosen_by_their_own_hash():
    keys = [f"{i:016x}" for i in range(0, 2**64, 2**58)]
    columns = np.asarray([bytes.fromhex(key) for key in keys], KEY_DTYPE)
    alone, sizes = np.full(len(keys), ALONE), np.ones(len(keys), int)
    out, by_group = held_out_documents(columns, alone, sizes, [], 0.25)
    assert not by_group and out.tolist() == [is_held_out(key, 0.25) for key in keys]
    assert out.sum() == 16


def _reference(groups, sizes, fraction):
    """Which documents are held out, one group after another: {key: group}, {group: bytes}."""
    left = fraction * sum(sizes.values())
    largest, chosen = left / 2, set()
    for group in sorted(sizes, key=hash_name):
        if left > 0 and sizes[group] <= largest:
            chosen.add(group)
            left -= sizes[group]
    if len(sizes) < len(groups) and min(len(chosen), len(sizes) - len(chosen)) >= 3:
        return {key for key, group in groups.items() if group in chosen}, True
    return {key for key in groups if is_held_out(key, fraction)}, False


def _agree(documents, fraction):
    """Compares columns with the reference; documents are (group or `ALONE`, bytes)."""
    names = [f"package {i}" for i in range(13)]
    rows = sorted((key_of(str(i)), *pair) for i, pair in enumerate(documents))
    groups = {key: names[group] if group != ALONE else key for key, group, _ in rows}
    bytes_of = collections.Counter()
    for key, _, size in rows:
        bytes_of[groups[key]] += size
    keys, numbers, sizes = zip(*rows, strict=True)
    keys = np.asarray([bytes.fromhex(key) for key in keys], KEY_DTYPE)
    out, by_group = held_out_documents(
        keys, np.asarray(numbers), np.asarray(sizes), names, fraction
    )
    chosen = {keys[i : i + 1].tobytes().hex() for i in np.flatnonzero(out)}
    assert (chosen, by_group) == _reference(groups, bytes_of, fraction)


@given(
    st.lists(st.tuples(st.integers(ALONE, 12), st.integers(1, 1000)), min_size=1, max_size=60),
    st.sampled_from([0.0, 0.05, 0.2, 0.5, 0.99]),
)
def test_columns_give_what_one_document_after_another_gives(documents, fraction):
    _agree(documents, fraction)


@pytest.mark.parametrize("large", range(13))
def test_a_group_of_exactly_half_the_share_may_be_held_out(large):
    _agree([(group, 20 if group == large else 5) for group in range(13)] * 2, 0.5)


def test_python_files_have_groups(tmp_path):
    for name in ("a/x.py", "a/y/z.py", "b/u.py", "top.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("pass")
    documents = PythonSource((str(tmp_path),)).documents()
    found = {document.name.split("/", 1)[1]: document.group for document in documents}
    assert found == {"a/x.py": "a", "a/y/z.py": "a", "b/u.py": "b", "top.py": ""}
