"""The run directory: who may write to it, and the JSON files that describe the run."""

import contextlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxopt_lab.data.tokenizer import Tokenizer, TokenizerConfig, make_tokenizer
from jaxopt_lab.report.files import read_text, write_json
from jaxopt_lab.report.storage import is_remote, names_in, path_of
from jaxopt_lab.report.tracker import METRICS_FILE, TENSORBOARD_DIRECTORY, read_metrics
from jaxopt_lab.train.compilation import PROGRAMS
from jaxopt_lab.train.config.choices import name_of
from jaxopt_lab.train.config.comparison import CompareConfig
from jaxopt_lab.train.config.finetune import FinetuneConfig
from jaxopt_lab.train.config.run import PretrainConfig
from jaxopt_lab.train.config.sections import DistributedConfig
from jaxopt_lab.train.config.serialize import from_json, to_json
from jaxopt_lab.train.dist.agreement import agreed, from_first
from jaxopt_lab.train.errors import CheckpointError, ConfigError, within
from jaxopt_lab.train.io.lease import LEASE_FILE
from jaxopt_lab.train.io.lock import LOCK_FILE, only_writer
from jaxopt_lab.train.io.manifest import MANIFEST_FILE, read_manifest
from jaxopt_lab.train.io.mirror import Message, RunFiles, run_files
from jaxopt_lab.train.io.retention import labels
from jaxopt_lab.train.io.stored import DIRECTORY as CHECKPOINTS
from jaxopt_lab.train.program import KERNEL_CHOICES

CONFIG_FILE = "config.json"
SUMMARY_FILE = "summary.json"
TOKENIZER_FILE = "tokenizer.json"


@contextlib.contextmanager
def open_run(config: PretrainConfig, message: Message = lambda text: None) -> Iterator[RunFiles]:
    """Creates the directory of a new run, or checks the one to be resumed, and holds its lock.

    In object storage that is a lease, and files are written to a local directory (`mirror`).

    A new run that ends with an exception before it has logged or saved anything is removed again:
    it must not block the next start.

    Raises:
      ConfigError: If a new run would write into a directory that is in use, there is no run to
        resume, or another process writes to it.
    """
    leads = jax.process_index() == 0
    directory = agreed(lambda: _existing_run(config) if config.resume else _new_name(config))

    def discard(kind: type[BaseException] | None, *_rest: object) -> None:
        if kind is not None:
            discard_unstarted(files.local, directory / CHECKPOINTS)

    def opened() -> RunFiles:
        below = (KERNEL_CHOICES,)
        return held.enter_context(run_files(directory, writes=leads, below=below, say=message))

    def claim() -> None:
        if not leads:
            return
        if config.resume:
            _check_files(files)
            _refuse_other_text(directory, config)
            if not is_remote(directory):
                held.enter_context(only_writer(directory))
            return
        _refuse_occupied(directory)
        if not is_remote(directory):
            # Left alone if it was there before: it is the user's.
            made = not directory.exists()
            directory.mkdir(parents=True, exist_ok=True)
            if made:
                held.callback(_remove_empty, directory)
            held.enter_context(only_writer(directory))
        held.push(discard)
        _refuse_occupied(directory)
        write_config(files.local, config)
        files.publish()

    with contextlib.ExitStack() as held:
        # Nobody brings files that a run before is still writing.
        first = agreed(lambda: opened() if leads else None)
        files = agreed(lambda: opened() if first is None else first)
        agreed(claim)
        yield files


def _remove_empty(directory: Path) -> None:
    """Of a run that was discarded, or never began."""
    with contextlib.suppress(OSError):
        directory.rmdir()


def _new_name(config: PretrainConfig) -> Path:
    if config.run_directory is not None:
        return path_of(config.run_directory)
    model = Path(config.init_from or config.preset).name  # it may be a directory
    return Path("runs") / f"{model}-{name_of(config.optimizer)}-{_start_time()}"


