"""Held-out loss on fixed batches, in nats per token and bits per byte."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jaxopt_lab import data
from jaxopt_lab.step import Batch, Loss, measured
from jaxopt_lab.train.mesh import BATCH_AXES, from_whole


class HeldOut:
    """The held-out batches of a run and the unigram model's score on them.

    Args:
      corpus: What `data.prepare` returned.
      batches: What `data.validation_batches` returned; they are put on the mesh once.
      mesh: Where the batches go.
      evaluate: (params, batch) -> (sum of nats, number of tokens), from `make_eval`.
    """

    def __init__(
        self,
        corpus: data.Corpus,
        batches: Sequence[data.Batch],
        mesh: Mesh,
        evaluate: Callable[[PyTree, Batch], tuple[Array, Array]],
    ):
        """Places the batches and scores the unigram model."""
        self._evaluate = evaluate
        self._host_batches = batches
        self._batches = [from_whole(mesh, batch) for batch in batches]
        self._tokenizer = corpus.tokenizer
        self.unigram_nats, self.unigram_bits_per_byte = data.unigram_nats(corpus, batches)
        self.tokens, self.bytes = data.count_targets(batches, corpus.tokenizer)

    def loss(self, params: PyTree) -> float:
        """Mean loss over all held-out tokens, in nats."""
        sums: Sequence[Any] = jax.device_get([self._evaluate(params, b) for b in self._batches])
        nats, tokens = np.asarray(sums, np.float64).sum(axis=0)
        return float(nats / tokens)

    def bits_per_byte(self, nats_per_token: float) -> float:
        """A loss on these batches per byte of text."""
        return data.bits_per_byte(nats_per_token, self._host_batches, self._tokenizer)


def make_eval(
    loss: Loss,
    *,
    mesh: Mesh,
    param_shardings: PyTree,
    compiler_options: Mapping[str, Any] | None = None,
) -> Callable[[PyTree, Batch], tuple[Array, Array]]:
    """Builds the jitted (parameters, batch) -> (sum of the reported loss, sum of weights)."""

    def evaluate(params: PyTree, batch: Batch) -> tuple[Array, Array]:
        _, (weight, metrics) = measured(loss, params, batch, jax.random.key(0))
        return metrics["loss"] * weight, weight

    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        evaluate,
        in_shardings=(param_shardings, NamedSharding(mesh, PartitionSpec(BATCH_AXES))),
        out_shardings=(replicated, replicated),
        compiler_options=dict(compiler_options) if compiler_options else None,
    )
