"""A recorder of how well the factors of SOAP and DyKAF approximate the Fisher matrix."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from jaxopt_lab.core.kronecker import symmetric
from jaxopt_lab.core.matrices import MatrixAxes, batch_first
from jaxopt_lab.core.spectral import eigenbasis
from jaxopt_lab.diagnostics.fisher import FullFisher, kronecker_distance
from jaxopt_lab.diagnostics.fisher_samples import SampledFisher, moving_average_weights
from jaxopt_lab.diagnostics.recording import Snapshot, find_state
from jaxopt_lab.optim.kronecker.transform import EigenbasisAdamState
from jaxopt_lab.optim.routing import MatrixAxesSpec, route

# A layer with more weights is never formed in full: 4096 of them take 64 MiB.
LARGEST_FULL = 4096


class FisherErrors:
    """Compares an optimizer's factors and eigenbases with the gradients it has seen.

    The Fisher matrix is the average of the second moment over the gradients before the record:
    over all of them, formed in full, or over a window of the last ones, never formed. For every
    layer, averaged over the matrices of a stacked leaf, a record holds

    =====================  ==================================================================
    kronecker              relative error of the product of the factors
    kronecker_rescaled     the same after the best scalar
    best                   error of the best Kronecker product
    distance               relative distance of the product of the factors to the best one
    distance_rescaled      the same after the best scalar
    eigenbasis_rescaled    error of Q diag(V) Q^T after the best scalar
    diagonal_mass          share of the norm on the diagonal in the eigenbases
    best_diagonal_mass     the same in the eigenbases of the best factors
    =====================  ==================================================================

    with the layer's name in front. A side without a factor counts as the identity. Without a
    gradient before the record, or with zero gradients alone, values are NaN. The gradients kept are
    not part of a checkpoint: after a resume the window fills again.

    Args:
      interval: Steps from one record to the next.
      layers: Names of leaves, path entries joined by a slash; None takes all matrices that have a
        factor.
      window: Gradients before a record, fewer than `interval`; None averages over all of them,
        which looks at every step.
      decay: Of the average; 1 weighs all gradients equally. Pass the decay of the factors.
      matrix_axes: As for the optimizers.

    Raises:
      ValueError: For a window that does not fit the interval; at the first step for a layer that is
        no matrix, has no factor, or is too large to be formed, and if no matrix has a factor.
    """

    name = "fisher"

    def __init__(
        self,
        interval: int,
        layers: Sequence[str] | None = None,
        *,
        window: int | None,
        decay: float,
        matrix_axes: MatrixAxesSpec = None,
    ):
        """See the class."""
        if interval < 1:
            raise ValueError(f"interval: got {interval}, expected at least 1 step")
        if window is not None and not 0 < window < interval:
            raise ValueError(f"window: got {window}, expected 1 to {interval - 1} gradients")
        self._interval, self._window, self._decay = interval, window, decay
        self._layers, self._matrix_axes = layers, matrix_axes
        self._known: dict[str, Any] = {}

    def due(self, step: int) -> bool:
        """Whether the step's gradient is kept, or a record is made before it."""
        position = step % self._interval
        return self._window is None or position == 0 or position >= self._interval - self._window

    def record(self, snapshot: Snapshot) -> dict[str, float]:
        """The metrics at every `interval`-th step; nothing at the steps in between."""
        state = find_state(snapshot.opt_state, EigenbasisAdamState)
        layouts = self._chosen(snapshot.params, state)
        values: dict[str, float] = {}
        # The state is from before this step: it has not seen this gradient, nor may the matrix.
        reported = snapshot.step % self._interval == 0
        if reported:
            for name, axes in layouts.items():
                measured = self._measure(name, _side_arrays(state, name, axes))
                values |= {f"{name}/{metric}": value for metric, value in measured.items()}
        if self._window is None or not reported:
            grads = _by_name(snapshot.grads)
            for name, axes in layouts.items():
                self._keep(name, _view(grads[name], axes))
        elif self._window is not None:
            self._known.clear()
        return values

    def _chosen(self, params: optax.Params, state: EigenbasisAdamState) -> dict[str, MatrixAxes]:
        # The method may leave a matrix to AdamW, for its size; then it has no factors to compare.
        having = {*_by_name(state.row_factor), *_by_name(state.column_factor)}
        routes = [(_name(r.path), r.axes) for r in route(params, self._matrix_axes)]
        matrices = {name: axes for name, axes in routes if axes is not None and name in having}
        if not matrices:
            raise ValueError("layers: the optimizer keeps factors of none of the matrices")
        chosen = list(matrices) if self._layers is None else self._layers
        shapes = {name: x.shape for name, x in _by_name(params).items()}
        for name in chosen:
            if name not in matrices:
                known = ", ".join(matrices)
                raise ValueError(
                    f"layers: {name!r} is not one of the matrices with factors: {known}"
                )
            _, m, n = matrices[name].matrix_shape(shapes[name])
            if self._window is None and m * n > LARGEST_FULL:
                raise ValueError(
                    f"layers: {name!r} has matrices of {m} x {n}, too large to form their Fisher "
                    f"matrix (at most {LARGEST_FULL} weights); give a window"
                )
        return {name: matrices[name] for name in chosen}

    def _keep(self, name: str, grad: Float[Array, "batch m n"]) -> None:
        if self._window is not None:
            self._known.setdefault(name, deque(maxlen=self._window)).append(grad)
        elif name not in self._known:
            self._known[name] = _products(grad)
        else:
            new = 1.0 if self._decay == 1 else 1 - self._decay
            self._known[name] = _advance(self._known[name], grad, self._decay, new)

    def _measure(self, name: str, sides: dict[str, Array]) -> dict[str, float]:
        known = self._known.get(name)
        if known is None:
            return dict.fromkeys(METRICS, np.nan)
        if self._window is None:
            values = _errors_of_full(known, sides)
        else:
            weights = moving_average_weights(len(known), self._decay)
            values = _errors_of_sample(jnp.stack(known, axis=1), weights, sides)
        values = np.asarray([values[metric] for metric in METRICS])
        return dict(zip(METRICS, map(float, values), strict=True))


