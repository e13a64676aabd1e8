import gc
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_lab.data import TrainBatches, rows_of_first_epoch, train_batches, train_rows
from tests.data.synthetic import (
    byte_tokenizer,
    corpus_of,
    counting_corpus,
    split_of_texts,
    texts,
)

TOKENIZER = byte_tokenizer()
TEXT = split_of_texts(texts(30, words=10), TOKENIZER)
CORPUS = corpus_of(TEXT, TEXT)
STEPS = st.integers(0, 10_000)
SEEDS = st.integers(0, 2**40)


def _batches(corpus=CORPUS, *, batch_size=6, context=10, seed=0, **options):
    return train_batches(corpus, batch_size=batch_size, context=context, seed=seed, **options)


def _rows(corpus, count, **options):
    """The first rows of the endless sequence."""
    batches = _batches(corpus, batch_size=1, **options)
    return np.concatenate([batches.batch_at(step)["tokens"] for step in range(count)])


@given(seed=SEEDS, step=STEPS)
def test_a_batch_is_a_function_of_seed_and_step(seed, step):
    first, second = _batches(seed=seed, start_step=step), _batches(seed=seed)
    second.batch_at(3)
    wanted = second.batch_at(step)["tokens"]
    assert wanted.shape == (6, 11) and wanted.dtype == np.int32
    np.testing.assert_array_equal(first.batch_at(step)["tokens"], wanted)
    with first:
        np.testing.assert_array_equal(next(first)["tokens"], wanted)


@given(seed=SEEDS, step=STEPS, segment_ids=st.booleans())
def test_rows_are_those_of_the_global_batch(seed, step, segment_ids):
    whole = _batches(seed=seed, segment_ids=segment_ids).batch_at(step)
    for rows in ([0], [1, 2, 5], range(3, 6), np.array([5, 0])):
        own = _batches(seed=seed, segment_ids=segment_ids, rows=rows).batch_at(step)
        for name, value in whole.items():
            np.testing.assert_array_equal(own[name], value[rows])


@given(
    size=st.integers(12, 60),
    context=st.integers(1, 11),
    epoch=st.integers(0, 2),
    seed=SEEDS,
)
def test_an_epoch_sees_every_window_once(size, context, epoch, seed):
    corpus = counting_corpus(size)
    count = size // context
    rows = _rows(corpus, (epoch + 1) * count, context=context, seed=seed)[epoch * count :]
    # Rows are stretches of the ring of tokens, and no token is a target twice.
    np.testing.assert_array_equal(np.diff(rows, axis=1) % size, 1 % size)
    targets = rows[:, 1:].ravel()
    assert len(set(targets)) == count * context
    starts = np.sort((rows[:, 0] - rows[:, 0].min()) % size)
    assert set(np.diff(starts)) <= {context, context + size % context}


