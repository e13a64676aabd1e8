"""`compare`: one run, several optimizers, equal tuning budgets, a verdict against seed noise."""

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from jaxopt_lab import data, models
from jaxopt_lab.report.files import read_json, write_json
from jaxopt_lab.report.progress import to_stderr
from jaxopt_lab.sweep import PAIRED_RULE, StepCost, Task, Tuned, lanes_that_fit, measure_step, tune
from jaxopt_lab.sweep.task import BuildOptimizer
from jaxopt_lab.tasks import language_model_loss
from jaxopt_lab.train.compare_report import CompareResult, Outcome, write_report
from jaxopt_lab.train.compilation import compiled_once
from jaxopt_lab.train.config.comparison import CompareConfig, Entrant, validate_comparison
from jaxopt_lab.train.config.decode import encode
from jaxopt_lab.train.config.optimizer_base import ModelInfo
from jaxopt_lab.train.config.sections import MeshConfig
from jaxopt_lab.train.config.serialize import to_json
from jaxopt_lab.train.dist.mesh import make_mesh
from jaxopt_lab.train.errors import ConfigError, within
from jaxopt_lab.train.interrupts import interrupt_by_the_end
from jaxopt_lab.train.io.manifest import add_session, describe_session
from jaxopt_lab.train.io.mirror import RunFiles
from jaxopt_lab.train.io.run_directory import open_comparison
from jaxopt_lab.train.machine import check_machine, check_memory
from jaxopt_lab.train.rule import build_rule
from jaxopt_lab.train.text import open_text

Message = Callable[[str], None]

RESULTS = "results"
_SECONDS_BETWEEN_LINES = 5.0
# What losses are measured by: results of another number are not compared with these. 2: standard
# errors over documents, training loss of the last 100 windows.
_MEASURE = 2
# Settings that do not change a result: they may differ when a comparison is continued.
_FREE = (
    "version", "optimizers", "rates", "cells", "spacing", "vectorize", "run_directory",
    "compilation_cache",
)  # fmt: skip


def compare(config: CompareConfig, *, message: Message | None = None) -> CompareResult:
    """Trains every optimizer at every one of its rates, then the best rates on fresh seeds.

    Each optimizer writes one result file, and what has one is not run again: the same call goes
    on where an earlier one was interrupted, and may name more optimizers.

    Runs use one device. Unlike `pretrain`, nothing guards a step that is not finite: such a run
    diverges, is reported as such and is never chosen.

    Args:
      config: The comparison.
      message: Receives lines of plain text; standard error by default.

    Returns:
      The outcome of every optimizer, the noise between seeds, and the table.

    Raises:
      ConfigError: For settings that cannot work, before anything is compiled.
    """
    say = message or to_stderr
    entrants = validate_comparison(config)
    check_machine(config)
    check_memory(config)
    with open_comparison(config, RESULTS, say) as files:
        say(f"run directory: {files.directory}")
        return replace(_compare(config, entrants, files, say), directory=files.directory)


def _compare(
    config: CompareConfig, entrants: Sequence[Entrant], files: RunFiles, say: Message
) -> CompareResult:
    directory = files.local
    with interrupt_by_the_end():
        text = open_text(config, config.eval, config.batch_size, say)
    corpus, held_out = text.corpus, text.held_out[data.VALIDATION]
    corpus.tokenizer.save(directory)
    task, close = _task(config, corpus, held_out)
    common = _common_settings(config, corpus)
    results = directory / RESULTS
    results.mkdir(exist_ok=True)
    outcomes = {e.label: _read(results / e.file_name, e, common) for e in entrants}
    missing = [entrant for entrant in entrants if outcomes[entrant.label] is None]
    if missing:
        mesh = make_mesh(MeshConfig(data=1))
        add_session(directory, describe_session(mesh, 0, corpus.summary(), {}))
    say(f"stated before the runs: {PAIRED_RULE}")
    lines = _ProgressLines(config, len(missing), say)
    try:
        with compiled_once(config.compilation_cache, say):
            for entrant in missing:
                outcome = _run(config, task, entrant, corpus.tokenizer.vocab_size, lines)
                outcomes[entrant.label] = outcome
                write_json(results / entrant.file_name, {**outcome.to_json(), "common": common})
                files.publish()
    finally:
        close()
    finished = tuple(outcome for outcome in outcomes.values() if outcome is not None)
    bits = data.bits_per_byte(1.0, held_out, corpus.tokenizer)
    return write_report(config, directory, finished, bits)


def _task(
    config: CompareConfig, corpus: data.Corpus, held_out: Sequence[data.RowsOnDemand]
) -> tuple[Task, Callable[[], None]]:
    """The run without its optimizer, and what closes its readers."""
    model = config.model
    readers = {
        seed: data.train_batches(
            corpus, batch_size=config.batch_size, context=model.context, seed=seed,
            segment_ids=model.document_mask, prefetch=0,
        )
        for seed in _order_seeds(config)
    }  # fmt: skip

    def batches(seed: int, start: int, stop: int) -> dict[str, np.ndarray]:
        return _stacked([readers[seed].batch_at(step) for step in range(start, stop)])

    def close() -> None:
        for reader in readers.values():
            reader.close()

    task = Task(
        init_params=functools.partial(models.init_params, model),
        loss=language_model_loss(model, z_loss=config.z_loss, head_chunks=config.head_chunks),
        batches=batches,
        held_out=_stacked(held_out),
        steps=config.steps,
        evaluate_every=config.eval.every,
        tokens_per_step=config.batch_size * model.context,
        clip=config.clip,
        init_seed=config.init_seed,
        data_seed=config.data_seed,
    )
    return task, close


