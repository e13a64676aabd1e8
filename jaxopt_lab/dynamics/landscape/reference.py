"""Training to the point around which the ensemble is run."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, Key, PyTree

from jaxopt_lab.dynamics.landscape import flat
from jaxopt_lab.dynamics.landscape.batches import batch_indices, check_sampling
from jaxopt_lab.dynamics.landscape.flat import Loss
from jaxopt_lab.dynamics.landscape.systems import System


class ReferencePoint(NamedTuple):
    """A trained point and the way to it; the first record is the start."""

    params: PyTree  # float64
    steps: Int[np.ndarray, "records"]  # of both phases
    loss: Float[np.ndarray, "records"]  # of the whole data
    gradient_norm: Float[np.ndarray, "records"]  # of the whole data


def reference_point(
    key: Key[Array, ""],
    system: System,
    *,
    sgd_steps: int,
    sgd_rate: float,
    batch_size: int,
    gd_steps: int = 0,
    gd_rate: float | None = None,
    params: PyTree | None = None,
    records: int = 20,
) -> ReferencePoint:
    """Trains with SGD, batches drawn with replacement, then with gradient descent on all data.

    Gradient descent brings the mean gradient down, which SGD leaves at the level of its noise.

    Args:
      key: Typed key of the initialisation and the batches.
      system: What to train.
      sgd_steps: Steps of SGD.
      sgd_rate: Its learning rate.
      batch_size: Samples of its batches.
      gd_steps: Steps of gradient descent.
      gd_rate: Its learning rate; None takes that of SGD.
      params: Where to start; None calls `system.init`.
      records: Records of each phase, at most.

    Raises:
      ValueError: An argument out of range, or the training left the finite numbers.

    >>> from jaxopt_lab.dynamics.landscape.quadratics import finite_sum
    >>> from jaxopt_lab.dynamics.landscape.systems import quadratic
    >>> well = quadratic(finite_sum([1.0, 1.0], [1.0, 3.0]))
    >>> rates = {"sgd_rate": 0.1, "gd_rate": 1.0}
    >>> point = reference_point(
    ...     jax.random.key(0), well, sgd_steps=4, gd_steps=2, batch_size=1, **rates
    ... )
    >>> float(point.params[0]), float(point.gradient_norm[-1])
    (-2.0, 0.0)
    """
    if records < 1 or sgd_steps < 0 or gd_steps < 0:
        raise ValueError(
            f"sgd_steps, gd_steps, records: got {sgd_steps}, {gd_steps}, {records}, expected none "
            "negative and a positive number of records"
        )
    with jax.enable_x64(True):
        init_key, batch_key = jax.random.split(key)
        params = flat.in_double(system.init(init_key) if params is None else params)
        data = flat.in_double(system.data)
        samples = flat.check_loss(system.loss, params, data)
        check_sampling(samples, batch_size, "with_replacement")
        log = [(0, *_level(system.loss, params, data))]
        phases = ((sgd_steps, sgd_rate, batch_size), (gd_steps, gd_rate or sgd_rate, None))
        for steps, rate, size in phases:
            before = log[-1][0]
            bounds = np.unique(np.linspace(0, steps, records + 1).round().astype(int))
            for first, last in zip(bounds[:-1], bounds[1:], strict=True):
                params = _descend(
                    system.loss, size, batch_key, jnp.float64(rate), first, last, params, data
                )
                log.append((before + int(last), *_level(system.loss, params, data)))
        params = jax.device_get(params)
    steps, losses, norms = (np.asarray(column) for column in zip(*log, strict=True))
    if not np.isfinite(losses).all():
        raise ValueError(f"the loss became {losses[-1]}: lower sgd_rate or gd_rate")
    return ReferencePoint(params, steps, losses, norms)


@functools.partial(jax.jit, static_argnums=0)
def _level(loss: Loss, params: PyTree, data: PyTree) -> tuple[Array, Array]:
    value, gradient = jax.value_and_grad(loss)(params, data)
    return value, jnp.linalg.norm(ravel_pytree(gradient)[0])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _descend(
    loss: Loss,
    batch_size: int | None,
    key: Key[Array, ""],
    rate: Float[Array, ""],
    first: Int[Array, ""],
    last: Int[Array, ""],
    params: PyTree,
    data: PyTree,
) -> PyTree:
    """Steps first to last - 1, on batches or, without a batch size, on all data."""
    samples = flat.sample_count(data)

    def step(number: Array, params: PyTree) -> PyTree:
        batch = data
        if batch_size is not None:
            drawn = batch_indices(key, number, num_samples=samples, batch_size=batch_size)
            batch = flat.take(data, drawn)
        gradient = jax.grad(loss)(params, batch)
        return jax.tree.map(lambda p, g: p - rate * g, params, gradient)

    return jax.lax.fori_loop(first, last, step, params)
