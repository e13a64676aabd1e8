import dataclasses
import types

import numpy as np
import pytest

from jaxopt_lab.data import (
    Windows,
    bits_per_byte,
    draw_windows,
    train_batches,
    validation_batches,
)
from tests.data.synthetic import byte_tokenizer, corpus_of, split_of_texts, texts

TOKENIZER = byte_tokenizer()
CORPUS = corpus_of(
    split_of_texts(texts(20), TOKENIZER), split_of_texts(texts(7, seed=1), TOKENIZER)
)
SHAPE = {"batch_size": 3, "context": 10}
WINDOWS = draw_windows(CORPUS, seeds=(0, 7), steps=5, max_batches=2, **SHAPE)


def test_windows_are_the_batches_of_a_run():
    for seed in (0, 7):
        with train_batches(CORPUS, seed=seed, **SHAPE) as batches:
            wanted = np.stack([batches.batch_at(step)["tokens"] for step in (2, 3)])
        np.testing.assert_array_equal(WINDOWS.batches(seed, 2, 4)["tokens"], wanted)
    held_out = validation_batches(CORPUS, max_batches=2, **SHAPE)
    wanted = np.stack([batch["tokens"] for batch in held_out])
    np.testing.assert_array_equal(WINDOWS.held_out()["tokens"], wanted)
    assert WINDOWS.held_out()["tokens"].dtype == np.int32
    per_byte = 1 / (np.log(2) * WINDOWS.bytes_per_token)
    assert bits_per_byte(1.0, held_out, TOKENIZER) == pytest.approx(per_byte)


def test_a_file_holds_all_of_it(tmp_path):
    path = tmp_path / "windows.npz"
    WINDOWS.save(path)
    read = Windows.read(path)
    assert read.train.keys() == {0, 7} and read.corpus_hash == CORPUS.hash
    np.testing.assert_equal(dataclasses.asdict(read), dataclasses.asdict(WINDOWS))
    assert read.train[0].dtype == read.validation.dtype == np.uint16


def test_tokens_must_fit_the_file():
    large = types.SimpleNamespace(tokenizer=types.SimpleNamespace(vocab_size=70_000))
    with pytest.raises(ValueError, match="70000 entries; windows hold 16-bit tokens"):
        draw_windows(large, seeds=(0,), steps=1, max_batches=1, **SHAPE)


def test_held_out_windows_hold_no_padding():
    tokens = CORPUS.validation.num_tokens
    shape = {"batch_size": 3, "context": tokens // 4}
    drawn = draw_windows(CORPUS, seeds=(0,), steps=1, max_batches=5, **shape)
    assert len(drawn.validation) == 1
    with pytest.raises(ValueError, match="held-out tokens, fewer than one batch: 3 \\* "):
        draw_windows(CORPUS, seeds=(0,), steps=1, max_batches=5, batch_size=3, context=tokens // 2)
