"""What a run can be made of, by name: the one table behind flags and JSON.

A method joins by a dataclass that says how it is built, and a row in one of the tables here.
"""

from collections.abc import Mapping
from typing import Any

from jaxopt_lab.data import CORPORA, LabelledFiles, MovieSentences, Topics
from jaxopt_lab.models import PRESETS
from jaxopt_lab.train.config.optimizers import OPTIMIZERS
from jaxopt_lab.train.config.optimizers_pairs import PAIR_OPTIMIZERS
from jaxopt_lab.train.config.schedules import SCHEDULES
from jaxopt_lab.train.config.trainable import TRAINABLES
from jaxopt_lab.train.errors import ConfigError

CHOICES: dict[str, Mapping[str, Any]] = {
    "model": PRESETS,
    "trainable": TRAINABLES,
    "optimizer": {**OPTIMIZERS, **PAIR_OPTIMIZERS},
    "schedule": SCHEDULES,
    "corpus": {
        **CORPORA,
        "movie-sentences": MovieSentences,
        "topics": Topics,
        "labelled-files": LabelledFiles,
    },
}
"""What a flag such as `--optimizer NAME` chooses from, and `name` in a section of config.json."""

CLASSES: dict[str, type] = {
    name: kind
    for field, kinds in CHOICES.items()
    if field != "model"
    for name, kind in kinds.items()
}
"""All of them that are sections of a configuration."""


def choose(field: str, choices: Mapping[str, Any], name: Any) -> Any:
    """Looks a name up.

    Raises:
      ConfigError: If there is no such choice; lists them.
    """
    if not isinstance(name, str) or name not in choices:
        raise ConfigError(field, name, f"expected one of {', '.join(choices)}")
    return choices[name]


def name_of(config: Any) -> str:
    """The name under which an optimizer, schedule or corpus is chosen.

    >>> name_of(OPTIMIZERS["muon"]())
    'muon'
    """
    return next(name for name, kind in CLASSES.items() if kind is type(config))
