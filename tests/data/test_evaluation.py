import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_lab.data import (
    TokenSplit,
    bits_per_byte,
    count_targets,
    unigram_nats,
    validation_batches,
    windows_of,
)
from tests.data.synthetic import byte_tokenizer, corpus_of, split_of_texts, texts

TOKENIZER = byte_tokenizer()
TRAIN = split_of_texts(texts(20), TOKENIZER)
HELD_OUT = split_of_texts(texts(7, seed=1), TOKENIZER)
CORPUS = corpus_of(TRAIN, HELD_OUT)
SHAPES = {"batch_size": st.integers(1, 9), "context": st.integers(1, 300)}


def _targets(batches):
    return np.concatenate([batch["tokens"][:, 1:][batch["mask"] == 1] for batch in batches])


@given(**SHAPES)
def test_every_held_out_token_is_a_target_once_and_in_order(batch_size, context):
    batches = validation_batches(CORPUS, batch_size=batch_size, context=context)
    for batch in batches:
        assert batch["tokens"].shape == (batch_size, context + 1)
        assert batch["mask"].shape == (batch_size, context)
        assert set(np.unique(batch["mask"])) <= {0.0, 1.0}
    np.testing.assert_array_equal(_targets(batches), HELD_OUT.tokens)
    # The input of a target is the token before it; end-of-text stands before the first.
    inputs = np.concatenate([batch["tokens"][:, :-1][batch["mask"] == 1] for batch in batches])
    wanted = np.concatenate([[TOKENIZER.end_of_text], HELD_OUT.tokens[:-1]])
    np.testing.assert_array_equal(inputs, wanted)


@given(**SHAPES)
def test_tokens_and_bytes_are_counted_exactly(batch_size, context):
    batches = validation_batches(CORPUS, batch_size=batch_size, context=context)
    assert count_targets(batches, TOKENIZER) == (HELD_OUT.num_tokens, HELD_OUT.num_bytes)


def rows_of(batches):
    """(tokens, mask) of every window that holds a target."""
    return [
        (tokens.tobytes(), mask.tobytes())
        for batch in batches
        for tokens, mask in zip(batch["tokens"], batch["mask"], strict=True)
        if mask.any()
    ]


# Token i is i, so a row tells where it was read.
NUMBERED = dataclasses.replace(CORPUS, validation=TokenSplit(np.arange(997), np.asarray([0]), 1))


@given(max_batches=st.integers(1, 40), **SHAPES)
def test_max_batches_takes_full_windows_and_more_windows_are_the_same_ones_and_others(
    max_batches, batch_size, context
):
    shape = {"batch_size": batch_size, "context": context}
    everything = rows_of(validation_batches(NUMBERED, **shape))
    some = rows_of(validation_batches(NUMBERED, max_batches=max_batches, **shape))
    assert len(some) == min(max_batches * batch_size, len(everything))
    assert some == sorted(some, key=everything.index) and len(set(some)) == len(some)
    if len(some) < len(everything):
        assert all(np.frombuffer(mask, np.float32).all() for _, mask in some)
    more = rows_of(validation_batches(NUMBERED, max_batches=max_batches + 1, **shape))
    assert set(some) <= set(more)


@given(
    batch_size=st.integers(1, 9), other=st.integers(1, 9), context=st.integers(1, 60),
    windows=st.integers(1, 60),
)  # fmt: skip
def test_which_windows_does_not_depend_on_the_batch(batch_size, other, context, windows):
    one, two = (
        windows_of(HELD_OUT, 256, batch_size=rows, context=context, max_windows=windows)
        for rows in (batch_size, other)
    )
    assert rows_of(one) == rows_of(two)


