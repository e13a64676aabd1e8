"""What is learnt: a task tells the trainer everything that depends on data and loss."""

from jaxopt_lab.tasks.classification import Rows, classification_loss, row_results
from jaxopt_lab.tasks.labelled import encoder_logits, encoder_rows, labelled
from jaxopt_lab.tasks.language_model import Text, language_model, language_model_loss
from jaxopt_lab.tasks.prompts import (
    PROMPTS,
    Prompt,
    prompt_logits,
    prompt_rows,
    prompted,
    word_tokens,
)
from jaxopt_lab.tasks.task import Evaluation, Task

__all__ = [
    "PROMPTS",
    "Evaluation",
    "Prompt",
    "Rows",
    "Task",
    "Text",
    "classification_loss",
    "encoder_logits",
    "encoder_rows",
    "labelled",
    "language_model",
    "language_model_loss",
    "prompt_logits",
    "prompt_rows",
    "prompted",
    "row_results",
    "word_tokens",
]
