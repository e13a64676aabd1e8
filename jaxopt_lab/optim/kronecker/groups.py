"""SOAP and DyKAF on whole models: which leaf is a matrix, a tensor of modes, or AdamW's."""

from collections.abc import Callable, Hashable
from typing import Any, Literal

import jax
import optax

from jaxopt_lab.core.modes import merged_shape
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.core.orthogonalization import Orthogonalizer
from jaxopt_lab.optim.kronecker.tensors import scale_by_tensor_soap
from jaxopt_lab.optim.kronecker.transform import MAX_PRECOND_DIM, preconditioned_sides
from jaxopt_lab.optim.options import Routing
from jaxopt_lab.optim.routing import (
    FALLBACK_LABEL,
    MatrixAxesSpec,
    Route,
    checks_leaves,
    route,
)

Uncovered = Literal["adamw", "error", "modes"]

# The group of tensors and vectors that get one factor an axis.
MODES_LABEL = "modes"


def on_whole_model(
    label: str,
    matrix_tx: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Scalar,
    b2: Scalar,
    factor_decay: Scalar | None,
    eps: Scalar,
    precondition_frequency: int,
    max_precond_dim: int | None,
    merge_dims: bool,
    precondition_1d: bool,
    correct_bias: bool,
    normalize_grads: bool,
    skip_first_step: bool,
    orthogonalizer: Orthogonalizer,
    weight_decay: Scalar,
    mask: Any,
    decay_after_step: bool,
    matrix_axes: MatrixAxesSpec,
    on_uncovered: str,
    vocabulary_size: int | None,
) -> optax.GradientTransformationExtraArgs:
    """Route matrices to `matrix_tx`, some other leaves to per-mode factors, the rest to AdamW.

    AdamW has the method's constants and order: it skips the first gradient when the method does,
    and its epsilon is outside the bias correction. Arguments are those of `soap`.

    Raises:
      ValueError: `on_uncovered` is unknown.
    """
    if on_uncovered not in ("adamw", "error", "modes"):
        raise ValueError(f"on_uncovered is {on_uncovered!r}; choose 'adamw', 'error' or 'modes'")

    def by_modes(limit: int | None) -> optax.GradientTransformation:
        return scale_by_tensor_soap(
            b1=b1,
            b2=b2,
            factor_decay=factor_decay,
            eps=eps,
            precondition_frequency=precondition_frequency,
            max_precond_dim=limit,
            merge_dims=merge_dims,
            correct_bias=correct_bias,
            normalize_grads=normalize_grads,
            skip_first_step=skip_first_step,
            orthogonalizer=orthogonalizer,
            weight_decay=weight_decay,
            mask=mask,
            decay_rate=learning_rate if decay_after_step else None,
        )

    rules: dict[Hashable, optax.GradientTransformation] = {
        label: matrix_tx,
        MODES_LABEL: by_modes(max_precond_dim),
        FALLBACK_LABEL: by_modes(0),
    }
    labels = _labels(
        label, max_precond_dim, merge_dims, precondition_1d, matrix_axes, on_uncovered,
        vocabulary_size,
    )  # fmt: skip
    tx = optax.chain(optax.partition(rules, labels), optax.scale_by_learning_rate(learning_rate))
    return checks_leaves(tx, matrix_axes, Routing(vocabulary_size or 10_000, on_uncovered))  # pyright: ignore


def _labels(
    label: str,
    max_precond_dim: int | None,
    merge_dims: bool,
    precondition_1d: bool,
    matrix_axes: MatrixAxesSpec,
    on_uncovered: str,
    vocabulary_size: int | None,
) -> Callable[[optax.Params], Any]:
    limit = MAX_PRECOND_DIM if max_precond_dim is None else max_precond_dim
    routing = Routing(vocabulary_size or 10_000, on_uncovered)  # pyright: ignore

    def name(r: Route, shape: tuple[int, ...]) -> str:
        if r.axes is not None:
            _, m, n = r.axes.matrix_shape(shape)
            if not any(preconditioned_sides(m, n, limit)):
                return FALLBACK_LABEL
            merges = merge_dims and not r.axes.batch and len(merged_shape(shape, limit)) == 1
            return MODES_LABEL if merges else label
        if r.role == "unspecified" and on_uncovered == "modes":
            return MODES_LABEL
        if len(shape) == 1 and precondition_1d and shape[0] <= limit:
            return MODES_LABEL
        return FALLBACK_LABEL

    def labels(params: optax.Params) -> Any:
        routes = route(params, matrix_axes, routing)
        shapes = [x.shape for x in jax.tree.leaves(params)]
        names = [name(r, shape) for r, shape in zip(routes, shapes, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(params), names)

    return labels
