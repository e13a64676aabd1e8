r"""Local smoothness along a run: how fast the gradient turns in the direction of a step.

For one optimizer step from $w$ to $w_+$, with both gradients of the same minibatch,

$$ r = \lVert \nabla f(w_+) - \nabla f(w) \rVert_* / \lVert w_+ - w \rVert $$

in each pair of norms of `jaxopt_lab.core.dual_norms`. Adaptive warm-up assumes that $r$ is at most
$K_0 + K_1 \Delta + K_\rho \Delta^\rho$ of the gap $\Delta = f(w_+) - f_*$ to a target loss;
`jaxopt_lab.diagnostics.smoothness_fit` fits that polynomial.

Source: Riabinin et al., "Where Does Warm-Up Come From? Adaptive Scheduling for Norm-Constrained
Optimizers", arXiv 2602.05813, released code.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxopt_lab.core.dual_norms import DUAL_NORMS, DualNorms, dual_norm, matrix_norm
from jaxopt_lab.core.matrices import MatrixAxes, batch_first
from jaxopt_lab.diagnostics.norms import SMALLEST_DENOMINATOR
from jaxopt_lab.diagnostics.recording import Every, Snapshot
from jaxopt_lab.optim.routing import MatrixAxesSpec, route_with_embeddings
from jaxopt_lab.step import apply_updates


class LocalSmoothness(NamedTuple):
    """One step in one pair of norms, over all matrices of the model."""

    gradient_difference: Float[Array, ""]  # sum of the dual norms
    step_norm: Float[Array, ""]  # largest norm
    ratio: Float[Array, ""]  # NaN where the step norm is at most 1e-12


def local_smoothness(
    grads_before: optax.Updates,
    grads_after: optax.Updates,
    params_before: optax.Params,
    params_after: optax.Params,
    *,
    matrix_axes: MatrixAxesSpec = None,
) -> dict[DualNorms, LocalSmoothness]:
    """Gradient difference over step norm in the three pairs of norms.

    All matrices count, tables of embeddings and output heads included; vectors do not. A stacked
    leaf `(L, m, n)` is L matrices. Differences are taken in float32 or wider. All is made of matrix
    products, on the device, and may be called inside `jit`.

    >>> w = {"w": jnp.eye(2)}
    >>> moved = {"w": 3 * jnp.eye(2)}
    >>> found = local_smoothness(w, moved, w, moved)  # the gradient of |w|^2 / 2
    >>> [round(float(measured.ratio), 5) for measured in found.values()]
    [2.0, 2.0, 1.0]

    Args:
      grads_before: Gradients at `params_before`, as the loss gives them: not clipped.
      grads_after: Gradients of the same minibatch at `params_after`.
      params_before: Parameters before the step.
      params_after: Parameters after the step.
      matrix_axes: Which leaves are matrices, as for the optimizers.

    Returns:
      What was measured, by pair.

    Raises:
      ValueError: A tree does not match `params_before`, a layout does not fit its leaf, or no leaf
        is a matrix.
    """
    axes = {r.path: r.axes for r in route_with_embeddings(params_before, matrix_axes)}
    leaves = jax.tree_util.tree_leaves_with_path(params_before)
    layouts = tuple(axes.get(path) for path, _ in leaves)
    if not any(layouts):
        raise ValueError("params_before: none of its leaves is a matrix")
    grads = _like(params_before, grads_before=grads_before, grads_after=grads_after)
    params = _like(params_before, params_before=params_before, params_after=params_after)
    return dict(zip(DUAL_NORMS, _measure(*grads, *params, layouts), strict=True))


def _like(params: optax.Params, **trees: optax.Params) -> list[list[Array]]:
    """Leaves of trees that must have the structure and shapes of the parameters."""
    wanted = jax.tree_util.tree_leaves_with_path(params)
    for name, tree in trees.items():
        if jax.tree.structure(tree) != jax.tree.structure(params):
            raise ValueError(f"{name} is not a tree like params_before: {jax.tree.structure(tree)}")
        for x, (path, p) in zip(jax.tree.leaves(tree), wanted, strict=True):
            if x.shape != p.shape:
                leaf = jax.tree_util.keystr(path)
                raise ValueError(f"{name}{leaf} has shape {x.shape}, expected {p.shape}")
    return [jax.tree.leaves(tree) for tree in trees.values()]


@functools.partial(jax.jit, static_argnames="layouts")
def _measure(
    grads_before: list[Array],
    grads_after: list[Array],
    params_before: list[Array],
    params_after: list[Array],
    layouts: tuple[MatrixAxes | None, ...],
) -> list[LocalSmoothness]:
    turned = _differences(grads_before, grads_after, layouts)
    moved = _differences(params_before, params_after, layouts)
    results = []
    for pair in DUAL_NORMS:
        difference = sum((jnp.sum(dual_norm(x, pair)) for x in turned), jnp.zeros(()))
        step = jnp.max(jnp.concatenate([matrix_norm(x, pair) for x in moved]), initial=0)
        ratio = difference / jnp.where(step > SMALLEST_DENOMINATOR, step, jnp.nan)
        results.append(LocalSmoothness(difference, step, ratio))
    return results


def _differences(
    before: list[Array], after: list[Array], layouts: tuple[MatrixAxes | None, ...]
) -> list[Float[Array, "batch m n"]]:
    stacks = []
    for x, y, axes in zip(before, after, layouts, strict=True):
        if axes is not None:
            dtype = jnp.promote_types(jnp.result_type(x, y), jnp.float32)
            stack = batch_first(y.astype(dtype) - x.astype(dtype), axes)
            stacks.append(stack.reshape(axes.matrix_shape(x.shape)))
    return stacks


class Smoothness:
    """Records the local smoothness of some steps of a training run.

    A record holds `PAIR/gradient_difference`, `PAIR/step_norm` and `PAIR/ratio` for the three pairs
    of norms, and `loss_after`, the loss of the same minibatch after the step. The gap to a target
    is taken when the records are fitted, because the target is a choice of the analysis.

    The gradients in a snapshot are clipped and rounded for the optimizer, and these must be neither
    to be comparable. Both are computed here: a record costs two forward and backward passes on the
    minibatch, and matrix products for the spectral and the nuclear norms of both differences.

    Args:
      every: Which steps to record; see `Every` about methods that alternate.
      matrix_axes: As for the optimizers.
    """

    name = "smoothness"

    def __init__(self, every: Every, *, matrix_axes: MatrixAxesSpec = None):
        """See the class."""
        self.due = every.due
        self._matrix_axes = matrix_axes

    def record(self, snapshot: Snapshot) -> dict[str, float]:
        """The metrics of one step.

        Raises:
          ValueError: The snapshot cannot evaluate its minibatch at other parameters.
        """
        if snapshot.value_and_grad is None:
            raise ValueError(
                "value_and_grad: the snapshot has none, and the smoothness of a step needs the "
                "gradients of its minibatch before and after it"
            )
        params_after = apply_updates(snapshot.params, snapshot.updates)
        _, before = snapshot.value_and_grad(snapshot.params)
        loss_after, after = snapshot.value_and_grad(params_after)
        measured = local_smoothness(
            before, after, snapshot.params, params_after, matrix_axes=self._matrix_axes
        )
        loss, pairs = jax.device_get((loss_after, measured))
        values = {
            f"{pair}/{what}": float(value)
            for pair, found in pairs.items()
            for what, value in found._asdict().items()
        }
        return {"loss_after": float(loss), **values}
