"""Training batches: packed windows, a pure function of (seed, step)."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxopt_lab.data.corpora import Corpus, CorpusPart

Batch = dict[str, np.ndarray]

_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class RowsOnDemand(Mapping[str, np.ndarray]):
    """A batch of which only those rows are built that are asked for.

    >>> batch = RowsOnDemand(4, lambda numbers: {"x": 10 * np.asarray(numbers)})
    >>> batch.build([1, 3])["x"], batch["x"]
    (array([10, 30]), array([ 0, 10, 20, 30]))

    Args:
        size: rows of the batch.
        build: (numbers of rows, from 0 on) -> these rows of every entry.
    """

    size: int
    build: Callable[[Sequence[int] | np.ndarray], Batch]

    def __getitem__(self, name: str) -> np.ndarray:
        """All rows of an entry."""
        return self.build(range(self.size))[name]

    def __iter__(self) -> Iterator[str]:
        """Names of the entries."""
        return iter(self.build(range(0)))

    def __len__(self) -> int:
        """Number of entries."""
        return len(self.build(range(0)))


class TrainBatches(Iterator[Batch]):
    """Iterates over training batches from `start_step` on, without end.

    `batch_at(step)` gives any batch directly. Iterating computes the next batches in one thread,
    which `close` (or leaving the `with` block) stops; an error in it is raised by `next`.
    """

    def __init__(self, batch_at: Callable[[int], Batch], *, start_step: int, prefetch: int = 2):
        """Iterates over what `batch_at` gives for the steps; of a corpus, use `train_batches`."""
        self._batch_at = batch_at
        self._next_step = start_step
        self._prefetch = prefetch
        self._executor: concurrent.futures.ThreadPoolExecutor | None = None
        self._pending: collections.deque[concurrent.futures.Future[Batch]] = collections.deque()
        self._closed = False

    @property
    def step(self) -> int:
        """The step whose batch `next` gives: with the seed, the whole state of the iterator."""
        return self._next_step

    def batch_at(self, step: int) -> Batch:
        """This process's rows of the batch of a step."""
        return self._batch_at(step)

    def __next__(self) -> Batch:
        """The batch of `step`."""
        if self._closed:
            raise RuntimeError("these batches are closed; make new ones with start_step")
        try:
            batch = self._take() if self._prefetch else self.batch_at(self._next_step)
        except BaseException:
            self.close()
            raise
        self._next_step += 1
        return batch

    def _take(self) -> Batch:
        if self._executor is None:
            self._executor = concurrent.futures.ThreadPoolExecutor(1, "train-batches")
        while len(self._pending) <= self._prefetch:
            step = self._next_step + len(self._pending)
            self._pending.append(self._executor.submit(self._batch_at, step))
        return self._pending.popleft().result()

    def close(self) -> None:
        """Stops the thread; calling it twice is harmless."""
        self._closed = True
        self._pending.clear()
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def __enter__(self) -> "TrainBatches":
        """Closes the batches at the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the batches."""
        self.close()


def train_batches(
    corpus: Corpus,
    *,
    batch_size: int,
    context: int,
    seed: int,
    start_step: int = 0,
    start_sample: int | None = None,
    rows: Sequence[int] | Int[np.ndarray, " rows"] | None = None,
    segment_ids: bool = False,
    prefetch: int = 2,
) -> TrainBatches:
    r"""Batches of windows of `context + 1` tokens.

    An epoch cuts the training tokens, taken as a ring, into `num_tokens // context` windows whose
    targets do not overlap, and visits them in a fresh permutation. Epoch $e$ starts cutting at
    token $\lfloor T \{e \varphi\} \rfloor$ ($\varphi$ the golden ratio, $T$ the context), so that
    later epochs see the documents at other positions. Rows of a mixture come from its parts in
    the given proportions (grain rounds each to better than 1 %), each part counting its own
    epochs. Rows of step $s$ are numbered
    $s B, \ldots, s B + B - 1$ whatever the number of processes, and a row is a function of its
    number and the seed. After a change of $B$ the count goes on: with `start_step` $s_0$ and
    `start_sample` $n$ the first row of step $s$ has the number $n + (s - s_0) B$.

    Args:
        corpus: what `prepare` returned.
        batch_size: rows of the global batch, B.
        context: input tokens of a row, T.
        seed: of the permutations.
        start_step: where iteration starts.
        start_sample: rows consumed before it, if other than `start_step` times `batch_size`.
        rows: numbers, from 0 to B - 1, of the rows to give; None: all of them.
        segment_ids: adds the index of the document within the window, from 1 on, per input token.
        prefetch: batches computed ahead in a thread; 0 computes them on demand.

    Returns:
        An iterator of `{"tokens": (rows, T + 1) int32}`, with `segment_ids` `(rows, T)` int32 where
        wanted; also `batch_at(step)`.

    Raises:
        ValueError: a number is out of range, or the corpus has fewer training tokens than one
            batch.
    """
    for field, value in {"batch_size": batch_size, "context": context}.items():
        if value < 1:
            raise ValueError(f"{field} = {value}; wanted at least 1")
    start_sample = start_step * batch_size if start_sample is None else start_sample
    counts = {"start_step": start_step, "start_sample": start_sample, "prefetch": prefetch}
    for field, value in {"seed": seed, **counts}.items():
        if value < 0:
            raise ValueError(f"{field} = {value}; wanted at least 0")
    numbers = list(range(batch_size)) if rows is None else [int(row) for row in rows]
    if not numbers or min(numbers) < 0 or max(numbers) >= batch_size:
        raise ValueError(f"rows = {numbers}; wanted some of 0 to {batch_size - 1}")
    _check_size(corpus, batch_size, context)
    origin = start_sample - start_step * batch_size  # of the numbers of rows; may be negative
    read = train_rows(corpus, context=context, seed=seed, segment_ids=segment_ids)

    def batch_at(step: int) -> Batch:
        first = origin + step * batch_size
        if step < 0 or first < 0:
            raise ValueError(f"step = {step}; wanted at least {max(0, -(origin // batch_size))}")
        return read([first + row for row in numbers])

    return TrainBatches(batch_at, start_step=start_step, prefetch=prefetch)


