"""WordPiece: rows as BERT reads them, from either of its files."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from jaxopt_lab.data import WordPiece

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "a", "cafe", "film", "[", "]"]
WORDS += ["sep", "pad", "A"]


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return tmp_path


def ids(*words):
    return [WORDS.index(word) for word in words]


def test_rows(directory):
    tokenizer = WordPiece.load(directory)
    assert tokenizer.vocab_size == len(WORDS)
    found = tokenizer.encode(["Unaffable film", "A CAFÉ", "", "xyz a"], length=7)
    assert found.tokens.dtype == found.types.dtype == np.int32 and found.mask.dtype == bool
    assert found.tokens.tolist() == [
        ids("[CLS]", "un", "##aff", "##able", "film", "[SEP]", "[PAD]"),
        ids("[CLS]", "a", "cafe", "[SEP]", "[PAD]", "[PAD]", "[PAD]"),
        ids("[CLS]", "[SEP]", *5 * ["[PAD]"]),
        ids("[CLS]", "[UNK]", "a", "[SEP]", *3 * ["[PAD]"]),
    ]
    assert found.mask.sum(1).tolist() == [6, 4, 2, 4] and not found.types.any()
    cut = tokenizer.encode(["unaffable film a a a"], length=4)
    assert cut.tokens.tolist() == [ids("[CLS]", "un", "##aff", "[SEP]")]
    assert tokenizer.encode([], length=4).tokens.shape == (0, 4)


def test_pairs(directory):
    found = WordPiece.load(directory).encode(["a film"], ["cafe cafe cafe a"], length=8)
    words = ("[CLS]", "a", "film", "[SEP]", "cafe", "cafe", "cafe", "[SEP]")
    assert found.tokens.tolist() == [ids(*words)]
    assert found.types.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    short = WordPiece.load(directory).encode(["a"], ["film"], length=8)
    assert short.types.tolist() == [[0, 0, 0, 1, 1, 0, 0, 0]]
    assert short.mask.tolist() == [[True] * 5 + [False] * 3]


def test_text_is_never_a_special_token(directory):
    found = WordPiece.load(directory).encode(["a [SEP] a [PAD]"], length=12)
    words = ("[CLS]", "a", "[", "sep", "]", "a", "[", "pad", "]", "[SEP]", "[PAD]", "[PAD]")
    assert found.tokens.tolist() == [ids(*words)]


def test_both_files_encode_alike(directory):
    first = WordPiece.load(directory)
    # The lengths that a file carries are those of its authors.
    model = Tokenizer.from_str(first._model.to_str())
    model.enable_truncation(4)
    model.enable_padding(length=4)
    (directory / "other").mkdir()
    model.save(str(directory / "other" / "tokenizer.json"))
    second = WordPiece.load(directory / "other")
    texts = ["Unaffable film a a a a", "[CLS] café"]
    for a, b in zip(
        first.encode(texts, texts, length=20), second.encode(texts, texts, length=20), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert second.hash == first.hash
    # What was encoded before does not matter.
    second.encode(texts, length=5)
    assert second.hash == first.hash


def test_case_is_kept_where_the_options_say_so(directory):
    (directory / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    found = WordPiece.load(directory).encode(["A a"], length=4)
    assert found.tokens.tolist() == [ids("[CLS]", "A", "a", "[SEP]")]


def test_refusals(directory):
    tokenizer = WordPiece.load(directory)
    with pytest.raises(ValueError, match="length: got 2, wanted at least 3"):
        tokenizer.encode(["a"], length=2)
    with pytest.raises(ValueError, match="length: got 4, wanted at least 5"):
        tokenizer.encode(["a"], ["a"], length=4)
    with pytest.raises(ValueError, match="shorter"):
        tokenizer.encode(["a", "a"], ["a"], length=6)
    with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor vocab.txt"):
        WordPiece.load(directory / "nowhere")
    (directory / "vocab.txt").write_text("\n".join(WORDS[2:]) + "\n")
    with pytest.raises(ValueError, match=r"vocab.txt: .* has no \[PAD\], \[UNK\]"):
        WordPiece.load(directory)
    other = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    other.save(str(directory / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer.json: .* got a BPE tokenizer"):
        WordPiece.load(directory)
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json: not a WordPiece tokenizer"):
        WordPiece.load(directory)
