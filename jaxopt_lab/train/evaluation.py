"""Held-out scores: the evaluations of a task on a mesh."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jaxopt_lab.data import RowsOnDemand, standard_error
from jaxopt_lab.models import BATCH_AXES
from jaxopt_lab.step import Batch, Loss, measured
from jaxopt_lab.tasks import Evaluation
from jaxopt_lab.train.dist.mesh import rows_of_process, to_global

OF_TARGETS = "of_targets"


class HeldOut:
    """The held-out sets of a task; their batches are put on the mesh once.

    Args:
      evaluations: Of the task, by name.
      mesh: Where the batches go.
      param_shardings: Tree of NamedSharding, like the parameters.
      compiler_options: Passed to the compiler.
      best: The evaluation whose first report ranks checkpoints; the first one by default.
    """

    def __init__(
        self,
        evaluations: Mapping[str, Evaluation],
        mesh: Mesh,
        param_shardings: PyTree,
        compiler_options: Mapping[str, Any] | None = None,
        best: str | None = None,
    ):
        """Places the batches; compiles nothing."""
        self.evaluations = evaluations
        self._best = best
        self.names = tuple(name for each in evaluations.values() for name in each.report)
        self._batches = {
            name: [_placed(mesh, batch) for batch in each.batches]
            for name, each in evaluations.items()
        }
        options: dict[str, Any] = {"mesh": mesh, "param_shardings": param_shardings}
        options["compiler_options"] = compiler_options
        losses = {each.loss for each in evaluations.values()}
        self._programs = {loss: make_eval(loss, **options) for loss in losses}

    @property
    def ranking(self) -> str:
        """What ranks checkpoints, by its name in the log."""
        best = next(iter(self.evaluations)) if self._best is None else self._best
        return next(iter(self.evaluations[best].report))

    def scores(self, params: PyTree) -> dict[str, float]:
        """What all evaluations report about some parameters, by the names in the log."""
        scores = {}
        for set_name, each in self.evaluations.items():
            program, batches = self._programs[each.loss], self._batches[set_name]
            sums: Any = jax.device_get([program(params, batch) for batch in batches])
            targets = [metrics.pop(OF_TARGETS, None) for metrics, _ in sums]
            weight = _total(weight for _, weight in sums)
            means = {
                metric: _total(metrics[metric] for metrics, _ in sums) / weight
                for metric in sums[0][0]
            }
            if targets[0] is not None:
                means["standard_error"] = _standard_error(targets)
            scores |= {name: report(means) for name, report in each.report.items()}
        return scores


def make_eval(
    loss: Loss,
    *,
    mesh: Mesh,
    param_shardings: PyTree,
    compiler_options: Mapping[str, Any] | None = None,
) -> Callable[[PyTree, Batch], tuple[dict[str, Any], Array]]:
    """Builds the jitted (parameters, batch) -> (weighted sums of the metrics, sum of weights).

    Of a loss with the metric `nats` of each target, `OF_TARGETS` among the metrics has these, the
    mask and the documents of the targets.
    """

    def evaluate(params: PyTree, batch: Batch) -> tuple[dict[str, Any], Array]:
        _, (weight, metrics) = measured(loss, params, batch, jax.random.key(0))
        nats = metrics.pop("nats", None)
        sums: dict[str, Any] = {name: value * weight for name, value in metrics.items()}
        if nats is not None:
            sums[OF_TARGETS] = (nats, batch["mask"], batch["documents"])
        return sums, weight

    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        evaluate,
        in_shardings=(param_shardings, NamedSharding(mesh, PartitionSpec(BATCH_AXES))),
        out_shardings=(replicated, replicated),
        compiler_options=dict(compiler_options) if compiler_options else None,
    )


def _standard_error(targets: Sequence[Any]) -> float:
    """Over documents, from the losses of the targets of every batch."""
    nats, mask, documents = (
        np.concatenate([x.ravel() for x in each]) for each in zip(*targets, strict=True)
    )
    sums = np.bincount(documents, nats.astype(np.float64))
    return float(standard_error(sums, np.bincount(documents, mask > 0)))


def _total(values: Iterable[Any]) -> float:
    return float(np.asarray(list(values), np.float64).sum())


def _placed(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
    """A batch on the mesh; this process builds the rows of its devices alone."""
    on_demand = isinstance(batch, RowsOnDemand)
    size = batch.size if on_demand else len(next(iter(batch.values())))
    rows = rows_of_process(mesh.devices, size, jax.process_index())
    own = batch.build(rows) if on_demand else {name: x[rows] for name, x in batch.items()}
    return to_global(mesh, own, size, rows)
