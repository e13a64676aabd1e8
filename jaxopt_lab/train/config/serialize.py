"""Configurations as JSON: complete, readable, and strict about what comes back."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from jaxopt_lab.train.config.choices import choose, name_of
from jaxopt_lab.train.config.decode import decode, encode, only_word
from jaxopt_lab.train.config.finetune import FinetuneConfig
from jaxopt_lab.train.config.run import PretrainConfig, RunConfig, with_preset
from jaxopt_lab.train.config.trainable import TRAINABLES
from jaxopt_lab.train.config.tuned import default_optimizer
from jaxopt_lab.train.errors import ConfigError

Settings = TypeVar("Settings")


def _decay_everywhere(values: dict[str, Any]) -> dict[str, Any]:
    """Before there was a choice, every parameter decayed.

    A file without the decay was not written by this package, which writes every setting.
    """
    optimizer = values.get("optimizer")
    if isinstance(optimizer, Mapping) and "weight_decay" in optimizer:
        values["optimizer"] = {"decay": "all", **optimizer}
    return values


def _profile_by_number(values: dict[str, Any]) -> dict[str, Any]:
    """A profile was a switch, of steps 4 to 6 where a run had as many."""
    if isinstance(values.get("profile"), bool):
        values["profile"] = "4:3" if values["profile"] and values.get("steps", 6) >= 6 else None
    return values


def _shampoo_names(values: dict[str, Any]) -> dict[str, Any]:
    """Two settings of Shampoo have got the names that the other methods have."""
    optimizer = values.get("optimizer")
    if isinstance(optimizer, Mapping) and optimizer.get("name") == "shampoo":
        names = {"epsilon": "eps", "max_preconditioner_dim": "max_precond_dim"}
        values["optimizer"] = {names.get(key, key): item for key, item in optimizer.items()}
    return values


def _whole_stream(values: dict[str, Any]) -> dict[str, Any]:
    """The residual stream could be split by its width; where it was, the rule stays unknown."""
    mesh = values.get("mesh")
    if not isinstance(mesh, Mapping):
        return values
    rules = mesh.get("rules")
    if isinstance(rules, Mapping) and rules.get("stream") == []:
        kept = {name: axes for name, axes in rules.items() if name != "stream"}
        values["mesh"] = {**mesh, "rules": kept}
    return values


_MIGRATIONS: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (
    lambda values: values,  # 0, before there were versions: the same fields
    _decay_everywhere,
    _profile_by_number,
    _shampoo_names,
    _whole_stream,
)
"""Number i turns version i into version i + 1; one that renames or drops a field is added here."""
VERSION = len(_MIGRATIONS)


def to_json(config: RunConfig) -> str:
    """Every field of a configuration, defaults included.

    >>> from_json(to_json(PretrainConfig(steps=7))).steps
    7
    """
    values = {"version": VERSION, **encode(config)}
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def from_json(text: str, kind: type[Settings] = PretrainConfig) -> Settings:  # pyright: ignore
    """Reads what `to_json` wrote, or a part of it; missing fields keep their defaults.

    Args:
      text: A JSON object.
      kind: The dataclass that it holds.

    Raises:
      ConfigError: For text that is not a JSON object, an unknown key or name, or a value of the
        wrong type; the message names the place.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError("config", text[:40], f"expected JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError("config", values, "expected a JSON object")
    return with_values(kind(), _migrated(values))


def with_values(default: Settings, values: Mapping[str, Any]) -> Settings:
    """A configuration with some values in place of those of `default`.

    Another preset comes first: it brings its model, tokenizer and rates.

    Args:
      default: A configuration, with or without a preset.
      values: As `decode` takes them.

    Raises:
      ConfigError, ArgumentError: As `decode`.
    """
    if not isinstance(default, RunConfig):
        return decode(type(default), default, values)
    preset = only_word("model", values.get("preset", default.preset))
    base = default if preset == default.preset else with_preset(default, preset)
    values = {name: value for name, value in values.items() if name != "preset"}
    # Nothing is tuned for weights from elsewhere.
    tuned = getattr(base, "init_from", None) or preset
    if isinstance(base, FinetuneConfig):
        base, tuned = _with_rate(base, values.get("trainable"))
    return decode(type(base), base, values, preset=tuned)  # pyright: ignore


def _with_rate(config: FinetuneConfig, section: Any) -> tuple[FinetuneConfig, str]:
    """What will move, and the run with its rate where the optimizer was left at its defaults."""
    before, optimizer = name_of(config.trainable), config.optimizer
    given = section.get("name", before) if isinstance(section, Mapping) else before
    moves = choose("trainable", TRAINABLES, only_word("trainable", given))
    after = name_of(moves())
    if optimizer == default_optimizer(before, name_of(optimizer)):
        config = replace(config, optimizer=default_optimizer(after, name_of(optimizer)))
    return config, after


def _migrated(values: dict[str, Any]) -> dict[str, Any]:
    """Today's form of what an earlier version of this package wrote, as far as there is one.

    What has none is an unknown setting, and refused by its name.
    """
    version = values.pop("version", 0)
    if type(version) is not int or not 0 <= version <= VERSION:
        raise ConfigError(
            "version", version, f"expected at most {VERSION}: written by a newer jaxopt-lab?"
        )
    for migrate in _MIGRATIONS[version:]:
        values = migrate(values)
    return values
