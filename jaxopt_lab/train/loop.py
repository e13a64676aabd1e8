"""The training loop: steps, evaluations, checkpoints, and stopping in good order."""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from jaxopt_lab import data
from jaxopt_lab.lora import LoraSpec, spec_to_json
from jaxopt_lab.report.progress import error_of
from jaxopt_lab.step import TrainState, merged
from jaxopt_lab.sweep import FRESH_WINDOWS
from jaxopt_lab.train.base import Base
from jaxopt_lab.train.config.finetune import FinetuneConfig
from jaxopt_lab.train.config.run import PretrainConfig
from jaxopt_lab.train.dist.agreement import agreed, gather
from jaxopt_lab.train.dist.mesh import flags, rows_of_process, to_global
from jaxopt_lab.train.errors import TrainingError
from jaxopt_lab.train.hooks import Hook, Hooks, View
from jaxopt_lab.train.interrupts import INTERRUPTED, TERMINATED, StopRequests
from jaxopt_lab.train.io.checkpoints import Checkpoints
from jaxopt_lab.train.io.run_log import RESERVED, RunLog, logged_at, losses_between
from jaxopt_lab.train.labelled import Labels
from jaxopt_lab.train.meter import Meter
from jaxopt_lab.train.profile import PROFILE_DIRECTORY, Trace, profiled_steps
from jaxopt_lab.train.program import Material, Program, averaged_params, build_program
from jaxopt_lab.train.step import SIGNALS

Status = Literal["finished", "terminated", "interrupted"]

FRESH_LOSS = "fresh_loss"
"""Mean training loss of the last 100 windows, each seen for the first time, in the log of
evaluations; left out where there are fewer, or in a second epoch."""


class _Taken(NamedTuple):
    """A step whose metrics have not been read yet."""

    step: int
    metrics: Mapping[str, Any]
    measured: Mapping[str, Any]  # by hooks


