"""Configurations as JSON: complete, readable, and strict about what comes back."""

import difflib
import json
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, overload

from jaxopt_lab.data.sources import PARTS, SinglePart, Source
from jaxopt_lab.train.config import CHOICES, AnyRun, PretrainConfig, RunConfig, choose, with_preset
from jaxopt_lab.train.errors import ConfigError
from jaxopt_lab.train.optimizers import OptimizerConfig
from jaxopt_lab.train.schedules import ScheduleConfig
from jaxopt_lab.train.tuned import default_optimizer

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


_MIGRATIONS: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (
    lambda values: values,  # 0, before there were versions: the same fields
    _decay_everywhere,
    _profile_by_number,
    _shampoo_names,
)
"""Number i turns version i into version i + 1; one that renames or drops a field is added here."""
VERSION = len(_MIGRATIONS)

_REGISTRIES: dict[Any, Mapping[str, Any]] = {
    OptimizerConfig: CHOICES["optimizer"],
    ScheduleConfig: CHOICES["schedule"],
    Source: CHOICES["corpus"],
    SinglePart: PARTS,
}
_NAMES = {kind: name for registry in _REGISTRIES.values() for name, kind in registry.items()}


def to_json(config: RunConfig) -> str:
    """Every field of a configuration, defaults included.

    >>> from_json(to_json(PretrainConfig(steps=7))).steps
    7
    """
    values = {"version": VERSION, **encode(config)}
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


@overload
def from_json(text: str) -> PretrainConfig: ...


@overload
def from_json(text: str, kind: type[AnyRun]) -> AnyRun: ...


def from_json(text: str, kind: type[RunConfig] = PretrainConfig) -> RunConfig:
    """Reads what `to_json` wrote, or a part of it; missing fields keep their defaults.

    Args:
      text: A JSON object.
      kind: The configuration that it holds.

    Raises:
      ConfigError: For text that is not a JSON object, an unknown key or name, or a value of the
        wrong type; the message names the place.
    """
    values = _migrated(_object(text))
    default = with_preset(kind(), values.get("preset", "tiny"))
    if isinstance(default, PretrainConfig) and "optimizer" in values:
        # A section that is there says which optimizer is meant: its own defaults fill it up.
        default = replace(default, optimizer=type(default.optimizer)())
    return _decode_dataclass(kind, default, values, "")


def _migrated(values: dict[str, Any]) -> dict[str, Any]:
    """Today's form of what an earlier version of this package wrote, as far as there is one.

    What has none is an unknown setting, and refused by its name.
    """
    values = dict(values)
    version = values.pop("version", 0)
    if type(version) is not int or not 0 <= version <= VERSION:
        raise ConfigError(
            "version", version, f"expected at most {VERSION}: written by a newer jaxopt-lab?"
        )
    for migrate in _MIGRATIONS[version:]:
        values = migrate(values)
    return values


def settings_from_json(text: str, kind: type[Settings]) -> Settings:
    """Reads a dataclass without sections from a JSON object; missing fields keep their defaults.

    Raises:
      ConfigError: As `from_json`.
    """
    return _decode_dataclass(kind, kind(), _object(text), "")


def optimizer_from(
    name: str, settings: Mapping[str, Any], path: str, preset: str
) -> OptimizerConfig:
    """An optimizer by name, with settings that differ from its defaults for a preset.

    >>> optimizer_from("lion-muon", {"period": 5}, "optimizer", "tiny").period
    5

    Raises:
      ConfigError: For an unknown name, an unknown setting, or a value of the wrong type.
    """
    kind = choose(path, CHOICES["optimizer"], name)
    return _decode_dataclass(kind, default_optimizer(preset, name), settings, f"{path}.{name}")


def name_of(config: Any) -> str:
    """The name under which an optimizer, schedule or corpus is chosen.

    >>> name_of(PretrainConfig().optimizer)
    'lion-muon'
    """
    return _NAMES[type(config)]


def encode(value: Any) -> Any:
    """A configuration or a part of one as JSON values, with the names of what was chosen."""
    if is_dataclass(value):
        named = {"name": _NAMES[type(value)]} if type(value) in _NAMES else {}
        return named | {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError("config", value, "expected finite numbers")
    return value


def _object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError("config", text[:40], f"expected JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError("config", values, "expected a JSON object")
    return values


def _decode(hint: Any, default: Any, value: Any, path: str) -> Any:
    registry = _REGISTRIES.get(hint)
    if registry is not None:
        if not isinstance(value, Mapping):
            raise ConfigError(path, value, "expected an object")
        kind = choose(f"{path}.name", registry, value.get("name", _NAMES.get(type(default))))
        rest = {key: item for key, item in value.items() if key != "name"}
        return _decode_dataclass(kind, default if type(default) is kind else None, rest, path)
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(path, value, "expected an object")
        return _decode_dataclass(hint, default, value, path)
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ConfigError(path, value, "expected a list")
        item = get_args(hint)[0]
        return tuple(_decode(item, None, v, f"{path}.{i}") for i, v in enumerate(value))
    return _decode_plain(hint, value, path)


def _decode_plain(hint: Any, value: Any, path: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if option in (int, float, str, bool, type(None)) and type(value) is option:
            return value
    wanted = " or ".join(_hint_text(option) for option in options)
    raise ConfigError(path, value, f"expected {wanted}")


def _decode_dataclass(kind: Any, default: Any, values: Mapping[str, Any], path: str) -> Any:
    prefix = f"{path}." if path else ""
    hints = get_type_hints(kind)
    known = {field.name for field in fields(kind)}
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{prefix}{key}", values[key], f"but there is no such setting{hint}")
    decoded = {
        key: _decode(hints[key], getattr(default, key, None), value, f"{prefix}{key}")
        for key, value in values.items()
    }
    try:
        return replace(default, **decoded) if default is not None else kind(**decoded)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError.inside(path, error) from error


def _hint_text(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    return {type(None): "null"}.get(hint, getattr(hint, "__name__", str(hint)))
