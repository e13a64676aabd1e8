"""Files in other encodings, with odd names and links, and with extremely long words."""

import glob
import gzip
import json
import os
import time

import numpy as np
import pytest

from jaxopt_lab.data import TextFiles, TokenizerConfig, prepare
from jaxopt_lab.data.decoding import decode
from jaxopt_lab.data.tokenizer import _pieces, make_tokenizer

TEXT = "Æsop, naïve café — 'ok'\n"


def documents(*paths):
    return list(TextFiles(tuple(map(str, paths))).documents())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_byte_order_mark_names_the_encoding_and_is_no_text(encoding):
    assert decode(("\ufeff" + TEXT).encode(encoding)) == (TEXT, 0)
    # Only at the beginning is it a mark.
    assert decode(("\ufeff\ufeff" + TEXT).encode(encoding)).text == "\ufeff" + TEXT


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_known_by_its_zero_bytes(encoding):
    assert decode((TEXT * 400).encode(encoding)) == (TEXT * 400, 0)


def test_what_is_no_text_is_replaced_and_counted():
    assert decode(TEXT.encode("latin-1", "replace")).replaced == 3
    # One that the text itself spells is none.
    assert decode("a\ufffdb".encode()) == ("a\ufffdb", 0)
    assert decode(b"\xef\xbf\xbd \xff").replaced == 1
    assert decode(b"") == ("", 0)


def test_replaced_bytes_are_reported_with_a_file(tmp_path):
    said = []
    rng = np.random.default_rng(0)
    for number in range(30):
        words = rng.choice(["one", "two", "three"], 60)
        (tmp_path / f"{number}.txt").write_text(" ".join(words) + str(number))
    (tmp_path / "old.txt").write_bytes((TEXT * 9).encode("latin-1", "replace"))
    config = TokenizerConfig("bytes")
    prepare(
        TextFiles((str(tmp_path),)), config, validation_fraction=0.3,
        cache_dir=tmp_path / "cache", on_progress=said.append,
    )  # fmt: skip
    line = next(line for line in said if "replacement" in line)
    assert line.startswith("27 sequences") and line.endswith(str(tmp_path / "old.txt"))


def test_a_path_that_exists_is_no_glob(tmp_path):
    (tmp_path / "notes[1].txt").write_text("brackets")
    (tmp_path / "notes1.txt").write_text("glob")
    assert [each.text for each in documents(tmp_path / "notes[1].txt")] == ["brackets"]
    assert [each.text for each in documents(tmp_path / "notes[1-9].txt")] == ["glob"]


def test_a_name_that_is_no_utf_8(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "wb") as file:
        file.write(b"text")
    (document,) = documents(tmp_path)
    assert document.name.encode().endswith("/caf\ufffd.txt".encode())
    with open(path + b".jsonl", "wb") as file:
        file.write(b"{")
    with pytest.raises(ValueError, match="line 1: not JSON") as found:
        documents(tmp_path)
    str(found.value).encode()  # can be printed


def test_links_are_followed_and_every_file_is_read_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x.txt").write_text("x")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "a" / "b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "a").symlink_to(tmp_path / "a")
    (tmp_path / "b" / "y.txt").symlink_to(tmp_path / "a" / "x.txt")
    (tmp_path / "b" / "z.txt").write_text("z")
    assert sorted(each.text for each in documents(tmp_path)) == ["x", "z"]
    assert sorted(each.text for each in documents(tmp_path / "**" / "*.txt")) == ["x", "z"]


@pytest.mark.parametrize("row", ["1" * 5000, "[" * 100_000, '{"text": '])
@pytest.mark.parametrize("packed", [False, True])
def test_a_row_that_is_no_json_is_named(tmp_path, row, packed):
    content = (json.dumps({"text": "good"}) + "\n\n" + row + "\n").encode()
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=rf"{path.name}, line 3: not JSON: ") as found:
        documents(path)
    assert "\n" not in str(found.value)


def test_one_word_of_400_000_letters_trains_a_vocabulary_in_time():
    letters = np.frombuffer(b"abcdefghij", np.uint8)
    word = np.random.default_rng(0).choice(letters, 400_000).tobytes().decode()
    before = time.monotonic()
    tokenizer = make_tokenizer(TokenizerConfig(vocab_size=800), [word, "some more words"])
    assert time.monotonic() - before < 60  # a second alone; whole, it takes minutes
    assert tokenizer.vocab_size == 800
    assert tokenizer.decode(tokenizer.encode(word)) == word


def test_only_extremely_long_runs_are_cut():
    word, gap = "ab" * 9000, " \n" * 7000
    text = f"hello  world {word} and{gap}{word}"
    pieces = _pieces(text)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) == 1000 and pieces[0] == "hello  world "
    for ordinary in ("", " ", "a" * 9_999, ("a" * 9_999 + " ") * 3, "a b\n" * 9_000):
        assert _pieces(ordinary) == [ordinary]


def test_globs_are_those_of_the_library_where_no_link_forms_a_ring(tmp_path):
    for name in (
        "a.txt",
        "b/c.txt",
        "b/d/e.txt",
        "b/d/f.md",
        "b/.hidden.txt",
        ".h/g.txt",
        "b/x[1]/y.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for pattern in (
        "*.txt",
        "**/*.txt",
        "**",
        "b/**/*.txt",
        "**/d/*",
        "*/*.txt",
        "**/d/**",
        "b/**/**/*.md",
        "**/[a-d].txt",
        "b/x[1]",
    ):
        matches = glob.glob(str(tmp_path / pattern), recursive=True)
        wanted = {path for path in matches if os.path.isfile(path)}
        if pattern == "b/x[1]":  # exists, so that it is no glob
            wanted = {str(tmp_path / "b/x[1]/y.txt")}
        assert sorted(each.name for each in documents(tmp_path / pattern)) == sorted(wanted)
