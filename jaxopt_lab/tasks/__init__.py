"""What is learnt: a task tells the trainer everything that depends on data and loss."""

from jaxopt_lab.tasks.language_model import language_model, language_model_loss
from jaxopt_lab.tasks.task import Task

__all__ = ["Task", "language_model", "language_model_loss"]
