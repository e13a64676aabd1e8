"""What comes before the first step: checks, text, the state to start from, the compiled step."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

from jaxopt_lab.lora import spec_from_json
from jaxopt_lab.step import Adapted, TrainState, merged, split
from jaxopt_lab.tasks import Text
from jaxopt_lab.train.base import Base, placed, read_params
from jaxopt_lab.train.config.finetune import FinetuneConfig
from jaxopt_lab.train.config.run import PretrainConfig, validate
from jaxopt_lab.train.config.sections import axis_sizes
from jaxopt_lab.train.dist.agreement import agreed, same_everywhere
from jaxopt_lab.train.dist.mesh import mesh_as_text
from jaxopt_lab.train.errors import CheckpointError
from jaxopt_lab.train.interrupts import interrupt_by_the_end
from jaxopt_lab.train.io.checkpoints import Restored
from jaxopt_lab.train.io.manifest import add_session, describe_session, samples_before
from jaxopt_lab.train.io.run_directory import as_stored, other_text, read_config, write_config
from jaxopt_lab.train.labelled import Labels, open_labels
from jaxopt_lab.train.loop import Position, Run
from jaxopt_lab.train.machine import check_machine, check_memory
from jaxopt_lab.train.meter import peak_of
from jaxopt_lab.train.program import Material, Program, compile_step, optimizer_share
from jaxopt_lab.train.step import param_shardings
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
    of_one_start = ("run_directory", "resume", "restartable", "dry_run")
    same_everywhere(as_stored(config) | {name: getattr(config, name) for name in of_one_start})


def prepare_text(config: PretrainConfig, say: Message) -> Material:
    """Opens what is learnt; process 0 first, so that the others find it in the cache.

    Where the cache is not shared, hosts may have prepared other text: they compare what they have.
    """
    rows, leads = config.batch_size // config.accumulation, jax.process_index() == 0

    def opened() -> Material:
        with interrupt_by_the_end():
            if isinstance(config, FinetuneConfig) and config.is_labelled:
                return open_labels(config, say)
            return open_text(config, config.eval, rows, say, config.eval.sets)

    text = agreed(lambda: opened() if leads else None)
    material = agreed(lambda: opened() if text is None else text)
    same_everywhere({"corpus": agreed(lambda: _fingerprint(material))})
    return material


def _fingerprint(material: Material) -> Mapping[str, Any]:
    if isinstance(material, Text):
        return material.corpus.fingerprint()
    return {"hash": material.corpus.hash}


def first_state(run: Run, say: Message) -> tuple[Run, TrainState, Position]:
    """The state and position of a run that is new, forked or resumed; and the run.

    A resumed run has the adapters of its checkpoint, which may have been fewer than at the start.
    """
    checkpoints = run.checkpoints
    if run.config.resume and checkpoints.are_all_damaged():
        place = checkpoints.run_directory
        raise CheckpointError(f"{place}: every checkpoint is damaged, nothing to resume")
    if run.config.resume and checkpoints.exist():
        return _resumed(run, say)
    if run.config.resume:
        say("no checkpoint was saved yet: starting from the beginning")
    if run.config.fork_from is not None:
        say(f"starting from the weights of {run.config.fork_from}")
    elif run.config.init_from is not None:
        say(f"starting from the weights in {run.config.init_from}")
    return run, _fresh(run), Position(0, 0)


def _fresh(run: Run) -> TrainState:
    step, key = run.program.step, jax.random.key(run.config.seed)
    if run.base is None:
        if run.config.fork_from is not None:
            return step.init_from(forked_params(run), key)
        if run.config.init_from is None:
            return step.init(key, run.config.weights_key)
        given = read_params("init_from", run.config.init_from, run.config.model)
        shardings = param_shardings(run.program.mesh, run.program.task.param_specs)
        return step.init_from(placed(jax.tree.map(np.asarray, given), shardings), key)
    params = all_params(run, run.base, run.config.weights_key)
    if run.config.fork_from is not None:
        _, frozen = split(params, run.program.trained.moves)
        params = merged(forked_params(run), frozen)
    return step.init_from(params, key)


def _resumed(run: Run, say: Message) -> tuple[Run, TrainState, Position]:
    def of_checkpoint(stored: Mapping[str, Any]) -> Run:
        if "adapters" not in stored:
            return run
        spec = spec_from_json(stored["adapters"])
        return run if spec == run.program.trained.spec else run.with_spec(spec)

    def abstract(stored: Mapping[str, Any]) -> TrainState:
        return of_checkpoint(stored).program.step.abstract_state._replace(frozen=())

    restored = run.checkpoints.restore(abstract)
    if int(restored.state.step) != restored.step:
        raise CheckpointError(
            f"checkpoint {restored.step} holds a state after {int(restored.state.step)} steps"
        )
    _refuse_change(run, restored.data)
    say(f"resuming after step {restored.step} of {run.config.steps}")
    run, state = of_checkpoint(restored.data), restored.state
    if run.base is not None:
        params = all_params(run, run.base, run.config.weights_key)
        _, frozen = split(params, run.program.trained.moves)
        state = state._replace(frozen=frozen)
    return run, state, Position(restored.step, _samples(run, restored))


def all_params(run: Run, base: Base, key: Array) -> PyTree:
    """The parameters of a run before its first step, on the devices."""
    trained = run.program.trained
    shardings = param_shardings(run.program.mesh, trained.task.param_specs)
    if trained.spec is None:
        return placed(base.params, shardings)
    params = placed(base.params, shardings.base)
    make: Any = jax.jit(trained.beside, out_shardings=shardings.beside)
    beside = make(params, key)
    if not trained.leaves_base:
        take: Any = jax.jit(trained.beneath, out_shardings=shardings.base, donate_argnums=0)
        params = take(params, beside)
    return Adapted(trained.held(params), beside)


def _refuse_change(run: Run, stored: Mapping[str, Any]) -> None:
    for name, value in run.identity.items():
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
    material = run.material
    if isinstance(material, Text):
        material.corpus.tokenizer.save(run.directory)  # the model is of no use without it
    about = material.summary() if isinstance(material, Labels) else material.corpus.summary()
    options = run.program.compiler_options
    session = describe_session(run.program.mesh, start, about, options)
    peak = peak_of(jax.devices()[0].device_kind, run.config.peak_tflops)
    session |= {"peak": None if peak is None else peak._asdict()}
    before = as_stored(read_config(run.checkpoints.run_directory))
    add_session(run.directory, session | {"config": as_stored(run.config)}, before)
    if run.config.resume:
        write_config(run.directory, run.config)
    for name, each in run.program.task.evaluations.items():
        say(f"held out, {name}: {_described(each.about)}")


def _described(about: Mapping[str, float]) -> str:
    """What a held-out set is, and what is reached without learning."""
    if "rows" in about:
        cut = "" if about["filled"] < 0.5 else "; most texts fill a row, whose length may be short"
        return (
            f"{about['rows']:,} rows; the most frequent label is right for "
            f"{100 * about['majority_accuracy']:.1f} %{cut}"
        )
    return (
        f"{about['tokens']:,} tokens; a unigram model reaches {about['unigram_nats']:.4f} "
        f"nats/token, {about['unigram_bits_per_byte']:.4f} bits/byte"
    )


def compiled_step(config: PretrainConfig, program: Program, say: Message) -> jax.stages.Compiled:
    """Compiles the training step and says what it is."""
    before = time.monotonic()
    compiled = compile_step(config, program)
    count = program.trained_count
    moving = "" if program.moves_all else f", of which {count:,} move,"
    say(
        f"{config.init_from or config.preset}: {program.parameters / 1e6:.2f}M parameters{moving} "
        f"on mesh {mesh_as_text(program.mesh)}, "
        f"{config.batch_size * config.row_tokens:,} tokens per step, "
        f"{100 * optimizer_share(program):.2g} % of its FLOPs in the optimizer; "
        f"compiled in {time.monotonic() - before:.1f} s"
    )
    return compiled
