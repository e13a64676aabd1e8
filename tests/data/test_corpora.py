import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_lab.data import (
    Mixture,
    PythonSource,
    SetError,
    TextFiles,
    TokenizerConfig,
    list_corpora,
    pace,
    preparation,
    prepare,
    train_batches,
)
from jaxopt_lab.data.groups import ALONE, KEY_DTYPE, held_out_documents
from jaxopt_lab.data.preparation import Encoded
from jaxopt_lab.data.scans import scan_documents, store_documents
from tests.data.synthetic import held_out, is_held_out, key_of, make_settled, texts, write_texts

DOCUMENTS = texts(60)
FRACTION = 0.2
SMALL = TokenizerConfig(vocab_size=280)
BYTES = TokenizerConfig("bytes")


def _prepare(source, cache_dir, tokenizer=BYTES, fraction=FRACTION, **options):
    return prepare(source, tokenizer, cache_dir=cache_dir, validation_fraction=fraction, **options)


def _texts_of(corpus, split):
    offsets = split.document_offsets
    pieces = [split.tokens[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]
    assert all(piece[-1] == corpus.tokenizer.end_of_text for piece in pieces)
    return [corpus.tokenizer.decode(piece[:-1]) for piece in pieces]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A BPE corpus of 60 documents, two duplicates and an empty one, and where it was made."""
    root = tmp_path_factory.mktemp("corpus")
    extra = [DOCUMENTS[3], DOCUMENTS[3], ""]
    make_settled(write_texts(root / "text", [*DOCUMENTS, *extra]))
    return _prepare(TextFiles((str(root / "text"),)), root / "cache", SMALL), root


def test_every_document_is_stored_once_in_the_order_of_its_hash(prepared):
    corpus, _ = prepared
    validation = held_out(DOCUMENTS, FRACTION)
    train = [text for text in DOCUMENTS if text not in validation]
    assert _texts_of(corpus, corpus.train) == sorted(train, key=key_of)
    assert _texts_of(corpus, corpus.validation) == sorted(validation, key=key_of)
    assert corpus.duplicates == 2
    assert corpus.train.tokens.dtype == np.uint16
    assert isinstance(corpus.train.tokens, np.memmap)


def test_counts_are_exact(prepared):
    corpus, _ = prepared
    for split in (corpus.train, corpus.validation):
        documents = _texts_of(corpus, split)
        assert split.num_documents == len(documents)
        assert split.num_tokens == split.document_offsets[-1] == len(split.tokens)
        assert split.num_bytes == sum(len(text.encode()) for text in documents)
        assert corpus.tokenizer.bytes_per_token[split.tokens].sum() == split.num_bytes


def test_the_summary_describes_the_corpus(prepared):
    corpus, root = prepared
    summary = corpus.summary()
    assert summary["hash"] == corpus.hash
    assert summary["splits"]["train"] == {
        "documents": corpus.train.num_documents,
        "tokens": corpus.train.num_tokens,
        "bytes": corpus.train.num_bytes,
    }
    assert summary["tokenizer"]["hash"] == corpus.tokenizer.hash
    (row,) = list_corpora(root / "cache")
    assert (row["documents"], row["hash"]) == (60, corpus.hash)
    assert row["tokens"] == corpus.train.num_tokens + corpus.validation.num_tokens
    assert row["path"] == str(corpus.path)
    assert list_corpora(root / "nothing") == []


def test_the_second_call_opens_what_the_first_one_wrote(prepared):
    corpus, root = prepared
    before = (corpus.path / "train.tokens").stat()
    messages = []
    again = _prepare(
        TextFiles((str(root / "text"),)), root / "cache", SMALL, on_progress=messages.append
    )
    assert (again.path / "train.tokens").stat() == before
    assert again.summary() == corpus.summary()
    assert not [m for m in messages if "training" in m or "encoding" in m]


def test_the_hash_is_of_the_content_alone(prepared, tmp_path):
    corpus, root = prepared
    write_texts(tmp_path / "elsewhere", DOCUMENTS[::-1])
    other = _prepare(TextFiles((str(tmp_path / "elsewhere"),)), root / "cache", SMALL)
    assert (other.hash, other.path) == (corpus.hash, corpus.path)
    assert other.duplicates == 0


def test_an_empty_cache_gives_the_same_tokens(prepared, tmp_path):
    corpus, root = prepared
    other = _prepare(TextFiles((str(root / "text"),)), tmp_path, SMALL)
    assert other.tokenizer.hash == corpus.tokenizer.hash
    np.testing.assert_array_equal(other.train.tokens, corpus.train.tokens)
    assert other.summary() == corpus.summary()


@pytest.mark.parametrize("damage", ["truncated", "deleted"])
def test_a_damaged_entry_is_rebuilt_from_the_stored_documents(prepared, tmp_path, damage):
    corpus, root = prepared
    shutil.copytree(root / "cache", tmp_path / "cache")
    file = tmp_path / "cache" / "tokens" / corpus.path.name / "train.tokens"
    whole = file.read_bytes()
    file.write_bytes(whole[:-2]) if damage == "truncated" else file.unlink()
    messages = []
    source = TextFiles((str(root / "text"),))
    again = _prepare(source, tmp_path / "cache", SMALL, on_progress=messages.append)
    assert [m for m in messages if "damaged" in m]
    assert not [m for m in messages if "storing" in m]
    assert (again.path / "train.tokens").read_bytes() == whole


def test_the_tokenizer_sees_training_documents_only(prepared, tmp_path):
    corpus, _ = prepared
    unseen = held_out([f"zzzz qqqq {i} " * 50 for i in range(20)], FRACTION)
    train = [text for text in DOCUMENTS if text not in held_out(DOCUMENTS, FRACTION)]
    write_texts(tmp_path / "text", train + unseen)
    other = _prepare(TextFiles((str(tmp_path / "text"),)), tmp_path, SMALL)
    assert unseen and other.hash != corpus.hash
    assert other.tokenizer.hash == corpus.tokenizer.hash


def _chosen_alone(keys, fraction):
    """Which of some documents are held out, each for itself."""
    columns = np.asarray([bytes.fromhex(key) for key in keys], KEY_DTYPE)
    alone, sizes = np.full(len(keys), ALONE), np.ones(len(keys), int)
    return held_out_documents(columns, alone, sizes, [], fraction)[0]


@given(
    keys=st.lists(st.text().map(key_of), min_size=1),
    fractions=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
)
def test_a_larger_fraction_only_adds_to_the_validation_documents(keys, fractions):
    smaller, larger = (_chosen_alone(keys, fraction) for fraction in sorted(fractions))
    assert not _chosen_alone(keys, 0.0).any()
    assert (smaller <= larger).all()


def test_adding_documents_moves_no_other_document(prepared, tmp_path):
    corpus, _ = prepared
    write_texts(tmp_path / "text", DOCUMENTS + texts(30, seed=1))
    larger = _prepare(TextFiles((str(tmp_path / "text"),)), tmp_path)
    for name in ("train", "validation"):
        before = _texts_of(corpus, getattr(corpus, name))
        assert set(before) < set(_texts_of(larger, getattr(larger, name)))


def test_the_share_of_validation_documents():
    share = _chosen_alone([key_of(str(i)) for i in range(2000)], 0.2).mean()
    assert abs(share - 0.2) < 0.03


def test_long_work_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "SECONDS", 0.0)
    source = TextFiles((str(write_texts(tmp_path / "text", DOCUMENTS)),))
    messages = []
    _prepare(source, tmp_path, SMALL, on_progress=messages.append)
    about = [message.removeprefix(f"{source.name}: ").split()[0] for message in messages]
    stages = [word for word, _ in itertools.groupby(about)]
    reading = ["reading", "read", "storing", "stored", "60", "training", "read"]
    assert stages == [*reading, "encoding", "encoded", "looked", "encoded"], messages


def test_a_vocabulary_beyond_16_bits_is_stored_in_32(tmp_path):
    class Wide:
        vocab_size, end_of_text = 70_000, 69_999

    writer = preparation._SplitWriter(tmp_path, "train", Wide())  # pyright: ignore[reportArgumentType]
    document = Encoded(b"key", np.asarray([66_000]), 4)
    counts = writer.write([document], pace.Pace("encoded", lambda message: None))
    assert np.flatnonzero(counts).tolist() == [66_000, 69_999]
    assert np.fromfile(tmp_path / "train.tokens", np.int32).tolist() == [66_000, 69_999]


def test_a_mixture_keeps_its_parts_apart_in_training(tmp_path):
    first, second = DOCUMENTS[:30], texts(30, seed=2)
    one = TextFiles((str(write_texts(tmp_path / "one", first)),))
    two = TextFiles((str(write_texts(tmp_path / "two", [*second, first[0]])),))
    corpus = _prepare(Mixture((one, two), (3.0, 1.0)), tmp_path)
    assert [part.weight for part in corpus.parts] == [0.75, 0.25]
    assert corpus.parts[0].stop == corpus.parts[1].start
    assert corpus.parts[1].stop == corpus.train.num_tokens
    assert corpus.duplicates == 1
    stretch = corpus.train.tokens[corpus.parts[1].start : corpus.parts[1].stop]
    held = held_out(first + second, FRACTION)
    inside = sorted((text for text in second if text not in held), key=key_of)
    ends = [text + "<|endoftext|>" for text in inside]
    assert corpus.tokenizer.decode(stretch) == "".join(ends)
    assert _texts_of(corpus, corpus.validation) == sorted(held, key=key_of)
    assert [part["weight"] for part in corpus.summary()["parts"]] == [0.75, 0.25]
    batch = train_batches(corpus, batch_size=4, context=16, seed=0).batch_at(0)
    assert batch["tokens"].shape == (4, 17)
    # Other weights are another run on the same tokens.
    assert _prepare(Mixture((one, two), (1.0, 1.0)), tmp_path).path == corpus.path


def test_nothing_held_out_on_request(tmp_path):
    source = TextFiles((str(write_texts(tmp_path / "text", DOCUMENTS[:5])),))
    corpus = _prepare(source, tmp_path, fraction=0.0)
    assert (corpus.train.num_documents, corpus.validation.num_documents) == (5, 0)


def long_lines(name, count=6):
    return [f"{name}, line {i}: a sentence that no other document has" for i in range(count)]


def test_held_out_documents_that_training_has_mostly_seen_are_not_evaluated(tmp_path):
    documents = ["\n".join(long_lines(f"document {i}")) for i in range(40)]
    validation = held_out(documents, FRACTION)
    first, second, third = validation[:3]
    training = [text for text in documents if text not in validation]

    def with_lines_of(text, count):
        """A training document that repeats so many lines of another one, indented."""
        lines = ["    " + line for line in text.splitlines()[:count]]
        for salt in range(100):
            copy = "\n".join([*lines, *long_lines(f"copy {salt}")])
            if not is_held_out(key_of(copy), FRACTION):
                return copy
        raise AssertionError

    copies = [with_lines_of(first, 3), with_lines_of(second, 2), with_lines_of(third, 6)]
    told = []
    write_texts(tmp_path / "text", [*documents, *copies])
    corpus = _prepare(
        TextFiles((str(tmp_path / "text"),)), tmp_path / "cache", on_progress=told.append
    )
    kept = sorted((text for text in validation if text not in (first, third)), key=key_of)
    assert _texts_of(corpus, corpus.validation) == kept
    assert len(_texts_of(corpus, corpus.train)) == len(training) + 3
    assert corpus.summary()["near_copies_dropped"] == 2
    assert any(line.startswith(f"2 of {len(validation)} held-out documents") for line in told)


def test_when_all_held_out_documents_are_near_copies(tmp_path):
    shared = long_lines("licence")
    documents = ["\n".join([*shared, f"{i}"]) for i in range(40)]
    write_texts(tmp_path / "text", documents)
    with pytest.raises(ValueError, match="all held-out documents are near copies"):
        _prepare(TextFiles((str(tmp_path / "text"),)), tmp_path / "cache")


@pytest.fixture(scope="module")
def with_sets(tmp_path_factory):
    """A mixture of two parts that share documents, and sets of one, of both, of others."""
    root = tmp_path_factory.mktemp("sets")
    write_texts(root / "a", DOCUMENTS[:40])
    write_texts(root / "b", DOCUMENTS[30:])
    write_texts(root / "other", [*texts(5, seed=1), DOCUMENTS[0], DOCUMENTS[1]])
    a, b, other = (TextFiles((str(root / name),)) for name in ("a", "b", "other"))
    sets = {"a": a, "b": b, "other": other, "seen": None}
    return _prepare(Mixture((a, b), (1.0, 1.0)), root / "cache", sets=sets), root, other


def test_sets_are_what_training_does_not_see(with_sets):
    corpus, _, _ = with_sets
    validation = held_out(DOCUMENTS, FRACTION)
    wanted = {
        "a": [text for text in DOCUMENTS[:40] if text in validation],
        "b": [text for text in DOCUMENTS[30:] if text in validation],
        "other": [*texts(5, seed=1), *(t for t in DOCUMENTS[:2] if t in validation)],
    }
    assert set(wanted["a"]) & set(wanted["b"])
    for name, documents in wanted.items():
        split = corpus.sets[name]
        assert _texts_of(corpus, split) == sorted(documents, key=key_of), name
        assert split.num_bytes == sum(len(text.encode()) for text in documents)
    assert corpus.sets["seen"] is corpus.train


def test_sets_are_kept_in_the_cache(with_sets, monkeypatch):
    corpus, root, other = with_sets
    monkeypatch.setattr(preparation, "_SplitWriter", None)  # nothing is written again
    parts = Mixture(tuple(TextFiles((str(root / name),)) for name in "ab"), (1.0, 1.0))
    again = _prepare(parts, root / "cache", sets={"renamed": other})
    np.testing.assert_array_equal(again.sets["renamed"].tokens, corpus.sets["other"].tokens)


def test_sets_without_text_of_their_own_are_named(tmp_path):
    documents = [text for text in DOCUMENTS if text not in held_out(DOCUMENTS, FRACTION)]
    write_texts(tmp_path / "text", DOCUMENTS)
    write_texts(tmp_path / "same", documents[:5])
    source = TextFiles((str(tmp_path / "text"),))
    for directory, message in {"same": "all documents of .* are training", "no": "no file"}.items():
        sets = {"mine": TextFiles((str(tmp_path / directory),))}
        with pytest.raises(SetError, match=f"mine: .*{message}"):
            _prepare(source, tmp_path / "cache", sets=sets)


def test_corpora_without_documents_on_one_side(tmp_path):
    validation = held_out(DOCUMENTS, FRACTION)
    train = [text for text in DOCUMENTS if text not in validation][:5]
    one = TextFiles((str(write_texts(tmp_path / "train", train)),))
    with pytest.raises(ValueError, match=r"no validation documents.* validation_fraction = 0\.2"):
        _prepare(one, tmp_path)
    two = TextFiles((str(write_texts(tmp_path / "validation", validation)),))
    with pytest.raises(ValueError, match="no training documents"):
        _prepare(two, tmp_path)
    three = TextFiles((str(write_texts(tmp_path / "empty", ["", ""])),))
    with pytest.raises(ValueError, match=r"the corpus .*empty is empty: it has no text"):
        _prepare(three, tmp_path)
    with pytest.raises(ValueError, match="all its documents are in other parts"):
        _prepare(Mixture((one, one), (1.0, 1.0)), tmp_path)
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="validation_fraction = "):
            _prepare(one, tmp_path, fraction=fraction)


def test_files_that_vanish_before_they_are_stored_again_are_reported(tmp_path):
    directory = write_texts(tmp_path / "text", DOCUMENTS[:5])
    silent = lambda message: None  # noqa: E731
    (scan,) = scan_documents([TextFiles((str(directory),))], 0.0, tmp_path, silent)
    next(directory.iterdir()).unlink()
    assert store_documents(tmp_path, scan, [], silent) == scan.documents
    shutil.rmtree(scan.documents)
    with pytest.raises(ValueError, match="changed while they were read"):
        store_documents(tmp_path, scan, [], silent)
    assert not scan.documents.exists()


_CONCURRENT = """
import sys
from jaxopt_lab.data import TextFiles, TokenizerConfig, prepare
corpus = prepare(TextFiles((sys.argv[1],)), TokenizerConfig(vocab_size=280),
                 cache_dir=sys.argv[2], validation_fraction=0.2)
print(corpus.summary()["train_tokens_sha256"])
"""


def test_two_processes_prepare_the_same_corpus(prepared, tmp_path):
    corpus, root = prepared
    arguments = [sys.executable, "-c", _CONCURRENT, str(root / "text"), str(tmp_path)]
    processes = [
        subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    expected = corpus.summary()["train_tokens_sha256"]
    assert [output for output, _ in outputs] == [expected + "\n"] * 2, outputs
    for folder in ("tokens", "documents"):
        names = [path.name for path in (tmp_path / folder).iterdir()]
        assert len(names) == 2 and not [name for name in names if name.startswith(".")]


def test_importing_the_room_is_light():
    code = (
        "import sys, jaxopt_lab.data; "
        "print({'tensorflow_datasets', 'grain', 'tokenizers', 'flax'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout == "set()\n"


@pytest.mark.slow
def test_the_default_corpus_is_ready_in_half_a_minute_and_cached_in_a_second(tmp_path):
    times = []
    for _ in range(2):
        start = time.perf_counter()
        corpus = prepare(PythonSource(), cache_dir=tmp_path)
        times.append(time.perf_counter() - start)
    assert corpus.tokenizer.vocab_size == 4096
    assert corpus.train.num_tokens > 2_000_000
    assert times[0] < 30 and times[1] < 1
