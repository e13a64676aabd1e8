"""What makes large corpora bearable: nothing is read, hashed or held in memory without need."""

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxopt_lab.data import (
    PreparedTokens,
    TextFiles,
    TokenizerConfig,
    cache,
    preparation,
    prepare,
    sorting,
    unigram_model,
)
from jaxopt_lab.data.builder import read_documents
from jaxopt_lab.data.documents import StoredDocument
from jaxopt_lab.data.sorting import DocumentSorter
from jaxopt_lab.data.tokenizer import make_tokenizer
from tests.data.synthetic import byte_tokenizer, held_out, key_of, make_settled, texts, write_texts

DOCUMENTS = texts(60)
FRACTION = 0.2
BYTES = TokenizerConfig("bytes")


def _prepare(directory, source=None, tokenizer=BYTES, **options):
    source = source or TextFiles((str(directory / "text"),))
    options = {"validation_fraction": FRACTION, "cache_dir": directory / "cache", **options}
    return prepare(source, tokenizer, **options)


@pytest.fixture
def settled(tmp_path):
    """Texts that were written some time ago."""
    make_settled(write_texts(tmp_path / "text", DOCUMENTS))
    return tmp_path


@pytest.fixture
def reads(monkeypatch):
    """Counts the times that a source of text files is read."""
    times, documents = [], TextFiles.documents

    def counted(self):
        times.append(1)
        return documents(self)

    monkeypatch.setattr(TextFiles, "documents", counted)
    return times


def test_a_second_start_reads_neither_sources_nor_tokens(settled, reads, monkeypatch):
    first = _prepare(settled)

    def refuse(path):
        raise AssertionError(f"{path} is read")

    monkeypatch.setattr(cache, "_digest", refuse)
    again = _prepare(settled)
    assert len(reads) == 1 and again.summary() == first.summary()
    assert isinstance(again.train.tokens, np.memmap)
    # Another share of the same text costs no reading either; only tokens are written.
    monkeypatch.undo()
    other = _prepare(settled, validation_fraction=0.4)
    assert len(reads) == 1 and other.hash == first.hash
    assert other.validation.num_documents == len(held_out(DOCUMENTS, 0.4))


def _changed_in_place(path):
    text = path.read_text()
    path.write_text(text.replace("# 0", "# 7"))


def _replaced(path):
    """Another file of the same size and time under this name."""
    found = path.stat()
    other = path.with_name("other")
    other.write_text(path.read_text().replace("# 0", "# 7"))
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    other.replace(path)


def _added(path):
    path.with_name("zzz.txt").write_text("one more")


@pytest.mark.parametrize("change", [_changed_in_place, _replaced, _added, Path.unlink])
def test_a_change_of_files_is_seen(settled, change):
    before = _prepare(settled)
    change(settled / "text" / "003.txt")
    assert _prepare(settled).hash != before.hash


def test_a_time_far_ahead_is_not_read_at_every_start(settled, reads):
    path = settled / "text" / "003.txt"
    os.utime(path, (time.time() + 10 * 86_400,) * 2)
    _prepare(settled)
    count = len(reads)
    _prepare(settled)
    assert len(reads) == count


