"""SOAP with the quirks of its released code: decay after the step, merged axes, and more."""

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab.core.checks import check_rates
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.optim.kronecker.model import MODES_LABEL
from jaxopt_lab.optim.kronecker.soap import soap_method
from jaxopt_lab.optim.kronecker.step import EigenbasisAdam
from jaxopt_lab.optim.kronecker.tensors import merged_shape, tensor_direction
from jaxopt_lab.optim.kronecker.transform import eigenbasis_direction
from jaxopt_lab.optim.nonfinite import guarded
from jaxopt_lab.optim.options import Eigenbasis, MeshWork, Routing
from jaxopt_lab.optim.rates import decayed_weights, matched_mask
from jaxopt_lab.optim.routing import MatrixAxesSpec, checks_leaves, route


def soap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    factor_decay: Scalar | None = None,
    eps: Scalar = 1e-8,
    precondition_frequency: int = 10,
    eigenbasis: Eigenbasis = Eigenbasis(),
    **others: Any,
) -> optax.GradientTransformationExtraArgs:
    """SOAP in which every leaf has its factors, and decay comes after the step.

    Args:
      learning_rate: As for `jaxopt_lab.soap`, and so are those that are not explained.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      factor_decay: Decay of the factors.
      eps: Epsilon on the uncorrected root.
      precondition_frequency: Updates from one refresh to the next.
      eigenbasis: How bases and moments are kept.
      **others: As for `released`.
    """
    method = soap_method(b1, b2, factor_decay, eps, precondition_frequency, eigenbasis, MeshWork())
    return released("soap", method, learning_rate, eigenbasis=eigenbasis, **others)


def released(
    label: str,
    method: EigenbasisAdam,
    learning_rate: optax.ScalarOrSchedule,
    *,
    eigenbasis: Eigenbasis,
    weight_decay: optax.ScalarOrSchedule = 0.01,
    mask: Any = None,
    matrix_axes: MatrixAxesSpec = None,
    mesh: MeshWork = MeshWork(),
    decay_after_step: bool = True,
    precondition_1d: bool = False,
    merge_dims: bool = False,
    correct_bias: bool = True,
    normalize_grads: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""A method on whole models, as the released codes route them.

    Args:
      label: Name of the group of matrices.
      method: The step.
      learning_rate: A number or a schedule.
      eigenbasis: How bases and moments are kept.
      weight_decay: Decay of all leaves.
      mask: Which leaves decay.
      matrix_axes: None: every leaf of two axes is a matrix, embeddings included.
      mesh: Layouts of the parameters.
      decay_after_step: $W \leftarrow (1 - \eta \lambda) (W - \eta N)$ instead of decay beside the
        step.
      precondition_1d: Give vectors a factor as well.
      merge_dims: Merge neighbouring axes while their product is within `max_precond_dim`, in leaves
        of more than two axes, and in matrices that become a vector.
      correct_bias: Multiply by Adam's bias correction.
      normalize_grads: Divide every direction by its root mean square, before that.
    """
    check_rates(learning_rate=learning_rate, weight_decay=weight_decay)
    method = replace(
        method, correct_bias=correct_bias, normalize_grads=normalize_grads, largest_ratio=None
    )
    layouts = every_two_axes if matrix_axes is None else matrix_axes
    decay = decayed_weights(weight_decay, mask, Routing())
    if decay_after_step:
        decay = decayed_after_step(weight_decay, mask, learning_rate)
    rest = (decay, optax.scale_by_learning_rate(learning_rate))
    tensors = tensor_direction(method, eigenbasis, merge_dims=merge_dims, vectors=precondition_1d)
    rules: dict[Hashable, optax.GradientTransformation] = {
        label: guarded(eigenbasis_direction(method, layouts, eigenbasis, mesh), *rest),
        MODES_LABEL: guarded(tensors, *rest),
    }

    def labels(params: optax.Params) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        limit = eigenbasis.max_precond_dim

        def name(r: Any, x: Any) -> str:
            if r.axes is None:
                return MODES_LABEL
            merges = merge_dims and not r.axes.batch and len(merged_shape(x.shape, limit)) == 1
            return MODES_LABEL if merges else label

        return treedef.unflatten(list(map(name, route(params, layouts), leaves)))

    return checks_leaves(optax.partition(rules, labels), layouts, Routing())


def decayed_after_step(
    weight_decay: optax.ScalarOrSchedule, mask: Any, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    r"""The link of a chain, before the learning rate, that lets the updated weights decay.

    $W \leftarrow (1 - \eta \lambda) (W - \eta N)$, as one direction: $(1 - \eta \lambda) N +
    \lambda W$.
    """

    def kept(count: Any) -> Any:
        rate, decay = (x(count) if callable(x) else x for x in (learning_rate, weight_decay))
        return 1 - rate * decay

    shrunk: Any = optax.scale_by_schedule(kept)
    matched = matched_mask(mask, Routing())
    if matched is not None:
        shrunk = optax.masked(shrunk, matched)
    return optax.chain(shrunk, decayed_weights(weight_decay, mask, Routing()))


def every_two_axes(params: optax.Params) -> Any:
    """Layouts of the released codes: leaves of two axes are matrices, and no others."""
    return jax.tree.map(lambda x: MuonDimensionNumbers() if len(x.shape) == 2 else None, params)
