"""Labelled texts with an encoder and a fresh classification head."""

import functools
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from jaxopt_lab import data, models
from jaxopt_lab.data.labelled import SPLITS
from jaxopt_lab.models import encoder
from jaxopt_lab.step import Batch
from jaxopt_lab.tasks.classification import Logits, Rows, check_sizes, classification
from jaxopt_lab.tasks.task import Task


def labelled(
    config: models.EncoderConfig,
    mesh: Mesh | models.Placement,
    rows: Mapping[str, Rows] | None = None,
    *,
    length: int = 64,
    seed: int = 0,
    eval_batch: int = 256,
) -> Task:
    """The task of an encoder on a mesh.

    Its parameters are those of the encoder and its `head`. `init` draws all of them;
    `jaxopt_lab.models.encoder.with_head` puts a fresh head on pretrained ones.

    >>> import jax
    >>> from jaxopt_lab.models import EncoderConfig
    >>> config = EncoderConfig(
    ...     vocab_size=64, width=32, depth=2, heads=4, context=16, classes=3)
    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> task = labelled(config, mesh, length=8)
    >>> task.heads, task.abstract_batch(4)["tokens"].shape
    (('head',), (4, 8))

    Args:
      config: Of the encoder, with `classes`.
      mesh: Axes among data, fsdp, tensor.
      rows: From `encoder_rows`; without them the task can be compiled, and no more.
      length: Tokens of a row.
      seed: Of the order of training rows.
      eval_batch: Rows of a batch in evaluation.

    Raises:
      ValueError: If the encoder has no classes.
    """
    if config.classes is None:
        raise ValueError(
            "classes: got None, wanted the number of classes that the head tells apart"
        )
    return classification(
        encoder_logits(config, mesh),
        functools.partial(encoder.init_params, config),
        models.partition_specs(config, mesh),
        rows,
        length=length,
        seed=seed,
        eval_batch=eval_batch,
        heads=("head",),
    )


def encoder_logits(config: models.EncoderConfig, mesh: models.OnMesh = None) -> Logits:
    """Scores of the encoder's head.

    Args:
      config: Of the encoder, with `classes`.
      mesh: Pins activations to it.
    """

    def logits(
        params: PyTree, batch: Batch, key: Any, side: Any = None, perturbation: Any = None
    ) -> Array:
        if perturbation is not None:
            return models.probe_scores(config, params, batch, *perturbation, mesh=mesh)
        tokens, mask = batch["tokens"], batch["mask"]
        return encoder.logits(config, params, tokens, mask, side=side, dropout_key=key, mesh=mesh)

    return logits


def encoder_rows(
    config: models.EncoderConfig,
    corpus: data.LabelledCorpus,
    tokenizer: data.WordPiece,
    *,
    length: int = 64,
) -> dict[str, Rows]:
    """The three parts of a corpus as an encoder reads them.

    Args:
      config: Of the encoder.
      corpus: Labelled texts.
      tokenizer: Its own.
      length: Tokens of a row; a longer text loses its end.

    Raises:
      ValueError: If the encoder has another number of classes, fewer tokens than the tokenizer or
        fewer positions than a row.
    """
    if config.classes != len(corpus.classes):
        raise ValueError(
            f"classes: got {config.classes}, wanted those of {corpus.name}: {len(corpus.classes)}"
        )
    check_sizes(config, tokenizer.vocab_size, length)

    def read(split: data.LabelledSplit) -> Rows:
        found = tokenizer.encode(split.texts, length=length)
        return Rows(found.tokens, found.mask, split.labels)

    return {name: read(getattr(corpus, name)) for name in SPLITS}
