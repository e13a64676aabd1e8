r"""Interventions on the noise of a minibatch gradient, as Optax transforms.

A minibatch gradient is $g_n = \bar g + \xi_n$: the full gradient and a noise of mean zero. The
transforms here change $\xi_n$ alone, so that a run with them and one without differ in nothing but
the noise. They stand first in a chain and take the full gradient of the same parameters as the
extra argument `full_grad`, one full-batch gradient a step.

Source: Ignashin, Radovskaya, Semenov, Lopatin, Potapov, Kovalenko, Veprikov, Shestakov, Leonidov,
Beznosikov, "Why SGD is not Brownian Motion: A New Perspective on Stochastic Dynamics",
arXiv 2605.22644; the interventions are experiments 7 to 11 of its repository.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from jaxopt_lab.core.numerics import Scalar

DirectionKind = Literal["flat", "sharp", "theory", "random"]

# Of the predictor eta d / (2 |lambda| + epsilon) that ranks the directions of "theory".
_PREDICTOR_EPSILON = 1e-6


def interpolate_noise(alpha: Scalar) -> optax.GradientTransformationExtraArgs:
    r"""Scale the noise: $\bar g + \alpha (g_n - \bar g)$.

    Alpha 0 is gradient descent and 1 is SGD, both to the last bit: what is evaluated is
    $\alpha g_n + (1 - \alpha) \bar g$.

    Args:
      alpha: $\alpha$; a negative one mirrors the noise.

    Raises:
      ValueError: `alpha` is NaN or infinite; at `update`, `full_grad` is missing or has other
        leaves than the gradient.

    Example:
      >>> tx = optax.chain(interpolate_noise(0.5), optax.sgd(0.1))
      >>> w = jnp.array([1.0, 2.0])
      >>> grad, full_grad = jnp.array([4.0, 0.0]), jnp.array([2.0, 2.0])
      >>> updates, _ = tx.update(grad, tx.init(w), w, full_grad=full_grad)
      >>> [round(float(u), 3) for u in updates]
      [-0.3, -0.1]

    Source: experiment 10 of the repository of Ignashin et al., arXiv 2605.22644.
    """
    _check_finite("alpha", alpha)

    def change(grad: optax.Updates, full: optax.Updates) -> optax.Updates:
        def one(g: Array, m: Array) -> Array:
            a = jnp.asarray(alpha, g.dtype)
            return a * g + (1 - a) * m

        return jax.tree.map(one, grad, full)

    return _intervention(change)


def match_noise_norm(alpha: Scalar) -> optax.GradientTransformationExtraArgs:
    r"""Give the noise $\alpha$ times the norm of the full gradient.

    With $\xi = g_n - \bar g$ and norms over all leaves, $\bar g + \alpha \|\bar g\| \xi / \|\xi\|$:
    noise of a known size relative to the signal at every step. Alpha 0 is gradient descent; there
    is no alpha that is SGD. Without noise the full gradient comes back.

    Args:
      alpha: $\alpha$, noise to signal.

    Raises:
      ValueError: `alpha` is NaN or infinite; at `update`, `full_grad` is missing or has other
        leaves than the gradient.

    Example:
      >>> tx = match_noise_norm(0.1)
      >>> full_grad = jnp.array([3.0, 4.0])
      >>> changed, _ = tx.update(jnp.array([3.0, 6.0]), tx.init(full_grad), full_grad=full_grad)
      >>> [round(float(g), 3) for g in changed]
      [3.0, 4.5]

    Source: experiment 11 of the repository of Ignashin et al., arXiv 2605.22644.
    """
    _check_finite("alpha", alpha)

    def change(grad: optax.Updates, full: optax.Updates) -> optax.Updates:
        noise = jax.tree.map(jnp.subtract, grad, full)
        size, wanted = _norm(noise), alpha * _norm(full)
        factor = jnp.where(size > 0, wanted / jnp.where(size > 0, size, 1), 0)
        return jax.tree.map(lambda m, x: m + factor.astype(x.dtype) * x, full, noise)

    return _intervention(change)


def project_noise(
    directions: Float[Array, "D k"], factor: Scalar
) -> optax.GradientTransformationExtraArgs:
    r"""Scale the noise inside a subspace: $\bar g + \xi + (a - 1) P \xi$.

    $P$ projects on the span of the directions: $a = 0$ suppresses the noise there, $a = 3$ trebles
    it, $a = 1$ is SGD; outside nothing changes. Near a critical point the variance along directions
    that the Hessian does not mix with others follows as $a^2$.

    Args:
      directions: Vectors in the columns, as long as the parameters flattened by
        `jax.flatten_util.ravel_pytree`; any basis of the subspace, it is orthonormalised here.
      factor: $a$.

    Raises:
      ValueError: `directions` has not two axes, has more columns than rows or dependent columns, or
        `factor` is NaN or infinite; at `init`, the parameters have another number of entries; at
        `update`, `full_grad` is missing or has other leaves than the gradient.

    Example:
      >>> tx = project_noise(jnp.array([[1.0], [0.0]]), 3.0)
      >>> w = jnp.zeros(2)
      >>> changed, _ = tx.update(jnp.array([1.5, 1.5]), tx.init(w), w, full_grad=jnp.ones(2))
      >>> changed.tolist()
      [2.5, 1.5]

    Source: experiments 7 to 9 of the repository of Ignashin et al., arXiv 2605.22644.
    """
    _check_finite("factor", factor)
    _check_directions(directions)
    basis = jnp.linalg.qr(directions)[0]

    def check(params: optax.Params) -> None:
        entries = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
        if entries != basis.shape[0]:
            raise ValueError(
                f"directions: columns of {basis.shape[0]} entries, the parameters have {entries}"
            )

    def change(grad: optax.Updates, full: optax.Updates) -> optax.Updates:
        noise, unravel = ravel_pytree(jax.tree.map(jnp.subtract, grad, full))
        within = basis.astype(noise.dtype)
        inside = within @ (within.T @ noise)
        changed = unravel(jnp.asarray(factor - 1, noise.dtype) * inside)
        return jax.tree.map(jnp.add, grad, changed)

    return _intervention(change, check)


def choose_directions(
    curvature: Float[Array, " m"],
    eigenvectors: Float[Array, "D m"],
    kind: DirectionKind,
    count: int,
    *,
    gradient_variance: Float[Array, " m"] | None = None,
    key: Array | None = None,
) -> Float[Array, "D {count}"]:
    r"""Directions to intervene on, of one of the kinds that the experiments compare.

    ======  =======================================================================
    flat    eigenvectors of the smallest $|\lambda|$
    sharp   eigenvectors of the largest positive $\lambda$
    theory  eigenvectors of the largest predicted variance, $d / (2|\lambda| + 10^{-6})$
    random  an orthonormal basis of a random subspace of the same rank: the control
    ======  =======================================================================

    Args:
      curvature: $\lambda$ of all or some of the eigenvectors, in any order.
      eigenvectors: Orthonormal, in the columns, in the order of `curvature`.
      kind: One of the above.
      count: Directions wanted.
      gradient_variance: $d$ of every eigenvector; for "theory".
      key: For "random".

    Returns:
      Orthonormal columns, the first the flattest, sharpest or most spread out.

    Raises:
      ValueError: The kind is unknown, `count` is not between 1 and the number of eligible
        directions, or what the kind needs is missing.

    >>> curvature, eigenvectors = jnp.array([2.0, -1e-3, 5.0]), jnp.eye(3)
    >>> choose_directions(curvature, eigenvectors, "sharp", 1).ravel().tolist()
    [0.0, 0.0, 1.0]
    """
    parameters, known = eigenvectors.shape
    if kind not in get_args(DirectionKind):
        raise ValueError(
            f"kind: got {kind!r}, expected one of {', '.join(get_args(DirectionKind))}"
        )
    sharp = int((curvature > 0).sum())
    eligible = {"sharp": sharp, "random": parameters}.get(kind, known)
    if not 1 <= count <= eligible:
        raise ValueError(
            f"count: got {count}, expected 1 to {eligible}, the directions eligible as {kind}"
        )
    if kind == "random":
        if key is None:
            raise ValueError("key: missing; random directions need one, as jax.random.key(0)")
        drawn = jax.random.normal(key, (parameters, count), eigenvectors.dtype)
        return jnp.linalg.qr(drawn)[0]
    if kind == "theory":
        if gradient_variance is None:
            raise ValueError("gradient_variance: missing; the predicted variance needs it")
        score = gradient_variance / (2 * jnp.abs(curvature) + _PREDICTOR_EPSILON)
    else:
        score = curvature if kind == "sharp" else -jnp.abs(curvature)
    return eigenvectors[:, jnp.argsort(-score)[:count]]


def _intervention(
    change: Callable[[optax.Updates, optax.Updates], optax.Updates],
    check: Callable[[optax.Params], None] = lambda params: None,
) -> optax.GradientTransformationExtraArgs:
    """A stateless transform from a function of the gradient and the full gradient."""

    def init(params: optax.Params) -> optax.EmptyState:
        check(params)
        return optax.EmptyState()

    def update(updates, state, params=None, *, full_grad=None, **extra_args):
        del params, extra_args
        return change(updates, _full_gradient(updates, full_grad)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _full_gradient(updates: optax.Updates, full_grad: Any) -> optax.Updates:
    """The full gradient, checked, without the leaves that are masked in the updates."""
    if full_grad is None:
        raise ValueError(
            "full_grad: missing; the noise is the difference to it. Pass "
            "tx.update(grads, state, params, full_grad=jax.grad(full_loss)(params))"
        )

    def masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    def one(path: Any, update: Any, full: Any) -> Any:
        if masked(update):
            return update
        if jnp.shape(full) != update.shape:
            raise ValueError(
                f"full_grad: leaf {jax.tree_util.keystr(path) or '(the only one)'} has shape "
                f"{jnp.shape(full)}, the gradient {update.shape}"
            )
        return jnp.asarray(full, update.dtype)

    try:
        return jax.tree_util.tree_map_with_path(one, updates, full_grad, is_leaf=masked)
    except (TypeError, ValueError) as error:
        if str(error).startswith("full_grad"):
            raise
        raise ValueError(f"full_grad: other leaves than the gradient: {error}") from error


def _norm(tree: optax.Updates) -> Array:
    """Norm over all leaves, accumulated at least in float32."""
    wide = jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)
    return jnp.asarray(optax.tree.norm(wide))


def _check_finite(name: str, value: Scalar) -> None:
    if isinstance(value, int | float) and not math.isfinite(value):
        raise ValueError(f"{name}: got {value}, expected a finite number")


def _check_directions(directions: Array) -> None:
    shape = jnp.shape(directions)
    if len(shape) != 2 or not 1 <= shape[1] <= shape[0]:
        raise ValueError(
            f"directions: got shape {shape}, expected (D, k) with a direction in each column"
        )
    if isinstance(directions, jax.core.Tracer):
        return  # of a hyperparameter that is injected: there is no value to look at
    values = np.linalg.svd(np.asarray(directions, np.float64), compute_uv=False)
    if not values[-1] > 1e-6 * values[0]:
        raise ValueError(
            f"directions: the columns are dependent (singular values {values[0]:.3g} "
            f"to {values[-1]:.3g}), expected a basis"
        )
