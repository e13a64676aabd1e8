"""Between the stages of a run with WeightLoRA: adapters leave or grow, and the step is another."""

import json
from collections.abc import Callable
from typing import Any

import jax

from jaxopt_lab import lora
from jaxopt_lab.core.keys import purpose_key
from jaxopt_lab.step import TrainState
from jaxopt_lab.train.config.optimizers_pairs import PairConfig, WeightLoraPlusConfig
from jaxopt_lab.train.config.run import PretrainConfig
from jaxopt_lab.train.loop import Run

Message = Callable[[str], None]

SELECTION_FILE = "selection.jsonl"
"""Which adapters stayed, with their weights, a line for each change."""


def stage_ends(config: PretrainConfig, start: int) -> list[int]:
    """Numbers of steps after which a run pauses, from `start` steps on; the last one is its end."""
    return [step for step in (*_changes(config), config.steps) if step > start] or [config.steps]


def changed(run: Run, state: TrainState, step: int, say: Message) -> tuple[Run, TrainState]:
    """The run and its state after what happens to the adapters between two steps, if anything does.

    A checkpoint of this label holds the state before it: a resumed run comes here first.

    Args:
      run: The run.
      state: After `step` steps.
      step: Steps taken.
      say: Receives lines of plain text.
    """
    spec = run.program.trained.spec
    if spec is None or step not in _changes(run.config):
        return run, state
    given = (state.params, spec, run.program.tx, state.opt_state)
    if isinstance(run.config.optimizer, WeightLoraPlusConfig):
        key = jax.random.fold_in(jax.random.key(run.config.seed), step)
        resized = lora.select_and_grow(*given, purpose_key(key, "growth"))
    else:
        resized = lora.prune(*given)
    _record(run, step, lora.selection(resized.adapters, resized.spec))
    count, before = (sum(len(e.kept) for e in s.adapters) for s in (resized.spec, spec))
    say(f"step {step}: {count} of {before} adapters stay")
    if resized.spec == spec:
        return run, state
    new = run.with_spec(resized.spec)
    shardings: Any = new.program.step.shardings
    placed = jax.device_put(
        (resized.adapters, resized.state), (shardings.params, shardings.opt_state)
    )
    return new, state._replace(params=placed[0], opt_state=placed[1])


def _changes(config: PretrainConfig) -> tuple[int, ...]:
    optimizer = config.optimizer
    return optimizer.changes(config.steps) if isinstance(optimizer, PairConfig) else ()


def _record(run: Run, step: int, kept: list[tuple[str, float]]) -> None:
    if jax.process_index() != 0:
        return
    row = {"step": step, "adapters": dict(kept)}
    path = run.directory / SELECTION_FILE
    earlier = path.read_text().splitlines() if path.is_file() else []
    rows = [line for line in earlier if json.loads(line)["step"] < step]
    path.write_text("".join(f"{line}\n" for line in [*rows, json.dumps(row)]))