@dataclass(frozen=True)
class Run:
    """What a run works with."""

    config: PretrainConfig
    directory: Path
    material: Material
    program: Program
    checkpoints: Checkpoints
    base: Base | None = None  # the model that is fine-tuned

    def with_spec(self, spec: LoraSpec) -> "Run":
        """The run with other adapters."""
        program = build_program(self.config, self.material, self.directory, spec)
        return replace(self, program=program)

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change while a run goes on, besides the number of samples consumed.

        By the names of the settings, so that a change can be refused by name.
        """
        config, corpus = self.config, self.material.corpus
        common = {"seed": config.seed, "data_seed": config.order_seed}
        common |= {"corpus": corpus.hash, "eval.best": config.eval.best}
        if self.base is not None:
            common["model"] = self.base.digest
        if isinstance(self.material, Labels):
            assert isinstance(config, FinetuneConfig)
            tokenizer, prompt = self.material.tokenizer_hash, config.chosen_prompt
            of_labels = {"tokenizer": tokenizer, "length": config.length}
            return common | of_labels | {"prompt": [prompt.template, *prompt.words]}
        return common | {
            "corpus.weights": [part.weight for part in self.material.corpus.parts],
            "validation_fraction": config.validation_fraction,
            "tokenizer": self.material.corpus.tokenizer.hash,
            "model.context": config.model.context,
        }


class Position(NamedTuple):
    """How far a run has come."""

    step: int
    samples: int  # windows consumed; batches need not all have had the same size

    def after(self, step: int, batch_size: int) -> "Position":
        """The position at a later step, if batches have this size from here on."""
        return Position(step, self.samples + (step - self.step) * batch_size)


class Loop:
    """The loop of one run; `run` drives it.

    The metrics of a step are read after the next one has been dispatched, so the device never
    waits for the host. Requests to stop, and process 0's wish to save by the clock, travel
    through the step as signals: all processes see the same ones with the same step's metrics and
    need no other agreement.

    Args:
      run: What it works with.
      compiled: The compiled step.
      log: Receives metrics.
      hooks: Measurements besides those of the configuration.
    """

    def __init__(
        self,
        run: Run,
        compiled: jax.stages.Compiled,
        log: RunLog,
        hooks: Sequence[Hook] = (),
    ):
        """Does not start anything yet."""
        self._run, self._config, self._compiled, self._log = run, run.config, compiled, log
        self._hooks, self._meter = Hooks([*run.program.hooks, *hooks], RESERVED), Meter()
        profiled = profiled_steps(run.config.profile, run.config.steps)
        self._trace = Trace(profiled, run.directory / PROFILE_DIRECTORY, log.message)
        self._start = Position(0, 0)
        devices = run.program.mesh.devices
        self._rows = rows_of_process(devices, run.config.batch_size, jax.process_index())
        self._stop_code, self._save_now = 0, False
        self._saved_at = time.monotonic()
        # Whether loss and gradient of the last step were finite; None before the first is read.
        self._last_finite: bool | None = None
        self._evaluated: dict[int, float] = {}
        # Losses of the last steps, for the windows of one number.
        self._recent: deque[float] = deque(maxlen=-(-FRESH_WINDOWS // run.config.batch_size))
        self.last_metrics: dict[str, Any] = {}
        self.last_evaluation: dict[str, float] = {}

    def run(
        self, state: TrainState, position: Position, until: int | None = None
    ) -> tuple[TrainState, Status]:
        """Trains from a position to a number of steps, or until asked to stop.

        Args:
          state: At the position.
          position: Where to go on.
          until: Number of steps taken at the end; None: those of the configuration.

        Returns:
          The last state, saved and committed, and how the loop ended.

        Raises:
          CheckpointError: If a checkpoint cannot be written.
          TrainingError: If too many steps were skipped, or the parameters are not finite.
        """
        self._start, start = position, position.step
        steps, step = until or self._config.steps, start
        taken: _Taken | None = None
        if start:
            self._take_up(start)
        with self._batches() as batches, StopRequests(self._log.message) as stop, self._trace:
            if start == 0:
                self.evaluate(0, state)
            for step in range(start + 1, steps + 1):
                self._meter.begin()
                batch = self._global_batch(self._meter.next_of(batches), stop.requested)
                measured = self._hooks.measure(View(step, state, {}, batch), before=True)
                self._trace.before(step, state)
                state, metrics = self._compiled(state, batch)
                measured |= self._hooks.measure(View(step, state, metrics, batch))
                previous, taken = taken, _Taken(step, metrics, measured)
                self._read(previous)
                self._trace.after(step, state)
                if self._is_due(step):
                    self._read(taken)
                    taken = None
                    # The last step is saved below, when it has been evaluated.
                    self._evaluate_and_save(step, state, saves=step < steps)
                if self._stop_code:
                    break
            self._read(taken)
            # Someone who asks to stop gets the checkpoint at once.
            if not self._stop_code and step not in self._evaluated:
                self.evaluate(step, state)
            self.save(step, state)
            self._run.checkpoints.wait()
            # No step has carried a request of the last step, evaluation or save.
            codes = gather(str(max(self._stop_code, stop.requested)))
            self._stop_code = max(map(int, codes))
        # On all processes: one that went on would wait for the one that failed.
        agreed(lambda: self._hooks.raise_failure(f"saved after step {step}"))
        return state, self._status()

    @property
    def step_bytes(self) -> int:
        """Memory of the compiled step on one device: what it is given, and its temporaries."""
        memory: Any = self._compiled.memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes

    @property
    def data_wait_share(self) -> float | None:
        """Share of the time of this process's steps in which it waited for a batch."""
        return self._meter.data_wait_share

    def _take_up(self, start: int) -> None:
        """What was measured at `start` is not measured again: the state is the same bit for bit."""
        logged = logged_at(self._run.directory, start)
        first = start - (self._recent.maxlen or 0)
        self._recent.extend(losses_between(self._run.directory, first, start))
        held_out = self._run.program.held_out
        names = {*held_out.names, *map(_of_average, held_out.names), FRESH_LOSS}
        measured = {k: v for k, v in logged.items() if k in names}
        if held_out.ranking in measured:
            self._evaluated, self.last_evaluation = {start: self._ranking(measured)}, measured
        if "loss" in logged:
            self.last_metrics = {k: v for k, v in logged.items() if k not in names}

    def evaluate(self, step: int, state: TrainState) -> float:
        """Evaluates parameters and, if there is one, their average; logs, returns the loss."""
        held_out = self._run.program.held_out
        metrics = held_out.scores(merged(state.params, state.frozen))
        average = averaged_params(self._config, state)
        if average is not None:
            scores = held_out.scores(merged(average, state.frozen))
            metrics |= {_of_average(name): score for name, score in scores.items()}
        metrics |= self._fresh_loss(step)
        loss = self._ranking(metrics)
        self._evaluated, self.last_evaluation = {step: loss}, metrics
        self._log.evaluation(step, metrics)
        return loss

    def _fresh_loss(self, step: int) -> dict[str, float]:
        """Mean training loss of the last windows, while all of them are new to the model."""
        material, config = self._run.material, self._config
        if isinstance(material, Labels) or len(self._recent) < (self._recent.maxlen or 0):
            return {}
        seen = self._start.after(step, config.batch_size).samples
        if seen > data.rows_of_first_epoch(material.corpus, config.model.context):
            return {}
        return {FRESH_LOSS: float(np.mean(self._recent))}

    def _ranking(self, scores: Mapping[str, float]) -> float:
        """The score that ranks checkpoints: of the average, if the run keeps one."""
        plain = self._run.program.held_out.ranking
        average = _of_average(plain)
        return scores[average if average in scores else plain]

    def save(self, step: int, state: TrainState) -> None:
        """Saves unless a parameter is not finite: such a state must not replace a good one."""
        if not _all_finite(state.params):
            raise TrainingError(
                f"the parameters are not finite after step {step}; nothing was saved, "
                f"checkpoints: {self._run.checkpoints.steps() or 'none'}"
            )
        samples = self._start.after(step, self._config.batch_size).samples
        position = {"step": step, "samples": samples, **self._run.identity}
        if (spec := self._run.program.trained.spec) is not None:
            position["adapters"] = spec_to_json(spec)
        # Normalisation makes the held-out loss of parameters finite whose gradient is not.
        checkpoints, doubtful = self._run.checkpoints, self._last_finite is False
        loss = self._evaluated.get(step)
        # What is frozen can be read again, and its digest is compared then.
        moving = state._replace(frozen=())
        checkpoints.save(step, moving, position, held_out_loss=loss, doubtful=doubtful)
        # No step will follow the last one.
        if step == self._config.steps and self._last_finite and np.isfinite(loss or np.nan):
            checkpoints.verify(step, finite=True)
        self._saved_at, self._save_now = time.monotonic(), False

    def _batches(self) -> data.TrainBatches:
        """The rows of this process, by their numbers, of the step after so many steps taken."""
        size, start = self._config.batch_size, self._start
        rows = self._run.program.task.batch
        assert rows is not None

        def batch_at(step: int) -> data.Batch:
            first = start.after(step, size).samples
            return dict(rows([first + int(row) for row in self._rows]))

        return data.TrainBatches(batch_at, start_step=start.step)

    def _global_batch(
        self, local: Mapping[str, np.ndarray], stop_requested: int
    ) -> dict[str, Array]:
        minutes = self._config.checkpoint.every_minutes
        waited = (time.monotonic() - self._saved_at) / 60
        save = minutes is not None and waited >= minutes and jax.process_index() == 0
        if self._hooks.failure:
            stop_requested = stop_requested or TERMINATED
        mesh = self._run.program.mesh
        batch = to_global(mesh, local, self._config.batch_size, self._rows)
        return batch | {SIGNALS: flags(mesh, [stop_requested, save])}

    def _read(self, taken: _Taken | None) -> None:
        """Logs a step's metrics and acts on them; waits for that step."""
        if taken is None:
            return
        metrics, measured = jax.device_get((dict(taken.metrics), dict(taken.measured)))
        measured |= self._meter.step_done()
        stop, save = metrics.pop(SIGNALS)
        self._stop_code, self._save_now = max(self._stop_code, int(stop)), bool(save)
        del metrics["weight"]  # the log counts the run's tokens
        metrics = {name: float(value) for name, value in metrics.items()}
        finite, skipped = bool(metrics.pop("finite")), int(metrics["skipped"])
        self.last_metrics = metrics
        self._recent.append(metrics["loss"])
        self._log.training(taken.step, {**metrics, **measured})
        # A step tells about the parameters that it was computed with. Where it was skipped, the
        # next one tells about the same again.
        self._last_finite = finite
        self._run.checkpoints.verify(taken.step - 1, finite)
        if not finite:
            self._log.message(
                f"step {taken.step}: loss or gradient is not finite, the update was skipped "
                f"({skipped} so far, at most {self._config.max_skipped})"
            )
        if skipped > self._config.max_skipped:
            raise TrainingError(
                f"{skipped} steps with a non-finite loss or gradient, more than max_skipped = "
                f"{self._config.max_skipped}; stopped after step {taken.step}, "
                f"checkpoints: {self._run.checkpoints.steps() or 'none'}"
            )

    def _is_due(self, step: int) -> bool:
        every = self._config.checkpoint.every_steps
        save = self._save_now or (every is not None and step % every == 0)
        return save or step % self._config.eval.every == 0

    def _evaluate_and_save(self, step: int, state: TrainState, saves: bool) -> None:
        self._meter.pause()
        if step % self._config.eval.every == 0:
            self.evaluate(step, state)
        every = self._config.checkpoint.every_steps
        if saves and (self._save_now or (every is not None and step % every == 0)):
            self.save(step, state)

    def _status(self) -> Status:
        if not self._stop_code:
            return "finished"
        return "interrupted" if self._stop_code == INTERRUPTED else "terminated"


def _of_average(name: str) -> str:
    """The name of a score of the averaged parameters."""
    plain = name.removesuffix(error_of(""))
    return f"{plain}_ema" if plain == name else error_of(f"{plain}_ema")


@jax.jit
def _all_finite(params: PyTree) -> Bool[Array, " "]:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params)]))
