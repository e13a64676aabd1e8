"""From command-line arguments to a configuration.

The flags are those of the configuration's dataclasses; flags that name a choice decide which
dataclass stands in a section, and thereby which further flags there are. Values go through the
same decoder as those of a JSON file; tyro writes the help.
"""

import inspect
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

from jaxopt_lab.models import DecoderConfig
from jaxopt_lab.report.files import read_text
from jaxopt_lab.report.storage import path_of
from jaxopt_lab.train.config.bounds import check_bounds
from jaxopt_lab.train.config.choices import CHOICES
from jaxopt_lab.train.config.decode import Words, only_word
from jaxopt_lab.train.config.finetune import FinetuneConfig, given_model
from jaxopt_lab.train.config.run import PretrainConfig
from jaxopt_lab.train.config.serialize import from_json, with_values
from jaxopt_lab.train.errors import ArgumentError, ConfigError, within
from jaxopt_lab.train.io.run_directory import is_begun, read_config

Settings = TypeVar("Settings")

# Common settings that live inside a section.
_SHORT_FLAGS = {
    "precision": "model.compute_dtype",
    "document_mask": "model.document_mask",
    "diagnostics": "diagnostics.record",
}
_HELP = {
    "diagnostics": "--diagnostics is short for --diagnostics.record.",
    "model": "--precision is short for --model.compute-dtype, --document-mask for "
    "--model.document-mask.",
    "init_from": "--init-from DIRECTORY starts from weights in Hugging Face's layout.",
    "fork_from": "--fork-from RUN starts from the weights and the config.json of a run.",
    "resume": "--resume continues --run-directory, with its own configuration instead of --config.",
    "restartable": "--restartable is --resume where there is a run already.",
    "corpus": "A mixture takes --corpus.parts python-source:stdlib 'text-files:notes/*.md' "
    "--corpus.weights 3 1.",
}


def parse_config(
    arguments: Sequence[str],
    verb: str,
    kind: type[Settings] = PretrainConfig,  # pyright: ignore[reportArgumentType]
) -> Settings:
    """Reads a configuration off the command line.

    `--config FILE`, `--resume`, `--fork-from RUN` and `--init-from DIRECTORY` say where settings
    come from that no flag gives. With `--help` among the arguments, prints what the other ones
    choose.

    Args:
      arguments: What stands after the verb.
      verb: For messages.
      kind: The configuration of the verb, a dataclass with a default for every field.

    Raises:
      ConfigError, ArgumentError: For names and values that cannot work.
      SystemExit: After `--help`.
    """
    known = {field.name for field in fields(kind)}  # pyright: ignore[reportArgumentType]
    asked = [argument for argument in arguments if argument not in ("-h", "--help")]
    values = _values(asked, known)
    config = with_values(_default(values, known, kind), values)
    if len(asked) < len(arguments):
        _print_help(config, verb, known)
    check_bounds(config)
    return config


def _values(arguments: Sequence[str], known: set[str]) -> dict[str, Any]:
    """Flags with the words after them, sections as mappings; the last of equal flags counts."""
    values: dict[str, Any] = {}
    position = 0
    while position < len(arguments):
        flag, equals, value = arguments[position].partition("=")
        if not flag.startswith("--"):
            raise ArgumentError(f"arguments: got {arguments[position]!r}, expected a flag")
        position += 1
        words = [value] if equals else []
        while position < len(arguments) and not arguments[position].startswith("--"):
            words.append(arguments[position])
            position += 1
        *sections, name = _path(flag[2:].replace("-", "_"), known)
        inner = values
        for section in sections:
            if not isinstance(inner.get(section), dict):
                inner[section] = {}
            inner = inner[section]
        inner[name] = Words(words)
    return values


def _path(flag: str, known: set[str]) -> list[str]:
    """Where the value of a flag belongs."""
    if flag == "model" and "preset" in known:
        return ["preset"]
    if "trainable" in known:  # what is read decides what is learnt
        section, dot, rest = flag.partition(".")
        flag = f"corpus{dot}{rest}" if section == "task" else flag
    if flag in CHOICES and flag in known:
        return [flag, "name"]
    return _SHORT_FLAGS.get(flag, flag).split(".")


