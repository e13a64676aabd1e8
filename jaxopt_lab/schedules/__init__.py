"""Learning-rate schedules."""

from jaxopt_lab.schedules.decay import DecayShape, constant, warmup_cosine, warmup_stable_decay

__all__ = ["DecayShape", "constant", "warmup_cosine", "warmup_stable_decay"]