def rows_of_first_epoch(corpus: Corpus, context: int) -> int:
    """Rows of `train_batches` before any part of the corpus is read a second time.

    Args:
        corpus: what `prepare` returned.
        context: input tokens of a row, T.
    """
    epochs = ((part.stop - part.start) // context / part.weight for part in corpus.parts)
    return int(min(epochs))


def train_rows(
    corpus: Corpus, *, context: int, seed: int, segment_ids: bool = False
) -> Callable[[Sequence[int]], Batch]:
    """(numbers of rows) -> these rows: what `train_batches` makes batches of.

    Args:
        corpus: what `prepare` returned.
        context: input tokens of a row, T.
        seed: of the permutations.
        segment_ids: as for `train_batches`.
    """
    windows = _window_order(corpus.parts, context, seed)

    def rows(numbers: Sequence[int]) -> Batch:
        tokens = np.stack([_read(corpus, context, windows[number]) for number in numbers])
        tokens = tokens.astype(np.int32)
        if not segment_ids:
            return {"tokens": tokens}
        inputs = tokens[:, :context]
        return {"tokens": tokens, "segment_ids": segments(inputs, corpus.tokenizer.end_of_text)}

    return rows


def _check_size(corpus: Corpus, batch_size: int, context: int) -> None:
    needed = batch_size * (context + 1)
    if corpus.train.num_tokens < needed:
        raise ValueError(
            f"the corpus {corpus.name} has {corpus.train.num_tokens} training tokens, fewer than "
            f"one batch: batch_size * (context + 1) = {batch_size} * {context + 1} = {needed}; "
            "give more text, or a smaller batch_size or context"
        )
    for part in corpus.parts:
        if part.stop - part.start <= context:
            raise ValueError(
                f"the part {part.name} of the corpus has {part.stop - part.start} training tokens, "
                f"fewer than one window: context + 1 = {context + 1}; give more text or a smaller "
                "context"
            )


def segments(
    inputs: Int[np.ndarray, "batch time"], end_of_text: int
) -> Int[np.ndarray, "batch time"]:
    """The document of each input token within its window: 1, then one more after end-of-text.

    >>> segments(np.array([[5, 0, 7, 7, 0, 0, 3]]), end_of_text=0)
    array([[1, 1, 2, 2, 2, 3, 4]], dtype=int32)
    """
    ends = inputs == end_of_text
    # An end-of-text still belongs to the document that it ends.
    return (1 + np.cumsum(ends, axis=1) - ends).astype(np.int32)


class _Window(NamedTuple):
    """Window number `index` of an epoch of one part."""

    part: int
    epoch: int
    index: int


def _read(corpus: Corpus, context: int, window: _Window) -> np.ndarray:
    part = corpus.parts[window.part]
    size = part.stop - part.start
    offset = int(context * (window.epoch * _GOLDEN % 1.0))
    start = part.start + (offset + window.index * context) % size
    stop = start + context + 1
    tokens = corpus.train.tokens
    if stop <= part.stop:
        return tokens[start:stop]
    return np.concatenate(
        [tokens[start : part.stop], tokens[part.start : part.start + stop - part.stop]]
    )


def _window_order(parts: tuple[CorpusPart, ...], context: int, seed: int) -> Any:
    """A grain dataset: row number -> `_Window`, endless, random access in constant time."""
    import grain

    class Label(grain.transforms.MapWithIndex):
        """Turns (row of the part, position within its epoch) into a `_Window`."""

        def __init__(self, part: int, num_windows: int):
            self._part = part
            self._num_windows = num_windows

        def map_with_index(self, index: int, element: int) -> _Window:
            return _Window(self._part, index // self._num_windows, element)

    orders = []
    for number, part in enumerate(parts):
        num_windows = (part.stop - part.start) // context
        # Grain shuffles epoch e with seed + e: nearby seeds would share epochs, hashed ones do not.
        hashed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        order = grain.MapDataset.range(num_windows).shuffle(hashed).repeat()
        orders.append(order.map_with_index(Label(number, num_windows)))
    if len(orders) == 1:
        return orders[0]
    return grain.MapDataset.mix(orders, [part.weight for part in parts])