def _refuse_occupied(directory: Path) -> None:
    # A process that was killed while it began may have left these.
    begun = {LOCK_FILE, LEASE_FILE, f"{CONFIG_FILE}.partial"}
    if not begun.issuperset(names_in(directory)):
        raise ConfigError(
            "run_directory",
            str(directory),
            "which is not empty: continue that run with --resume, or choose another directory",
        )


def _refuse_other_text(directory: Path, config: PretrainConfig) -> None:
    """Compares what fixes the text, as far as that is known before the text is read."""
    if not labels(directory / CHECKPOINTS):
        return
    before = read_config(directory)
    fixed = {
        "seed": "seed",
        "data_seed": "order_seed",
        "validation_fraction": "validation_fraction",
    }
    for name, field in fixed.items():
        if getattr(config, field) != getattr(before, field):
            raise other_text(name, getattr(config, field), getattr(before, field))
    if isinstance(config, FinetuneConfig) and config.is_labelled:
        return  # compared when it has been read
    if not _is_tokenizer_of(directory, config.tokenizer, before.tokenizer):
        raise other_text("tokenizer", config.tokenizer, before.tokenizer)
    if config.model.context != before.model.context:
        raise other_text("model.context", config.model.context, before.model.context)


def _is_tokenizer_of(directory: Path, config: TokenizerConfig, before: TokenizerConfig) -> bool:
    """Whether a configuration describes the tokenizer of a run, wherever its files lie."""
    if config.kind == "bpe" or not (directory / TOKENIZER_FILE).is_file():
        # One that is yet to be trained on the text is compared when it has been.
        return replace(config, directory=before.directory) == before
    with within("tokenizer"):
        return make_tokenizer(config, ()).hash == Tokenizer.load(directory).hash


def other_text(name: str, value: Any, before: Any) -> ConfigError:
    """The refusal to resume a run with other text than before."""
    return ConfigError(
        name,
        value,
        f"but the run to resume was trained with {before!r}; --fork-from RUN starts a new run "
        "from its weights",
    )


def _check_files(files: RunFiles) -> None:
    """Reads what a resumed run will go on writing, before anything expensive is done.

    Raises:
      CheckpointError: If a file is damaged; names it.
      OSError: If one cannot be read.
    """
    try:
        read_manifest(files.local)
        if (files.local / METRICS_FILE).exists():
            read_metrics(files.local)
    except ValueError as error:
        told = str(error).replace(str(files.local), str(files.directory))
        raise CheckpointError(f"{told}; repair or remove that file") from error


@contextlib.contextmanager
def open_comparison(config: CompareConfig, below: str, message: Message) -> Iterator[RunFiles]:
    """Creates the directory of a comparison, or checks that it already is one.

    Args:
      config: The comparison.
      below: The directory of its results.
      message: Receives lines of plain text.

    Raises:
      ConfigError: If the directory is in use by something else.
    """
    if config.run_directory is None:
        directory = Path("runs") / f"compare-{config.preset}-{_start_time()}"
    else:
        directory = path_of(config.run_directory)
    _refuse_other_use(directory)
    with run_files(directory, writes=True, below=(below,), say=message) as files:
        files.local.mkdir(parents=True, exist_ok=True)
        settings = replace(config, run_directory=None)
        write_json(files.local / CONFIG_FILE, json.loads(to_json(settings)))
        files.publish()
        yield files


def _refuse_other_use(directory: Path) -> None:
    if not {LEASE_FILE}.issuperset(names_in(directory)):
        path = directory / CONFIG_FILE
        try:
            from_json(read_text(path) if path.is_file() else "", CompareConfig)
        except ConfigError as error:
            raise ConfigError(
                "run_directory", str(directory), "which is not empty and holds no comparison"
            ) from error


