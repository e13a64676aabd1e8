"""The seam between training and what is learnt: a few functions, and no hierarchy."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, PyTree

from jaxopt_lab.step import Loss


@dataclass(frozen=True)
class Task:
    """What is learnt, without optimizer, schedule and number of steps.

    Args:
      init: (key) -> parameters.
      loss: (params, batch, key) -> (objective, weight, metrics), see `jaxopt_lab.step.Loss`.
      param_specs: Tree of PartitionSpec, like the parameters.
      batch_spec: Shape and dtype of one row of every entry of a batch.
    """

    init: Callable[[Array], PyTree]
    loss: Loss
    param_specs: PyTree
    batch_spec: Mapping[str, jax.ShapeDtypeStruct]

    def abstract_batch(self, rows: int, sharding: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch of so many rows."""
        return {
            name: jax.ShapeDtypeStruct((rows, *row.shape), row.dtype, sharding=sharding)
            for name, row in self.batch_spec.items()
        }
