"""A small encoder, and batches for it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.models import EncoderConfig, encoder
from tests.models.decoders import jit

BERT = EncoderConfig(
    vocab_size=64, width=16, depth=2, heads=4, hidden=24, context=12, classes=3, norm_eps=1e-6
)


def wide(config, **changes):
    return dataclasses.replace(config, param_dtype="float64", compute_dtype="float64", **changes)


def batch(rows=4, length=10, seed=0):
    """Rows of different lengths, the first without padding, each of two sentences."""
    rng = np.random.default_rng(seed)
    count = np.concatenate([[length], rng.integers(3, length, rows - 1)])[:, None]
    return {
        "tokens": rng.integers(0, 64, (rows, length), dtype=np.int32),
        "mask": np.arange(length) < count,
        "types": (np.arange(length) >= count // 2).astype(np.int32),
        "labels": rng.integers(0, 3, rows, dtype=np.int32),
    }


@functools.partial(jit, static_argnums=0)
def hidden(config, params, given):
    return encoder.hidden(config, params, given["tokens"], given["mask"], given["types"])


@functools.partial(jit, static_argnums=0)
def logits(config, params, given, side=None, dropout_key=None):
    return scores(config, params, given, side=side, dropout_key=dropout_key)


@functools.partial(jit, static_argnums=0)
def loss_and_gradient(config, params, given, dropout_key=None):
    loss = functools.partial(cross_entropy, config, given=given, dropout_key=dropout_key)
    return jax.value_and_grad(loss)(params)


def scores(config, params, given, **options):
    rows = (given["tokens"], given["mask"], given["types"])
    return encoder.logits(config, params, *rows, **options)


def cross_entropy(config, params, given, **options):
    logs = jax.nn.log_softmax(scores(config, params, given, **options))
    return -jnp.mean(jnp.take_along_axis(logs, given["labels"][:, None], 1))
