"""`pretrain`: one run from a configuration to a trained model, a curve and a sample."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab import models
from jaxopt_lab.report.figures import loss_figure
from jaxopt_lab.report.files import write_json
from jaxopt_lab.report.progress import to_stderr
from jaxopt_lab.report.schedule_figure import schedule_figure
from jaxopt_lab.step import TrainState, merged
from jaxopt_lab.tasks import Text
from jaxopt_lab.train.agreement import agreed, same_everywhere
from jaxopt_lab.train.compilation import compiled_once
from jaxopt_lab.train.config import PretrainConfig, validate
from jaxopt_lab.train.errors import CheckpointError, TrainingError
from jaxopt_lab.train.hooks import Callback, Hook, hook_of
from jaxopt_lab.train.interrupts import interrupt_by_the_end
from jaxopt_lab.train.io.checkpoints import Checkpoints, Restored
from jaxopt_lab.train.io.manifest import add_session, describe_session, samples_before
from jaxopt_lab.train.io.run_directory import (
    SUMMARY_FILE,
    as_stored,
    open_run,
    other_text,
    read_config,
    resume_command,
    write_config,
)
from jaxopt_lab.train.io.run_log import RunLog
from jaxopt_lab.train.loop import Loop, Position, Run, Status
from jaxopt_lab.train.machine import check_machine
from jaxopt_lab.train.mesh import axis_sizes, initialize_processes
from jaxopt_lab.train.meter import peak_of
from jaxopt_lab.train.program import (
    Cost,
    Program,
    averaged_params,
    build_program,
    compile_step,
    cost_of,
    step_flops,
)
from jaxopt_lab.train.smoothness import fit_run
from jaxopt_lab.train.text import open_text
from jaxopt_lab.train.trained import forked_params

Message = Callable[[str], None]

_PROMPT_TOKENS = 32
_TEMPERATURE = 0.8
FIGURE = Path("figures") / "loss.png"
SCHEDULE_FIGURE = Path("figures") / "schedule.png"
SMOOTHNESS_FIGURE = Path("figures") / "smoothness.png"


@dataclass(frozen=True)
class RunResult:
    """What a run ended with."""

    status: Status | Literal["dry-run"]
    directory: Path | None = None
    summary: Mapping[str, Any] | None = None
    cost: Cost | None = None


def pretrain(
    config: PretrainConfig,
    *,
    hooks: Sequence[Hook] = (),
    callbacks: Sequence[Callback] = (),
    message: Message | None = None,
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

    Returns:
      How it ended, where everything is, and the summary. With `dry_run`, the cost of the
      compiled step instead, and nothing is written.

    Raises:
      ConfigError: For settings that cannot work, before anything is compiled.
      CheckpointError: If a checkpoint cannot be written or restored.
      TrainingError: If too many steps were not finite, a step failed across processes, or a hook
        raised; after the latter the run is saved.
    """
    hooks = (*hooks, *map(hook_of, callbacks))
    initialize_processes(config.distributed)
    say = (message or to_stderr) if jax.process_index() == 0 else _silent
    agreed(lambda: _check(config))
    of_one_start = ("run_directory", "resume", "dry_run")
    same_everywhere(as_stored(config) | {name: getattr(config, name) for name in of_one_start})
    kept = compiled_once(config.compilation_cache, say)
    if config.dry_run:
        with kept:
            program = build_program(config)
            return RunResult("dry-run", cost=cost_of(config, _compile(config, program, say)))
    with interrupt_by_the_end(_note(say), "all know"), open_run(config) as directory, kept:
        say(f"run directory: {directory}")
        if jax.process_count() > 1:
            (message or to_stderr)(_if_a_process_dies(config, directory))
        try:
            return _run(config, directory, hooks, say)
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1:
                raise
            reason = " ".join(str(error).split())
            raise TrainingError(
                f"a computation of all processes failed: {reason}; if one of them died, start all "
                f"of them again with: {resume_command(directory)}"
            ) from error


def _note(say: Message) -> Message | None:
    """For work that others wait for: then a signal is told, and stops all at the end of a block."""
    return say if jax.process_count() > 1 else None


def _check(config: PretrainConfig) -> None:
    validate(config, jax.device_count())
    check_machine(config, axis_sizes(config.mesh, jax.device_count()), config.accumulation)


def _if_a_process_dies(config: PretrainConfig, directory: Path) -> str:
    # JAX then aborts the others from C++, where no message of ours can be printed any more.
    return (
        f"process {jax.process_index()} of {jax.process_count()}: should another process die, JAX "
        f"aborts this one within about {config.distributed.heartbeat_timeout_seconds} s; then "
        f"start all of them again with: {resume_command(directory)}"
    )