def test_a_file_that_was_just_written_is_read_once_more(tmp_path, reads):
    """Another change within the same tick of the clock would not show."""
    write_texts(tmp_path / "text", DOCUMENTS)
    before = _prepare(tmp_path)
    path = tmp_path / "text" / "003.txt"
    found = path.stat()
    _changed_in_place(path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    after = _prepare(tmp_path)
    assert len(reads) == 2 and after.hash != before.hash
    assert after.train.num_documents + after.validation.num_documents == 60


def test_corpora_are_those_of_earlier_versions(settled):
    """Stored runs go on only with the text that they began with: these were written in 2026."""
    corpus = _prepare(settled)
    assert corpus.hash == HASH
    assert corpus.summary()["train_tokens_sha256"] == TOKENS
    assert corpus.path.name == ENTRY


HASH = "e51464788fd0ac1e6a59b558acf67bb9e416c397e6e24c14e96cb73bc4387e8e"
TOKENS = "c14d9f720679058ea154beb2632fc7a2c9070bba019b80e2f67fc11559667cd7"
ENTRY = "43b8ed5810910ee53935c38b"


@pytest.mark.parametrize("memory", [0, 1 << 10, 10_000, 64 << 20])
def test_sorting_is_the_same_in_memory_and_on_disk(tmp_path, monkeypatch, memory):
    monkeypatch.setattr(sorting, "_MEMORY", memory)
    keys = [bytes.fromhex(key_of(text)) for text in DOCUMENTS]
    rows = [
        StoredDocument(key, f"{name}{number}", text.encode(), number)
        for name in ("first ", "copy ")
        for number, (key, text) in enumerate(zip(keys, DOCUMENTS, strict=True))
    ]
    sorter = DocumentSorter(tmp_path)
    for row in rows:
        sorter.add(row)
    assert any(tmp_path.iterdir()) == (memory < 1 << 20)
    left_out = {keys[5]}
    found = list(sorter.take(lambda byte: {key for key in left_out if key[0] == byte}))
    assert found == sorted(row for row in rows[:60] if row.key != keys[5])
    assert not any(tmp_path.iterdir())


def test_the_same_corpus_through_the_disk(settled, monkeypatch, tmp_path):
    expected = _prepare(settled)
    monkeypatch.setattr(sorting, "_MEMORY", 0)
    assert _prepare(settled, cache_dir=tmp_path / "other").summary() == expected.summary()


def test_a_stopped_preparation_keeps_what_was_complete(settled, reads, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "_encoded", stop)
        with pytest.raises(KeyboardInterrupt):
            _prepare(settled)
    found = {path.name for path in (settled / "cache" / "tokens").iterdir()}
    assert all(name.endswith(".lock") for name in found)
    corpus = _prepare(settled)
    assert len(reads) == 1
    assert corpus.train.num_documents + corpus.validation.num_documents == 60


def test_a_vocabulary_is_learnt_from_a_sample_of_a_large_corpus(settled, monkeypatch):
    config = TokenizerConfig(vocab_size=280)
    size = sum(len(text.encode()) for text in DOCUMENTS)
    monkeypatch.setattr(preparation, "LEARNT_FROM", size // 4)
    corpus = _prepare(settled, tokenizer=config)
    training = [text for text in DOCUMENTS if text not in held_out(DOCUMENTS, FRACTION)]
    sample = sorted(training, key=key_of)[: len(training) // 4]
    assert corpus.tokenizer.hash == make_tokenizer(config, sample).hash
    assert corpus.train.num_documents == len(training)


def test_counts_of_tokens_are_kept(settled, monkeypatch):
    monkeypatch.setattr(preparation, "_WRITTEN_AT_ONCE", 100)
    corpus = _prepare(settled)
    assert corpus.counts is not None
    counted = np.bincount(corpus.train.tokens, minlength=corpus.tokenizer.vocab_size)
    np.testing.assert_array_equal(corpus.counts, [counted])
    stored = unigram_model(corpus)
    np.testing.assert_array_equal(unigram_model(replace(corpus, counts=None)), stored)


def test_the_fingerprint_sees_what_is_written(settled):
    corpus = _prepare(settled)
    same = _prepare(settled).fingerprint()
    assert corpus.fingerprint() == same
    tokens = np.array(corpus.train.tokens)
    tokens[-1] += 1
    damaged = replace(corpus, train=replace(corpus.train, tokens=tokens)).fingerprint()
    differing = [key for key in same if same[key] != damaged[key]]
    assert differing == ["written"] and same["written"]["validation"]


class Rows(tfds.core.GeneratorBasedBuilder):
    """A dataset of tokens that somebody else has prepared."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, rows=(), feature=None, **kwargs):
        self._rows = rows
        self._feature = feature or tfds.features.Tensor(shape=(None,), dtype=np.int32)
        super().__init__(**kwargs)

    def _info(self):
        features = tfds.features.FeaturesDict({"ids": self._feature})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from ((i, {"ids": row}) for i, row in enumerate(self._rows))


def _write_rows(directory, rows, feature=None):
    builder = Rows(rows=rows, feature=feature, data_dir=directory, file_format="array_record")
    tfds.disable_progress_bar()
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    return PreparedTokens(str(builder.data_dir), tokens_field="ids")


def test_documents_may_come_as_tokens(tmp_path):
    tokenizer = byte_tokenizer()
    rows = [tokenizer.encode(text) for text in DOCUMENTS]
    rows[3] = np.append(rows[3], np.int32(tokenizer.end_of_text))
    source = _write_rows(tmp_path / "rows", [*rows, rows[0]])
    corpus = _prepare(tmp_path, source)
    found = {tokenizer.decode(corpus.train.tokens), tokenizer.decode(corpus.validation.tokens)}
    documents = [text for joined in found for text in joined.split("<|endoftext|>")[:-1]]
    assert sorted(documents) == sorted(DOCUMENTS) and corpus.duplicates == 1
    assert corpus.train.num_bytes + corpus.validation.num_bytes == len("".join(DOCUMENTS).encode())
    assert source.name == "tokens:rows/1.0.0"


def test_near_copies_are_found_among_tokens(tmp_path):
    tokenizer = byte_tokenizer()
    shared = "\n".join(f"line {i} of a licence that everybody has copied" for i in range(6))
    rows = [tokenizer.encode(f"{shared}\n{i}") for i in range(40)]
    source = _write_rows(tmp_path / "rows", rows)
    with pytest.raises(ValueError, match="all held-out documents are near copies"):
        _prepare(tmp_path, source)


def test_tokens_need_their_tokenizer(tmp_path):
    source = _write_rows(
        tmp_path / "rows", [np.asarray([1, 2, 300 + i], np.int32) for i in range(20)]
    )
    with pytest.raises(ValueError, match="no vocabulary can be learnt from them"):
        _prepare(tmp_path, source, TokenizerConfig())
    message = r"rows/1\.0\.0/train:\d+ has the token 3\d\d, but the tokenizer has 257 entries"
    with pytest.raises(ValueError, match=message):
        _prepare(tmp_path, source)
    other = make_tokenizer(TokenizerConfig(vocab_size=270), DOCUMENTS)
    other.save(source.directory)
    with pytest.raises(ValueError, match=r"tokenizer\.json \(270 entries\) is not the tokenizer"):
        _prepare(tmp_path, source)


@pytest.mark.parametrize(
    ("rows", "feature", "message"),
    [
        (
            [np.asarray([0.5], np.float32)],
            tfds.features.Tensor(shape=(None,), dtype=np.float32),
            "dtype float32",
        ),
        (["text"], tfds.features.Text(), "train:0 is text, wanted whole numbers"),
        ([[1, -1]], tfds.features.Sequence(np.int64), r"train:0 has the tokens -1 to 1"),
    ],
)
def test_rows_without_tokens_are_named(tmp_path, rows, feature, message):
    source = _write_rows(tmp_path, rows, feature)
    with pytest.raises(ValueError, match=message):
        list(source.documents())


def test_damaged_rows_are_named(tmp_path, settled):
    def damage(directory):
        (file,) = directory.rglob("*.array_record*")
        content = bytearray(file.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 100] = bytes(100)
        file.write_bytes(content)

    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 256, 100, dtype=np.int32) for _ in range(600)]
    source = _write_rows(tmp_path / "rows", rows)
    damage(Path(source.directory))
    with pytest.raises(ValueError, match=r"train: the rows \d+ to \d+ cannot be read: "):
        list(source.documents())
    _prepare(settled)
    (store,) = (settled / "cache" / "documents").glob("[!.]*/")
    damage(store)
    with pytest.raises(ValueError, match="are damaged, delete that directory"):
        list(read_documents(store))


def test_bytes_of_tokens():
    tokenizer = make_tokenizer(TokenizerConfig(vocab_size=300), DOCUMENTS)
    ids = np.append(tokenizer.encode(DOCUMENTS[0]), tokenizer.end_of_text)
    assert tokenizer.bytes_of(ids) == DOCUMENTS[0].encode()
