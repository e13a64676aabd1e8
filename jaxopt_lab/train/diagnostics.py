"""Diagnostics of a run: which to record, when, and on what."""

from collections.abc import Mapping
from dataclasses import replace

import jax
import optax
from jaxtyping import Array

from jaxopt_lab.core.matrices import MatrixLayout
from jaxopt_lab.diagnostics import (
    Every,
    FisherErrors,
    NormRatios,
    Recorder,
    Recorders,
    Smoothness,
    Snapshot,
    direction_of,
)
from jaxopt_lab.step import TrainState
from jaxopt_lab.train.config.optimizer_base import ModelInfo, OptimizerConfig
from jaxopt_lab.train.config.optimizers_kronecker import EigenbasisConfig
from jaxopt_lab.train.config.sections import DiagnosticsConfig
from jaxopt_lab.train.errors import ConfigError
from jaxopt_lab.train.hooks import Hook
from jaxopt_lab.train.step import PlacedStep


def make_recorders(
    config: DiagnosticsConfig,
    optimizer: OptimizerConfig,
    model: ModelInfo,
    ema: optax.GradientTransformation | None,
) -> Recorders | None:
    """The recorders of a run, or None where nothing is recorded.

    Args:
      config: What to record.
      optimizer: The optimizer that trains.
      model: Facts about the model.
      ema: What is chained behind the optimizer, whose state is then part of the state.

    Raises:
      ConfigError: For a layer that is no matrix of the model.
    """
    if not config.record:
        return None
    recorders: list[Recorder] = []
    if "norms" in config.record:
        recorders.append(_norm_ratios(config, optimizer, model, ema))
    if "fisher" in config.record:
        recorders.append(_fisher_errors(config, optimizer, model))
    if "smoothness" in config.record:
        recorders.append(Smoothness(_every(config), matrix_axes=model.matrix_axes))
    return Recorders(recorders)


def _fisher_errors(
    config: DiagnosticsConfig, optimizer: OptimizerConfig, model: ModelInfo
) -> FisherErrors:
    assert isinstance(optimizer, EigenbasisConfig)
    leaves = jax.tree_util.tree_leaves_with_path(
        model.matrix_axes, is_leaf=lambda x: isinstance(x, MatrixLayout)
    )
    matrices = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    for layer in config.layers or ():
        if layer not in matrices:
            raise ConfigError(
                "diagnostics.layers", layer, f"expected some of {', '.join(matrices)}"
            )
    return FisherErrors(
        config.every,
        config.layers,
        window=config.window,
        decay=optimizer.b2,
        matrix_axes=model.matrix_axes,
    )


def _norm_ratios(
    config: DiagnosticsConfig,
    optimizer: OptimizerConfig,
    model: ModelInfo,
    ema: optax.GradientTransformation | None,
) -> NormRatios:
    # The rate cancels in the ratios, but must not be zero where a schedule is.
    plain = replace(optimizer, weight_decay=0.0).build(optax.constant_schedule(1.0), model)
    plain = plain if ema is None else optax.chain(plain, ema)
    return NormRatios(_every(config), direction_of(plain), matrix_axes=model.matrix_axes)


def _every(config: DiagnosticsConfig) -> Every:
    return Every(config.every, tuple(residue % config.every for residue in config.residues))


def diagnostic_hook(recorders: Recorders, step: PlacedStep) -> Hook:
    """The hook that records.

    Before the step, which consumes the state: nothing has to be copied that way.

    Args:
      recorders: The recorders.
      step: The programs of the run.
    """
    return Hook(
        lambda view: take_record(recorders, step, view.step, view.state, view.batch),
        every=recorders,
        before=True,
        name="diagnostics",
    )


def take_record(
    recorders: Recorders,
    step: PlacedStep,
    number: int,
    state: TrainState,
    batch: Mapping[str, Array],
) -> dict[str, float]:
    """Records one step that is about to be taken; waits for the result.

    Args:
      recorders: The recorders; they are due.
      step: The programs of the run.
      number: The step, 1 for the first.
      state: The state before it.
      batch: Its batch.
    """
    loss, grads, updates = step.preview(state, batch)
    snapshot = Snapshot(
        number, state.params, grads, state.opt_state, updates, loss,
        value_and_grad=lambda params: step.value_and_grad(state._replace(params=params), batch),
    )  # fmt: skip
    return recorders.record(snapshot)
