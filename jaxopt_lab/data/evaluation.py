"""Held-out text: fixed batches, exact token and byte counts, and the unigram model for scale."""

import math
from collections.abc import Sequence

import numpy as np

from jaxopt_lab.data.batches import Batch, segments
from jaxopt_lab.data.corpora import Corpus
from jaxopt_lab.data.tokenizer import Tokenizer

_CHUNK = 1 << 22


def validation_batches(
    corpus: Corpus,
    *,
    batch_size: int,
    context: int,
    max_batches: int | None = None,
    segment_ids: bool = False,
) -> list[Batch]:
    """The held-out windows, the same on every call.

    The validation tokens, with an end-of-text in front so that the first token is a target as
    well, are cut into windows whose targets do not overlap: under the mask every token is a target
    exactly once and in order. With `max_batches` the list ends early; documents lie in the order
    of their content hash, so what is kept is a random sample of them.

    Args:
        corpus: what `prepare` returned.
        batch_size: rows of a batch, B.
        context: input tokens of a row, T.
        max_batches: at most so many batches; None gives all.
        segment_ids: adds the document index per input token, as `train_batches` does.

    Returns:
        Batches of `tokens` (B, T + 1) int32 and `mask` (B, T) float32, 1 where the target
        `tokens[:, 1:]` counts and 0 on the padding of the last batch.

    Raises:
        ValueError: the corpus holds out no documents, or a number is below 1.
    """
    for field, value in {"batch_size": batch_size, "context": context}.items():
        if value < 1:
            raise ValueError(f"{field} = {value}; wanted at least 1")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches = {max_batches}; wanted at least 1, or None for all")
    targets = corpus.validation.tokens
    if not len(targets):
        raise ValueError(
            f"the corpus {corpus.name} has no validation documents; prepare it with a "
            "validation_fraction above 0"
        )
    per_batch = batch_size * context
    end_of_text = corpus.tokenizer.end_of_text
    batches = []
    for start in range(0, len(targets), per_batch)[:max_batches]:
        chosen = targets[start : start + per_batch].astype(np.int32)
        stream = np.full(per_batch + 1, end_of_text, np.int32)
        stream[0] = targets[start - 1] if start else end_of_text
        stream[1 : 1 + len(chosen)] = chosen
        positions = context * np.arange(batch_size)[:, None] + np.arange(context + 1)
        mask = np.arange(per_batch).reshape(batch_size, context) < len(chosen)
        batch = {"tokens": stream[positions], "mask": mask.astype(np.float32)}
        if segment_ids:
            batch["segment_ids"] = segments(batch["tokens"][:, :-1], end_of_text)
        batches.append(batch)
    return batches


def count_targets(batches: Sequence[Batch], tokenizer: Tokenizer) -> tuple[int, int]:
    """Target tokens under the mask, and the bytes of text they stand for.

    End-of-text is a target of no bytes.
    """
    targets = _targets(batches)
    return len(targets), int(tokenizer.bytes_per_token[targets].sum(dtype=np.int64))


def bits_per_byte(nats_per_token: float, batches: Sequence[Batch], tokenizer: Tokenizer) -> float:
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


def unigram_nats(corpus: Corpus, batches: Sequence[Batch]) -> tuple[float, float]:
    r"""Loss of the unigram model of the training tokens on held-out targets.

    $p(v) = \sum_k w_k (c_{kv} + 1) / (N_k + V)$ with the counts $c_{kv}$ of the $N_k$ tokens of
    part $k$ and its weight $w_k$: a model that knows how often tokens occur and nothing else.

    Args:
        corpus: what `prepare` returned.
        batches: what `validation_batches` returned.

    Returns:
        Nats per token, and bits per byte.
    """
    size = corpus.tokenizer.vocab_size
    probability = np.zeros(size)
    for part in corpus.parts:
        counts = np.ones(size)
        for start in range(part.start, part.stop, _CHUNK):
            stop = min(start + _CHUNK, part.stop)
            counts += np.bincount(corpus.train.tokens[start:stop], minlength=size)
        probability += part.weight * counts / counts.sum()
    nats = float(-np.log(probability[_targets(batches)]).mean())
    return nats, bits_per_byte(nats, batches, corpus.tokenizer)


def _targets(batches: Sequence[Batch]) -> np.ndarray:
    return np.concatenate([batch["tokens"][:, 1:][batch["mask"] > 0] for batch in batches])
