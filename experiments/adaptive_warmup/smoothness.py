"""Local smoothness along one run of each optimizer, at its tuned rate and warm-up."""

import functools
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from methods import SWEEP_SEED, scheduled, schedules_of

from jaxopt_lab import models
from jaxopt_lab.diagnostics.smoothness import local_smoothness
from jaxopt_lab.sweep.task import Task, start, step

if TYPE_CHECKING:
    from run import Study

POINTS = 60


def record_run(study: "Study") -> None:
    """Trains the best linear cell on the sweep's seed once more, with records, and writes them."""
    row, index = best_linear(study)
    if study.path("smoothness").exists():
        return
    begun = time.perf_counter()
    config = study.scale.model()
    axes = models.matrix_axes(config)
    cells = study.cells([row])

    def build(rate: Any) -> Any:
        cell = cells.at(index)._replace(peak=rate)
        return scheduled(study.optimizer, row.family, cell, study.task.steps, axes)

    measure = measurement(config, axes)
    records = record(study.task, build, float(cells.peak[index]), measure)
    study.write(
        "smoothness",
        {
            "name": study.optimizer.name,
            "schedule": row.name,
            "rate": float(cells.peak[index]),
            "target": study.target(),
            **records,
        },
    )
    print(
        f"{study.optimizer.name}: {len(records['step'])} records of smoothness in "
        f"{time.perf_counter() - begun:.0f} s",
        flush=True,
    )


def best_linear(study: "Study") -> tuple[Any, int]:
    """The row of the linear family and its cell with the lowest loss on the sweep's seed."""
    found = []
    for row in schedules_of(study.optimizer):
        if row.family == "linear" and study.path(row.name).exists():
            result = study.read(row.name)
            cell = result["best_cell"]
            if cell is not None:
                found.append((result["sweep_losses"][cell], row, cell))
    if not found:
        raise SystemExit(f"no linear row of {study.optimizer.name} has a result yet")
    _, row, cell = min(found, key=lambda entry: entry[0])
    return row, cell


def measurement(config: models.DecoderConfig, matrix_axes: Any) -> Any:
    """(parameters before and after a step, its batch) -> (loss after it, smoothness), compiled.

    Loss and gradients are in float32 throughout: at the end of a run a step changes the gradient by
    less than bfloat16 rounds it.
    """
    exact = replace(config, compute_dtype="float32")

    @jax.jit
    def measure(before: Any, after: Any, batch: Any) -> tuple[Any, Any]:
        with jax.default_matmul_precision("highest"):
            value_and_grad = jax.value_and_grad(lambda p: models.loss(exact, p, batch)[0])
            _, grads_before = value_and_grad(before)
            loss_after, grads_after = value_and_grad(after)
        found = local_smoothness(grads_before, grads_after, before, after, matrix_axes=matrix_axes)
        return loss_after, found

    return measure


def record(task: Task, build: Any, rate: float, measure: Any) -> dict[str, list[float]]:
    """Trains on the sweep's seed; one entry of each list a recorded step."""
    state = jax.jit(functools.partial(start, task, build))(np.float32(rate), np.int32(SWEEP_SEED))
    advance = jax.jit(functools.partial(step, task, build, jnp.float32(rate)))
    due = recorded_steps(task.steps)
    records: dict[str, list[float]] = {"step": [], "loss_after": []}
    for number in range(task.steps):
        batch = {k: x[0] for k, x in task.batches(SWEEP_SEED, number, number + 1).items()}
        before = state.params
        state, _ = advance(state, batch)
        if number not in due:
            continue
        loss_after, found = jax.device_get(measure(before, state.params, batch))
        records["step"].append(number)
        records["loss_after"].append(float(loss_after))
        for pair, measured in found.items():
            for what in ("gradient_difference", "step_norm"):
                records.setdefault(f"{pair}/{what}", []).append(float(getattr(measured, what)))
    return records


def recorded_steps(steps: int) -> set[int]:
    """At equal ratios: the loss, which the records are drawn against, falls fast at first."""
    return {round(x) - 1 for x in np.geomspace(1, steps, min(POINTS, steps))}
