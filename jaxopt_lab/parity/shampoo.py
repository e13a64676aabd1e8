"""DistributedShampoo as released, for replays: what it does that `jaxopt_lab.shampoo` does not."""

from typing import Literal

import optax

from jaxopt_lab.core.checks import check_choice
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.optim.kronecker.shampoo_step import ReleasedCode, ShampooRule, shampoo_direction
from jaxopt_lab.optim.nonfinite import guarded
from jaxopt_lab.optim.options import Graft, InverseRoot, MeshWork


def distributed_shampoo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 1.0,
    b3: Scalar | None = None,
    eps: Scalar = 1e-12,
    precondition_frequency: int = 1,
    start_preconditioning_step: int | None = None,
    bias_correction: bool = True,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    weight_decay_type: Literal["decoupled", "l2"] = "decoupled",
    inverse_root: InverseRoot = InverseRoot(method="eigh"),
    graft: Graft = Graft(kind=None),
) -> optax.GradientTransformationExtraArgs:
    """The released rule for every leaf, vectors included; a small matrix is merged into a vector.

    Args:
      learning_rate: A number or a schedule.
      b1: Decay of the first moment.
      b2: Decay of the factors; 1 accumulates sums.
      b3: Look-ahead: average with this decay instead of `b1` what is used, not what is stored.
      eps: Ridge of the factors.
      precondition_frequency: Steps from one refresh of the roots to the next, f.
      start_preconditioning_step: Step of the first roots, at least f; None: f.
      bias_correction: Divide moment and factors by what their decay has not yet filled.
      momentum: Of the direction, decay included; 0: none.
      dampening: 1 minus the weight of the direction in the momentum.
      nesterov: Add the momentum to the direction instead of replacing it.
      weight_decay: Decay of all leaves.
      weight_decay_type: "decoupled" adds decay times parameter to the direction, "l2" to the
        gradient.
      inverse_root: As in `jaxopt_lab.shampoo`.
      graft: As in `jaxopt_lab.shampoo`.

    Raises:
      ValueError: `start_preconditioning_step` is below `precondition_frequency`, or a choice is
        unknown.

    Source: Shi et al., arXiv 2309.06497 (2023), released code.
    """
    start = start_preconditioning_step
    if start is not None and start < precondition_frequency:
        raise ValueError(
            f"start_preconditioning_step is {start}; it must be at least the "
            f"precondition_frequency of {precondition_frequency}"
        )
    released = ReleasedCode(True, b3, bias_correction, start)
    rule = ShampooRule(
        b1, b2, eps, precondition_frequency, inverse_root, graft, MeshWork(), released
    )
    direction = shampoo_direction(rule, matrix_axes=None)
    decay = optax.add_decayed_weights(weight_decay)
    trace = optax.chain(optax.scale(1 - dampening), optax.trace(momentum, nesterov))
    rest = (trace if momentum else optax.identity(), optax.scale_by_learning_rate(learning_rate))
    check_choice("weight_decay_type", weight_decay_type, ("decoupled", "l2"))
    if weight_decay_type == "l2":
        return optax.chain(decay, guarded(direction, *rest))
    return guarded(direction, decay, *rest)
