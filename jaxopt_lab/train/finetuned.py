"""What a fine-tuning run leaves: adapters of its best checkpoint, and its test, read once."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jaxopt_lab import lora
from jaxopt_lab.lora.adapters import whole_leaves
from jaxopt_lab.report.files import write_json
from jaxopt_lab.step import Adapted, TrainState, merged
from jaxopt_lab.sweep import accuracy_interval
from jaxopt_lab.tasks import row_results
from jaxopt_lab.train.base import digest, placed
from jaxopt_lab.train.dist.agreement import agreed, from_first
from jaxopt_lab.train.io.stored import checkpoint_path, read_item, read_leaves, select_step
from jaxopt_lab.train.labelled import Labels
from jaxopt_lab.train.loop import Run
from jaxopt_lab.train.program import model_of

Message = Callable[[str], None]

ADAPTER_DIRECTORY = "adapter"
TEST_FILE = "test.json"


class Best(NamedTuple):
    """The parameters that a run ends with."""

    step: int
    run: Run  # with the adapters of that step
    moving: PyTree  # what moved, on the devices


def report(run: Run, state: TrainState, say: Message) -> dict[str, Any]:
    """Writes and says what the best checkpoint is worth; returns it as JSON values.

    Args:
      run: The run, finished.
      state: After its last step.
      say: Receives lines of plain text.
    """
    found = _best(run, state)
    assert run.base is not None
    moved, whole = run.program.trained_count, run.program.parameters
    host: Any = jax.tree.map(np.asarray, jax.device_get(found.moving))
    summary = {
        "best_step": found.step,
        "trainable_parameters": moved,
        "trainable_share": moved / whole,
        "model_hash": run.base.digest,
        "adapter_hash": digest(host),
    }
    say(
        f"best checkpoint: step {found.step}; {moved:,} of {whole:,} parameters moved "
        f"({100 * moved / whole:.2f} %), hash {summary['adapter_hash'][:12]}"
    )
    spec = found.run.program.trained.spec
    if spec is not None and jax.process_index() == 0:
        target = run.directory / ADAPTER_DIRECTORY
        shutil.rmtree(target, ignore_errors=True)  # of this run, before it went on
        key = jax.random.key(run.config.seed)
        adapters, spec = found.run.program.trained.ordinary(run.base.params, key, host)
        lora.save(target, adapters, spec, base=run.base.params)
        say(f"adapters: {run.checkpoints.run_directory / ADAPTER_DIRECTORY}")
    if isinstance(run.material, Labels):
        summary |= _test(found, state.frozen, run.material, say)
    return summary


def _best(run: Run, state: TrainState) -> Best:
    directory = run.checkpoints.run_directory
    step = from_first(lambda: select_step(directory, "best"))
    if step == int(state.step):
        return Best(step, run, state.params)
    stored = agreed(lambda: read_item(checkpoint_path(directory, step), "data"))
    if "adapters" in stored:
        spec = lora.spec_from_json(stored["adapters"])
        run = run if spec == run.program.trained.spec else run.with_spec(spec)
    abstract = run.program.step.abstract_state.params
    target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), abstract)
    moving = agreed(lambda: read_leaves(directory, step, {"params": target}))["params"]
    return Best(step, run, placed(moving, run.program.step.shardings.params))


def _test(found: Best, frozen: PyTree, labels: Labels, say: Message) -> dict[str, Any]:
    """Accuracy on the rows that nothing has looked at before."""
    program, config = found.run.program, found.run.config
    params, side = merged(found.moving, frozen), None
    if isinstance(params, Adapted):
        assert program.trained.spec is not None
        side = lora.side(params.beside, program.trained.spec)
        params = whole_leaves(params.base, params.beside, program.trained.spec)
    rows = labels.rows["test"]
    logits = labels.logits(model_of(config, labels), program.placement)
    results = row_results(logits, params, rows, side=side)
    count, (share, low, high) = len(results.correct), accuracy_interval(results.correct)
    most_frequent = np.bincount(labels.rows["train"].label).argmax()
    majority = float(np.mean(rows.label == most_frequent))
    say(
        f"test: {100 * share:.2f} % of {count:,} rows right, 95 % interval "
        f"{100 * low:.2f} to {100 * high:.2f} (most frequent label: {100 * majority:.2f})"
    )
    _write_rows(found.run.directory, labels, results)
    return {
        "test_accuracy": share,
        "test_accuracy_low": low,
        "test_accuracy_high": high,
        "test_loss": float(results.nats.mean()),
        "test_rows": count,
        "test_majority_accuracy": majority,
    }


def _write_rows(directory: Path, labels: Labels, results: Any) -> None:
    """Every answer, for paired comparisons of runs."""
    if jax.process_index() == 0:
        rows = {"ids": list(labels.corpus.test.ids), "answers": results.answers.tolist()}
        write_json(directory / TEST_FILE, rows | {"correct": results.correct.tolist()})
