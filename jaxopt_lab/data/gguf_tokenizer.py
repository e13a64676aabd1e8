"""The tokenizer that a GGUF file carries in its metadata."""

import os
from typing import Any

from jaxopt_lab.data.tokenizer import Tokenizer
from jaxopt_lab.report.files import open_gguf

_SPECIAL, _ADDED = 3, 4  # kinds of tokens: control tokens, and those that text spells whole


def gguf_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads a byte-level BPE, of GPT-2 or of SmolLM, from a GGUF file.

    SmolLM's splits digits from each other first. `Tokenizer.save` writes the `tokenizer.json` that
    `TokenizerConfig("saved")` reads.

    Args:
        path: the file.

    Raises:
        ModuleNotFoundError: without the package gguf.
        FileNotFoundError: without the file.
        ValueError: not a GGUF file, or one with another kind of tokenizer.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    fields = open_gguf(path).fields

    def value(name: str) -> Any:
        key = f"tokenizer.ggml.{name}"
        if key not in fields:
            raise ValueError(f"{path}: no {key} in it")
        return fields[key].contents()

    before = {"gpt-2": [], "smollm": [pre_tokenizers.Digits(individual_digits=True)]}
    for name, wanted in {"model": ("gpt2",), "pre": tuple(before)}.items():
        if value(name) not in wanted:
            raise ValueError(
                f"{path}: tokenizer.ggml.{name}: got {value(name)!r}, wanted {' or '.join(wanted)}"
            )
    tokens, kinds = value("tokens"), value("token_type")
    merges = [tuple(merge.split(" ")) for merge in value("merges")]
    try:
        ids = {token: i for i, token in enumerate(tokens)}
        model = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges))
    except Exception as error:  # the library raises bare exceptions
        raise ValueError(f"{path}: tokens and merges are not those of a BPE: {error}") from error
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([*before[value("pre")], byte_level])
    model.decoder = decoders.ByteLevel()
    given = list(zip(tokens, kinds, strict=True))
    model.add_special_tokens([token for token, kind in given if kind == _SPECIAL])
    model.add_tokens([token for token, kind in given if kind == _ADDED])
    return Tokenizer(model)
