"""A model small enough that a compiled step costs milliseconds, for tests of the trainer alone."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

VOCAB, WIDTH = 13, 16
SPECS = {"table": P(None, "fsdp"), "head": P("fsdp", "tensor"), "bias": P()}
SPECS_UNSPLIT = {"table": P(), "head": P(), "bias": P()}


def init_params(key):
    first, second = jax.random.split(key)
    return {
        "table": jax.random.normal(first, (VOCAB, WIDTH)),
        "head": 0.1 * jax.random.normal(second, (WIDTH, 14)),
        "bias": jnp.zeros((14,)),
    }


def loss_fn(params, batch, key=None):
    """Next-token cross-entropy of a bigram model, with an optional mask over targets."""
    tokens = batch["tokens"]
    logits = jnp.tanh(params["table"][tokens[:, :-1]]) @ params["head"] + params["bias"]
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]
    mask = batch.get("mask", jnp.ones_like(nats))
    count = jnp.sum(mask)
    return jnp.sum(nats * mask) / jnp.maximum(count, 1), count, {}


def batch_at(step, batch_size=32, length=9):
    rng = np.random.default_rng((7, step))
    return {"tokens": rng.integers(0, VOCAB, (batch_size, length), dtype=np.int32)}
