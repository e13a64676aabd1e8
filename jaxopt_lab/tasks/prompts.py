"""Labelled texts with a decoder: a prompt, and one word for each class that may come next.

The answer is the class whose word is the likeliest next token. The loss is the cross-entropy of the
right word *among these words*: it is what decides the answer, it is the loss of an encoder's head
(ln(classes) for knowing nothing), and only their columns of the output matrix are needed. Over the
whole vocabulary the first steps would teach the model which words may stand there at all, which
changes no answer. Without training it is the zero-shot protocol, and adapters and zero-order
methods minimise the same.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from jaxopt_lab import data, models
from jaxopt_lab.core.packed import unpacked
from jaxopt_lab.data.labelled import SPLITS
from jaxopt_lab.models.side import matmul
from jaxopt_lab.step import Batch
from jaxopt_lab.tasks.classification import Logits, Rows, check_sizes, classification
from jaxopt_lab.tasks.task import Task

_TEXT, _LABEL = "{text}", "{label}"


@dataclass(frozen=True)
class Prompt:
    """How a text and its label are written for a decoder.

    >>> Prompt(words=("bad", "good")).parts
    ('', ' It was', ' ')

    Source: Schick, Schütze, "Exploiting Cloze Questions for Few Shot Text Classification and
    Natural Language Inference", arXiv 2001.07676; the default template is that of Gao, Fisch, Chen,
    "Making Pre-trained Language Models Better Few-shot Learners", arXiv 2012.15723.
    """

    template: str = "{text} It was {label}."
    """With {text} and behind it {label}. What follows the label does not matter: the model has not
    read it when it scores the label."""
    words: tuple[str, ...] = ("terrible", "great")
    """The verbaliser: what is written for the label, class by class; one token each."""

    def __post_init__(self) -> None:
        """Checks both before anything is read."""
        places = self.template.find(_TEXT), self.template.find(_LABEL)
        once = self.template.count(_TEXT) == self.template.count(_LABEL) == 1
        if not once or places[0] > places[1]:
            raise ValueError(
                f"Prompt.template: got {self.template!r}, wanted {_TEXT} once, and {_LABEL} once "
                "behind it"
            )
        if len(set(self.words)) != len(self.words) or len(self.words) < 2:
            raise ValueError(f"Prompt.words: got {self.words}, wanted distinct words, two or more")

    @property
    def parts(self) -> tuple[str, str, str]:
        """What comes before the text, between it and the label, and the space of the label.

        Byte-level tokenizers make one token of a space and the word after it.
        """
        before, _, rest = self.template.partition(_TEXT)
        between = rest.partition(_LABEL)[0]
        stripped = between.rstrip(" ")
        return before, stripped, between[len(stripped) :]


PROMPTS: Mapping[str, Prompt] = {
    "movie-sentences": Prompt("Review: {text}\nSentiment: {label}", ("negative", "positive"))
}
"""Prompts of known corpora, by the name of the source.

