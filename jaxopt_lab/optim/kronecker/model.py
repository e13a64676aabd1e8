"""SOAP and DyKAF on whole models: matrices, tensors with one factor an axis, and AdamW's leaves."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxopt_lab.core.checks import check_rates
from jaxopt_lab.optim.fallback import with_fallback
from jaxopt_lab.optim.kronecker.step import EigenbasisAdam
from jaxopt_lab.optim.kronecker.tensors import tensor_direction
from jaxopt_lab.optim.kronecker.transform import eigenbasis_direction, preconditioned_sides
from jaxopt_lab.optim.nonfinite import guarded
from jaxopt_lab.optim.options import AdamW, Eigenbasis, MeshWork, Routing
from jaxopt_lab.optim.rates import decayed_weights
from jaxopt_lab.optim.routing import FALLBACK_LABEL, MatrixAxesSpec, Route, route

# The group of tensors that get one factor an axis.
MODES_LABEL = "modes"


def eigenbasis_optimizer(
    label: str,
    method: EigenbasisAdam,
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: optax.ScalarOrSchedule,
    mask: Any,
    matrix_axes: MatrixAxesSpec,
    eigenbasis: Eigenbasis,
    routing: Routing,
    fallback: AdamW,
    mesh: MeshWork,
) -> optax.GradientTransformationExtraArgs:
    """A method on whole models: matrices, tensors with one factor an axis, and AdamW's leaves.

    AdamW has the numbers of the method and its order: it skips the first gradient, and its epsilon
    stands outside of the bias correction. Arguments are those of `soap`.
    """
    check_rates(learning_rate=learning_rate)
    rest = (
        decayed_weights(weight_decay, mask, routing),
        optax.scale_by_learning_rate(learning_rate),
    )
    return with_fallback(
        label,
        guarded(eigenbasis_direction(method, matrix_axes, eigenbasis, mesh), *rest),
        learning_rate,
        fallback,
        b1=method.b1,
        b2=method.b2,
        eps=method.eps,
        weight_decay=weight_decay,
        mask=mask,
        matrix_axes=matrix_axes,
        routing=routing,
        skip_first_step=True,
        labels=_labels(label, matrix_axes, eigenbasis, routing),
        modes=guarded(tensor_direction(method, eigenbasis), *rest),
    )


def _labels(
    label: str, matrix_axes: MatrixAxesSpec, eigenbasis: Eigenbasis, routing: Routing
) -> Callable[[optax.Params], Any]:
    limit = eigenbasis.max_precond_dim

    def name(r: Route, shape: tuple[int, ...]) -> str:
        if r.axes is not None:
            _, m, n = r.axes.matrix_shape(shape)
            return label if any(preconditioned_sides(m, n, limit)) else FALLBACK_LABEL
        modes = r.role == "unspecified" and routing.on_uncovered == "modes"
        return MODES_LABEL if modes and min(shape) <= limit else FALLBACK_LABEL

    def labels(params: optax.Params) -> Any:
        routes = route(params, matrix_axes, routing)
        shapes = [x.shape for x in jax.tree.leaves(params)]
        return jax.tree.unflatten(jax.tree.structure(params), list(map(name, routes, shapes)))

    return labels