def _run(config: PretrainConfig, directory: Path, hooks: Sequence[Hook], say: Message) -> RunResult:
    with interrupt_by_the_end(_note(say), "the text is prepared"):
        text = _prepare(config, say)
    with interrupt_by_the_end(say):
        program = agreed(lambda: build_program(config, text, directory))
    with Checkpoints(
        directory,
        keep_newest=config.checkpoint.keep_newest,
        keep_best=config.checkpoint.keep_best,
        message=say,
    ) as checkpoints:
        run = Run(config, directory, text.corpus, program, checkpoints)
        return _train(run, hooks, say)


def _train(run: Run, hooks: Sequence[Hook], say: Message) -> RunResult:
    leader = jax.process_index() == 0
    with interrupt_by_the_end(say):
        state, position = agreed(lambda: _initial_state(run, say))
        agreed(lambda: _record_start(run, position.step) if leader else None)
        compiled = agreed(lambda: _compile(run.config, run.program, say))
    evaluations = run.program.task.evaluations
    for name, each in evaluations.items():
        say(
            f"held out, {name}: {each.about['tokens']:,} tokens; a unigram model reaches "
            f"{each.about['unigram_nats']:.4f} nats/token, "
            f"{each.about['unigram_bits_per_byte']:.4f} bits/byte"
        )
    about = evaluations["validation"].about
    before = time.monotonic()
    with agreed(lambda: RunLog(run.config, run.directory, *position)) as log:
        loop = Loop(run, compiled, log, hooks)
        state, status = loop.run(state, position)
    if status != "finished":
        say(f"stopped and saved; continue with: {resume_command(run.directory)}")
        return RunResult(status, run.directory)
    summary = {
        "steps": int(state.step),
        "skipped": int(state.skipped),
        "parameters": models.parameter_count(run.config.model),
        "seconds": round(time.monotonic() - before, 1),
        "optimizer_share_of_flops": _optimizer_share(run.config),
        "training_loss": loop.last_metrics.get("loss"),
        **_schedule_outcome(run, state, say),
        **loop.last_evaluation,
        "unigram_nats": about["unigram_nats"],
        "unigram_bits_per_byte": about["unigram_bits_per_byte"],
        "sample": _sample(run, state),
    }

    def report() -> None:
        summary.update(_smoothness(run, say))
        _report(run, summary, say)

    with interrupt_by_the_end(say, "the report is written"):
        agreed(lambda: report() if leader else None)
    return RunResult(status, run.directory, summary)


def _record_start(run: Run, start: int) -> None:
    """Writes what a resumed run replaces, now that nothing will refuse it any more."""
    run.corpus.tokenizer.save(run.directory)  # the model is of no use without it
    options = run.program.compiler_options
    session = describe_session(run.program.mesh, start, run.corpus.summary(), options)
    peak = peak_of(jax.devices()[0].device_kind, run.config.peak_tflops)
    session |= {"peak": None if peak is None else peak._asdict()}
    before = as_stored(read_config(run.directory))
    add_session(run.directory, session | {"config": as_stored(run.config)}, before)
    if run.config.resume:
        write_config(run.directory, run.config)


def _schedule_outcome(run: Run, state: TrainState, say: Message) -> dict[str, Any]:
    """How a schedule went that followed the run; nothing for the others."""
    if run.program.outcome is None:
        return {}
    numbers, sentence = run.program.outcome(state.opt_state)
    say(sentence)
    return {"schedule": numbers}


def _prepare(config: PretrainConfig, say: Message) -> Text:
    """Opens the corpus; process 0 first, so that the others find it in the cache."""
    rows, leads = config.batch_size // config.accumulation, jax.process_index() == 0

    def opened() -> Text:
        with interrupt_by_the_end():
            return open_text(config, config.eval, rows, say, config.eval.sets)

    text = agreed(lambda: opened() if leads else None)
    return agreed(lambda: opened() if text is None else text)


def _initial_state(run: Run, say: Message) -> tuple[TrainState, Position]:
    step, checkpoints = run.program.step, run.checkpoints
    key = jax.random.key(run.config.seed)
    if run.config.resume and checkpoints.are_all_damaged():
        raise CheckpointError(f"{run.directory}: every checkpoint is damaged, nothing to resume")
    if run.config.resume and checkpoints.exist():
        restored = checkpoints.restore(step.abstract_state)
        if int(restored.state.step) != restored.step:
            raise CheckpointError(
                f"checkpoint {restored.step} holds a state after {int(restored.state.step)} steps"
            )
        _refuse_other_text(run, restored.data)
        say(f"resuming after step {restored.step} of {run.config.steps}")
        return restored.state, Position(restored.step, _samples(run, restored))
    if run.config.resume:
        say("no checkpoint was saved yet: starting from the beginning")
    if run.config.fork_from is not None:
        say(f"starting from the weights of {run.config.fork_from}")
        return step.init_from(forked_params(run), key), Position(0, 0)
    return step.init(key), Position(0, 0)


