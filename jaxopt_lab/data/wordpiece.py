"""WordPiece tokenizers of BERT: texts to rows of one length."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

if TYPE_CHECKING:
    import tokenizers

_FILE, _VOCABULARY, _OPTIONS = "tokenizer.json", "vocab.txt", "tokenizer_config.json"
_PAD, _UNKNOWN, _FIRST, _LAST = _SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


class Encoded(NamedTuple):
    """Rows for `jaxopt_lab.models.encoder`."""

    tokens: Int32[np.ndarray, "rows length"]
    mask: Bool[np.ndarray, "rows length"]  # False: padding
    types: Int32[np.ndarray, "rows length"]  # 1: of the second text


class WordPiece:
    """A tokenizer that puts [CLS] before a text and [SEP] after it.

    Text never encodes to special tokens, even where it spells their names.
    """

    vocab_size: int
    """One more than the largest id: what an embedding needs at least."""

    def __init__(self, model: "tokenizers.Tokenizer"):
        """Wraps a model of the `tokenizers` library.

        Raises:
            ValueError: it is no WordPiece model, or has no [PAD], [UNK], [CLS] and [SEP].
        """
        from tokenizers import models

        if not isinstance(model.model, models.WordPiece):
            raise ValueError(f"got a {type(model.model).__name__} tokenizer, wanted WordPiece")
        vocabulary = model.get_vocab(with_added_tokens=True)
        missing = [t for t in _SPECIAL if t not in vocabulary]
        if missing:
            raise ValueError(f"the tokenizer's vocabulary has no {', '.join(missing)}")
        # Files carry the lengths that their authors used.
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True
        self._model = model
        self._pad = vocabulary[_PAD]
        self.vocab_size = max(vocabulary.values()) + 1

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "WordPiece":
        """Reads `tokenizer.json`, or where there is none `vocab.txt`.

        With `vocab.txt` alone, `tokenizer_config.json` says whether text becomes lower case (it
        does where nothing is said).

        Raises:
            FileNotFoundError: there is neither.
            ValueError: a file is damaged or of another kind of tokenizer; names the file.
        """
        import tokenizers

        path = Path(directory, _FILE)
        if not path.exists():
            path = Path(directory, _VOCABULARY)
        if not path.exists():
            raise FileNotFoundError(f"{directory}: neither {_FILE} nor {_VOCABULARY}")
        try:
            if path.name == _FILE:
                return cls(tokenizers.Tokenizer.from_buffer(path.read_bytes()))
            return cls(_from_vocabulary(path))
        except Exception as error:  # the library raises bare exceptions
            raise ValueError(f"{path}: not a WordPiece tokenizer: {error}") from error

    @property
    def hash(self) -> str:
        """A hash of everything that decides the encoding."""
        return hashlib.sha256(self._model.to_str().encode()).hexdigest()

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, length: int
    ) -> Encoded:
        """Rows of exactly `length` tokens.

        What is longer loses its end, of two texts the longer one first; what is shorter is padded.

        Args:
            texts: one a row.
            pairs: a second text for each row; None: there is none.
            length: of a row, [CLS] and [SEP] counted; at least 3, and 5 with pairs.

        Raises:
            ValueError: a smaller length, or not as many pairs as texts.
        """
        least = 3 if pairs is None else 5
        if length < least:
            raise ValueError(f"length: got {length}, wanted at least {least}")
        rows = texts if pairs is None else list(zip(texts, pairs, strict=True))
        model = self._model
        model.enable_truncation(length)
        model.enable_padding(pad_id=self._pad, pad_token=_PAD, length=length)
        found = model.encode_batch(list(rows))
        model.no_truncation()
        model.no_padding()
        shape = (len(found), length)
        return Encoded(
            np.array([row.ids for row in found], np.int32).reshape(shape),
            np.array([row.attention_mask for row in found], bool).reshape(shape),
            np.array([row.type_ids for row in found], np.int32).reshape(shape),
        )


def _from_vocabulary(path: Path) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    options_path = path.with_name(_OPTIONS)
    options = json.loads(options_path.read_text()) if options_path.exists() else {}
    model = models.WordPiece.from_file(str(path), unk_token=_UNKNOWN)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=options.get("tokenize_chinese_chars", True),
        strip_accents=options.get("strip_accents"),
        lowercase=options.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    vocabulary = tokenizer.get_vocab()
    if vocabulary.keys() >= set(_SPECIAL):  # otherwise the caller refuses
        tokenizer.add_special_tokens(list(_SPECIAL))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{_FIRST} $A {_LAST}",
            pair=f"{_FIRST} $A {_LAST} $B:1 {_LAST}:1",
            special_tokens=[(name, vocabulary[name]) for name in (_FIRST, _LAST)],
        )
    return tokenizer
