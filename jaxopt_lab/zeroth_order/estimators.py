"""Estimates of a gradient from values of the loss, as the first link of an Optax chain."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.routing import MatrixAxesSpec
from jaxopt_lab.zeroth_order.directions import Sampler
from jaxopt_lab.zeroth_order.engines import Engine, sequential
from jaxopt_lab.zeroth_order.probes import Probes, check_integer, default_sampler, initial_state
from jaxopt_lab.zeroth_order.probing import Step, finite_or_zero, transformation


@explains_keywords()
def estimate(
    sampler: Sampler | None = None,
    *,
    eps: Scalar = 1e-3,
    num_directions: int = 1,
    two_sided: bool = True,
    key: Array,
    engine: Engine = sequential(),
    matrix_axes: MatrixAxesSpec = None,
    trainable: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Turns values of the loss into an estimate of its gradient; no backward pass.

    $$g = \frac1q \sum_{j=1}^{q} D_j z_j, \qquad
    D_j = \frac{f(x + \epsilon z_j) - f(x - \epsilon z_j)}{2 \epsilon}.$$

    Any Optax transformation may follow. The first argument of `update` is ignored; `value_fn`, from
    parameters to a scalar, closes over the batch and is evaluated at perturbed parameters. It must
    give the same value each time: no dropout. `probe_fn` in its place perturbs the layers of a
    model inside of its own loop (`jaxopt_lab.zeroth_order.layerwise`).

    A direction whose loss is not finite counts as 0 in the average, and `notfinite_count` of the
    state counts it.

    Args:
      sampler: How directions are drawn; None: `gaussian()`. See `jaxopt_lab.zeroth_order.samplers`.
      eps: $\epsilon$, in units of the parameters.
      num_directions: $q$.
      two_sided: False: $D_j = (f(x + \epsilon z_j) - f(x)) / \epsilon$, with $q + 1$ losses.
      key: A threefry key, from `jax.random.key(seed)`. Its data is part of the state.
      engine: `sequential()`, `chunked(size)` or `vmapped()`: the same numbers, other memory.
      matrix_axes: As for `Probes`.
      trainable: As for `Probes`.

    Returns:
      A transformation with state `ProbeState`. Estimates have the dtypes of the parameters.

    Raises:
      ValueError: The key is no threefry key; `eps` is too small for the dtype of a leaf or of the
        loss; `value_fn` is missing, no scalar, cannot be traced, or draws random numbers; it and
        `probe_fn` are both given.

    Example:
      >>> tx = optax.chain(estimate(key=jax.random.key(0)), optax.sgd(0.1))
      >>> x = jnp.array([1.0, -2.0])
      >>> state, loss = tx.init(x), lambda x: jnp.sum(x**2)
      >>> update = jax.jit(lambda state, x: tx.update(None, state, x, value_fn=loss))
      >>> for _ in range(50):
      ...     updates, state = update(state, x)
      ...     x = optax.apply_updates(x, updates)
      >>> bool(jnp.sum(x**2) < 0.1)
      True

    Source: Malladi, Gao, Nichani, Damian, Lee, Chen and Arora, "Fine-Tuning Language Models with
    Just Forward Passes", arXiv 2305.17333.

    Differs from the released code in: perturbed parameters are a copy, so that adding and removing
    a perturbation leaves no rounding behind.
    """
    check_integer("num_directions", num_directions)
    probes = Probes(sampler, num_directions, two_sided, engine, matrix_axes, trainable)
    return estimated(probes, eps=eps, key=key)


def estimated(
    probes: Probes,
    *,
    eps: Scalar,
    key: Array,
    coefficient: Callable[[Array], Array] = lambda difference: difference,
) -> optax.GradientTransformationExtraArgs:
    """`estimate` with options, and with a function of the differences in their place."""
    size = probes.losses()

    def init(params: optax.Params) -> Any:
        return initial_state(params, key, eps, size)

    def update(step: Step, state: Any, extra_args: Any) -> Any:
        del state, extra_args
        differences = coefficient(step.differences(eps))
        found, _ = step.combined(differences / probes.num_directions)
        return step.tree(found), step.next_state()

    return transformation(probes, default_sampler(probes), eps, init, update)


def forward_estimated(probes: Probes, *, key: Array) -> optax.GradientTransformationExtraArgs:
    """Directional derivatives by forward mode, times their directions."""
    probes.engine.check(probes.num_directions)

    def init(params: optax.Params) -> Any:
        # Nothing is perturbed: a distance that every dtype holds.
        return initial_state(params, key, 1.0, probes.num_directions)

    def update(step: Step, state: Any, extra_args: Any) -> Any:
        del state, extra_args

        def derivative(probe: Array) -> Array:
            key, probe = step.apart(probe)
            direction = step.direction(probe, key=key)
            tangent = step.tree([direction.of(i) for i in range(len(step.leaves))])
            assert step.value_fn is not None
            return jax.jvp(step.value_fn, (step.tree(step.params),), (tangent,))[1]

        probe = jnp.arange(probes.num_directions)
        found = step.seen(probe.size, lambda: probes.engine.map(derivative, probe))
        found, _ = step.combined(finite_or_zero(found) / probes.num_directions)
        return step.tree(found), step.next_state()

    method = "forward_gradient"
    return transformation(probes, default_sampler(probes), None, init, update, whole_trees=method)
