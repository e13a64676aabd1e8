"""What every run of a comparison shares, and the training step of one run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from jaxopt_lab.step import Estimator, Loss, Step, TrainState, backprop, measured

Batch = Mapping[str, Any]  # of arrays on the host or a device
BuildOptimizer = Callable[..., optax.GradientTransformation]
"""(learning rate, a number or a traced scalar) -> optimizer whose updates are added; of a task with
`keyed`, (learning rate, key of the run)."""


@dataclass(frozen=True)
class Task:
    """A training run without its optimizer, learning rate and seed.

    Args:
      init_params: (key) -> parameters.
      loss: (params, batch, key) -> (objective, weight, metrics), as the step takes it.
      batches: (seed, start, stop) -> the batches of steps `start` to `stop - 1` in the order that
        belongs to the seed, as host arrays with a leading axis of that length.
      held_out: Batches to evaluate on, stacked along a leading axis. With the `documents` of their
        targets, and a loss that has the metric `nats` then, losses have a standard error.
      steps: Optimizer steps of a run.
      evaluate_every: Steps between evaluations; the last step is always evaluated.
      tokens_per_step: Tokens of a training batch.
      clip: Largest global norm of the gradient; None does not clip.
      gradient: How the gradient is estimated; `forward_only()` for optimizers that do it.
      init_seed: Seed of the initial parameters, the same for all runs; None: that of the run.
      data_seed: Seed of the order of the batches, likewise.
      keyed: Whether the optimizer draws and is built with the key of the run. Runs of one seed
        then share their draws.
    """

    init_params: Callable[[Array], PyTree]
    loss: Loss
    batches: Callable[[int, int, int], Batch]
    held_out: Batch
    steps: int
    evaluate_every: int
    tokens_per_step: int
    clip: float | None = None
    gradient: Estimator = backprop
    keyed: bool = False
    init_seed: int | None = None
    data_seed: int | None = None

    def evaluated_steps(self) -> list[int]:
        """Numbers of steps after which a run is evaluated.

        >>> Task(*[None] * 4, steps=7, evaluate_every=3, tokens_per_step=1).evaluated_steps()
        [3, 6, 7]
        """
        inner = range(self.evaluate_every, self.steps, self.evaluate_every)
        return [*inner, self.steps]

    def targets_by_document(self) -> np.ndarray:
        """Held-out targets of every document, (documents,); empty where these are not told."""
        if "documents" not in self.held_out:
            return np.zeros(0, int)
        documents, mask = (np.asarray(self.held_out[name]) for name in ("documents", "mask"))
        return np.bincount(documents.ravel(), mask.ravel() > 0)


def step_of(task: Task, build: BuildOptimizer, rate: Any, key: Array) -> Step:
    """The training step of a run; a run that diverges is to show it, so nothing is guarded.

    Args:
      task: What every run shares.
      build: The optimizer.
      rate: The learning rate.
      key: The key that the state begins with; any other one later.
    """
    tx = build(rate, key) if task.keyed else build(rate)
    return Step(task.loss, tx, task.gradient, clip=task.clip, guarded=False)


def start(task: Task, build: BuildOptimizer, rate: Any, seed: Int[Array, " "]) -> TrainState:
    """The first state of a seed; under vmap, leaves that no run changes alone stay unbatched."""
    key = jax.random.key(seed)
    of_params = key if task.init_seed is None else jax.random.key(task.init_seed)
    return step_of(task, build, rate, key).start(task.init_params(of_params), key)


def step(
    task: Task, build: BuildOptimizer, rate: Any, state: TrainState, batch: Batch
) -> tuple[TrainState, Float[Array, " "]]:
    """One optimizer step; returns the training loss before it."""
    key = jax.random.wrap_key_data(state.key)
    state, metrics = step_of(task, build, rate, key).take(state, batch)
    return state, metrics["loss"]


def held_out_loss(
    task: Task, params: PyTree, held_out: Batch
) -> tuple[Float[Array, " "], Float[Array, " documents"]]:
    """Mean over all held-out tokens, one batch after the other; and the nats of every document."""
    count = len(task.targets_by_document())

    def sums(batch: Batch) -> tuple[Array, Array, Array]:
        _, (weight, metrics) = measured(task.loss, params, batch, jax.random.key(0))
        documents = batch["documents"].ravel() if count else jnp.zeros(0, int)
        nats = metrics["nats"].ravel() if count else jnp.zeros(0)
        return metrics["loss"] * weight, weight, jax.ops.segment_sum(nats, documents, count)

    nats, tokens, by_document = jax.lax.map(sums, held_out)
    return jnp.sum(nats) / jnp.sum(tokens), jnp.sum(by_document, axis=0)
