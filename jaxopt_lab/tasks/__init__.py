"""What is learnt: a task tells the trainer everything that depends on data and loss."""

from jaxopt_lab.tasks.language_model import Text, language_model, language_model_loss
from jaxopt_lab.tasks.task import Evaluation, Task

__all__ = ["Evaluation", "Task", "Text", "language_model", "language_model_loss"]
