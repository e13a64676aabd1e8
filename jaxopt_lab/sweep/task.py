"""What every run of a comparison shares, and the training step of one run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

Batch = Mapping[str, Any]
BuildOptimizer = Callable[[Any], optax.GradientTransformation]
"""(learning rate, a number or a traced scalar) -> optimizer whose updates are added."""


@dataclass(frozen=True)
class Task:
    """A training run without its optimizer, learning rate and seed.

    Args:
      init_params: (key) -> parameters.
      loss: (params, batch) -> (mean nats per token, {"tokens": number of tokens in the mean}).
      batches: (seed, start, stop) -> the batches of steps `start` to `stop - 1` in the order that
        belongs to the seed, as host arrays with a leading axis of that length.
      held_out: Batches to evaluate on, stacked along a leading axis.
      steps: Optimizer steps of a run.
      evaluate_every: Steps between evaluations; the last step is always evaluated.
      tokens_per_step: Tokens of a training batch.
      clip: Largest global norm of the gradient; None does not clip.
    """

    init_params: Callable[[Array], PyTree]
    loss: Callable[[PyTree, Batch], tuple[Float[Array, " "], Mapping[str, Array]]]
    batches: Callable[[int, int, int], Batch]
    held_out: Batch
    steps: int
    evaluate_every: int
    tokens_per_step: int
    clip: float | None = None

    def evaluated_steps(self) -> list[int]:
        """Numbers of steps after which a run is evaluated.

        >>> Task(*[None] * 4, steps=7, evaluate_every=3, tokens_per_step=1).evaluated_steps()
        [3, 6, 7]
        """
        inner = range(self.evaluate_every, self.steps, self.evaluate_every)
        return [*inner, self.steps]


class RunState(NamedTuple):
    """What training changes; under vmap, leaves that no run changes on its own stay unbatched."""

    params: PyTree
    opt_state: PyTree


def start(task: Task, build: BuildOptimizer, rate: Any, seed: Int[Array, " "]) -> RunState:
    """Parameters of a seed and the first optimizer state."""
    params = task.init_params(jax.random.key(seed))
    return RunState(params, build(rate).init(params))


def gradient(task: Task, params: PyTree, batch: Batch) -> tuple[Float[Array, " "], PyTree]:
    """Loss and clipped gradient, in the dtype of the parameters."""
    (loss, _), grads = jax.value_and_grad(task.loss, has_aux=True)(params, batch)
    if task.clip is None:
        return loss, grads
    norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
    scale = jnp.minimum(1.0, task.clip / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
    return loss, jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)


def step(
    task: Task, build: BuildOptimizer, rate: Any, state: RunState, batch: Batch
) -> tuple[RunState, Float[Array, " "]]:
    """One optimizer step; returns the training loss before it."""
    loss, grads = gradient(task, state.params, batch)
    tx = optax.with_extra_args_support(build(rate))
    updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss)
    return RunState(optax.apply_updates(state.params, updates), opt_state), loss


def held_out_loss(task: Task, params: PyTree, held_out: Batch) -> Float[Array, " "]:
    """Mean over all held-out tokens, one batch after the other."""

    def sums(batch: Batch) -> tuple[Array, Array]:
        loss, aux = task.loss(params, batch)
        tokens = jnp.asarray(aux["tokens"], jnp.float32)
        return loss * tokens, tokens

    nats, tokens = jax.lax.map(sums, held_out)
    return jnp.sum(nats) / jnp.sum(tokens)
