"""Next-token prediction with a decoder: the task of `pretrain`."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxopt_lab import models
from jaxopt_lab.step import Loss
from jaxopt_lab.tasks.task import Task


def language_model_loss(
    config: models.DecoderConfig,
    *,
    z_loss: float = 0.0,
    head_chunks: int = 1,
    mesh: Mesh | None = None,
) -> Loss:
    """Cross-entropy in nats per token, weighted by the number of tokens.

    With a z-loss, the objective is the sum of both, and the metrics tell them apart: `loss` is the
    plain cross-entropy, `z_loss` what is added to it.

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

    def loss(
        params: models.Params, batch: Mapping[str, jax.Array], key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        del key  # nothing is drawn
        objective, aux = models.loss(
            config, params, batch, z_loss=z_loss, head_chunks=head_chunks, mesh=mesh
        )
        if not z_loss:  # then they are the same, and one sum over the mesh is enough
            return objective, aux["tokens"], {}
        plain = aux["cross_entropy"]
        return objective, aux["tokens"], {"loss": plain, "z_loss": objective - plain}

    return loss


def language_model(
    config: models.DecoderConfig, mesh: Mesh, *, z_loss: float = 0.0, head_chunks: int = 1
) -> Task:
    """The task of a decoder on a mesh, without text."""
    row = {"tokens": jax.ShapeDtypeStruct((config.context + 1,), jnp.int32)}
    if config.document_mask:
        row["segment_ids"] = jax.ShapeDtypeStruct((config.context,), jnp.int32)
    return Task(
        init=functools.partial(models.init_params, config),
        loss=language_model_loss(config, z_loss=z_loss, head_chunks=head_chunks, mesh=mesh),
        param_specs=models.partition_specs(config, mesh),
        batch_spec=row,
    )
