"""The tokenizer in a GGUF file, against the one it was written from."""

import importlib.util
import json
import pathlib

import pytest

from jaxopt_lab.data import Tokenizer, TokenizerConfig, gguf_tokenizer
from jaxopt_lab.data.tokenizer import make_tokenizer
from tests.models import gguf_files

TEXTS = [
    "It's 2024, the café holds 1,234 people;\n\n\tand   so on  ",
    "naïve 東京 🎉 <|im_start|> def f(x):\r\n    return x**2<|endoftext|>",
]


def fields(pre="gpt-2", model="gpt2"):
    """Metadata of a BPE trained on our licence, and the tokenizer itself."""
    licence = pathlib.Path(__file__).parents[2] / "LICENSE"
    trained = make_tokenizer(TokenizerConfig(vocab_size=400), [licence.read_text()])
    held = json.loads(trained._model.to_str())["model"]
    tokens = sorted(held["vocab"], key=held["vocab"].get)
    return trained, {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t == "<|endoftext|>" else 1 for t in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in held["merges"]],
        "llama.vocab_size": 400,
    }


def test_ids_are_those_of_the_original(tmp_path):
    trained, given = fields()
    gguf_files.write(tmp_path / "model.gguf", fields=given)
    found = gguf_tokenizer(tmp_path / "model.gguf")
    assert (found.vocab_size, found.end_of_text) == (400, trained.end_of_text)
    for text in TEXTS:
        ids = found.encode(text)
        assert ids.tolist() == trained.encode(text).tolist()
        assert found.decode(ids) == text
        assert found.bytes_per_token[ids].sum() == len(text.encode())
    found.save(tmp_path)
    assert Tokenizer.load(tmp_path).hash == found.hash


def test_smollm_takes_digits_apart(tmp_path):
    _, given = fields("smollm")
    given["tokenizer.ggml.tokens"][-1] = "20"
    given["tokenizer.ggml.merges"][-1] = "2 0"
    gguf_files.write(tmp_path / "model.gguf", fields=given)
    found = gguf_tokenizer(tmp_path / "model.gguf")
    assert [found.decode([i]) for i in found.encode("in 2024")] == ["in", " ", *"2024"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model: got 'llama', wanted gpt2"),
        ({"tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre: got 'qwen2', wanted gpt-2 or smol"),
        ({"tokenizer.ggml.merges": ["zz yy"]}, "tokens and merges are not those of a BPE"),
        ({"tokenizer.ggml.tokens": None}, "no tokenizer.ggml.tokens in it"),
    ],
)
def test_other_tokenizers_are_refused(change, message, tmp_path):
    gguf_files.write(tmp_path / "model.gguf", fields=fields()[1] | change)
    with pytest.raises(ValueError, match=message):
        gguf_tokenizer(tmp_path / "model.gguf")


def test_without_the_package_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxopt-lab\[finetune\]'"):
        gguf_tokenizer(tmp_path / "model.gguf")
