"""The text of a scale as arrays, so that a machine without the corpus can train on it."""

import pathlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tokens:
    """Training windows of every seed, and the held-out ones."""

    train: dict[int, np.ndarray]  # seed -> (steps, batch, context + 1)
    validation: np.ndarray  # (batches, batch, context + 1)
    bytes_per_token: float  # of the held-out targets
    corpus_hash: str

    def batches(self, seed: int, start: int, stop: int) -> dict[str, np.ndarray]:
        """Batches of steps `start` to `stop - 1`."""
        return {"tokens": self.train[seed][start:stop].astype(np.int32)}

    def held_out(self) -> dict[str, np.ndarray]:
        """All held-out batches."""
        return {"tokens": self.validation.astype(np.int32)}


def draw(
    roots: tuple[str, ...],
    vocab_size: int,
    *,
    seeds: tuple[int, ...],
    steps: int,
    batch_size: int,
    context: int,
    validation_batches: int,
) -> Tokens:
    """Prepares the corpus and draws the windows."""
    from jaxopt_lab import data

    tokenizer = data.TokenizerConfig("bpe", vocab_size)
    corpus = data.prepare(data.PythonSource(roots), tokenizer, on_progress=print)
    train = {}
    for seed in seeds:
        with data.train_batches(
            corpus, batch_size=batch_size, context=context, seed=seed
        ) as batches:
            drawn = [batches.batch_at(step)["tokens"] for step in range(steps)]
        train[seed] = np.stack(drawn).astype(np.uint16)
    held_out = data.validation_batches(
        corpus, batch_size=batch_size, context=context, max_batches=validation_batches
    )
    count, size = data.count_targets(held_out, corpus.tokenizer)
    windows = np.stack([batch["tokens"] for batch in held_out]).astype(np.uint16)
    return Tokens(train, windows, size / count, corpus.hash)


def save(tokens: Tokens, path: pathlib.Path) -> None:
    """Writes the windows as one compressed file."""
    np.savez_compressed(
        path,
        validation=tokens.validation,
        bytes_per_token=tokens.bytes_per_token,
        corpus_hash=tokens.corpus_hash,
        **{f"train{seed}": windows for seed, windows in tokens.train.items()},
    )


def read(path: pathlib.Path) -> Tokens:
    """Reads what `save` wrote."""
    with np.load(path) as saved:
        train = {int(k[5:]): saved[k] for k in saved if k.startswith("train")}
        size, digest = float(saved["bytes_per_token"]), str(saved["corpus_hash"])
        return Tokens(train, saved["validation"], size, digest)
