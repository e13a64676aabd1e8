r"""The learning rate as a function of the loss that is left to lose.

With the gap $\Delta$ between the loss and its target, curvature $K(\Delta) = K_0 + K_1 \Delta +
K_\rho \Delta^\rho$ asks for the rate $\eta(\Delta) = \Delta / K(\Delta)$: it rises while the gap
closes down to a peak, and falls below it. All functions are closed forms, elementwise in the gap.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxopt_lab.core.checks import check_choice
from jaxopt_lab.core.dual_norms import DUAL_NORMS, DualNorms, largest_dual
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.optim.routing import MatrixAxesSpec, route_with_embeddings

# Curvature given by hand may vanish or change sign; the released code divides by at least this.
SMALLEST_CURVATURE = 1e-8


class Curvature(NamedTuple):
    r"""Coefficients of $K(\Delta) = K_0 + K_1 \Delta + K_\rho \Delta^\rho$.

    `k1` may be negative: the curvature fitted to a peak usually has it so.
    """

    k0: Scalar
    k1: Scalar
    k_rho: Scalar
    rho: Scalar = 2.0


def gap_rate(gap: Scalar, curvature: Curvature) -> Array:
    r"""$\eta(\Delta) = \Delta / K(\Delta)$.

    >>> float(gap_rate(2.0, Curvature(1.0, 0.0, 0.25)))
    1.0

    Args:
      gap: $\Delta$, not negative, any shape.
      curvature: The coefficients of $K$.
    """
    gap = jnp.asarray(gap)
    k = curvature.k0 + curvature.k1 * gap + curvature.k_rho * gap**curvature.rho
    return gap / jnp.maximum(k, SMALLEST_CURVATURE)


def peak_gap_of(curvature: Curvature) -> Array:
    r"""The gap with the largest rate, $\Delta^* = (K_0 / ((\rho - 1) K_\rho))^{1/\rho}$.

    >>> float(peak_gap_of(Curvature(1.0, 0.0, 0.25)))
    2.0
    """
    ratio = jnp.asarray(curvature.k0) / ((curvature.rho - 1) * curvature.k_rho)
    return ratio ** (1 / curvature.rho)


def fit_curvature(
    peak_lr: Scalar, div_factor: Scalar, initial_gap: Scalar, peak_gap: Scalar
) -> Curvature:
    r"""The quadratic $K$ whose rate has its peak at a gap and a share of it at the first one.

    Solves $\eta(\Delta^*) = \eta_{\max}$, $\eta'(\Delta^*) = 0$, $\eta(\Delta_0) = \eta_{\max}/r$:

    $$K_2 = \frac{\Delta_0 (r - 1)}{\eta_{\max} (\Delta_0 - \Delta^*)^2}, \qquad
    K_0 = K_2 \Delta^{*2}, \qquad K_1 = \frac{1}{\eta_{\max}} - 2 K_2 \Delta^*$$

    The coefficients are large and cancel, so a rate is better taken from `relative_rate`.

    Args:
      peak_lr: $\eta_{\max}$.
      div_factor: $r$, the peak rate over the rate at the initial gap.
      initial_gap: $\Delta_0$.
      peak_gap: $\Delta^*$, less than the initial gap.
    """
    peak_lr, initial_gap = jnp.asarray(peak_lr), jnp.asarray(initial_gap)
    k2 = initial_gap * (div_factor - 1) / (peak_lr * (initial_gap - peak_gap) ** 2)
    return Curvature(k2 * peak_gap**2, 1 / peak_lr - 2 * k2 * peak_gap, k2)


def relative_rate(gap: Scalar, initial_gap: Scalar, peak_gap: Scalar, div_factor: Scalar) -> Array:
    r"""The rate of `fit_curvature` over its peak, without the cancellation of its coefficients.

    $$\frac{\eta(\Delta)}{\eta_{\max}} = \left(1 + (r - 1) \frac{\Delta_0}{\Delta}
    \left(\frac{\Delta - \Delta^*}{\Delta_0 - \Delta^*}\right)^2\right)^{-1}$$

    >>> [float(relative_rate(gap, 8.0, 2.0, 10.0)) for gap in (8.0, 2.0)]
    [0.10000000149011612, 1.0]

    Args:
      gap: $\Delta$, positive, any shape.
      initial_gap: $\Delta_0$.
      peak_gap: $\Delta^*$, less than the initial gap.
      div_factor: $r$.
    """
    gap = jnp.asarray(gap)
    distance = (gap - peak_gap) / (initial_gap - peak_gap)
    return 1 / (1 + (div_factor - 1) * (initial_gap / gap) * distance**2)


def warmup_kappa(
    params: optax.Params,
    norm: DualNorms | Mapping[DualNorms, float] = "spectral",
    matrix_axes: MatrixAxesSpec = None,
) -> float:
    r"""The largest dual norm of a gradient of norm 1, summed over the matrices of a model.

    $\sum_i \min(m_i, n_i)$ for the spectral norm, $\sum_i m_i n_i$ for the largest entry, the
    number of matrices for Frobenius. Tables of embeddings and heads count, vectors do not.

    >>> shapes = ((64, 32), (32, 32), (100, 16), (16, 100))
    >>> params = [jnp.zeros(shape) for shape in shapes]
    >>> [warmup_kappa(params, norm) for norm in ("spectral", "sign", "frobenius")]
    [96.0, 6272.0, 4.0]

    Args:
      params: The parameters, arrays or `jax.ShapeDtypeStruct`.
      norm: The norm the optimizer steps in, or a weight for each of several: LionMuon of period P
        steps in `{"spectral": 1 / P, "sign": 1 - 1 / P}`.
      matrix_axes: Layouts as in `jaxopt_lab.optim.routing.route`. Without one, a leaf of more than
        two axes counts nothing, as in the released code.

    Raises:
      ValueError: A norm is unknown, or a layout does not fit its leaf.
    """
    weights: Mapping[DualNorms, float] = norm if isinstance(norm, Mapping) else {norm: 1.0}
    for pair in weights:
        check_choice("norm", pair, DUAL_NORMS)
    layouts = {r.path: r.axes for r in route_with_embeddings(params, matrix_axes)}
    total = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        axes = layouts.get(path)
        if axes is not None:
            batch, rows, columns = axes.matrix_shape(leaf.shape)
            duals = (w * largest_dual(rows, columns, pair) for pair, w in weights.items())
            total += batch * sum(duals)
    return float(total)