def discard_unstarted(directory: Path, saved: Path) -> None:
    """Removes what a new run wrote that ended before it logged or saved anything.

    Only files that a run writes itself are touched, and none once there is a checkpoint.

    Args:
      directory: Where the run wrote its files.
      saved: Where it would have written checkpoints.
    """
    log = directory / METRICS_FILE
    logged = log.is_file() and log.stat().st_size
    if logged or names_in(saved):
        return
    for name in (CONFIG_FILE, MANIFEST_FILE, TOKENIZER_FILE, METRICS_FILE):
        (directory / name).unlink(missing_ok=True)
    for name in (KERNEL_CHOICES, TENSORBOARD_DIRECTORY, PROGRAMS):
        shutil.rmtree(directory / name, ignore_errors=True)
    if not is_remote(saved):
        _remove_empty(saved)


def read_config(directory: str | os.PathLike[str]) -> PretrainConfig:
    """Reads the configuration of a run.

    Raises:
      ConfigError: If the directory does not hold a run.
    """
    path = path_of(directory) / CONFIG_FILE
    if CONFIG_FILE not in (names := names_in(path.parent)):
        state = f"has no {CONFIG_FILE}" if names else "is empty"
        raise ConfigError("run_directory", str(directory), f"which {state}: there is no run there")
    with within("run_directory"):
        text = read_text(path)
    with within(str(path)):
        config = from_json(text, _kind_of(text))
    if config.tokenizer.kind == "saved" and TOKENIZER_FILE in names:
        # The run has a copy; where it came from may be gone.
        tokenizer = replace(config.tokenizer, directory=str(directory))
        config = replace(config, tokenizer=tokenizer)
    return config


def _kind_of(text: str) -> type[PretrainConfig]:
    """Which verb has written a configuration: only fine-tuning says what moves."""
    try:
        values = json.loads(text)
    except ValueError:  # reported where it is decoded
        return PretrainConfig
    return FinetuneConfig if isinstance(values, dict) and "trainable" in values else PretrainConfig


def is_begun(directory: str | os.PathLike[str] | None) -> bool:
    """Whether a run has begun in a directory."""
    return directory is not None and CONFIG_FILE in names_in(path_of(directory))


def begun_or_new(config: PretrainConfig) -> PretrainConfig:
    """A run that resumes, where it may, what has begun; on all processes alike.

    Raises:
      ConfigError: If the next start would not find it.
    """
    # The first process looks for all: another may do so while that one removes a run that never
    # began. And all ask, also where only some were told to: `check` then names the difference.
    begun = from_first(lambda: config.restartable and is_begun(config.run_directory))
    if not config.restartable:
        return config
    if config.run_directory is None:
        raise ConfigError("run_directory", None, "expected a directory that the next start finds")
    return replace(config, resume=config.resume or begun)


def _existing_run(config: PretrainConfig) -> Path:
    if config.run_directory is None:
        raise ConfigError("run_directory", None, "expected the directory of the run to resume")
    read_config(config.run_directory)
    return path_of(config.run_directory)


def write_config(directory: Path, config: PretrainConfig) -> None:
    """Writes the configuration of a run, so that it can be resumed and run again."""
    write_json(directory / CONFIG_FILE, as_stored(config))


def as_stored(config: PretrainConfig) -> dict[str, Any]:
    """A configuration as JSON, without what belongs to one start only."""
    # Without the place: `--config` must start a new run, not collide with this one. And without
    # the processes: a later start may have others, or none.
    none = DistributedConfig()
    distributed = replace(
        config.distributed,
        coordinator_address=none.coordinator_address,
        num_processes=none.num_processes,
        process_id=none.process_id,
        launcher=none.launcher,
    )
    settings = replace(
        config,
        run_directory=None,
        resume=False,
        restartable=False,
        dry_run=False,
        distributed=distributed,
    )
    return json.loads(to_json(settings))


def _start_time() -> str:
    # All processes must name the same directory, whatever their clocks and time zones are.
    return from_first(lambda: time.strftime("%Y%m%d-%H%M%S"))


def resume_command(verb: str, directory: str | os.PathLike[str]) -> str:
    """The command line that continues a run."""
    return f"jaxopt-lab {verb} --resume --run-directory {shlex.quote(str(directory))}"
