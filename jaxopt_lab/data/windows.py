"""The text of a study as arrays in one file, for a machine that does not have the corpus."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxopt_lab.data.batches import Batch, train_batches
from jaxopt_lab.data.corpora import Corpus
from jaxopt_lab.data.evaluation import count_targets, validation_batches

_TRAIN = "train"


@dataclass(frozen=True)
class Windows:
    """Training windows of every seed, and the held-out ones."""

    train: dict[int, np.ndarray]  # seed -> (steps, batch, context + 1)
    validation: np.ndarray  # (batches, batch, context + 1)
    documents: np.ndarray  # (batches, batch, context), of the held-out targets
    bytes_per_token: float  # of the held-out targets
    corpus_hash: str

    def batches(self, seed: int, start: int, stop: int) -> Batch:
        """Batches of steps `start` to `stop - 1`, stacked."""
        return {"tokens": self.train[seed][start:stop].astype(np.int32)}

    def held_out(self) -> Batch:
        """All held-out batches, stacked; every target counts."""
        mask = np.ones(self.documents.shape, np.float32)
        tokens = self.validation.astype(np.int32)
        return {"tokens": tokens, "mask": mask, "documents": self.documents}

    def save(self, path: Path) -> None:
        """Writes one compressed NumPy archive; the path ends in .npz."""
        train: dict[str, Any] = {f"{_TRAIN}{seed}": x for seed, x in self.train.items()}
        np.savez_compressed(
            path,
            validation=self.validation,
            documents=self.documents,
            bytes_per_token=self.bytes_per_token,
            corpus_hash=self.corpus_hash,
            **train,
        )

    @classmethod
    def read(cls, path: Path) -> "Windows":
        """Reads what `save` wrote."""
        with np.load(path) as saved:
            train = {int(k[len(_TRAIN) :]): saved[k] for k in saved if k.startswith(_TRAIN)}
            size, digest = float(saved["bytes_per_token"]), str(saved["corpus_hash"])
            return cls(train, saved["validation"], saved["documents"], size, digest)


def draw_windows(
    corpus: Corpus,
    *,
    seeds: Sequence[int],
    steps: int,
    batch_size: int,
    context: int,
    max_batches: int,
) -> Windows:
    """Draws the batches of some seeds as `train_batches` does, and held-out ones.

    Args:
        corpus: what `prepare` returned.
        seeds: orders of the training windows.
        steps: batches of each seed.
        batch_size: rows of a batch, B.
        context: input tokens of a row, T.
        max_batches: held-out batches; fewer where the held-out text does not fill as many.

    Raises:
        ValueError: the vocabulary has more than 65 536 entries, or the corpus is too small for a
            batch, one of held-out text included.
    """
    vocabulary = corpus.tokenizer.vocab_size
    if vocabulary > 1 << 16:
        raise ValueError(f"the vocabulary has {vocabulary} entries; windows hold 16-bit tokens")
    train = {}
    for seed in seeds:
        with train_batches(corpus, batch_size=batch_size, context=context, seed=seed) as batches:
            drawn = [batches.batch_at(step)["tokens"] for step in range(steps)]
        train[seed] = np.stack(drawn).astype(np.uint16)
    held_out = validation_batches(
        corpus, batch_size=batch_size, context=context, max_batches=max_batches
    )
    held_out = [batch for batch in held_out if batch["mask"].all()]  # windows have no mask
    if not held_out:
        raise ValueError(
            f"the corpus {corpus.name} has {corpus.validation.num_tokens} held-out tokens, fewer "
            f"than one batch: {batch_size} * {context}"
        )
    tokens, size = count_targets(held_out, corpus.tokenizer)
    validation = np.stack([batch["tokens"] for batch in held_out]).astype(np.uint16)
    documents = np.stack([batch["documents"] for batch in held_out])
    return Windows(train, validation, documents, size / tokens, corpus.hash)