def _refuse_other_text(run: Run, stored: Mapping[str, Any]) -> None:
    for name, value in run.text.items():
        if name in stored and stored[name] != value:
            raise other_text(name, value, stored[name])


def _samples(run: Run, restored: Restored) -> int:
    """Windows that a checkpoint has seen."""
    if "samples" in restored.data:
        return restored.data["samples"]
    # Written before they were counted.
    return samples_before(run.directory, restored.step, read_config(run.directory).batch_size)


def _compile(config: PretrainConfig, program: Program, say: Message) -> jax.stages.Compiled:
    before = time.monotonic()
    compiled = compile_step(config, program)
    sizes = " x ".join(f"{name} {size}" for name, size in program.mesh.shape.items())
    say(
        f"{config.preset}: {models.parameter_count(config.model) / 1e6:.2f}M parameters on mesh "
        f"{sizes}, {config.batch_size * config.model.context:,} tokens per step, "
        f"{100 * _optimizer_share(config):.2g} % of its FLOPs in the optimizer; "
        f"compiled in {time.monotonic() - before:.1f} s"
    )
    return compiled


def _optimizer_share(config: PretrainConfig) -> float:
    of_model, of_optimizer = step_flops(config)
    return of_optimizer / (of_model + of_optimizer)


def _sample(run: Run, state: TrainState) -> dict[str, str] | None:
    """A continuation of the beginning of the held-out text."""
    config, steps = run.config, run.config.eval.sample_tokens
    if not steps or jax.process_count() > 1:  # drawing token by token is not worth a network
        return None
    average = averaged_params(config, state)
    prompt = jnp.asarray(run.corpus.validation.tokens[:_PROMPT_TOKENS], jnp.int32)
    drawn = models.generate(
        config.model,
        merged(state.params if average is None else average, state.frozen),
        prompt,
        steps=steps,
        temperature=_TEMPERATURE,
        key=jax.random.key(config.seed),
    )
    decode, start = run.corpus.tokenizer.decode, len(prompt)
    tokens = np.asarray(drawn)
    return {"prompt": decode(tokens[:start]), "continuation": decode(tokens[start:])}


def _smoothness(run: Run, say: Message) -> dict[str, Any]:
    diagnostics, figure = run.config.diagnostics, run.directory / SMOOTHNESS_FIGURE
    if "smoothness" not in diagnostics.record:
        return {}
    try:
        fitted = fit_run(run.directory, target_loss=diagnostics.target_loss, figure=figure)
    except ValueError as error:  # a short run, or a target above its losses; no reason to fail
        say(f"smoothness was not fitted: {error}")
        return {"smoothness": None}
    say(f"smoothness against the gap to {fitted['target_loss']:.4f} nats/token: {figure}")
    return {"smoothness": fitted}


def _report(run: Run, summary: Mapping[str, Any], say: Message) -> None:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in summary.items()
    }
    write_json(run.directory / SUMMARY_FILE, finite)
    levels = {"unigram": summary["unigram_nats"]}
    (run.directory / FIGURE).parent.mkdir(exist_ok=True)
    try:
        loss_figure(run.directory, run.directory / FIGURE, levels=levels)
        if run.program.outcome is not None:
            schedule_figure(run.directory, run.directory / SCHEDULE_FIGURE)
    except ValueError as error:
        raise TrainingError(
            f"{error}; the run is finished and saved, only figures are missing"
        ) from error
    if summary["sample"]:
        sample = summary["sample"]
        say(f"sample\n{sample['prompt']}\N{BLACK RIGHT-POINTING TRIANGLE}{sample['continuation']}")
    say(
        f"held-out loss {summary['validation_loss']:.4f} nats/token, "
        f"{summary['bits_per_byte']:.4f} bits/byte "
        f"(unigram: {summary['unigram_bits_per_byte']:.4f}) after {summary['steps']} steps"
    )
    drawn = [FIGURE] if run.program.outcome is None else [FIGURE, SCHEDULE_FIGURE]
    say("\n".join(f"figure: {run.directory / figure}" for figure in drawn))


def _silent(text: str) -> None:
    del text
