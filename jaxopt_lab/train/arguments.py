"""From command-line arguments to a configuration.

The flags are those of the configuration's dataclasses. Flags that name a choice decide which
dataclass stands in a section, and thereby which further flags there are; they are taken out
first, the rest is parsed by tyro.
"""

import contextlib
import inspect
import io
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar, overload

import tyro

from jaxopt_lab.data import Mixture
from jaxopt_lab.data.sources import part_from_text
from jaxopt_lab.report.files import read_text
from jaxopt_lab.train.bounds import check_bounds
from jaxopt_lab.train.config import (
    CHOICES,
    AnyRun,
    PretrainConfig,
    RunConfig,
    choose,
    with_preset,
)
from jaxopt_lab.train.errors import ArgumentError, ConfigError
from jaxopt_lab.train.io.run_directory import read_config
from jaxopt_lab.train.serialize import from_json, settings_from_json
from jaxopt_lab.train.tuned import default_optimizer

Settings = TypeVar("Settings")

# Common settings that live inside a section.
_SHORT_FLAGS = {
    "--precision": "--model.compute-dtype",
    "--document-mask": "--model.document-mask",
    "--diagnostics": "--diagnostics.record",
}


@overload
def parse_config(arguments: Sequence[str], verb: str) -> PretrainConfig: ...


@overload
def parse_config(arguments: Sequence[str], verb: str, kind: type[AnyRun]) -> AnyRun: ...


def parse_config(
    arguments: Sequence[str], verb: str, kind: type[RunConfig] = PretrainConfig
) -> RunConfig:
    """Reads a configuration off the command line.

    Flags that name a choice (`--optimizer adamw`), `--config file.json` and `--resume` decide the
    defaults; the flags of the chosen types then change single values.

    Args:
      arguments: What stands after the verb.
      verb: For messages.
      kind: The configuration of the verb.

    Raises:
      ConfigError: For names and values that cannot work.
      SystemExit: After `--help`.
    """
    known = {field.name for field in fields(kind)}
    names, rest = _take_names(_normalized(arguments), known)
    default = _default_config(
        names, _value_of(rest, "--run-directory"), _value_of(rest, "--fork-from"), kind
    )
    return _parse(kind, default, rest, verb, _choices_help(known))


def parse_settings(arguments: Sequence[str], verb: str, kind: type[Settings]) -> Settings:
    """Reads a configuration without sections: its flags, and `--config FILE` for the defaults.

    Args:
      arguments: What stands after the verb.
      verb: For messages.
      kind: A dataclass with a default for every field.

    Raises:
      ConfigError: For names and values that cannot work.
      SystemExit: After `--help`.
    """
    names, rest = _take_names(_normalized(arguments), set())
    default = kind()
    if "config" in names:
        default = settings_from_json(_config_text(names["config"]), kind)
    description = f"{inspect.getdoc(kind)}\n\n--config FILE starts from the config.json of a run."
    return _parse(kind, default, rest, verb, description)