def test_epochs_and_seeds_differ_in_order_and_offset():
    corpus = counting_corpus(400)
    rows = _rows(corpus, 120, context=10)
    first, second, third = rows[:40, 0], rows[40:80, 0], rows[80:, 0]
    assert set(first % 10) == {0}
    assert len({first[0] % 10, second[0] % 10, third[0] % 10}) == 3
    assert list(first // 10) != list(second // 10)
    assert sorted(first // 10) == list(range(40))
    # Neighbouring seeds share no epoch.
    other = _rows(corpus, 40, context=10, seed=1)[:, 0]
    assert not np.array_equal(other // 10, (second - second.min() % 10) // 10)
    assert not np.array_equal(other, first)


def test_a_corpus_smaller_than_the_run_repeats():
    corpus = counting_corpus(70)
    batch = _batches(corpus, batch_size=6, context=10).batch_at(10**6)
    assert batch["tokens"].shape == (6, 11)
    assert batch["tokens"].max() < 70


@given(seed=SEEDS, step=STEPS)
def test_rows_of_a_mixture_come_from_its_parts_in_proportion(seed, step):
    corpus = counting_corpus(100, 60, 300, weights=(5.0, 3.0, 2.0))
    tokens = _batches(corpus, batch_size=50, context=1, seed=seed).batch_at(step)["tokens"]
    part = np.searchsorted([100, 160], tokens, side="right")
    assert (part == part[:, :1]).all()
    counts = np.bincount(part[:, 0], minlength=3)
    assert np.abs(counts - [25, 15, 10]).max() <= 2
    np.testing.assert_array_equal(
        _batches(corpus, batch_size=50, context=1, seed=seed).batch_at(step)["tokens"], tokens
    )


def test_each_part_of_a_mixture_counts_its_own_epochs():
    corpus = counting_corpus(40, 80, weights=(1.0, 1.0))
    rows = _rows(corpus, 16, context=10)
    small, large = rows[rows[:, 0] < 40], rows[rows[:, 0] >= 40]
    assert sorted(small[:4, 0]) == [0, 10, 20, 30]
    assert sorted(large[:, 0]) == list(range(40, 120, 10))


def test_segments_count_documents_within_the_window():
    batches = _batches(context=60, batch_size=8, segment_ids=True)
    seen = 0
    for step in range(5):
        batch = batches.batch_at(step)
        assert batch["segment_ids"].shape == (8, 60)
        assert batch["segment_ids"].dtype == np.int32
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            document = 1
            for token, segment in zip(tokens[:-1], segments, strict=True):
                assert segment == document
                document += token == TOKENIZER.end_of_text
            seen = max(seen, document)
    assert seen > 1


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_iteration_follows_batch_at(prefetch):
    with _batches(start_step=5, prefetch=prefetch) as batches:
        for step in range(5, 20):
            assert batches.step == step
            np.testing.assert_array_equal(next(batches)["tokens"], batches.batch_at(step)["tokens"])


def _worker_threads():
    return [t for t in threading.enumerate() if t.name.startswith("train-batches")]


def test_closing_stops_the_thread():
    batches = _batches()
    next(batches)
    assert len(_worker_threads()) == 1
    batches.close()
    batches.close()
    assert not _worker_threads()
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


def test_forgotten_batches_leave_no_thread():
    batches = _batches()
    next(batches)
    (thread,) = _worker_threads()
    del batches
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_rows_are_asked_for_by_their_numbers():
    batches = _batches(batch_size=4, context=10, seed=3, segment_ids=True)
    rows = train_rows(CORPUS, context=10, seed=3, segment_ids=True)([6, 1])
    for name, found in rows.items():
        wanted = [batches.batch_at(1)[name][2], batches.batch_at(0)[name][1]]
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_in_the_thread_reaches_the_consumer(prefetch):
    right = _batches().batch_at

    def failing(step):
        if step == 3:
            raise OSError("the disk is gone")
        return right(step)

    batches = TrainBatches(failing, start_step=0, prefetch=prefetch)
    for _ in range(3):
        next(batches)
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert batches.step == 3
    assert not _worker_threads()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0"),
        ({"context": 0}, "context = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"start_step": -1}, "start_step = -1"),
        ({"prefetch": -1}, "prefetch = -1"),
        ({"rows": [0, 6]}, r"rows = \[0, 6\]; wanted some of 0 to 5"),
        ({"rows": [-1]}, r"rows = \[-1\]; wanted some of 0 to 5"),
        ({"rows": []}, r"rows = \[\]; wanted some of 0 to 5"),
        ({"batch_size": 10**6}, r"fewer than one batch: .* 1000000 \* 11 = 11000000"),
    ],
)
def test_wrong_numbers_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        _batches(**options)


def test_one_batch_of_tokens_is_enough():
    corpus = counting_corpus(66)
    assert _batches(corpus).batch_at(0)["tokens"].shape == (6, 11)
    with pytest.raises(ValueError, match="has 65 training tokens, fewer than one batch"):
        _batches(counting_corpus(65))


def test_every_part_of_a_mixture_must_fill_a_window():
    with pytest.raises(ValueError, match="the part part1 of the corpus has 10 training tokens"):
        _batches(counting_corpus(100, 10, weights=(1.0, 1.0)))


@given(seed=SEEDS, samples=STEPS, size=st.integers(1, 8))
def test_the_count_of_rows_goes_on_after_a_change_of_the_batch_size(seed, samples, size):
    batches = _batches(batch_size=size, seed=seed, start_step=5, start_sample=samples)
    rows = _batches(batch_size=1, seed=seed)
    for step in (5, 7):
        first = samples + (step - 5) * size
        expected = [rows.batch_at(row)["tokens"][0] for row in range(first, first + size)]
        np.testing.assert_array_equal(batches.batch_at(step)["tokens"], expected)
    if samples < 5 * size:
        with pytest.raises(ValueError, match="step = 0; wanted at least"):
            batches.batch_at(0)


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match="step = -1"):
        _batches().batch_at(-1)


def test_rows_of_the_first_epoch_are_all_different():
    corpus = counting_corpus(400, 100, weights=(3.0, 1.0))
    first = rows_of_first_epoch(corpus, 10)
    assert first == 40  # ten windows of the second part, a quarter of the rows
    rows = train_rows(corpus, context=10, seed=0)(range(first))["tokens"]
    assert len({row.tobytes() for row in rows}) == first
