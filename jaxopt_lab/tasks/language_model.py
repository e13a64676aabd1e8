"""Next-token prediction with a decoder: the task of `pretrain`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxopt_lab import data, models
from jaxopt_lab.models.cross_entropy import predictions
from jaxopt_lab.report.progress import error_of
from jaxopt_lab.step import Loss
from jaxopt_lab.tasks.task import Evaluation, Report, Task


def language_model_loss(
    config: models.DecoderConfig,
    *,
    z_loss: float = 0.0,
    head_chunks: int = 1,
    mesh: models.OnMesh = None,
) -> Loss:
    """Cross-entropy in nats per token, weighted by the number of tokens.

    With a z-loss, the objective is the sum of both, and the metrics tell them apart: `loss` is the
    plain cross-entropy, `z_loss` what is added to it. A batch that has `documents` is held-out
    text: its metric `nats` is the loss of each target (B, T), and nothing regularises. With
    `perturbation=(direction, scale)` it is `models.probe_loss`, its layers in a scan.

    >>> config = models.DecoderConfig(vocab_size=64, width=32, depth=2, heads=4, context=16)
    >>> params = models.init_params(config, jax.random.key(0))
    >>> batch = {"tokens": jnp.ones((1, 9), int)}
    >>> objective, _, metrics = language_model_loss(config, z_loss=1e-2)(params, batch, None)
    >>> bool(jnp.isclose(objective, metrics["loss"] + metrics["z_loss"]))
    True

    Args:
      config: Of the decoder.
      z_loss: Weight of the squared log-sum-exp.
      head_chunks: Pieces in which the head is evaluated.
      mesh: Pins activations to it.
    """
    scanned = dataclasses.replace(config, loop="scanned")

    def loss(
        params: models.Params,
        batch: Mapping[str, jax.Array],
        key: jax.Array | None,
        side: Mapping[str, Any] | None = None,
        perturbation: tuple[Any, Any] | None = None,
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        del key  # nothing is drawn
        if perturbation is not None:
            found = models.probe_loss(scanned, batch, mesh=mesh)(params, *perturbation)
            return found, predictions(config, batch).count, {}
        if "documents" in batch:
            nats = models.target_nats(
                config, params, batch, head_chunks=head_chunks, mesh=mesh, side=side
            )
            tokens = jnp.sum(batch["mask"] != 0, dtype=jnp.int32)
            return jnp.sum(nats) / jnp.maximum(tokens, 1), tokens, {"nats": nats}
        objective, aux = models.loss(
            config, params, batch, z_loss=z_loss, head_chunks=head_chunks, mesh=mesh, side=side
        )
        if not z_loss:  # then they are the same, and one sum over the mesh is enough
            return objective, aux["tokens"], {}
        plain = aux["cross_entropy"]
        return objective, aux["tokens"], {"loss": plain, "z_loss": objective - plain}

    return loss


class Text(NamedTuple):
    """What a language model learns from and is evaluated on."""

    corpus: data.Corpus
    # What `data.windows_of` returned, by the names of the sets; `validation` is the first.
    held_out: Mapping[str, Sequence[data.RowsOnDemand]]


def language_model(
    config: models.DecoderConfig,
    mesh: Mesh | models.Placement,
    text: Text | None = None,
    *,
    seed: int = 0,
    z_loss: float = 0.0,
    head_chunks: int = 1,
) -> Task:
    """The task of a decoder on a mesh.

    A held-out set is scored in nats per token, which ranks checkpoints, and in bits per byte: the
    mean over all its targets, end-of-text among them, and the same sum of nats over the bytes that
    just these targets stand for. Beside both stands their standard error over documents.

    Args:
      config: Of the decoder.
      mesh: Axes data, fsdp, tensor.
      text: Without it the task can be compiled, but has neither batches nor evaluations.
      seed: Of the order of training windows.
      z_loss: As for `language_model_loss`.
      head_chunks: As for `language_model_loss`.
    """
    loss = language_model_loss(config, z_loss=z_loss, head_chunks=head_chunks, mesh=mesh)
    row = {"tokens": jax.ShapeDtypeStruct((config.context + 1,), jnp.int32)}
    if config.document_mask:
        row["segment_ids"] = jax.ShapeDtypeStruct((config.context,), jnp.int32)
    return Task(
        init=functools.partial(models.init_params, config),
        loss=loss,
        param_specs=models.partition_specs(config, mesh),
        batch_spec=row,
        batch=None if text is None else _rows(config, text, seed),
        evaluations={} if text is None else _evaluations(text, loss),
    )


def _rows(
    config: models.DecoderConfig, text: Text, seed: int
) -> Callable[[Sequence[int]], Mapping[str, np.ndarray]]:
    return data.train_rows(
        text.corpus, context=config.context, seed=seed, segment_ids=config.document_mask
    )


def _evaluations(text: Text, loss: Loss) -> dict[str, Evaluation]:
    unigram = data.unigram_model(text.corpus)
    return {
        name: _evaluation(name, held_out, text.corpus.tokenizer, unigram, loss)
        for name, held_out in text.held_out.items()
    }


def _evaluation(
    name: str,
    held_out: Sequence[data.RowsOnDemand],
    tokenizer: data.Tokenizer,
    unigram: np.ndarray,
    loss: Loss,
) -> Evaluation:
    tokens, _ = data.count_targets(held_out, tokenizer)
    told = np.concatenate([batch["documents"][batch["mask"] > 0] for batch in held_out])
    documents = len(np.unique(told))
    nats, bits = data.nats_under(unigram, held_out, tokenizer)
    bits_per_nat = data.bits_per_byte(1.0, held_out, tokenizer)
    in_nats, in_bits = (
        ("validation_loss", "bits_per_byte")
        if name == data.VALIDATION
        else (f"{name}/loss", f"{name}/bits_per_byte")
    )
    report: dict[str, Report] = {
        in_nats: lambda means: means["loss"],
        in_bits: lambda means: means["loss"] * bits_per_nat,
    }
    if documents > 1:
        report[error_of(in_nats)] = lambda means: means["standard_error"]
        report[error_of(in_bits)] = lambda means: means["standard_error"] * bits_per_nat
    about = {"tokens": tokens, "documents": documents}
    about |= {"unigram_nats": nats, "unigram_bits_per_byte": bits}
    return Evaluation(held_out, loss, report, about)
