"""The seam between training and what is learnt: a few functions, and no hierarchy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

from jaxopt_lab.step import Loss

Report = Callable[[Mapping[str, float]], float]
"""(means of the metrics) -> one number."""


@dataclass(frozen=True)
class Evaluation:
    """One held-out set, and what is measured on it.

    Args:
      batches: All of it. Of `data.RowsOnDemand` a process builds only the rows of its devices.
      loss: Its metrics are averaged over the batches by their weights; the objective is not used.
      report: What is logged, by its name in the log. The first one may rank checkpoints; lower is
        better.
      about: Facts known beforehand, such as the score of a trivial predictor.
    """

    batches: Sequence[Mapping[str, np.ndarray]]
    loss: Loss
    report: Mapping[str, Report]
    about: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """What is learnt, without optimizer, schedule and number of steps.

    Args:
      init: (key) -> parameters.
      loss: (params, batch, key) -> (objective, weight, metrics), see `jaxopt_lab.step.Loss`. It
        and those of the evaluations take `side=`, what stands beside the kernels of linear layers,
        where adapters are to be trained. It takes `perturbation=(direction, scale)` where
        zero-order methods are to perturb it layer by layer.
      param_specs: Tree of PartitionSpec, like the parameters.
      batch_spec: Shape and dtype of one row of every entry of a batch.
      batch: (numbers of rows) -> these rows on the host. A row is a function of its number, which
        counts the rows that a run consumes. None where a task is only compiled.
      evaluations: Held-out sets by name. What one of them reports first ranks checkpoints, by
        default the first.
      heads: Modules that start from random values, and are trained whole beside adapters.
    """

    init: Callable[[Array], PyTree]
    loss: Loss
    param_specs: PyTree
    batch_spec: Mapping[str, jax.ShapeDtypeStruct]
    batch: Callable[[Sequence[int]], Mapping[str, np.ndarray]] | None = None
    evaluations: Mapping[str, Evaluation] = field(default_factory=dict)
    heads: tuple[str, ...] = ()

    def abstract_batch(self, rows: int, sharding: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch of so many rows."""
        return {
            name: jax.ShapeDtypeStruct((rows, *row.shape), row.dtype, sharding=sharding)
            for name, row in self.batch_spec.items()
        }
