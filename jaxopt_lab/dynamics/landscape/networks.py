"""The networks of the ensemble laboratory as plain functions of their parameters.

Layers are written as matrix products throughout: with a replica axis on the parameters these stay
batched products, where convolutions and lookups would become slow grouped ones and scatters.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Key, PyTree

_LAYER_NORM_EPSILON = 1e-5
_BATCH_NORM_EPSILON = 1e-5


def adaptive_average_pool(images: ArrayLike, size: int) -> Float[np.ndarray, "samples size size"]:
    """Averages square or oblong images to size x size as PyTorch's adaptive pooling does.

    Output pixel i averages the inputs from floor(i n / size) to ceil((i + 1) n / size): windows
    overlap where size does not divide n.

    >>> adaptive_average_pool(np.arange(9.0).reshape(1, 3, 3), 2).tolist()
    [[[2.0, 3.0], [5.0, 6.0]]]
    """
    images = np.asarray(images, dtype=np.float64)
    if not 1 <= size <= min(images.shape[-2:]):
        raise ValueError(f"size: {size} is not between 1 and the image's {images.shape[-2:]}")
    rows, columns = (_pooling_weights(n, size) for n in images.shape[-2:])
    return rows @ images @ columns.T


def _pooling_weights(length: int, size: int) -> Float[np.ndarray, "size length"]:
    weights = np.zeros((size, length))
    for i in range(size):
        start, stop = i * length // size, -(-(i + 1) * length // size)
        weights[i, start:stop] = 1 / (stop - start)
    return weights


def linear_layers(key: Key[Array, ""], widths: Sequence[int]) -> list[dict[str, Array]]:
    """Weights and biases uniform in ±1/√fan_in, PyTorch's default."""
    layers = []
    pairs = list(itertools.pairwise(widths))
    for layer_key, (fan_in, fan_out) in zip(jax.random.split(key, len(pairs)), pairs, strict=True):
        weight_key, bias_key = jax.random.split(layer_key)
        bound = fan_in**-0.5
        layers.append(
            {
                "weight": jax.random.uniform(
                    weight_key, (fan_in, fan_out), minval=-bound, maxval=bound
                ),
                "bias": jax.random.uniform(bias_key, (fan_out,), minval=-bound, maxval=bound),
            }
        )
    return layers


def linear_parameters(widths: Sequence[int]) -> int:
    """Number of weights and biases."""
    return sum((fan_in + 1) * fan_out for fan_in, fan_out in itertools.pairwise(widths))


def mlp_loss(params: PyTree, batch: PyTree) -> Array:
    """Mean cross-entropy of `mlp`."""
    return _cross_entropy(_perceptron(params, batch["inputs"]), batch["labels"])


def cnn_loss(params: PyTree, batch: PyTree) -> Array:
    """Mean cross-entropy of `cnn`, with the batch's own statistics."""
    x_BxHxWxC = shifted_images(batch["inputs"]) @ params["kernel"]
    mean = jnp.mean(x_BxHxWxC, axis=(0, 1, 2))
    variance = jnp.var(x_BxHxWxC, axis=(0, 1, 2))
    unit = (x_BxHxWxC - mean) * jax.lax.rsqrt(variance + _BATCH_NORM_EPSILON)
    active = jax.nn.silu(unit * params["scale"] + params["shift"])
    return _cross_entropy(
        _perceptron(params["linear"], jnp.mean(active, axis=(1, 2))), batch["labels"]
    )


def nano_gpt_loss(params: PyTree, batch: PyTree) -> Array:
    """Mean cross-entropy of the next character of `nano_gpt`."""
    logits = nano_gpt_logits(params, batch["tokens"][:, :-1])
    return _cross_entropy(logits, batch["tokens"][:, 1:])


def nano_gpt_logits(params: PyTree, tokens_BxT: Int[Array, "B T"]) -> Float[Array, "B T symbols"]:
    """Logits of the character after each."""
    length, width = params["positions"].shape
    table = params["tokens"]
    x_BxTxD = jax.nn.one_hot(tokens_BxT, len(table), dtype=table.dtype) @ table
    x_BxTxD = x_BxTxD + params["positions"]
    normed = _layer_norm(params["attention_norm"], x_BxTxD)
    q, k, v = jnp.split(normed @ params["qkv"], 3, axis=-1)
    scores_BxTxS = q @ jnp.swapaxes(k, -1, -2) / np.sqrt(width)
    causal = jnp.tril(jnp.ones((length, length), bool))
    attention_BxTxS = jax.nn.softmax(jnp.where(causal, scores_BxTxS, -jnp.inf), axis=-1)
    x_BxTxD = x_BxTxD + attention_BxTxS @ v @ params["attention_out"]
    normed = _layer_norm(params["mlp_norm"], x_BxTxD)
    active = jax.nn.gelu(normed @ params["up"], approximate=False)
    x_BxTxD = x_BxTxD + active @ params["down"]
    return _layer_norm(params["final_norm"], x_BxTxD) @ params["head"]


def shifted_images(images_BxHxW: Array) -> Float[Array, "B H W 9"]:
    """Each pixel's 3 x 3 neighbourhood in rows, zero outside of the image."""
    height, width = images_BxHxW.shape[1:]
    padded = jnp.pad(images_BxHxW, ((0, 0), (1, 1), (1, 1)))
    shifts = [
        padded[:, row : row + height, column : column + width]
        for row in range(3)
        for column in range(3)
    ]
    return jnp.stack(shifts, axis=-1)


def _perceptron(layers: list[dict[str, Array]], x_BxF: Array) -> Array:
    for layer in layers[:-1]:
        x_BxF = jax.nn.silu(x_BxF @ layer["weight"] + layer["bias"])
    return x_BxF @ layers[-1]["weight"] + layers[-1]["bias"]


def _cross_entropy(logits: Array, labels: Array) -> Array:
    picked = jnp.sum(logits * jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), axis=-1)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def _layer_norm(params: dict[str, Array], x: Array) -> Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    unit = centred * jax.lax.rsqrt(variance + _LAYER_NORM_EPSILON)
    return unit * params["scale"] + params["shift"]
