"""Classes of texts: what an encoder with a head and a decoder with a prompt have in common.

Both give scores of the classes for padded rows of tokens. The loss is the mean cross-entropy in
nats per row, so ln(classes) is what knowing nothing costs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from jaxopt_lab import data, models
from jaxopt_lab.step import Batch, Loss
from jaxopt_lab.tasks.task import Evaluation, Task


class Rows(NamedTuple):
    """Texts as the model reads them."""

    tokens: np.ndarray  # int32 (rows, length)
    mask: np.ndarray  # bool (rows, length): False on the padding behind a text
    label: np.ndarray  # int32 (rows,)


class Logits(Protocol):
    """Scores of the classes."""

    def __call__(
        self, params: PyTree, batch: Batch, key: Any, side: Any = None, perturbation: Any = None
    ) -> Array:
        """Scores (rows, classes) in float32 or wider.

        Args:
          params: Of the model.
          batch: `tokens` and `mask`.
          key: Of dropout; None, as in evaluation: no dropout.
          side: What stands beside the kernels of linear layers.
          perturbation: (direction, scale), added to the parameters layer by layer
            (`models.probe_scores`), without dropout; None: nothing.
        """
        ...


class RowResults(NamedTuple):
    """What a model says about each row."""

    answers: np.ndarray  # int (rows,): the likeliest class
    correct: np.ndarray  # bool (rows,)
    nats: np.ndarray  # float (rows,): cross-entropy

    @property
    def accuracy(self) -> float:
        """Share of correct answers."""
        return float(self.correct.mean())


def classification_loss(logits: Logits, *, dropout: bool = True) -> Loss:
    """Mean cross-entropy, weighted by the number of rows; `accuracy` is among the metrics.

    It takes `side=` and `perturbation=` as the scores do, and an optional entry `weight` (rows,) of
    the batch, 0 for rows that do not count.

    >>> loss = classification_loss(lambda params, batch, key, side=None: params)
    >>> batch = {"label": jnp.array([0, 1, 1]), "weight": jnp.array([1.0, 1.0, 0.0])}
    >>> value, weight, metrics = loss(jnp.array([[9.0, 0.0]] * 3), batch, None)
    >>> float(weight), float(metrics["accuracy"])
    (2.0, 0.5)

    Args:
      logits: Scores of the classes.
      dropout: Whether the model gets the key.
    """

    def loss(
        params: PyTree, batch: Batch, key: Array | None, **options: Any
    ) -> tuple[Array, Array, dict[str, Array]]:
        scores = logits(params, batch, key if dropout else None, **options)
        nats, answers = _of_rows(scores, batch["label"])
        weights = batch.get("weight", jnp.ones_like(nats))
        total = weights.sum()
        mean = lambda x: (x * weights).sum() / jnp.maximum(total, 1.0)  # noqa: E731
        return mean(nats), total, {"accuracy": mean(answers == batch["label"])}

    return loss


def _of_rows(scores: Array, labels: Array) -> tuple[Array, Array]:
    logs = jax.nn.log_softmax(scores)
    return -jnp.take_along_axis(logs, labels[:, None], 1)[:, 0], jnp.argmax(scores, 1)


def classification(
    logits: Logits,
    init: Callable[[Array], PyTree],
    param_specs: PyTree,
    rows: Mapping[str, Rows] | None,
    *,
    length: int,
    seed: int,
    eval_batch: int,
    heads: tuple[str, ...] = (),
) -> Task:
    """A task from scores of classes and rows.

    An epoch is a fresh permutation of the training rows; which row number n stands for is a
    function of n and the seed. The validation part is evaluated: its loss ranks checkpoints. The
    test part is none of the task's business: `row_results` reads it, once, when all is done.

    Args:
      logits: Scores of the classes.
      init: (key) -> parameters.
      param_specs: Tree of PartitionSpec, like the parameters.
      rows: `train` and `validation`; None: the task can be compiled, and no more.
      length: Tokens of a row.
      seed: Of the permutations.
      eval_batch: Rows of a batch in evaluation; the devices of the mesh's batch axes divide it.
      heads: Modules that start from random values.
    """
    tokens = jax.ShapeDtypeStruct((length,), jnp.int32)
    mask = jax.ShapeDtypeStruct((length,), jnp.bool_)
    loss = classification_loss(logits)
    return Task(
        init=init,
        loss=loss,
        param_specs=param_specs,
        batch_spec={"tokens": tokens, "mask": mask, "label": jax.ShapeDtypeStruct((), jnp.int32)},
        batch=None if rows is None else _shuffled(rows["train"], seed),
        evaluations={}
        if rows is None
        else {data.VALIDATION: _evaluation(logits, rows, eval_batch)},
        heads=heads,
    )


def _shuffled(rows: Rows, seed: int) -> Callable[[Sequence[int]], Mapping[str, np.ndarray]]:
    import grain

    # Grain shuffles epoch e with seed + e: nearby seeds would share epochs, hashed ones do not.
    hashed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    order = grain.MapDataset.range(len(rows.label)).shuffle(hashed).repeat()

    def batch(numbers: Sequence[int]) -> Mapping[str, np.ndarray]:
        chosen = [order[int(number)] for number in numbers]
        return {name: array[chosen] for name, array in rows._asdict().items()}

    return batch


def _evaluation(logits: Logits, rows: Mapping[str, Rows], batch_size: int) -> Evaluation:
    held_out = rows[data.VALIDATION]
    most_frequent = np.bincount(rows["train"].label).argmax()
    return Evaluation(
        batches=_batches(held_out, batch_size),
        loss=classification_loss(logits, dropout=False),
        report={
            "validation_loss": lambda means: means["loss"],
            "validation_accuracy": lambda means: means["accuracy"],
        },
        about={
            "rows": len(held_out.label),
            "majority_accuracy": float(np.mean(held_out.label == most_frequent)),
            # Texts that fill a row, most of which are cut.
            "filled": float(held_out.mask.all(1).mean()),
        },
    )


def _batches(rows: Rows, batch_size: int) -> list[dict[str, np.ndarray]]:
    """All rows in order; the last batch is filled with rows of weight 0."""
    batches = []
    for start in range(0, len(rows.label), batch_size):
        part = {name: x[start : start + batch_size] for name, x in rows._asdict().items()}
        missing = batch_size - len(part["label"])
        weight = np.ones(len(part["label"]), np.float32)
        part = {name: np.concatenate([x, x[:1].repeat(missing, 0)]) for name, x in part.items()}
        batches.append(part | {"weight": np.pad(weight, (0, missing))})
    return batches


def row_results(
    logits: Logits, params: PyTree, rows: Rows, *, batch_size: int = 256, side: Any = None
) -> RowResults:
    """Answer and loss of every row, in order: what a paired comparison of two models needs.

    Args:
      logits: Scores of the classes.
      params: Of the model.
      rows: In every process.
      batch_size: Rows at a time; the devices of the mesh's batch axes divide it.
      side: What stands beside the kernels of linear layers.
    """

    def of_batch(params: PyTree, batch: Batch, side: Any) -> tuple[Array, Array]:
        return _of_rows(logits(params, batch, None, side=side), batch["label"])

    # Every process reads all results.
    of_batch = jax.jit(of_batch, out_shardings=_replicated(params))
    found = [jax.device_get(of_batch(params, batch, side)) for batch in _batches(rows, batch_size)]
    nats, answers = (np.concatenate(x)[: len(rows.label)] for x in zip(*found, strict=True))
    return RowResults(answers, answers == rows.label, nats)


def _replicated(params: PyTree) -> NamedSharding | None:
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params))
    meshes = [each.mesh for each in shardings if isinstance(each, NamedSharding)]
    return NamedSharding(meshes[0], PartitionSpec()) if meshes else None


def check_sizes(
    config: models.EncoderConfig | models.DecoderConfig, vocab_size: int, length: int
) -> None:
    """Refuses tokens and positions that a model does not have.

    Raises:
      ValueError: If there are some.
    """
    if vocab_size > config.vocab_size:
        raise ValueError(
            f"vocab_size: got {config.vocab_size}, but the tokenizer has {vocab_size} tokens"
        )
    if not 0 < length <= config.context:
        raise ValueError(f"length: got {length}, wanted at most context = {config.context}")