The one of movie sentences is the best of three that were tried with SmolLM2-135M-Instruct, without
training, on 200 validation rows: 81.5 % right, 57 % with the default prompt (194 times "great"),
62 % with its template and the words bad and good."""


def prompted(
    config: models.DecoderConfig,
    mesh: Mesh | models.Placement,
    words: np.ndarray,
    rows: Mapping[str, Rows] | None = None,
    *,
    length: int = 64,
    seed: int = 0,
    eval_batch: int = 256,
) -> Task:
    """The task of a decoder on a mesh; it adds no parameter to the model.

    Args:
      config: Of the decoder.
      mesh: Axes among data, fsdp, tensor.
      words: From `word_tokens`.
      rows: From `prompt_rows`; without them the task can be compiled, and no more.
      length: Tokens of a row.
      seed: Of the order of training rows.
      eval_batch: Rows of a batch in evaluation.
    """
    return classification(
        prompt_logits(config, words, mesh),
        functools.partial(models.init_params, config),
        models.partition_specs(config, mesh),
        rows,
        length=length,
        seed=seed,
        eval_batch=eval_batch,
    )


def prompt_logits(
    config: models.DecoderConfig, words: np.ndarray, mesh: models.OnMesh = None
) -> Logits:
    """Scores of the classes' words behind a prompt.

    >>> import jax
    >>> config = models.DecoderConfig(vocab_size=64, width=32, depth=2, heads=4, context=16)
    >>> params = models.init_params(config, jax.random.key(0))
    >>> mask = jnp.arange(8)[None] < jnp.array([[8], [5]])
    >>> batch = {"tokens": jnp.ones((2, 8), int), "mask": mask}
    >>> prompt_logits(config, np.array([5, 9, 11]))(params, batch, None).shape
    (2, 3)

    Args:
      config: Of the decoder.
      words: From `word_tokens`.
      mesh: Pins activations to it.
    """

    def logits(
        params: PyTree, batch: Batch, key: Any, side: Any = None, perturbation: Any = None
    ) -> Array:
        del key  # the decoder has no dropout
        if perturbation is not None:
            return models.probe_scores(
                config, params, batch, *perturbation, words=words.tolist(), mesh=mesh
            )
        tokens, mask = batch["tokens"], batch["mask"]
        documents = jnp.ones_like(tokens) if config.document_mask else None
        decoder = models.bind(config, params)
        hidden = decoder.hidden(tokens, documents, mesh=mesh, side=side)
        # Padding comes behind the prompt, where no token of it looks.
        last = hidden[jnp.arange(len(tokens)), mask.sum(1) - 1]
        wide = jnp.promote_types(last.dtype, jnp.float32)
        last, beside = last.astype(wide), decoder.head_side(side)
        if beside is not None:
            return matmul(beside, last, decoder.head_kernel().astype(wide))[:, words]
        return last @ unpacked(decoder.head_kernel())[:, words].astype(wide)

    return logits


def word_tokens(
    prompt: Prompt, corpus: data.LabelledCorpus, tokenizer: data.Tokenizer
) -> np.ndarray:
    """The token of each class, int32 (classes,).

    Raises:
      ValueError: If there is not one word for each class, or a word is more than one token.
    """
    if len(prompt.words) != len(corpus.classes):
        raise ValueError(
            f"Prompt.words: got {prompt.words}, wanted one for each class: "
            f"{', '.join(corpus.classes)}"
        )
    space = prompt.parts[2]
    found = tokenizer.encode_batch([space + word for word in prompt.words])
    for word, tokens in zip(prompt.words, found, strict=True):
        if len(tokens) != 1:
            pieces = [tokenizer.decode([token]) for token in tokens]
            raise ValueError(
                f"Prompt.words: {space + word!r} is {len(tokens)} tokens, {pieces}, wanted one"
            )
    return np.array(found, np.int32)[:, 0]


def prompt_rows(
    config: models.DecoderConfig,
    corpus: data.LabelledCorpus,
    tokenizer: data.Tokenizer,
    prompt: Prompt,
    *,
    length: int = 64,
) -> dict[str, Rows]:
    """The three parts of a corpus as prompts up to where the label is to come.

    Args:
      config: Of the decoder.
      corpus: Labelled texts.
      tokenizer: The decoder's.
      prompt: What is written around a text.
      length: Tokens of a row; of a longer text the end is cut, and never the prompt behind it.

    Raises:
      ValueError: If the decoder has fewer tokens than the tokenizer or fewer positions than a row,
        or a row no room for a text.
    """
    check_sizes(config, tokenizer.vocab_size, length)
    before, between, _ = prompt.parts
    tail = tokenizer.encode(between)
    room = length - len(tail)
    if room <= len(tokenizer.encode(before)):
        raise ValueError(f"length: got {length}, wanted more than {prompt.template!r} without text")

    def read(split: data.LabelledSplit) -> Rows:
        tokens = np.full((len(split.texts), length), tokenizer.end_of_text, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, text in enumerate(tokenizer.encode_batch([before + t for t in split.texts])):
            whole = np.append(text[:room], tail)
            tokens[row, : len(whole)] = whole
            mask[row, : len(whole)] = True
        return Rows(tokens, mask, split.labels)

    return {name: read(getattr(corpus, name)) for name in SPLITS}
