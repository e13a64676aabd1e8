"""The text of a run: the corpus, opened and checked against the model, and its held-out batches."""

from collections.abc import Callable, Sequence

from jaxopt_lab import data
from jaxopt_lab.tasks import Text
from jaxopt_lab.train.config.run import RunConfig, check_vocabulary
from jaxopt_lab.train.config.sections import HeldOutConfig
from jaxopt_lab.train.errors import ConfigError

# Of a unit of `eval.batches`. Not those of a training batch: runs that differ in that one are to be
# evaluated on the same text.
_WINDOWS = 8


def open_text(
    config: RunConfig,
    evaluation: HeldOutConfig,
    rows: int,
    say: Callable[[str], None],
    sets: Sequence[str] = (),
) -> Text:
    """Opens the corpus, preparing it where it is not in the cache.

    Args:
      config: The run.
      evaluation: How much text is evaluated.
      rows: Rows of a held-out batch.
      say: Receives lines of plain text.
      sets: More text to evaluate, as in `EvalConfig.sets`.

    Returns:
      The corpus and its held-out batches.

    Raises:
      ConfigError: If the corpus or a set is empty or too small for the batches, or has tokens that
        the model does not know.
    """
    model = config.model
    try:
        corpus = data.prepare(
            config.corpus,
            config.tokenizer,
            validation_fraction=config.validation_fraction,
            sets=data.sets_from_text(sets),
            on_progress=say,
        )
        splits = {data.VALIDATION: corpus.validation, **corpus.sets}
        held_out = {
            name: data.windows_of(
                split,
                corpus.tokenizer.end_of_text,
                batch_size=rows,
                context=model.context,
                max_windows=evaluation.batches * _WINDOWS,
                segment_ids=model.document_mask,
            )
            for name, split in splits.items()
        }
        first = data.train_batches(
            corpus, batch_size=config.batch_size, context=model.context, seed=0
        )
        first.close()
    except data.SetError as error:
        raise ConfigError.inside("eval.sets", error) from error
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
