"""The systems of the ensemble laboratory: a loss over batches, its parameters and its data.

Any `loss(params, batch)` that returns the mean loss of a batch takes part: a `System` adds a name,
a starting point and the data, a tree of arrays whose leading axis counts samples.

Source: architectures of Ignashin et al., "Why SGD is not Brownian Motion: A New Perspective on
Stochastic Dynamics", arXiv 2605.22644, released code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Key, PyTree

from jaxopt_lab.dynamics.landscape import flat
from jaxopt_lab.dynamics.landscape.flat import Loss
from jaxopt_lab.dynamics.landscape.networks import (
    adaptive_average_pool,
    cnn_loss,
    linear_layers,
    linear_parameters,
    mlp_loss,
    nano_gpt_loss,
)
from jaxopt_lab.dynamics.landscape.quadratics import FiniteSum
from jaxopt_lab.dynamics.landscape.text import ALPHABET, encode


@dataclass(frozen=True, eq=False)
class System:
    """A loss, a starting point and the data.

    Args:
      name: What tables and files call it.
      loss: (params, batch) -> mean loss of the batch, a scalar.
      init: Typed key -> tree of parameters, in JAX's default floating type.
      data: Tree of arrays with a leading sample axis.
    """

    name: str
    loss: Loss
    init: Callable[[Key[Array, ""]], PyTree]
    data: PyTree

    @property
    def samples(self) -> int:
        """Number of samples N."""
        return flat.sample_count(self.data)

    @property
    def parameters(self) -> int:
        """Number of parameters D."""
        return flat.parameter_count(jax.eval_shape(self.init, jax.random.key(0)))


def mlp(
    images: ArrayLike,
    labels: ArrayLike,
    *,
    pooled: int | None = 6,
    hidden: Sequence[int] = (8,),
    classes: int = 10,
) -> System:
    """A multilayer perceptron with SiLU on images pooled to a few pixels, cross-entropy.

    The defaults are the MLP-386: 28 x 28 pixels averaged to 6 x 6, 36 → 8 → 10.
    `pooled=None, hidden=(128,)` has 101 770 parameters.

    Args:
      images: Pixels in [0, 1], shape (samples, height, width).
      labels: Classes as integers, shape (samples,).
      pooled: Side of the pooled image; None keeps the pixels.
      hidden: Widths of the hidden layers.
      classes: Number of classes.

    Raises:
      ValueError: Shapes or labels that do not fit.

    >>> mlp(np.zeros((4, 28, 28)), np.arange(4)).parameters
    386
    """
    images, labels = _labelled(images, labels, classes)
    if pooled is not None:
        images = adaptive_average_pool(images, pooled)
    inputs = images.reshape(len(images), -1)
    widths = (inputs.shape[1], *hidden, classes)

    def init(key: Key[Array, ""]) -> PyTree:
        return linear_layers(key, widths)

    return System(
        f"mlp-{linear_parameters(widths)}", mlp_loss, init, {"inputs": inputs, "labels": labels}
    )


def cnn(
    images: ArrayLike,
    labels: ArrayLike,
    *,
    pooled: int | None = None,
    channels: int = 12,
    hidden: int = 11,
    classes: int = 10,
) -> System:
    """A small convolutional network: 3 x 3, batch norm, SiLU, global average, one hidden layer.

    Batch norm uses the statistics of the batch it is given, as in training. They couple the
    samples: the loss of a batch is no mean over its samples, the mean gradient of batches is not
    the gradient of the whole data (they differ at order 1/B), and noise statistics must be taken
    from mini-batches (`noise_statistics(..., batches=)`).

    Args:
      images: Pixels in [0, 1], shape (samples, height, width).
      labels: Classes as integers, shape (samples,).
      pooled: Side to which images are averaged first; None keeps the pixels.
      channels: Filters of the convolution, which has no bias.
      hidden: Width of the hidden layer.
      classes: Number of classes.

    Raises:
      ValueError: Shapes or labels that do not fit.

    >>> cnn(np.zeros((4, 28, 28)), np.arange(4)).parameters
    395
    """
    images, labels = _labelled(images, labels, classes)
    if pooled is not None:
        images = adaptive_average_pool(images, pooled)

    def init(key: Key[Array, ""]) -> PyTree:
        kernel_key, linear_key = jax.random.split(key)
        kernel = jax.random.uniform(kernel_key, (9, channels), minval=-1 / 3, maxval=1 / 3)
        return {
            "kernel": kernel,
            "scale": jnp.ones(channels),
            "shift": jnp.zeros(channels),
            "linear": linear_layers(linear_key, (channels, hidden, classes)),
        }

    return System("cnn", cnn_loss, init, {"inputs": images, "labels": labels})


def nano_gpt(text: str, *, samples: int | None = None, block: int = 16, width: int = 8) -> System:
    """A one-layer, one-head transformer on characters: next-character cross-entropy.

    Pre-norm, learned positions, no biases outside the layer norms, GELU with one times the width,
    separate output head, weights N(0, 0.02²). The defaults have 960 parameters.

    Args:
      text: Text of the alphabet of `read_text`.
      samples: Number of windows, the first ones; None takes all. A window starts at every
        character.
      block: Characters a window predicts from.
      width: Width of the residual stream.

    Raises:
      ValueError: A character outside the alphabet, or too little text.

    >>> nano_gpt("the quick brown fox iumps ouer the lazy dog").parameters
    960
    """
    tokens = encode(text)
    windows = len(tokens) - block
    wanted = 1 if samples is None else samples
    if not 1 <= wanted <= windows:
        raise ValueError(
            f"text: {len(tokens)} characters hold {max(windows, 0)} windows of {block} + 1, "
            f"samples asks for {wanted}"
        )
    starts = np.arange(windows if samples is None else samples)
    data = {"tokens": tokens[starts[:, None] + np.arange(block + 1)]}
    symbols = len(ALPHABET)

    def init(key: Key[Array, ""]) -> PyTree:
        shapes = {
            "tokens": (symbols, width),
            "positions": (block, width),
            "qkv": (width, 3 * width),
            "attention_out": (width, width),
            "up": (width, width),
            "down": (width, width),
            "head": (width, symbols),
        }
        keys = jax.random.split(key, len(shapes))
        weights = {
            name: 0.02 * jax.random.normal(k, shape)
            for k, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        norms = {
            name: {"scale": jnp.ones(width), "shift": jnp.zeros(width)}
            for name in ("attention_norm", "mlp_norm", "final_norm")
        }
        return {**weights, **norms}

    return System("nanogpt", nano_gpt_loss, init, data)


def quadratic(problem: FiniteSum) -> System:
    r"""A finite sum of quadratics: sample k has the loss $g_k^\top w + \frac12 w^\top H_k w$.

    Starts at 0. `moments` has the exact mean and covariance of the ensemble on it.

    >>> from jaxopt_lab.dynamics.landscape.quadratics import finite_sum
    >>> quadratic(finite_sum([1.0, 3.0], [0.5, -0.5])).parameters
    1
    """
    size = problem.gradients.shape[1]
    data = {"hessians": problem.hessians, "gradients": problem.gradients}
    return System("quadratic", _quadratic_loss, lambda key: jnp.zeros(size), data)


def _labelled(images: ArrayLike, labels: ArrayLike, classes: int) -> tuple[np.ndarray, np.ndarray]:
    images, labels = np.asarray(images, dtype=np.float64), np.asarray(labels)
    if images.ndim != 3:
        raise ValueError(f"images has shape {images.shape}, expected (samples, height, width)")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels has shape {labels.shape}, expected {images.shape[:1]}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels is {labels.dtype}, expected integers")
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"labels: from {labels.min()} to {labels.max()}, expected 0..{classes - 1}"
        )
    return images, labels.astype(np.int32)


def _quadratic_loss(params: Array, batch: PyTree) -> Array:
    linear = batch["gradients"] @ params
    curved = jnp.einsum("kij,i,j->k", batch["hessians"], params, params)
    return jnp.mean(linear + curved / 2)
