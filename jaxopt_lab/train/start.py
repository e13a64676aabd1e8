"""What comes before the first step: checks, text, the state to start from, the compiled step."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxopt_lab import models
from jaxopt_lab.step import TrainState
from jaxopt_lab.tasks import Text
from jaxopt_lab.train.config.run import PretrainConfig, validate
from jaxopt_lab.train.config.sections import axis_sizes
from jaxopt_lab.train.dist.agreement import agreed, same_everywhere
from jaxopt_lab.train.errors import CheckpointError
from jaxopt_lab.train.interrupts import interrupt_by_the_end
from jaxopt_lab.train.io.checkpoints import Restored
from jaxopt_lab.train.io.manifest import add_session, describe_session, samples_before
from jaxopt_lab.train.io.run_directory import as_stored, other_text, read_config, write_config
from jaxopt_lab.train.loop import Position, Run
from jaxopt_lab.train.machine import check_machine, check_memory
from jaxopt_lab.train.meter import peak_of
from jaxopt_lab.train.program import Program, compile_step, optimizer_share
from jaxopt_lab.train.text import open_text
from jaxopt_lab.train.trained import forked_params

Message = Callable[[str], None]


def check(config: PretrainConfig, say: Message) -> None:
    """Refuses what cannot work, on all processes alike, before anything is read or compiled.

    A dry run allocates nothing: that this machine's memory will not do is only said there.
    """

    def on_this_machine() -> None:
        validate(config, jax.device_count())
        check_machine(config)
        sizes = axis_sizes(config.mesh, jax.device_count())
        if note := check_memory(config, sizes, config.accumulation, dry_run=config.dry_run):
            say(note)

    agreed(on_this_machine)
    of_one_start = ("run_directory", "resume", "dry_run")
    same_everywhere(as_stored(config) | {name: getattr(config, name) for name in of_one_start})


def prepare_text(config: PretrainConfig, say: Message) -> Text:
    """Opens the corpus; process 0 first, so that the others find it in the cache."""
    rows, leads = config.batch_size // config.accumulation, jax.process_index() == 0

    def opened() -> Text:
        with interrupt_by_the_end():
            return open_text(config, config.eval, rows, say, config.eval.sets)

    text = agreed(lambda: opened() if leads else None)
    return agreed(lambda: opened() if text is None else text)


def first_state(run: Run, say: Message) -> tuple[TrainState, Position]:
    """The state and position of a run that is new, forked or resumed."""
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


def record_start(run: Run, start: int, say: Message) -> None:
    """Writes what a resumed run replaces, now that nothing will refuse it any more."""
    if jax.process_index() != 0:
        return
    run.corpus.tokenizer.save(run.directory)  # the model is of no use without it
    options = run.program.compiler_options
    session = describe_session(run.program.mesh, start, run.corpus.summary(), options)
    peak = peak_of(jax.devices()[0].device_kind, run.config.peak_tflops)
    session |= {"peak": None if peak is None else peak._asdict()}
    before = as_stored(read_config(run.directory))
    add_session(run.directory, session | {"config": as_stored(run.config)}, before)
    if run.config.resume:
        write_config(run.directory, run.config)
    for name, each in run.program.task.evaluations.items():
        say(
            f"held out, {name}: {each.about['tokens']:,} tokens; a unigram model reaches "
            f"{each.about['unigram_nats']:.4f} nats/token, "
            f"{each.about['unigram_bits_per_byte']:.4f} bits/byte"
        )


def compiled_step(config: PretrainConfig, program: Program, say: Message) -> jax.stages.Compiled:
    """Compiles the training step and says what it is."""
    before = time.monotonic()
    compiled = compile_step(config, program)
    sizes = " x ".join(f"{name} {size}" for name, size in program.mesh.shape.items())
    say(
        f"{config.preset}: {models.parameter_count(config.model) / 1e6:.2f}M parameters on mesh "
        f"{sizes}, {config.batch_size * config.model.context:,} tokens per step, "
        f"{100 * optimizer_share(config):.2g} % of its FLOPs in the optimizer; "
        f"compiled in {time.monotonic() - before:.1f} s"
    )
    return compiled
