"""Held-out text: fixed batches, exact token and byte counts, and the unigram model for scale."""

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Num

from jaxopt_lab.data.batches import Batch, RowsOnDemand, segments
from jaxopt_lab.data.corpora import Corpus, TokenSplit
from jaxopt_lab.data.tokenizer import Tokenizer

Batches = Sequence[Mapping[str, np.ndarray]]

_CHUNK = 1 << 22
_GOLDEN = 0.6180339887498949


def validation_batches(
    corpus: Corpus,
    *,
    batch_size: int,
    context: int,
    max_batches: int | None = None,
    segment_ids: bool = False,
) -> list[Batch]:
    """The held-out windows of a corpus, the same on every call: `windows_of` its validation split.

    Args:
        corpus: what `prepare` returned.
        batch_size: rows of a batch, B.
        context: input tokens of a row, T.
        max_batches: at most so many batches, full ones if there are as many; None gives all.
        segment_ids: adds the document index per input token, as `train_batches` does.

    Raises:
        ValueError: the corpus holds out no documents, or a number is below 1.
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches = {max_batches}; wanted at least 1, or None for all")
    if not corpus.validation.num_tokens:
        raise ValueError(
            f"the corpus {corpus.name} has no validation documents; prepare it with a "
            "validation_fraction above 0"
        )
    windows = windows_of(
        corpus.validation,
        corpus.tokenizer.end_of_text,
        batch_size=batch_size,
        context=context,
        max_windows=None if max_batches is None else max_batches * batch_size,
        segment_ids=segment_ids,
    )
    return [batch.build(range(batch_size)) for batch in windows]


def windows_of(
    split: TokenSplit,
    end_of_text: int,
    *,
    batch_size: int,
    context: int,
    max_windows: int | None = None,
    segment_ids: bool = False,
) -> list[RowsOnDemand]:
    """Windows of a split to evaluate on, the same on every call.

    The tokens, with an end-of-text in front so that the first one is a target as well, are cut into
    windows whose targets do not overlap: under the mask every token is a target at most once, and
    exactly once if all windows are taken. With `max_windows` they are spread evenly over the whole
    split (a Kronecker sequence with the golden ratio), so that every document has its share: a mean
    over them is an estimate of the mean over all tokens, whatever `batch_size` is, and more windows
    are the same ones and others.

    A window knows nothing of what came before it, so a longer `context` makes the same text easier.

    Args:
        split: of a corpus.
        end_of_text: token that ends a document.
        batch_size: rows of a batch, B.
        context: input tokens of a row, T.
        max_windows: at most so many windows; None gives all.
        segment_ids: adds the document index per input token, as `train_batches` does.

    Returns:
        Batches, whose rows are read when they are asked for, of `tokens` (B, T + 1) int32,
        `mask` (B, T) float32, 1 where the target `tokens[:, 1:]` counts and 0 on the padding of the
        last batch, and `documents` (B, T) int32, the number of the target's document in the split.

    Raises:
        ValueError: a number is below 1.
    """
    for field, value in {"batch_size": batch_size, "context": context}.items():
        if value < 1:
            raise ValueError(f"{field} = {value}; wanted at least 1")
    chosen = _spread(split.num_tokens, context, max_windows)
    padding = np.full(-len(chosen) % batch_size, split.num_tokens // context + 2)
    starts = context * np.concatenate([chosen, padding]).reshape(-1, batch_size)

    def rows(of_batch: np.ndarray, numbers: Sequence[int] | np.ndarray) -> Batch:
        # Positions of the inputs and the last target; those of the padding lie beyond the end.
        at = of_batch[np.asarray(numbers, int), None] + np.arange(-1, context)
        there = (at >= 0) & (at < split.num_tokens)
        tokens = np.full(at.shape, end_of_text, np.int32)
        tokens[there] = split.tokens[at[there]]
        documents = np.searchsorted(split.document_offsets[1:-1], at[:, 1:], "right")
        batch = {
            "tokens": tokens,
            "mask": there[:, 1:].astype(np.float32),
            "documents": documents.astype(np.int32),
        }
        if segment_ids:
            batch["segment_ids"] = segments(tokens[:, :-1], end_of_text)
        return batch

    return [RowsOnDemand(batch_size, functools.partial(rows, of_batch)) for of_batch in starts]


def _spread(num_tokens: int, context: int, max_windows: int | None) -> np.ndarray:
    """Numbers of the windows to take, ascending; a last one that is not full only with all."""
    whole = num_tokens // context
    if max_windows is None or max_windows > whole:
        return np.arange(-(-num_tokens // context))
    order = np.argsort(np.arange(whole) * _GOLDEN % 1.0, kind="stable")
    return np.sort(order[:max_windows])


def count_targets(batches: Batches, tokenizer: Tokenizer) -> tuple[int, int]:
    """Target tokens under the mask, and the bytes of text they stand for.

    End-of-text is a target of no bytes.
    """
    targets = _targets(batches)
    return len(targets), int(tokenizer.bytes_per_token[targets].sum(dtype=np.int64))


def bits_per_byte(nats_per_token: float, batches: Batches, tokenizer: Tokenizer) -> float:
    r"""A loss on these batches per byte of text: $\ell N / (\ln 2 \cdot \text{bytes})$.

    Unlike nats per token it can be compared between tokenizers.

    Args:
        nats_per_token: mean loss over the targets of `batches`.
        batches: what `validation_batches` returned.
        tokenizer: of the corpus.

    Raises:
        ValueError: the targets are end-of-text only.
    """
    tokens, num_bytes = count_targets(batches, tokenizer)
    if not num_bytes:
        raise ValueError(f"the {tokens} targets of the batches stand for no bytes")
    return nats_per_token * tokens / (math.log(2) * num_bytes)


def standard_error(
    nats: Float[np.ndarray, "*runs documents"], targets: Num[np.ndarray, " documents"]
) -> Float[np.ndarray, "*runs"]:
    r"""Standard error of a mean loss, for documents as the units that were drawn.

    The targets of one document depend on each other, so that their number says little. The mean
    loss is a ratio of sums over documents, $\hat\ell = \sum_d s_d / \sum_d n_d$, of $D$ of them
    that were drawn independently (delta method):

    $$
    \widehat{\mathrm{se}}^2 = \frac{D}{D - 1} \,
        \frac{\sum_d (s_d - \hat\ell n_d)^2}{(\sum_d n_d)^2}
    $$

    It is about the text. What another seed would change comes on top; and two models that were
    measured on the same text differ by less than their errors say.

    >>> float(standard_error(np.asarray([2.0, 8.0, 5.0]), np.asarray([1, 3, 1])).round(4))
    0.5477

    Args:
        nats: sum of the losses of each document, of one run or several.
        targets: number of them; documents with none do not count.

    Returns:
        In nats per token; NaN for fewer than two documents.
    """
    count, total = int((targets > 0).sum()), targets.sum()
    if count < 2:
        return np.full(nats.shape[:-1], np.nan)
    rest = nats - nats.sum(-1, keepdims=True) / total * targets
    return np.sqrt(count / (count - 1) * np.square(rest).sum(-1)) / total


def unigram_nats(corpus: Corpus, batches: Batches) -> tuple[float, float]:
    """Loss on held-out targets of a model that knows how often tokens occur and nothing else.

    Args:
        corpus: what `prepare` returned.
        batches: what `validation_batches` returned.

    Returns:
        Nats per token, and bits per byte.
    """
    return nats_under(unigram_model(corpus), batches, corpus.tokenizer)


def unigram_model(corpus: Corpus) -> Float[np.ndarray, " vocabulary"]:
    r"""The unigram model of the training tokens.

    $p(v) = \sum_k w_k (c_{kv} + 1) / (N_k + V)$ with the counts $c_{kv}$ of the $N_k$ tokens of
    part $k$ and its weight $w_k$.
    """
    size = corpus.tokenizer.vocab_size
    probability = np.zeros(size)
    for number, part in enumerate(corpus.parts):
        if corpus.counts is None:
            counts = _count(corpus.train.tokens[part.start : part.stop], size)
        else:
            counts = corpus.counts[number]
        counts = counts + 1.0
        probability += part.weight * counts / counts.sum()
    return probability


def _count(tokens: np.ndarray, size: int) -> np.ndarray:
    """How often each of `size` tokens occurs."""
    counts = np.zeros(size, np.int64)
    for start in range(0, len(tokens), _CHUNK):
        counts += np.bincount(tokens[start : start + _CHUNK], minlength=size)
    return counts


def nats_under(
    probability: Float[np.ndarray, " vocabulary"], batches: Batches, tokenizer: Tokenizer
) -> tuple[float, float]:
    """Loss of a unigram model: nats per token, and bits per byte."""
    nats = float(-np.log(probability[_targets(batches)]).mean())
    return nats, bits_per_byte(nats, batches, tokenizer)


def _targets(batches: Batches) -> np.ndarray:
    return np.concatenate([batch["tokens"][:, 1:][batch["mask"] > 0] for batch in batches])
