"""Small corpora for the tests of `data`."""

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxopt_lab.data import Corpus, CorpusPart, Tokenizer, TokenizerConfig, TokenSplit
from jaxopt_lab.data.tokenizer import make_tokenizer

WORDS = "alpha beta gamma delta Straße naïve 数据 def return\n    x = 0x1f\n".split(" ")


def texts(count: int, *, seed: int = 0, words: int = 30) -> list[str]:
    """Distinct pseudo-random documents."""
    rng = np.random.default_rng(seed)
    return [f"# {seed}.{i} " + " ".join(rng.choice(WORDS, words)) for i in range(count)]


def write_texts(directory: Path, documents: Sequence[str]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(documents):
        (directory / f"{number:03d}.txt").write_bytes(text.encode())
    return directory


def make_settled(directory: Path) -> Path:
    """As if the files had been written some time ago: others are read at every start."""
    long_ago = time.time() - 1000
    for path in directory.iterdir():
        os.utime(path, (long_ago, long_ago))
    return directory


def key_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def is_held_out(key: str, fraction: float) -> bool:
    """Whether a hash falls below a share of the range of hashes: the rule for single documents."""
    return int(key[:16], 16) < fraction * 2**64


def held_out(documents: Sequence[str], fraction: float) -> list[str]:
    return [text for text in documents if is_held_out(key_of(text), fraction)]


def byte_tokenizer() -> Tokenizer:
    return make_tokenizer(TokenizerConfig("bytes"), [])


def split_of_texts(documents: Sequence[str], tokenizer: Tokenizer) -> TokenSplit:
    pieces = [np.append(tokenizer.encode(text), tokenizer.end_of_text) for text in documents]
    offsets = np.cumsum([0, *map(len, pieces)])
    tokens = np.concatenate([np.empty(0, int), *pieces]).astype(np.uint16)
    return TokenSplit(tokens, offsets, sum(len(text.encode()) for text in documents))


def corpus_of(
    train: TokenSplit,
    validation: TokenSplit,
    *,
    stops: Sequence[int] | None = None,
    weights: Sequence[float] = (1.0,),
) -> Corpus:
    """A corpus in memory; `stops` ends the stretch of each part."""
    stops = stops or [train.num_tokens]
    starts = [0, *stops[:-1]]
    total = sum(weights)
    parts = tuple(
        CorpusPart(f"part{i}", str(i), weight / total, start, stop)
        for i, (start, stop, weight) in enumerate(zip(starts, stops, weights, strict=True))
    )
    return Corpus("test", "0", byte_tokenizer(), train, validation, parts, Path(), {}, 0)


def counting_corpus(*sizes: int, weights: Sequence[float] = (1.0,)) -> Corpus:
    """Token i of the corpus is i, so a row tells where it was read."""
    total = sum(sizes)
    train = TokenSplit(np.arange(total, dtype=np.int32), np.asarray([0, total]), total)
    return corpus_of(train, train, stops=list(np.cumsum(sizes)), weights=weights)
