r"""Norm ratios of gradients, weights and updates: which geometry does training live in?

For each matrix, with gradient $G$, weight $W$ before the step, scaled direction $U$, momentum $M$
before the step, and differences $\Delta$ to the previous record:

==================  ==========================================================
grad_nuc_over_1     $\|G\|_{nuc} / \|G\|_1$
param_2_over_inf    $\|W\|_2 / \|W\|_\infty$
update_2_over_inf   $\|U\|_2 / \|U\|_\infty$
errmom_F_over_nuc   $\|G - M\|_F / \|G - M\|_{nuc}$
errmom_F_over_1     $\|G - M\|_F / \|G - M\|_1$
smooth_nuc_over_2   $\|\Delta G\|_{nuc} / \|\Delta W\|_2$
smooth_1_over_inf   $\|\Delta G\|_1 / \|\Delta W\|_\infty$
==================  ==========================================================

$\|.\|_1$ and $\|.\|_\infty$ are entrywise, $\|.\|_2$ is the largest singular value. The gradients
of two records come from different minibatches, so the last two measure noise as well as curvature.

Source: Bolatov et al., "LionMuon", arXiv 2605.19811, released code.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import KeyPath
from jaxtyping import Array, Float

from jaxopt_lab.core.matrices import MatrixAxes, batch_first
from jaxopt_lab.core.spectral import nuclear_norm, spectral_norm
from jaxopt_lab.diagnostics.recording import Every, Snapshot, find_state
from jaxopt_lab.optim.lion_muon.transform import LionMuonState
from jaxopt_lab.optim.routing import MatrixAxesSpec, route

RATIOS = (
    "grad_nuc_over_1",
    "param_2_over_inf",
    "update_2_over_inf",
    "errmom_F_over_nuc",
    "errmom_F_over_1",
    "smooth_nuc_over_2",
    "smooth_1_over_inf",
)

# A ratio whose denominator is not above this is undefined and left out of the median.
SMALLEST_DENOMINATOR = 1e-12


class NormRecord(NamedTuple):
    """What the next record's differences are taken against: one stack a matrix leaf."""

    grads: tuple[Float[Array, "batch m n"], ...]  # float32
    params: tuple[Float[Array, "batch m n"], ...]  # float32


def norm_ratios(
    grads: optax.Updates,
    params: optax.Params,
    direction: optax.Updates,
    momentum: optax.Updates,
    previous: NormRecord | None = None,
    *,
    matrix_axes: MatrixAxesSpec = None,
) -> tuple[dict[str, Float[Array, ""]], NormRecord]:
    """Medians over all matrices of the seven ratios of this module, norms in float32.

    A stacked leaf `(L, m, n)` counts as L matrices. A ratio whose denominator is at most 1e-12
    is left out of its median; without any left, and for the last two ratios of the first record,
    the result is NaN.

    Args:
      grads: gradients as the optimizer received them.
      params: parameters before the step.
      direction: what the step moves along, scale included; a common factor (the rate, a sign)
        cancels.
      momentum: the momentum buffer before the step.
      previous: the record of the previous call, None at the first.
      matrix_axes: which leaves are matrices, as for the optimizers; other leaves may be absent
        from `direction` and `momentum`.

    Returns:
      The ratios by name and the record to pass to the next call.

    Raises:
      ValueError: when a matrix leaf is missing from one of the trees.
    """
    layouts = {r.path: r.axes for r in route(params, matrix_axes) if r.axes is not None}
    trees = {"grads": grads, "params": params, "direction": direction, "momentum": momentum}
    g, w, u, m = (_matrices(name, tree, layouts) for name, tree in trees.items())
    rows = [
        _leaf_ratios(
            g[i],
            w[i],
            u[i],
            m[i],
            None if previous is None else (previous.grads[i], previous.params[i]),
        )
        for i in range(len(layouts))
        if g[i].size
    ]
    undefined = jnp.full((len(RATIOS), 1), jnp.nan)
    medians = jnp.nanmedian(jnp.concatenate([*rows, undefined], axis=1), axis=1)
    record = NormRecord(
        tuple(x.astype(jnp.float32) for x in g), tuple(x.astype(jnp.float32) for x in w)
    )
    return dict(zip(RATIOS, medians, strict=True)), record