def _order_seeds(config: CompareConfig) -> set[int]:
    """Seeds of the orders of the text that are read."""
    fixed = config.data_seed
    return {config.sweep_seed, *config.seeds} | (set() if fixed is None else {fixed})


def _builder(config: CompareConfig, entrant: Entrant, vocab_size: int) -> BuildOptimizer:
    """(rate, key) -> the optimizer as `pretrain` builds it."""
    info = ModelInfo.of(config.model, vocab_size=vocab_size)

    def build(rate: Any, key: Array) -> Any:
        model = info._replace(key=key)
        return build_rule(entrant.with_rate(rate), config.schedule, model, config.steps).tx

    return build


def _run(
    config: CompareConfig, task: Task, entrant: Entrant, vocab_size: int, lines: "_ProgressLines"
) -> Outcome:
    build = _builder(config, entrant, vocab_size)
    estimator = entrant.optimizer.gradient(1, ModelInfo.of(config.model))
    task = replace(task, gradient=estimator, keyed=True)
    middle = entrant.rates[len(entrant.rates) // 2]
    lines.say(f"{entrant.label}: timing one run alone")
    cost = measure_step(task, build, middle, seed=config.sweep_seed, steps=config.timing_steps)
    lanes = _lanes(config, cost)
    lines.say(
        f"{entrant.label}: {cost.tokens_per_second:,.0f} tokens/s, optimizer "
        f"{100 * cost.optimizer_share:.1f} % of the step; "
        f"{len(entrant.rates)} rates, then {len(config.seeds)} seeds, up to {lanes} at once"
    )
    tuned = tune(
        task, build, entrant.rates, sweep_seed=config.sweep_seed, seeds=config.seeds, lanes=lanes,
        on_progress=functools.partial(lines.update, entrant.label),
    )  # fmt: skip
    lines.finish()
    flops = entrant.optimizer.mean_flops(
        models.abstract_params(config.model), models.matrix_axes(config.model)
    )
    return Outcome(entrant.label, encode(entrant.optimizer), tuned, cost, flops)


def _lanes(config: CompareConfig, cost: StepCost) -> int:
    if config.vectorize == "never":
        return 1
    wanted = max(config.cells, len(config.seeds))
    return wanted if config.vectorize == "always" else lanes_that_fit(cost, wanted)


def _common_settings(config: CompareConfig, corpus: data.Corpus) -> dict[str, Any]:
    """What all results of a directory must share to be compared."""
    settings = json.loads(to_json(config))
    shared = {name: value for name, value in settings.items() if name not in _FREE}
    about = {"corpus_hash": corpus.hash, "device": jax.devices()[0].device_kind}
    return shared | about | {"measure": _MEASURE}


def _read(path: Path, entrant: Entrant, common: Mapping[str, Any]) -> Outcome | None:
    """An earlier result, if it answers the same question."""
    if not path.is_file():
        return None
    with within("run_directory"):
        values = read_json(path)
    expected = {"optimizer": encode(entrant.optimizer), "rates": list(entrant.rates), **common}
    found = {"optimizer": values["optimizer"], "rates": values["rates"], **values["common"]}
    for name, value in expected.items():
        if found.get(name) != value:
            raise ConfigError(
                name, value, f"but {path} was made with {found.get(name)!r}; delete it to run "
                "it again, or choose another run_directory",
            )  # fmt: skip
    return Outcome(
        label=entrant.label,
        optimizer=values["optimizer"],
        tuned=Tuned.from_json(values),
        cost=StepCost(**values["cost"]),
        optimizer_flops=values["optimizer_flops_per_step"],
    )


class _ProgressLines:
    """Plain lines with the time left, every few seconds."""

    def __init__(self, config: CompareConfig, optimizers: int, say: Message):
        self.say = say
        self._tokens = config.batch_size * config.model.context
        self._per_optimizer = (config.cells + len(config.seeds)) * config.steps
        self._optimizers, self._finished = optimizers, 0
        self._begin = self._last_line = time.monotonic()

    def update(self, label: str, stage: str, done: int, total: int, lowest: float) -> None:
        now = time.monotonic()
        if now - self._last_line < _SECONDS_BETWEEN_LINES and done < total:
            return
        self._last_line = now
        taken = self._finished * self._per_optimizer + done
        speed = taken / (now - self._begin)
        left = (self._optimizers * self._per_optimizer - taken) / speed
        self.say(
            f"{label}: {stage}, step {done:,} of {total:,} over all runs, lowest held-out loss "
            f"{lowest:.4f}, {speed * self._tokens:,.0f} tokens/s, {left / 60:.1f} min left"
        )

    def finish(self) -> None:
        self._finished += 1


def _stacked(batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