@pytest.mark.parametrize("windows", [8, 20, 50])
def test_windows_are_spread_over_all_documents(windows):
    split = TokenSplit(np.arange(10_000), np.arange(0, 10_001, 500), 1)
    batches = windows_of(split, 0, batch_size=4, context=10, max_windows=windows)
    starts = np.asarray([tokens[1] for batch in batches for tokens in batch["tokens"]])[:windows]
    gaps = np.diff([0, *starts, 10_000])
    assert gaps.max() < 3 * 10_000 / windows  # neighbours are at most 1 + golden ratio apart
    if windows == 50:
        assert set(starts // 500) == set(range(20))  # each of the documents


def test_segments_of_held_out_windows():
    (batch,) = validation_batches(
        CORPUS, batch_size=1, context=HELD_OUT.num_tokens, segment_ids=True
    )
    # Segment 1 is the end-of-text in front.
    lengths = np.bincount(batch["segment_ids"][0])[1:]
    wanted = np.diff(HELD_OUT.document_offsets)
    np.testing.assert_array_equal(lengths, [1, *wanted[:-1], wanted[-1] - 1])


def test_bits_per_byte_by_hand():
    batches = validation_batches(CORPUS, batch_size=2, context=50)
    # A model that pays 8 bits for every token, end-of-text included.
    paid = 8 * HELD_OUT.num_tokens / HELD_OUT.num_bytes
    assert bits_per_byte(math.log(256), batches, TOKENIZER) == pytest.approx(paid, rel=1e-12)


def test_the_unigram_model_by_hand():
    batches = validation_batches(CORPUS, batch_size=3, context=40)
    counts = [1 + list(TRAIN.tokens).count(v) for v in range(TOKENIZER.vocab_size)]
    losses = [-math.log(counts[v] / sum(counts)) for v in HELD_OUT.tokens]
    nats, bits = unigram_nats(CORPUS, batches)
    assert nats == pytest.approx(np.mean(losses), rel=1e-12)
    total_bits = sum(losses) / math.log(2)
    assert bits == pytest.approx(total_bits / HELD_OUT.num_bytes, rel=1e-12)


def test_the_unigram_model_of_a_mixture_weights_its_parts():
    stop = int(TRAIN.document_offsets[5])
    mixture = corpus_of(TRAIN, HELD_OUT, stops=[stop, TRAIN.num_tokens], weights=(0.9, 0.1))
    batches = validation_batches(mixture, batch_size=3, context=40)
    size = TOKENIZER.vocab_size
    parts = [
        1 + np.bincount(tokens, minlength=size)
        for tokens in (TRAIN.tokens[:stop], TRAIN.tokens[stop:])
    ]
    first, second = (part / part.sum() for part in parts)
    wanted = -np.log(0.9 * first + 0.1 * second)[HELD_OUT.tokens].mean()
    assert unigram_nats(mixture, batches)[0] == pytest.approx(wanted, rel=1e-12)
    assert wanted != pytest.approx(unigram_nats(CORPUS, batches)[0], rel=1e-6)


def test_the_unigram_model_beats_the_uniform_one():
    nats, _ = unigram_nats(CORPUS, validation_batches(CORPUS, batch_size=3, context=40))
    assert nats < math.log(TOKENIZER.vocab_size)


def test_nothing_held_out_is_an_error():
    empty = corpus_of(TRAIN, split_of_texts([], TOKENIZER))
    with pytest.raises(ValueError, match="no validation documents"):
        validation_batches(empty, batch_size=1, context=10)


@pytest.mark.parametrize("field", ["batch_size", "context", "max_batches"])
def test_numbers_below_one_are_named(field):
    with pytest.raises(ValueError, match=f"{field} = 0"):
        validation_batches(CORPUS, **{"batch_size": 1, "context": 10, field: 0})


def test_targets_without_text_have_no_bits_per_byte():
    batches = [{"tokens": np.full((1, 3), 256), "mask": np.ones((1, 2))}]
    with pytest.raises(ValueError, match="the 2 targets of the batches stand for no bytes"):
        bits_per_byte(1.0, batches, TOKENIZER)


@given(**SHAPES)
def test_rows_are_read_one_by_one_as_the_whole_batch_is(batch_size, context):
    for batch in windows_of(HELD_OUT, 256, batch_size=batch_size, context=context):
        odd = batch.build(range(1, batch_size, 2))
        assert odd.keys() == set(batch) == {"tokens", "mask", "documents"}
        for name, rows in odd.items():
            np.testing.assert_array_equal(rows, batch[name][1::2])
