"""Byte-level tokenizers: every text has an encoding, and every token knows its bytes."""

import functools
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Int

from jaxopt_lab.report.files import naming
from jaxopt_lab.report.storage import local, path_of, staged

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
_FILE = "tokenizer.json"
_SMALLEST_VOCABULARY = 257  # the bytes and end-of-text
_LONG_WORD, _PIECE = 10_000, 1000  # characters
_LONG_RUN = re.compile(rf"((?<!\S)\S{{{_LONG_WORD},}}|(?<!\s)\s{{{_LONG_WORD},}})")
_GPT2_FILES = (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt"))


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer to use."""

    kind: Literal["bpe", "gpt2", "bytes", "saved"] = "bpe"
    """`bpe`: byte-level BPE trained on the training documents. `gpt2`: byte-level BPE read from
    the files of GPT-2. `bytes`: one token per byte. `saved`: the tokenizer.json of a run or of a
    model, or what a GGUF file carries."""
    vocab_size: int = 4096
    """Entries of the trained vocabulary with end-of-text, at least 257. A corpus with few distinct
    words can give fewer. The other kinds have their own size and ignore this."""
    directory: str | None = None
    """For `gpt2`: holds encoder.json (or vocab.json) and vocab.bpe (or merges.txt). For `saved`:
    holds tokenizer.json, or one file of the kind gguf."""

    def __post_init__(self) -> None:
        """Checks the fields before anything is read."""
        kinds = ("bpe", "gpt2", "bytes", "saved")
        if self.kind not in kinds:
            raise ValueError(
                f"TokenizerConfig.kind = {self.kind!r} is unknown; give one of {kinds}"
            )
        if self.kind == "saved" and self.directory is None:
            raise ValueError(
                "TokenizerConfig.directory is needed for kind='saved': a directory with "
                "tokenizer.json"
            )
        if self.kind == "bpe" and self.vocab_size < _SMALLEST_VOCABULARY:
            raise ValueError(
                f"TokenizerConfig.vocab_size = {self.vocab_size} is too small: the 256 bytes and "
                f"end-of-text need {_SMALLEST_VOCABULARY}"
            )
        if self.kind == "gpt2" and self.directory is None:
            raise ValueError(
                "TokenizerConfig.directory is needed for kind='gpt2': a directory with "
                "encoder.json (or vocab.json) and vocab.bpe (or merges.txt)"
            )

    def identity(self) -> dict[str, Any]:
        """What decides the encoding besides the training documents, as JSON values.

        Raises:
            ValueError: the files of a GPT-2 tokenizer are missing.
        """
        if self.kind == "bpe":
            return {"kind": "bpe", "vocab_size": self.vocab_size}
        if self.kind == "gpt2":
            digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in self.gpt2_files()]
            return {"kind": "gpt2", "files": digests}
        if self.kind == "saved":
            return {"kind": "saved", "hash": Tokenizer.load(self.directory or "").hash}
        return {"kind": "bytes"}

    def gpt2_files(self) -> tuple[Path, Path]:
        """The vocabulary and the merges file."""
        directory = Path(staged(self.directory or "")).expanduser()
        found = []
        for names in _GPT2_FILES:
            present = [directory / name for name in names if (directory / name).is_file()]
            if not present:
                raise ValueError(
                    f"TokenizerConfig.directory: {self.directory!r} has neither "
                    f"{' nor '.join(names)}, which the GPT-2 tokenizer is read from"
                )
            found.append(present[0])
        return found[0], found[1]


class Tokenizer:
    """A byte-level tokenizer with one special token, end-of-text.

    Text never encodes to end-of-text, even where it spells the token's name, so that an
    end-of-text in a token stream always is the end of a document.
    """

    vocab_size: int
    end_of_text: int
    bytes_per_token: np.ndarray
    """(vocab_size,) int32: bytes each token stands for, 0 for end-of-text. Over the tokens of a
    text they add up to the length of its UTF-8 encoding."""

    def __init__(self, model: "tokenizers.Tokenizer"):
        """Wraps a byte-level model of the `tokenizers` library.

        Raises:
            ValueError: the model has no end-of-text token, or its tokens are not byte-level.
        """
        from tokenizers.pre_tokenizers import ByteLevel

        vocabulary = model.get_vocab(with_added_tokens=True)
        if END_OF_TEXT not in vocabulary:
            raise ValueError(f"the tokenizer's vocabulary has no {END_OF_TEXT} token")
        model.encode_special_tokens = True
        self._model = model
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_text = vocabulary[END_OF_TEXT]
        # A byte-level vocabulary spells every byte as one character of this alphabet.
        alphabet = frozenset(ByteLevel.alphabet())
        self.bytes_per_token = np.zeros(self.vocab_size, np.int32)
        for token, index in vocabulary.items():
            if not alphabet.issuperset(token):
                raise ValueError(f"token {token!r} (id {index}) is not spelled in bytes")
            self.bytes_per_token[index] = len(token)
        self.bytes_per_token[self.end_of_text] = 0
        self._is_bytes = vocabulary == _byte_vocabulary()

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "Tokenizer":
        """Reads what `save` wrote, or what the one GGUF file of a directory carries.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is damaged; names the file.
        """
        import tokenizers

        path = path_of(directory) / _FILE
        if not path.exists() and len(found := list(path.parent.glob("*.gguf"))) == 1:
            from jaxopt_lab.data.gguf_tokenizer import gguf_tokenizer

            return gguf_tokenizer(Path(staged(found[0])))
        with naming(path):
            content = path.read_bytes()
        try:
            return cls(tokenizers.Tokenizer.from_buffer(content))
        except Exception as error:  # the library raises bare exceptions
            raise ValueError(f"{path}: not a tokenizer file: {error}") from error

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Writes `tokenizer.json`, which Hugging Face libraries read; returns its path."""
        path = local(directory) / _FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(_FILE + ".partial")
        with naming(path):
            partial.write_text(self._model.to_str(pretty=True), encoding="utf-8")
            partial.replace(path)
        return path

    @property
    def hash(self) -> str:
        """A hash of everything that decides the encoding."""
        return hashlib.sha256(self._model.to_str().encode()).hexdigest()

    def encode(self, text: str) -> Int[np.ndarray, " tokens"]:
        """Token ids of a text, without end-of-text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Int[np.ndarray, " tokens"]]:
        """Token ids of several texts, encoded in parallel threads."""
        if self._is_bytes:
            return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]
        encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def bytes_of(self, ids: Int[np.ndarray, " tokens"]) -> bytes:
        """The bytes that token ids stand for; end-of-text stands for none."""
        return b"".join(map(self._spellings.__getitem__, ids.tolist()))

    @functools.cached_property
    def _spellings(self) -> list[bytes]:
        """The bytes of every token."""
        byte_of = {spelled: byte for spelled, byte in _byte_vocabulary().items() if byte < 256}
        spellings = [b""] * self.vocab_size
        for token, index in self._model.get_vocab(with_added_tokens=True).items():
            if index != self.end_of_text:
                spellings[index] = bytes(map(byte_of.__getitem__, token))
        return spellings

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of token ids; bytes that are no UTF-8 become replacement characters."""
        ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
        return self._model.decode(ids.astype(int).tolist(), skip_special_tokens=False)


def make_tokenizer(config: TokenizerConfig, training_texts: Iterable[str]) -> Tokenizer:
    """Builds the tokenizer that a configuration describes.

    >>> tokenizer = make_tokenizer(TokenizerConfig("bytes"), [])
    >>> tokenizer.encode("né").tolist(), tokenizer.vocab_size, tokenizer.end_of_text
    ([110, 195, 169], 257, 256)

    Args:
        config: which one.
        training_texts: what a BPE is trained on; the other kinds do not read it.

    Raises:
        ValueError: the files of a GPT-2 tokenizer are missing or not those of a byte-level BPE.
    """
    from tokenizers import models

    if config.kind == "bytes":
        return Tokenizer(_byte_level(models.BPE(vocab=_byte_vocabulary(), merges=[])))
    if config.kind == "saved":
        return Tokenizer.load(config.directory or "")
    if config.kind == "gpt2":
        vocabulary, merges = config.gpt2_files()
        try:
            model = models.BPE.from_file(str(vocabulary), str(merges))
        except Exception as error:  # the library raises bare exceptions
            raise ValueError(
                f"TokenizerConfig.directory: {vocabulary} and {merges} are not the files of a "
                f"byte-level BPE: {error}"
            ) from error
        return Tokenizer(_byte_level(model))
    return _train(config.vocab_size, training_texts)


def _train(vocab_size: int, texts: Iterable[str]) -> Tokenizer:
    from tokenizers import models, pre_tokenizers, trainers

    model = _byte_level(models.BPE(), special=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        # All bytes, seen or not: held-out text may hold others than the training text.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    return Tokenizer(model)


def _pieces(text: str) -> list[str]:
    """The text for training a BPE, in one piece unless a word or a gap is extremely long.

    Each merge passes over every word that has the pair, so that one word of megabytes takes hours.
    """
    words = text.split()
    gaps = len(text) - sum(map(len, words)) - len(words)
    if max([gaps, *map(len, words)]) < _LONG_WORD:
        return [text]
    pieces = []
    for number, run in enumerate(_LONG_RUN.split(text)):
        size = _PIECE if number % 2 else max(len(run), 1)  # every second one is extremely long
        pieces += [run[start : start + size] for start in range(0, len(run), size)]
    return pieces


def _byte_level(model: Any, *, special: bool = True) -> "tokenizers.Tokenizer":
    """A byte-level tokenizer without normalisation or added space, so decoding is exact."""
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, pre_tokenizers

    tokenizer = Model(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if special:
        tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _byte_vocabulary() -> dict[str, int]:
    """Byte-level spelling of the bytes in their order, then end-of-text.

    The spelling is GPT-2's: printable Latin-1 characters stand for themselves, the others are
    moved to code points from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = (byte for byte in range(256) if byte not in printable)
    spelling = {byte: chr(byte) for byte in printable}
    spelling |= {byte: chr(256 + shift) for shift, byte in enumerate(moved)}
    return {spelling[byte]: byte for byte in range(256)} | {END_OF_TEXT: 256}
