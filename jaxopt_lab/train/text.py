"""The text of a run: the corpus, opened and checked against the model, and its held-out batches."""

from collections.abc import Callable

from jaxopt_lab import data
from jaxopt_lab.tasks import Text
from jaxopt_lab.train.config import HeldOutConfig, RunConfig, check_vocabulary
from jaxopt_lab.train.errors import ConfigError


def open_text(
    config: RunConfig, evaluation: HeldOutConfig, rows: int, say: Callable[[str], None]
) -> Text:
    """Opens the corpus, preparing it where it is not in the cache.

    Args:
      config: The run.
      evaluation: How much text is held out of training and evaluated.
      rows: Rows of a held-out batch.
      say: Receives lines of plain text.

    Returns:
      The corpus and its held-out batches.

    Raises:
      ConfigError: If the corpus is empty or too small for the batches, or has tokens that the
        model does not know.
    """
    model = config.model
    try:
        corpus = data.prepare(
            config.corpus,
            config.tokenizer,
            validation_fraction=config.validation_fraction,
            on_progress=say,
        )
        held_out = data.validation_batches(
            corpus,
            batch_size=rows,
            context=model.context,
            max_batches=evaluation.batches,
            segment_ids=model.document_mask,
        )
        first = data.train_batches(
            corpus, batch_size=config.batch_size, context=model.context, seed=0
        )
        first.close()
    except (OSError, ValueError) as error:
        raise ConfigError.inside("corpus", error) from error
    say(
        f"corpus {corpus.name}: {corpus.train.num_tokens:,} training tokens, "
        f"{corpus.validation.num_tokens:,} held out"
    )
    note = check_vocabulary(model, corpus.tokenizer)
    if note:
        say(note)
    return Text(corpus, held_out)