def _default(values: dict[str, Any], known: set[str], kind: type[Any]) -> Any:
    """The configuration that single flags then change."""
    names = ("config", "run_directory", "fork_from", "init_from")
    given = {n: only_word(n, values[n]) for n in names if isinstance(values.get(n), Words)}
    if "config" in given:
        del values["config"]
    directory, fork = given.get("run_directory"), given.get("fork_from")
    restarted = values.get("restartable") == Words() and is_begun(directory)
    if "resume" in known and (values.get("resume") == Words() or restarted):
        if directory is None:
            raise ConfigError("run_directory", None, "expected the directory of the run to resume")
        for name in ("fork_from", "init_from"):
            if name in given and not restarted:
                wanted = "which starts a new run: leave out --resume"
                raise ConfigError(name, given[name], wanted)
        return _of_verb("run_directory", directory, read_config(directory), kind)
    if "config" in given:
        path = given["config"]
        try:
            with within("config"):
                text = read_text(path_of(path))
        except OSError as error:
            raise ConfigError(
                "config", path, f"expected a file: {error.strerror or error}"
            ) from error
        config = from_json(text, kind)
    elif fork is not None and "fork_from" in known:
        config = _forked(fork, kind)
    else:
        config = kind()
    if kind is PretrainConfig and given.get("init_from", "None") != "None":
        return started_from(given["init_from"], config)
    return config


def started_from(directory: str, config: PretrainConfig) -> PretrainConfig:
    """A run that starts from the weights in a directory, with their model and vocabulary.

    Args:
      directory: In Hugging Face's layout or with one GGUF file, or the name of a fetched package.
      config: Everything else; numerics of the model among it.

    Raises:
      ConfigError: If there is no decoder that can be read.
    """
    model, tokenizer = given_model("init_from", directory)
    if not isinstance(model, DecoderConfig):
        raise ConfigError("init_from", directory, "which is an encoder: expected a decoder")
    return replace(config, model=model, tokenizer=tokenizer, init_from=directory)


def _of_verb(name: str, directory: str, config: PretrainConfig, kind: type[Any]) -> PretrainConfig:
    """A configuration of the verb in use, and no other's."""
    if type(config) is kind:
        return config
    hint = ""
    if kind is FinetuneConfig and name == "fork_from":
        hint = ": write its model with jaxopt-lab export and fine-tune that, with --model"
    raise ConfigError(name, directory, f"which is a run of {config.verb}{hint}")


def _forked(directory: str, kind: type[Any]) -> PretrainConfig:
    """The configuration of another run, with the tokens that its weights know."""
    with within("fork_from"):
        config = read_config(directory)
    config = _of_verb("fork_from", directory, config, kind)
    tokenizer = config.tokenizer
    if tokenizer.kind in ("bpe", "saved"):
        tokenizer = replace(tokenizer, kind="saved", directory=directory)
    return replace(config, fork_from=directory, init_from=None, tokenizer=tokenizer)


def _print_help(config: Any, verb: str, known: set[str]) -> None:
    import tyro

    lines = [f"--{n} {{{','.join(names)}}}" for n, names in CHOICES.items() if n in known]
    if "optimizers" in known:
        lines.append(f"--optimizers some of {{{','.join(CHOICES['optimizer'])}}}")
    if lines:
        lines.insert(0, "These choose what the sections below are made of:")
    else:
        lines.append(f"{inspect.getdoc(type(config))}\n")
    lines.append("--config FILE starts from the config.json of a run.")
    lines += [text for name, text in _HELP.items() if name in known]
    tyro.cli(
        type(config),
        prog=f"jaxopt-lab {verb}",
        description="\n".join(lines),
        args=["--help"],
        default=config,
        config=(tyro.conf.AvoidSubcommands,),
    )
