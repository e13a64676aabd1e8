import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxopt_lab.data import Tokenizer, TokenizerConfig
from jaxopt_lab.data.tokenizer import END_OF_TEXT, make_tokenizer
from tests.data.synthetic import byte_tokenizer, texts


@pytest.fixture(scope="module")
def bpe():
    return make_tokenizer(TokenizerConfig(vocab_size=300), texts(40))


@pytest.fixture(scope="module")
def gpt2_directory(bpe, tmp_path_factory):
    """The two files of GPT-2's layout, written from a trained tokenizer."""
    directory = tmp_path_factory.mktemp("gpt2")
    model = json.loads((bpe.save(directory / "source")).read_text())["model"]
    (directory / "encoder.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (directory / "vocab.bpe").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return directory


@pytest.fixture(scope="module", params=["bpe", "gpt2", "bytes"])
def tokenizer(request, bpe, gpt2_directory):
    if request.param == "bpe":
        return bpe
    config = TokenizerConfig(request.param, directory=str(gpt2_directory))
    return make_tokenizer(config, [])


@given(text=st.text(max_size=200))
@example(text=f"a{END_OF_TEXT}b")
@example(text="  leading, trailing \r\n\t\x00 \u2028")
@example(text="")
def test_text_round_trips_and_bytes_add_up(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_per_token[ids].sum() == len(text.encode())
    assert tokenizer.end_of_text not in ids
    assert ids.size == 0 or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size


def test_end_of_text_has_no_bytes_and_every_other_token_has_some(tokenizer):
    assert tokenizer.bytes_per_token.shape == (tokenizer.vocab_size,)
    without = np.flatnonzero(tokenizer.bytes_per_token == 0)
    assert without.tolist() == [tokenizer.end_of_text]
    assert tokenizer.decode([tokenizer.end_of_text]) == END_OF_TEXT


def test_saving_keeps_the_encoding(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    text = texts(1)[0] + END_OF_TEXT
    assert loaded.hash == tokenizer.hash
    assert loaded.vocab_size == tokenizer.vocab_size
    np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))


def test_batches_encode_like_single_texts(tokenizer):
    documents = [*texts(5), ""]
    for text, ids in zip(documents, tokenizer.encode_batch(documents), strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_training_is_deterministic_and_compresses(bpe):
    assert make_tokenizer(TokenizerConfig(vocab_size=300), texts(40)).hash == bpe.hash
    assert bpe.vocab_size == 300
    text = texts(41)[-1]
    assert len(bpe.encode(text)) < 0.8 * len(text.encode())


def test_the_smallest_bpe_is_bytes(bpe):
    smallest = make_tokenizer(TokenizerConfig(vocab_size=257), texts(5))
    assert smallest.vocab_size == 257
    assert len(smallest.encode("Straße")) == len("Straße".encode())


def test_byte_ids_are_the_bytes():
    tokenizer = byte_tokenizer()
    data = bytes(range(128)).decode() + "ü"
    assert tokenizer.encode(data).tolist() == list(data.encode())
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)
    assert tokenizer.decode(np.array([255, 65])) == "\ufffdA"


def test_gpt2_files_give_the_same_encoding_under_both_names(bpe, gpt2_directory, tmp_path):
    (tmp_path / "vocab.json").write_text((gpt2_directory / "encoder.json").read_text())
    (tmp_path / "merges.txt").write_text((gpt2_directory / "vocab.bpe").read_text())
    config = TokenizerConfig("gpt2", directory=str(gpt2_directory))
    renamed = TokenizerConfig("gpt2", directory=str(tmp_path))
    assert config.identity() == renamed.identity()
    text = texts(1)[0]
    for one in (config, renamed):
        np.testing.assert_array_equal(make_tokenizer(one, []).encode(text), bpe.encode(text))


def test_missing_or_foreign_gpt2_files(gpt2_directory, tmp_path):
    config = TokenizerConfig("gpt2", directory=str(tmp_path))
    with pytest.raises(ValueError, match="has neither encoder.json nor vocab.json"):
        config.identity()
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match="has neither vocab.bpe nor merges.txt"):
        config.identity()
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(ValueError, match="are not the files of a byte-level BPE"):
        make_tokenizer(config, [])
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "vocab.json").write_text('{"\\u4e00": 0, "<|endoftext|>": 1}')
    with pytest.raises(ValueError, match="is not spelled in bytes"):
        make_tokenizer(config, [])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 256}, "vocab_size = 256 is too small.*257"),
        ({"kind": "gpt2"}, "directory is needed for kind='gpt2'"),
        ({"kind": "words"}, "kind = 'words' is unknown"),
    ],
)
def test_wrong_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**fields)
