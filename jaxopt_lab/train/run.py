"""`pretrain`: one run from a configuration to a trained model, a curve and a sample."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from jaxopt_lab.report.progress import to_stderr
from jaxopt_lab.report.storage import is_remote
from jaxopt_lab.train.base import Base, read_base
from jaxopt_lab.train.compilation import compiled_once
from jaxopt_lab.train.config.finetune import FinetuneConfig
from jaxopt_lab.train.config.run import PretrainConfig
from jaxopt_lab.train.dist.agreement import agreed
from jaxopt_lab.train.dist.processes import initialize_processes
from jaxopt_lab.train.errors import TrainingError
from jaxopt_lab.train.hooks import Callback, Hook, hook_of
from jaxopt_lab.train.interrupts import interrupt_by_the_end
from jaxopt_lab.train.io.checkpoints import Checkpoints
from jaxopt_lab.train.io.mirror import RunFiles
from jaxopt_lab.train.io.run_directory import begun_or_new, open_run, resume_command
from jaxopt_lab.train.io.run_log import RunLog
from jaxopt_lab.train.loop import Loop, Run, Status
from jaxopt_lab.train.meter import StartClock
from jaxopt_lab.train.outcome import summary_of, write_report
from jaxopt_lab.train.program import Cost, Material, build_program, cost_of, model_of
from jaxopt_lab.train.stages import changed, stage_ends
from jaxopt_lab.train.start import check, compiled_step, first_state, prepare_text, record_start

Message = Callable[[str], None]


@dataclass(frozen=True)
class RunResult:
    """What a run ended with."""

    status: Status | Literal["dry-run"]
    directory: Path | None = None
    summary: Mapping[str, Any] | None = None
    cost: Cost | None = None
    restartable: bool = False  # as configured


def pretrain(
    config: PretrainConfig,
    *,
    hooks: Sequence[Hook] = (),
    callbacks: Sequence[Callback] = (),
    message: Message | None = None,
    clock: StartClock | None = None,
) -> RunResult:
    """Pretrains a decoder as configured and writes a run directory.

    On SIGTERM or Ctrl-C the run finishes its step, saves and returns; it can be resumed. Before the
    first step and after the last, KeyboardInterrupt is raised instead, by SIGTERM its subclass
    `errors.Terminated`, and a new directory is removed again.

    Args:
      config: The run.
      hooks: Measurements, logged with the steps.
      callbacks: The same for every step, as functions (step, state, metrics, batch).
      message: Receives lines of plain text outside the loop; standard error by default.
      clock: Measures the time to the first step; by default it starts here.

    Returns:
      How it ended, where everything is, and the summary. With `dry_run`, the cost of the
      compiled step instead, and nothing is written.

    Raises:
      ConfigError: For settings that cannot work, before anything is compiled.
      CheckpointError: If a checkpoint cannot be written or restored.
      TrainingError: If too many steps were not finite, a step failed across processes, or a hook
        raised; after the latter the run is saved.
    """
    return _run(config, hooks, callbacks, message, clock or StartClock())


def finetune(
    config: FinetuneConfig,
    *,
    hooks: Sequence[Hook] = (),
    callbacks: Sequence[Callback] = (),
    message: Message | None = None,
    clock: StartClock | None = None,
) -> RunResult:
    """Trains a given model, or what stands beside it, and writes a run directory.

    Signals, directories, checkpoints and errors are those of `pretrain`. A checkpoint holds what
    moves and a digest of the weights that it belongs to; adapters of the best checkpoint are
    written to `adapter/` in peft's layout.

    Args:
      config: The run.
      hooks: As for `pretrain`.
      callbacks: As for `pretrain`.
      message: As for `pretrain`.
      clock: As for `pretrain`.

    Returns:
      As `pretrain`.

    Raises:
      ConfigError: As `pretrain`; for a name that matches nothing, a rank that is too large, or an
        optimizer of adapters without them; for other weights than a resumed run was trained on.
      CheckpointError: As `pretrain`.
      TrainingError: As `pretrain`.
    """
    return _run(config, hooks, callbacks, message, clock or StartClock())


def _run(
    config: PretrainConfig,
    hooks: Sequence[Hook],
    callbacks: Sequence[Callback],
    message: Message | None,
    clock: StartClock,
) -> RunResult:
    initialize_processes(config.distributed)
    config = begun_or_new(config)
    tell = message or to_stderr
    say = tell if jax.process_index() == 0 else _silent
    check(config, say)
    clock.lap("devices")
    if config.dry_run:
        return _dry_run(config, say)
    # Where other processes wait, a signal is told first, and stops all of them as a block ends.
    note = say if jax.process_count() > 1 else None
    with interrupt_by_the_end(note, "all know"), _opened(config, say, tell) as files:
        with interrupt_by_the_end(note, "the text is prepared"):
            text = prepare_text(config, say)
            clock.lap("data")
        with interrupt_by_the_end(say):
            program = agreed(lambda: build_program(config, text, files.local))
            clock.lap("program")
        with _checkpoints(config, files, say) as checkpoints:
            with interrupt_by_the_end(say):
                base = agreed(lambda: _base(config, text))
                new = Run(config, files.local, text, program, checkpoints, base)
                run, state, position = agreed(lambda: first_state(new, say))
                agreed(lambda: record_start(run, position.step, say))
                run, state = changed(run, state, position.step, say)
                clock.lap("restore" if position.step else "initial state")
                compiled = agreed(lambda: compiled_step(config, run.program, say))
                clock.lap("compile")
            before, measurements = time.monotonic(), (*hooks, *map(hook_of, callbacks))
            with agreed(lambda: RunLog(config, run.program, files.local, *position, clock)) as log:
                for end in stage_ends(config, position.step):
                    loop = Loop(run, compiled, log, measurements)
                    state, status = loop.run(state, position, end)
                    if status != "finished" or end == config.steps:
                        break
                    position = position.after(end, config.batch_size)
                    with interrupt_by_the_end(log.message):
                        run, state = changed(run, state, end, log.message)
                        compiled = compiled_step(config, run.program, log.message)
            if status != "finished":
                again = resume_command(config.verb, files.directory)
                say(f"stopped and saved; continue with: {again}")
                return RunResult(status, files.directory, restartable=config.restartable)
            summary = summary_of(run, loop, state, time.monotonic() - before, say)
            summary["start_seconds"] = clock.seconds
            with interrupt_by_the_end(say, "the report is written"):
                summary = agreed(lambda: write_report(run, summary, say))
            return RunResult(status, files.directory, summary)


def _dry_run(config: PretrainConfig, say: Message) -> RunResult:
    with compiled_once(config.compilation_cache, say):
        # The number of classes is a part of the program.
        is_labelled = isinstance(config, FinetuneConfig) and config.is_labelled
        program = build_program(config, prepare_text(config, say) if is_labelled else None)
        compiled = compiled_step(config, program, say)
    return RunResult("dry-run", cost=cost_of(program, compiled))


def _base(config: PretrainConfig, material: Material) -> Base | None:
    """The model that is fine-tuned."""
    if not isinstance(config, FinetuneConfig):
        return None
    return read_base(config, model_of(config, material))


def _checkpoints(config: PretrainConfig, files: RunFiles, say: Message) -> Checkpoints:
    newest, best = config.checkpoint.keep_newest, config.checkpoint.keep_best
    return Checkpoints(
        files.directory,
        keep_newest=newest,
        keep_best=best,
        message=say,
        publish=files.publish,
        check=files.check,
    )


@contextlib.contextmanager
def _opened(config: PretrainConfig, say: Message, tell: Message) -> Iterator[RunFiles]:
    """The run directory; where a process dies, it says how all of them start again."""
    with contextlib.ExitStack() as held:
        files = held.enter_context(open_run(config, say))
        # Programs of several processes lie in the run, where all of them see it.
        shared = None if is_remote(files.directory) else files.directory
        held.enter_context(compiled_once(config.compilation_cache, say, shared))
        say(f"run directory: {files.directory}")
        if jax.process_count() == 1:
            yield files
            return
        command = resume_command(config.verb, files.directory)
        again = f"start all of them again with: {command}"
        # JAX then aborts the others from C++, where no message of ours can be printed any more.
        seconds = config.distributed.heartbeat_timeout_seconds
        tell(
            f"process {jax.process_index()} of {jax.process_count()}: should another process die, "
            f"JAX aborts this one within about {seconds} s; then {again}"
        )
        try:
            yield files
        except jax.errors.JaxRuntimeError as error:
            reason = " ".join(str(error).split())
            raise TrainingError(
                f"a computation of all processes failed: {reason}; if one of them died, {again}"
            ) from error


def _silent(text: str) -> None:
    del text