def _parse(kind: type[Settings], default: Settings, arguments: list[str], verb: str, text: str):
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            config = tyro.cli(
                kind,
                prog=f"jaxopt-lab {verb}",
                description=text,
                args=arguments,
                default=default,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as exit:
        if exit.code in (0, None):
            raise
        raise ArgumentError(_one_line(errors.getvalue(), arguments)) from None
    except ValueError as error:
        raise ArgumentError(str(error)) from error
    check_bounds(config)
    return config


def _config_text(path: str) -> str:
    try:
        return read_text(Path(path))
    except OSError as error:
        raise ConfigError("config", path, f"expected a file: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError.inside("config", error) from error


def _normalized(arguments: Sequence[str]) -> list[str]:
    """Splits `--flag=value`, writes flags with dashes, and expands the short forms."""
    result = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if not flag.startswith("--"):
            result.append(argument)
            continue
        flag = flag.replace("_", "-")
        result.append(_SHORT_FLAGS.get(flag, flag))
        if equals:
            result.append(value)
    return result


def _take_names(arguments: Sequence[str], known: set[str]) -> tuple[dict[str, Any], list[str]]:
    """Takes `--optimizer NAME` and its like, `--config FILE` and `--resume` out of the flags."""
    chosen = [f"--{choice}" for choice in CHOICES if choice in known]
    names: dict[str, Any] = {}
    rest, position = [], 0
    while position < len(arguments):
        flag = arguments[position]
        position += 1
        if flag == "--resume" and "resume" in known:
            names["resume"] = True
        elif flag in (*chosen, "--config"):
            if position == len(arguments) or arguments[position].startswith("--"):
                raise ArgumentError(f"{flag}: expected a value after it")
            names[flag[2:]] = arguments[position]
            position += 1
        elif names.get("corpus") == "mixture" and flag in ("--corpus.parts", "--corpus.weights"):
            values = []
            while position < len(arguments) and not arguments[position].startswith("--"):
                values.append(arguments[position])
                position += 1
            names[flag[2:]] = values
        else:
            rest.append(flag)
    return names, rest


def _default_config(
    names: dict[str, Any], run_directory: str | None, fork_from: str | None, kind: type[RunConfig]
) -> RunConfig:
    """The configuration that single flags then change."""
    config: RunConfig
    if names.get("resume"):
        if run_directory is None:
            raise ConfigError("run_directory", None, "expected the directory of the run to resume")
        if fork_from is not None:
            raise ConfigError("fork_from", fork_from, "which starts a new run: leave out --resume")
        config = replace(read_config(run_directory), resume=True)
    elif fork_from is not None and "config" not in names:
        config = _forked(fork_from, kind)
    elif "config" in names:
        config = from_json(_config_text(names["config"]), kind)
    else:
        config = with_preset(kind(), names.get("model", "tiny"))
    if names.get("model", config.preset) != config.preset:
        config = with_preset(config, names["model"])
    if "optimizer" in names and isinstance(config, PretrainConfig):
        name = names["optimizer"]
        if type(config.optimizer) is not choose("optimizer", CHOICES["optimizer"], name):
            config = replace(config, optimizer=default_optimizer(config.preset, name))
    if "schedule" in names:
        chosen = choose("schedule", CHOICES["schedule"], names["schedule"])
        if type(config.schedule) is not chosen:
            config = replace(config, schedule=chosen())
    if "corpus" in names:
        chosen = choose("corpus", CHOICES["corpus"], names["corpus"])
        if type(config.corpus) is not chosen or "corpus.parts" in names:
            parts, weights = names.get("corpus.parts", []), names.get("corpus.weights", [])
            corpus = _mixture(parts, weights) if chosen is Mixture else chosen()
            config = replace(config, corpus=corpus)
    return config


def _forked(directory: str, kind: type[RunConfig]) -> RunConfig:
    """The configuration of another run, with the tokens that its weights know."""
    if kind is not PretrainConfig:
        raise ArgumentError("--fork-from: only pretrain starts from the weights of a run")
    try:
        config = read_config(directory)
    except ConfigError as error:
        raise ConfigError.inside("fork_from", error) from error
    tokenizer = config.tokenizer
    if tokenizer.kind in ("bpe", "saved"):
        tokenizer = replace(tokenizer, kind="saved", directory=directory)
    return replace(config, fork_from=directory, tokenizer=tokenizer)


def _mixture(parts: Sequence[str], weights: Sequence[str]) -> Mixture:
    """Builds a mixture from `python-source:stdlib text-files:notes/*.md` and weights."""
    try:
        shares = tuple(float(weight) for weight in weights) or (1.0,) * len(parts)
    except ValueError:
        raise ConfigError("corpus.weights", " ".join(weights), "expected numbers") from None
    try:
        sources = tuple(part_from_text(part) for part in parts)
    except ValueError as error:
        raise ArgumentError(f"corpus.{error}") from error
    try:
        return Mixture(sources, shares)
    except ValueError as error:
        raise ConfigError.inside("corpus", error) from error


def _value_of(arguments: Sequence[str], flag: str) -> str | None:
    if flag not in arguments[:-1]:
        return None
    return arguments[len(arguments) - 1 - arguments[::-1].index(flag) + 1]


def _choices_help(known: set[str]) -> str:
    resume = (
        "; --resume continues --run-directory; --fork-from RUN starts from the weights and the "
        "config.json of a run"
        if "resume" in known
        else ""
    )
    diagnostics = ", --diagnostics for --diagnostics.record" if "diagnostics" in known else ""
    lines = [
        "These choose what the sections below are made of:",
        *(f"--{n} {{{','.join(names)}}}" for n, names in CHOICES.items() if n in known),
        "A mixture takes --corpus.parts python-source:stdlib 'text-files:notes/*.md' "
        "--corpus.weights 3 1.",
        f"--config FILE starts from the config.json of a run{resume}.",
        "--precision is short for --model.compute-dtype, "
        f"--document-mask for --model.document-mask{diagnostics}.",
    ]
    if "optimizers" in known:
        lines.insert(1, f"--optimizers some of {{{','.join(CHOICES['optimizer'])}}}")
    return "\n".join(lines)


def _one_line(box: str, arguments: Sequence[str]) -> str:
    """Takes the frame off an error message and joins its lines."""
    kept = []
    for line in box.splitlines():
        text = line.strip("╭╮╰╯│─ ")
        if set(line) & set("╭╰") or not text.strip("-"):
            continue
        if set(line.strip("│ ")) == {"─"} or text.startswith("For full helptext"):
            break  # what follows repeats the help
        kept.append(text)
    message = " ".join(" ".join(kept).split())
    # A switch takes no value: tyro names the value alone, which belongs to nothing then.
    stray = message.rpartition("Unrecognized options:")[2].strip()
    if message.startswith("Unrecognized options") and not stray.startswith("--"):
        flag = next((a for a, b in zip(arguments, arguments[1:], strict=False) if b == stray), "")
        return f"{flag or 'arguments'}: got {stray!r}, expected no value here"
    return message
