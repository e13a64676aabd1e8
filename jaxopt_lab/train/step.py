"""The training step on a mesh: compiled programs with fixed layouts."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jaxopt_lab.step import Batch, Estimator, Loss, Step, TrainState, backprop, state_layout

SIGNALS = "signals"
"""Entry of a batch with one row of flags a device; see `make_step`."""

Rates = Callable[[Array, PyTree], Mapping[str, Array]]
"""(steps taken, optimizer state) -> learning rates of the step, to report."""


class PlacedStep(NamedTuple):
    """The programs of a step, and the layouts they were built for."""

    init: Callable[..., TrainState]  # (key, another of the parameters or None) -> state, jitted
    init_from: Callable[
        [PyTree, Array], TrainState
    ]  # (all parameters, which it donates; key) -> state, jitted
    update: Any  # (state, batch) -> (state, metrics), jitted, donates the state
    preview: Any  # (state, batch) -> (loss, gradients, updates) of that step, jitted
    value_and_grad: Any  # (state, batch) -> (loss, gradients, neither clipped nor cast), jitted
    shardings: Any  # TrainState of NamedSharding
    abstract_state: Any  # TrainState of ShapeDtypeStruct with shardings; the target of a restore


def param_shardings(mesh: Mesh, specs: PyTree) -> PyTree:
    """Shardings of parameters from their PartitionSpecs."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def make_step(
    init_params: Callable[[Array], PyTree],
    loss: Loss,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh,
    param_specs: PyTree,
    gradient: Estimator = backprop,
    clip: float | None = None,
    trainable: PyTree | None = None,
    rates: Rates = lambda step, opt_state: {},
    compiler_options: Mapping[str, Any] | None = None,
) -> PlacedStep:
    """Builds the initialisation and the guarded step with explicit shardings.

    Args:
      init_params: (key) -> parameters.
      loss: (params, batch, key) -> (objective, weight, metrics).
      tx: The optimizer; it returns updates to be added.
      mesh: Axes data, fsdp, tensor.
      param_specs: Tree of PartitionSpec, like the parameters.
      gradient: How the gradient is estimated.
      clip: Largest global gradient norm; None does not clip.
      trainable: Tree of bools, False where a parameter is frozen: neither gradient nor optimizer
        state exists for it. None trains everything.
      rates: (steps taken, optimizer state) -> learning rates of the step, to report.
      compiler_options: Passed to the compiler for every program built here.

    Returns:
      The jitted programs. A batch lies on the mesh already. It may contain "signals", the ints of
      `mesh.flags`, (devices, k): their maximum over the devices comes back as a metric, which is
      how processes agree on stopping and saving without a synchronisation of their own.
    """
    step = Step(loss, tx, gradient, clip)

    def init_from(params: PyTree, key: Array) -> TrainState:
        return step.start(params, key, trainable)

    def init(key: Array, of_params: Array | None = None) -> TrainState:
        return init_from(init_params(key if of_params is None else of_params), key)

    key = jax.eval_shape(lambda: jax.random.key(0))
    params_at, abstract = param_shardings(mesh, param_specs), jax.eval_shape(init, key)
    state_at = state_layout(tx, abstract, params_at, trainable)
    everywhere = NamedSharding(mesh, PartitionSpec())
    jit = functools.partial(jax.jit, compiler_options=dict(compiler_options or {}) or None)
    of_batch = functools.partial(jit, in_shardings=(state_at, None))
    return PlacedStep(
        init=jit(init, out_shardings=state_at),
        init_from=jit(
            init_from,
            in_shardings=(params_at, everywhere),
            out_shardings=state_at,
            donate_argnums=0,  # a frozen base is there once
        ),
        update=of_batch(
            functools.partial(_update, step, rates),
            out_shardings=(state_at, everywhere),
            donate_argnums=0,
        ),
        preview=of_batch(
            lambda state, batch: tuple(step.preview(state, _without_signals(batch))),
            out_shardings=(everywhere, state_at.params, state_at.params),
        ),
        value_and_grad=of_batch(
            functools.partial(_value_and_grad, step), out_shardings=(everywhere, state_at.params)
        ),
        shardings=state_at,
        abstract_state=jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, state_at
        ),
    )


def _update(
    step: Step, rates: Rates, state: TrainState, batch: Batch
) -> tuple[TrainState, dict[str, Array]]:
    new, metrics = step.take(state, _without_signals(batch))
    metrics |= rates(state.step, state.opt_state)
    if SIGNALS in batch:
        metrics[SIGNALS] = jnp.max(batch[SIGNALS], axis=0)
    return new, metrics


def _value_and_grad(step: Step, state: TrainState, batch: Batch) -> tuple[Array, PyTree]:
    found = step.estimate(state, _without_signals(batch))
    return found.metrics["loss"], found.grads


def _without_signals(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != SIGNALS}