def _leaf_ratios(
    g: Float[Array, "batch m n"],
    w: Float[Array, "batch m n"],
    u: Float[Array, "batch m n"],
    m: Float[Array, "batch m n"],
    previous: tuple[Float[Array, "batch m n"], Float[Array, "batch m n"]] | None,
) -> Float[Array, "7 batch"]:
    matrices = [g, w, u, g - m]
    if previous is not None:
        # The rounded record is subtracted from the unrounded value, as the released code does.
        matrices += [g - previous[0].astype(g.dtype), w - previous[1].astype(w.dtype)]
    norms = _norms(jnp.stack([x.astype(jnp.float32) for x in matrices]))
    grad, param, update, error = (_Norms(*(n[i] for n in norms)) for i in range(4))
    ratios = [
        _divide(grad.nuc, grad.l1),
        _divide(param.spectral, param.linf),
        _divide(update.spectral, update.linf),
        _divide(error.frobenius, error.nuc),
        _divide(error.frobenius, error.l1),
    ]
    if previous is None:
        return jnp.stack([*ratios, *[jnp.full_like(ratios[0], jnp.nan)] * 2])
    dg, dw = (_Norms(*(n[i] for n in norms)) for i in (4, 5))
    return jnp.stack([*ratios, _divide(dg.nuc, dw.spectral), _divide(dg.l1, dw.linf)])


class _Norms(NamedTuple):
    l1: Array
    linf: Array
    frobenius: Array
    spectral: Array
    nuc: Array


def _norms(x: Float[Array, "*batch m n"]) -> _Norms:
    size = jnp.abs(x)
    axes = (-2, -1)
    return _Norms(
        l1=size.sum(axes),
        linf=size.max(axes),
        frobenius=jnp.sqrt(jnp.square(x).sum(axes)),
        spectral=spectral_norm(x),
        nuc=nuclear_norm(x),
    )


def _divide(numerator: Array, denominator: Array) -> Array:
    defined = denominator > SMALLEST_DENOMINATOR
    return jnp.where(defined, numerator / jnp.where(defined, denominator, 1.0), jnp.nan)


def _matrices(
    name: str, tree: optax.Params, layouts: dict[KeyPath, MatrixAxes]
) -> list[Float[Array, "batch m n"]]:
    leaves = dict(jax.tree_util.tree_leaves_with_path(tree))
    views = []
    for path, axes in layouts.items():
        if path not in leaves:
            raise ValueError(f"{name} has no leaf {jax.tree_util.keystr(path)}, a matrix")
        x = jnp.asarray(leaves[path])
        views.append(batch_first(x, axes).reshape(axes.matrix_shape(x.shape)))
    return views


def lion_muon_momentum(snapshot: Snapshot) -> optax.Updates:
    """The momentum of the LionMuon family inside the state of any chain or partition."""
    return find_state(snapshot.opt_state, LionMuonState).mu


def direction_of(
    optimizer: optax.GradientTransformation,
) -> Callable[[Snapshot], optax.Updates]:
    """Directions of an optimizer: pass the one that trains, built with a weight decay of zero.

    Its state is that of the training optimizer, which decay does not enter, and the rate cancels
    in the ratios.
    """

    def direction(snapshot: Snapshot) -> optax.Updates:
        return optimizer.update(snapshot.grads, snapshot.opt_state, snapshot.params)[0]

    return direction


class NormRatios:
    """Records the norm ratios of this module every few steps of a training run.

    Each residue of the schedule has its own previous record, so the differences of the last two
    ratios always span one interval. With more than one residue the metrics of residue r are named
    `residue_r/...`. Previous records are not part of a checkpoint: after a resume the first record
    of the last two ratios is NaN again.

    Args:
      every: which steps to record; see `Every` about methods that alternate.
      direction: from a snapshot to what the step moves along, without weight decay.
      momentum: from a snapshot to the momentum tree.
      matrix_axes: as for the optimizers.
    """

    name = "norm_ratios"

    def __init__(
        self,
        every: Every,
        direction: Callable[[Snapshot], optax.Updates],
        *,
        momentum: Callable[[Snapshot], optax.Updates] = lion_muon_momentum,
        matrix_axes: MatrixAxesSpec = None,
    ):
        """See the class."""
        self.due = every.due
        self._every = every
        self._previous: dict[int, NormRecord] = {}

        @jax.jit
        def measure(snapshot: Snapshot, previous: NormRecord | None):
            return norm_ratios(
                snapshot.grads,
                snapshot.params,
                direction(snapshot),
                momentum(snapshot),
                previous,
                matrix_axes=matrix_axes,
            )

        self._measure = measure

    def record(self, snapshot: Snapshot) -> dict[str, float]:
        """The seven ratios of one step."""
        residue = snapshot.step % self._every.interval
        # A traced step number would be as good, but the loss and its function are not needed.
        inputs = snapshot._replace(step=0, loss=None, value_and_grad=None)
        ratios, self._previous[residue] = self._measure(inputs, self._previous.get(residue))
        prefix = f"residue_{residue}/" if len(self._every.residues) > 1 else ""
        values = np.asarray(list(ratios.values()))
        return {prefix + name: float(v) for name, v in zip(ratios, values, strict=True)}
