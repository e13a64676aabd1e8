"""Configurations to and from plain values: one decoder for JSON and for words of a command line."""

import difflib
import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jaxopt_lab.data.sources import PARTS, part_from_text
from jaxopt_lab.train.config.choices import CLASSES, choose, name_of
from jaxopt_lab.train.config.tuned import tuned_settings
from jaxopt_lab.train.errors import ArgumentError, ConfigError

Settings = TypeVar("Settings")


class Words(tuple[str, ...]):
    """What stands after a flag."""


def encode(value: Any) -> Any:
    """A configuration or a part of one as JSON values, with the names of what was chosen."""
    if is_dataclass(value):
        named = {"name": name_of(value)} if type(value) in CLASSES.values() else {}
        return named | {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError("config", value, "expected finite numbers")
    return value


def decode(
    kind: type[Settings],
    default: Settings | None,
    values: Mapping[str, Any],
    path: str = "",
    preset: str = "tiny",
) -> Settings:
    """A dataclass with some values in place of those of `default`.

    Args:
      kind: The dataclass.
      default: One of its kind; None: the defaults of the fields.
      values: JSON values or `Words` by name of the field, of a section as mappings.
      path: Dotted name of the section that this is.
      preset: The model, or in fine-tuning what moves, for which a chosen optimizer has its default
        rate.

    Raises:
      ConfigError: For an unknown setting or name, or a value of the wrong type; names the place.
      ArgumentError: For a flag without its value.
    """
    hints, known, decoded = get_type_hints(kind), [f.name for f in fields(kind)], {}  # pyright: ignore
    for key, value in values.items():
        if value == Words() and hints.get(key.removeprefix("no_")) is bool:
            key, value = key.removeprefix("no_"), not key.startswith("no_")
        name = f"{path}.{key}" if path else key
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise _error(name, value, f"but there is no such setting{hint}")
        decoded[key] = _decode(hints[key], getattr(default, key, None), value, name, preset)
    try:
        return kind(**decoded) if default is None else replace(default, **decoded)  # pyright: ignore
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError.inside(path, error) from error


def only_word(name: str, value: Any) -> Any:
    """The one word after a flag; JSON values as they are."""
    if not isinstance(value, Words):
        return value
    if len(value) != 1:
        given = f"one value, got {' '.join(value)}" if value else "a value after it"
        raise ArgumentError(f"{_flag(name)}: expected {given}")
    return value[0]


def _decode(hint: Any, default: Any, value: Any, name: str, preset: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    classes = tuple(option for option in options if isinstance(option, type))
    choices = {n: kind for n, kind in CLASSES.items() if issubclass(kind, classes)}
    if choices or any(map(is_dataclass, options)):
        return _section(hint, choices, default, value, name, preset)
    item = next((get_args(o)[0] for o in options if get_origin(o) is tuple), None)
    if item is None or (type(None) in options and value in (None, Words(("None",)))):
        return _plain(options, value, name)
    if isinstance(value, Words):
        return tuple(_decode(item, None, Words((word,)), name, preset) for word in value)
    if not isinstance(value, list):
        raise _error(name, value, "expected a list")
    return tuple(_decode(item, None, v, f"{name}.{i}", preset) for i, v in enumerate(value))


def _section(
    hint: Any, choices: Mapping[str, Any], default: Any, value: Any, name: str, preset: str
) -> Any:
    """A dataclass inside of another; of several kinds, the one that `name` says."""
    if choices.keys() == PARTS.keys() and isinstance(value, Words):
        try:
            return part_from_text(only_word(name, value))
        except ValueError as error:
            raise ArgumentError(f"{name.rpartition('.')[0]}.{error}") from error
    if not isinstance(value, Mapping):
        raise _error(name, value, "expected an object")
    if not choices:
        return decode(hint if default is None else type(default), default, value, name, preset)
    same = name_of(default) if default is not None else None
    values = {key: item for key, item in value.items() if key != "name"}
    chosen = value.get("name", same)
    place = name if isinstance(chosen, Words) else f"{name}.name"
    chosen = only_word(name, chosen)
    kind = choose(place, choices, chosen)
    if chosen == same:
        return decode(kind, default, values, name, preset)
    return decode(kind, None, tuned_settings(preset, chosen) | values, name, preset)


def _plain(options: tuple[Any, ...], value: Any, name: str) -> Any:
    given = _spelled(options, value, name) if isinstance(value, Words) else value
    for option in options:
        if get_origin(option) is Literal and given in get_args(option):
            return given
        if option is float and type(given) is int and abs(given) < 2**1023:
            return float(given)
        if type(given) is option:
            return given
    raise _error(name, value, f"expected {' or '.join(map(_hint_text, options))}")


def _spelled(options: tuple[Any, ...], words: Words, name: str) -> Any:
    """The JSON value that is meant by the words after a flag; themselves if there is none."""
    if bool in options:
        raise _error(name, words, "expected no value here")
    word = only_word(name, words)
    if type(None) in options and word == "None":
        return None
    for option in options:
        if option in (int, float):
            try:
                return option(word)
            except ValueError:
                continue
    return word


def _error(name: str, value: Any, wanted: str) -> ConfigError:
    while isinstance(value, Mapping) and value:
        key, value = next(iter(value.items()))
        name = f"{name}.{key}"
    if not isinstance(value, Words):
        return ConfigError(name, value, wanted)
    wanted = wanted.replace("null", "None").replace("an object", "flags of its settings")
    return ConfigError(_flag(name), " ".join(value), wanted)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _hint_text(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    return {type(None): "null"}.get(hint, getattr(hint, "__name__", str(hint)))