METRICS = (
    "kronecker",
    "kronecker_rescaled",
    "best",
    "distance",
    "distance_rescaled",
    "eigenbasis_rescaled",
    "diagonal_mass",
    "best_diagonal_mass",
)


@jax.jit
def _errors_of_full(entries, sides) -> dict[str, Array]:
    def one(entries, sides):
        return _errors(FullFisher(entries), sides)

    return jax.tree.map(jnp.mean, jax.vmap(one)(entries, sides))


@jax.jit
def _errors_of_sample(grads, weights, sides) -> dict[str, Array]:
    def one(grads, sides):
        return _errors(SampledFisher(grads, weights), sides)

    return jax.tree.map(jnp.mean, jax.vmap(one)(grads, sides))


def _errors(fisher: FullFisher | SampledFisher, sides: dict[str, Array]) -> dict[str, Array]:
    pair = symmetric(sides["row_factor"]), symmetric(sides["column_factor"])
    bases = sides["row_basis"], sides["column_basis"]
    best = fisher.best_kronecker()
    ours, distance = fisher.kronecker_errors(*pair), kronecker_distance(*pair, best)
    return {
        "kronecker": ours.relative,
        "kronecker_rescaled": ours.rescaled,
        "best": fisher.kronecker_errors(*best).rescaled,
        "distance": distance.relative,
        "distance_rescaled": distance.rescaled,
        "eigenbasis_rescaled": fisher.eigenbasis_errors(sides["nu"], *bases).rescaled,
        "diagonal_mass": fisher.diagonal_mass(*bases),
        "best_diagonal_mass": fisher.diagonal_mass(*map(eigenbasis, best)),
    }


@jax.jit
def _products(grad: Float[Array, "batch m n"]) -> Float[Array, "batch m n m n"]:
    return grad[:, :, :, None, None] * grad[:, None, None]


@jax.jit
def _advance(entries, grad, decay, new):
    return decay * entries + new * _products(grad)


def _side_arrays(state: EigenbasisAdamState, name: str, axes: MatrixAxes) -> dict[str, Array]:
    """Factors, bases and second moment of one leaf, (batch, ...); the identity where none is."""
    mu = _view(_by_name(state.mu)[name], axes)
    batch, m, n = mu.shape
    out = {}
    for side, size in (("row", m), ("column", n)):
        for what in ("factor", "basis"):
            stored = _by_name(getattr(state, f"{side}_{what}")).get(name)
            eye = jnp.broadcast_to(jnp.eye(size, dtype=mu.dtype), (batch, size, size))
            out[f"{side}_{what}"] = eye if stored is None else stored.reshape(batch, size, size)
    if isinstance(state.nu, optax.MaskedNode):
        rows, columns = (_by_name(tree)[name] for tree in (state.row_nu, state.column_nu))
        out["nu"] = rows.reshape(batch, m, 1) * columns.reshape(batch, 1, n)
    else:
        out["nu"] = _view(_by_name(state.nu)[name], axes)
    return out


def _view(x: Array, axes: MatrixAxes) -> Float[Array, "batch m n"]:
    x = jnp.asarray(x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return batch_first(x, axes).reshape(axes.matrix_shape(x.shape))


def _by_name(tree: Any) -> dict[str, Any]:
    return {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
