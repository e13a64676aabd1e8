"""`jaxopt-lab VERB`: every verb is one call into the library.

Rooms are imported by the verb that needs them, so that `--help` answers at once.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

_SIGINT_EXIT = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
      0 on success, 1 when a run failed, 2 for a mistake in the arguments, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_overview())
        return 0 if arguments else 2
    verb, rest = arguments[0], arguments[1:]
    if verb not in _VERBS:
        return _fail(f"unknown verb {verb!r}, expected one of {', '.join(_VERBS)}", 2)
    # Background threads of the checkpoint library log tracebacks of errors that we report.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        return _VERBS[verb][1](rest)
    except ValueError as error:
        if not _is_ours(error):
            raise
        return _fail(str(error), 2)
    except RuntimeError as error:
        if not _is_ours(error):
            raise
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", _SIGINT_EXIT)


def _pretrain(arguments: list[str]) -> int:
    from jaxopt_lab.train import pretrain
    from jaxopt_lab.train.arguments import parse_config

    config = parse_config(arguments, "pretrain")
    result = pretrain(config)
    if result.cost is not None:
        sys.stdout.write(f"{result.cost}\n")
    return _SIGINT_EXIT if result.status == "interrupted" else 0


def _describe(arguments: list[str]) -> int:
    from jaxopt_lab import describe, models
    from jaxopt_lab.train.arguments import parse_config
    from jaxopt_lab.train.optimizers import ModelInfo

    config = parse_config(arguments, "describe")
    config.optimizer.validate()
    info = ModelInfo(models.matrix_axes(config.model), None, config.model.vocab_size)
    tx = config.schedule.apply(config.optimizer, info, config.steps).tx
    sys.stdout.write(f"{describe(tx, models.abstract_params(config.model))}\n")
    return 0


def _plot(arguments: list[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser("jaxopt-lab plot", description="Loss curves of runs.")
    parser.add_argument("run_directories", nargs="+", help="directories that pretrain wrote")
    parser.add_argument("--output", default="loss.png", help="where the figure goes")
    parser.add_argument("--x", choices=("step", "tokens", "time"), default="step")
    options = parser.parse_args(arguments)

    from jaxopt_lab.report.figures import loss_figure

    try:
        path = loss_figure(options.run_directories, options.output, x=options.x)
    except (OSError, ValueError) as error:
        return _fail(str(error), 2)
    sys.stdout.write(f"{path}\n")
    return 0


def _data(arguments: list[str]) -> int:
    from jaxopt_lab import data
    from jaxopt_lab.report.tables import format_table
    from jaxopt_lab.train.arguments import parse_config

    if arguments[:1] == ["list"]:
        names = ("name", "tokenizer", "documents", "tokens", "bytes", "path")
        rows = [[row[name] for name in names] for row in data.list_corpora()]
        sys.stdout.write(format_table(names, rows) + "\n")
        return 0
    if arguments[:1] != ["prepare"]:
        return _fail("data: expected `data list` or `data prepare [--corpus ...]`", 2)
    config = parse_config(arguments[1:], "data prepare")
    try:
        corpus = data.prepare(
            config.corpus,
            config.tokenizer,
            validation_fraction=config.validation_fraction,
            on_progress=_to_stderr,
        )
    except (OSError, ValueError) as error:
        return _fail(f"corpus: {error}", 2)
    for name, value in corpus.summary().items():
        sys.stdout.write(f"{name}: {value}\n")
    return 0


def _bench(arguments: list[str]) -> int:
    from jaxopt_lab.bench.command import main as bench

    return bench(arguments)


_VERBS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "pretrain": ("train a transformer on text, with any optimizer, on a mesh", _pretrain),
    "describe": ("which parameter gets which rule, and the bytes of state", _describe),
    "plot": ("loss curves of one or several run directories", _plot),
    "data": ("list or prepare corpora", _data),
    "bench": ("time optimizer steps and training, count collectives", _bench),
}


def _overview() -> str:
    width = max(map(len, _VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {text}" for name, (text, _) in _VERBS.items())
    return f"usage: jaxopt-lab VERB [--help]\n\n{verbs}\n"


def _is_ours(error: Exception) -> bool:
    # If the training room was never imported, nobody can have raised one of its errors.
    errors: Any = sys.modules.get("jaxopt_lab.train.errors")
    if errors is None:
        return False
    ours = ("ArgumentError", "ConfigError", "CheckpointError", "TrainingError")
    return isinstance(error, tuple(getattr(errors, name) for name in ours))


def _fail(text: str, code: int) -> int:
    _to_stderr(f"jaxopt-lab: error: {text}")
    return code


def _to_stderr(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
