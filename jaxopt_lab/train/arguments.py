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

from jaxopt_lab.data import Mixture, PreparedTfds, PythonSource, TextFiles
from jaxopt_lab.models import PRESETS
from jaxopt_lab.report.files import read_text
from jaxopt_lab.train.config import (
    CORPORA,
    AnyRun,
    PretrainConfig,
    RunConfig,
    choose,
    with_preset,
)
from jaxopt_lab.train.errors import ArgumentError, ConfigError
from jaxopt_lab.train.io.run_directory import read_config
from jaxopt_lab.train.optimizers import OPTIMIZERS
from jaxopt_lab.train.schedules import SCHEDULES
from jaxopt_lab.train.serialize import from_json, settings_from_json

Settings = TypeVar("Settings")

# The flags that name a choice; which further flags there are depends on them.
_CHOICES = ("model", "optimizer", "schedule", "corpus")
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
            return tyro.cli(
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
        raise ArgumentError(_one_line(errors.getvalue())) from None
    except ValueError as error:
        raise ArgumentError(str(error)) from error


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
    chosen = [f"--{choice}" for choice in _CHOICES if choice in known]
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
    for section, registry in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        if section in names:
            chosen = choose(section, registry, names[section])
            if type(getattr(config, section)) is not chosen:
                config = replace(config, **{section: chosen()})
    if "corpus" in names:
        chosen = choose("corpus", CORPORA, names["corpus"])
        if type(config.corpus) is not chosen or "corpus.parts" in names:
            config = replace(config, corpus=_blank_corpus(names))
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


def _blank_corpus(names: dict[str, Any]) -> Any:

    blank = {
        "python-source": PythonSource(),
        "text-files": TextFiles(()),
        "prepared-tfds": PreparedTfds(""),
    }
    if names["corpus"] in blank:
        return blank[names["corpus"]]
    return _mixture(names.get("corpus.parts", []), names.get("corpus.weights", []))


def _mixture(parts: Sequence[str], weights: Sequence[str]) -> Mixture:
    """Builds a mixture from `python-source:stdlib text-files:notes/*.md` and weights."""
    sources = []
    for part in parts:
        kind, _, argument = part.partition(":")
        values = tuple(argument.split(",")) if argument else ()
        if kind == "python-source":
            sources.append(PythonSource(values) if values else PythonSource())
        elif kind == "text-files":
            sources.append(TextFiles(values))
        elif kind == "prepared-tfds":
            sources.append(PreparedTfds(argument))
        else:
            raise ArgumentError(
                f"corpus.parts: got {part!r}, expected python-source:ROOT[,...], "
                "text-files:GLOB[,...] or prepared-tfds:DIRECTORY"
            )
    try:
        shares = tuple(float(weight) for weight in weights) or (1.0,) * len(sources)
        return Mixture(tuple(sources), shares)
    except ValueError as error:
        raise ConfigError.inside("corpus", error) from error


def _value_of(arguments: Sequence[str], flag: str) -> str | None:
    if flag not in arguments[:-1]:
        return None
    return arguments[len(arguments) - 1 - arguments[::-1].index(flag) + 1]


def _choices_help(known: set[str]) -> str:
    registries = {"model": PRESETS, "optimizer": OPTIMIZERS, "schedule": SCHEDULES}
    resume = (
        "; --resume continues --run-directory; --fork-from RUN starts from the weights and the "
        "config.json of a run"
        if "resume" in known
        else ""
    )
    diagnostics = ", --diagnostics for --diagnostics.record" if "diagnostics" in known else ""
    lines = [
        "These choose what the sections below are made of:",
        *(f"--{n} {{{','.join(names)}}}" for n, names in registries.items() if n in known),
        f"--corpus {{{','.join(CORPORA)}}}; a mixture takes --corpus.parts python-source:stdlib "
        "'text-files:notes/*.md' --corpus.weights 3 1",
        f"--config FILE starts from the config.json of a run{resume}.",
        "--precision is short for --model.compute-dtype, "
        f"--document-mask for --model.document-mask{diagnostics}.",
    ]
    if "optimizers" in known:
        lines.insert(1, f"--optimizers some of {{{','.join(OPTIMIZERS)}}}")
    return "\n".join(lines)


def _one_line(box: str) -> str:
    """Takes the frame off an error message and joins its lines."""
    kept = []
    for line in box.splitlines():
        text = line.strip("╭╮╰╯│─ ")
        if set(line) & set("╭╰"):
            continue
        if set(line.strip("│ ")) == {"─"}:
            break  # what follows repeats the help
        kept.append(text)
    return " ".join(" ".join(kept).split())
