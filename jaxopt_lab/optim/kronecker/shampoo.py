"""Shampoo: inverse roots of Kronecker factors on every side, with the step size of Adam."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.core.stacks import ReplicatedWork
from jaxopt_lab.optim.fallback import with_adamw_fallback
from jaxopt_lab.optim.kronecker.shampoo_guard import zip_strict
from jaxopt_lab.optim.kronecker.shampoo_transform import ShampooState, scale_by_shampoo
from jaxopt_lab.optim.options import Routing
from jaxopt_lab.optim.rates import check_rates, scaled_rate
from jaxopt_lab.optim.routing import FALLBACK_LABEL, MatrixAxesSpec, route

__all__ = ["ShampooState", "scale_by_shampoo", "shampoo"]


def shampoo(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    *,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_lr_ratio: Scalar = 1.0,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    epsilon: Scalar = 1e-12,
    relative_epsilon: bool = False,
    precondition_frequency: Scalar = 10,
    start_preconditioning_step: Scalar | None = None,
    exponent: float | Mapping[int, float] | None = None,
    bias_correction: bool = True,
    graft: str | None = "adam",
    graft_b2: Scalar | None = None,
    graft_eps: Scalar = 1e-8,
    b3: Scalar | None = None,
    momentum: Scalar | None = None,
    dampening: Scalar = 0.0,
    nesterov: bool = False,
    weight_decay: Scalar = 0.0,
    weight_decay_type: str = "decoupled",
    max_learning_rate: Scalar | None = None,
    adam_weight_decay: Scalar | None = None,
    mask: Any = None,
    trace_scaling: bool = False,
    kl_factors: bool = False,
    max_preconditioner_dim: int | None = None,
    merge: str = "tensors",
    matrix_axes: MatrixAxesSpec = None,
    precondition_1d: bool = False,
    on_uncovered: str = "adamw",
    vocabulary_size: int | None = None,
    root_method: str = "newton",
    stagger: bool = False,
    adam_b1: Scalar = 0.9,
    adam_b2: Scalar = 0.999,
    adam_eps: Scalar = 1e-8,
    param_shardings: Any = None,
    replicated_work: ReplicatedWork = "repeat",
) -> optax.GradientTransformationExtraArgs:
    r"""Shampoo for the matrices of a model, AdamW for everything else.

    See `scale_by_shampoo` for the equations and for the options that are not explained here. To
    start from a tuned AdamW keep its rate, betas and decay: with Adam grafting every block moves as
    far as Adam would, in a better direction.

    Args:
      learning_rate: A number or a schedule.
      adam_learning_rate: Rate of the other leaves; None: `adam_lr_ratio * learning_rate`.
      adam_lr_ratio: AdamW rate over Shampoo rate.
      b1: Decay of the first moment.
      b2: Decay of the factors; 1 accumulates sums.
      epsilon: Ridge of the factors.
      relative_epsilon: Measure the ridge in units of each factor's largest eigenvalue.
      precondition_frequency: Steps from one refresh of the roots to the next.
      start_preconditioning_step: Step of the first roots; None: `precondition_frequency`.
      exponent: Of the inverse roots, a number or {order: number}; None: 1 / (2 order).
      bias_correction: Divide moment and factors by what their decay has not yet filled.
      graft: "adam", "rmsprop", "adagrad", "sgd" or None.
      graft_b2: Decay of the graft's second moment; None: `b2`.
      graft_eps: Epsilon of the graft.
      b3: Look-ahead decay; None: `b1`.
      momentum: Momentum of the direction; None: none.
      dampening: Dampening of that momentum.
      nesterov: Nesterov's form of it.
      weight_decay: $\lambda$.
      weight_decay_type: "decoupled" decays by $\eta \lambda W$, "l2" adds $\lambda W$ to the
        gradient, "corrected" decays by $\eta^2 / \eta_{\max} \lambda W$ and "independent" by
        $\eta / \eta_{\max} \lambda W$. The other leaves never take "l2" but "decoupled".
      max_learning_rate: $\eta_{\max}$; None: `learning_rate`, if that is a number.
      adam_weight_decay: Decay of the other leaves; None: the same.
      mask: Which leaves decay.
      trace_scaling: Divide factors by the roots of their traces.
      kl_factors: Factors of KL-Shampoo.
      max_preconditioner_dim: Longest block edge; None: 1024.
      merge: "tensors", "always" or "never".
      matrix_axes: `MuonDimensionNumbers` for the leaves that are matrices, None for those that are
        not: a tree, a prefix, or a function of the parameters. None: leaves of two axes, except
        embeddings and heads.
      precondition_1d: Precondition vectors too, by one full factor of their blocks.
      on_uncovered: For a leaf of more than two axes without a layout: "adamw", "modes" (one factor
        an axis) or "error".
      vocabulary_size: Without `matrix_axes`, an axis this long marks an embedding. None: 10 000.
      root_method: "newton" or "eigh".
      stagger: Spread the refresh over the steps.
      adam_b1: First-moment decay of AdamW.
      adam_b2: Second-moment decay of AdamW.
      adam_eps: Epsilon of AdamW, on the uncorrected root.
      param_shardings: Tree of `NamedSharding`, for meshes with Auto axes.
      replicated_work: "repeat" or "share" the roots over replicas.

    Returns:
      A transformation whose state is an `optax.transforms.PartitionState` with the groups "shampoo"
      and "adamw".

    Raises:
      ValueError: An option is unknown or out of range, or a layout does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), shampoo(1e-3, weight_decay=0.1))
      >>> params = {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> jax.tree.map(jnp.shape, updates)
      {'bias': (8,), 'kernel': (4, 8)}

    Source: Gupta, Koren and Singer, arXiv 1802.09568 (2018); Shi et al., arXiv 2309.06497 (2023).

    Differs from the released code in: see `scale_by_shampoo`; vectors, embeddings and heads go to
    AdamW.
    """
    check_rates(
        learning_rate=learning_rate,
        adam_learning_rate=adam_learning_rate,
        adam_lr_ratio=adam_lr_ratio,
        weight_decay=weight_decay,
        adam_weight_decay=adam_weight_decay,
    )
    decay_scale = _decay_scale(weight_decay_type, learning_rate, max_learning_rate)
    direction = scale_by_shampoo(
        b1=b1,
        b2=b2,
        epsilon=epsilon,
        relative_epsilon=relative_epsilon,
        precondition_frequency=precondition_frequency,
        start_preconditioning_step=start_preconditioning_step,
        exponent=exponent,
        bias_correction=bias_correction,
        graft=graft,
        graft_b2=graft_b2,
        graft_eps=graft_eps,
        b3=b3,
        momentum=momentum,
        dampening=dampening,
        nesterov=nesterov,
        weight_decay=scaled_rate(decay_scale, weight_decay),
        weight_decay_type="l2" if weight_decay_type == "l2" else "decoupled",
        mask=mask,
        trace_scaling=trace_scaling,
        kl_factors=kl_factors,
        max_preconditioner_dim=max_preconditioner_dim,
        merge=merge,
        matrix_axes=matrix_axes,
        root_method=root_method,
        stagger=stagger,
        param_shardings=param_shardings,
        replicated_work=replicated_work,
    )
    return with_adamw_fallback(
        "shampoo",
        optax.chain(direction, optax.scale_by_learning_rate(learning_rate)),
        scaled_rate(learning_rate, adam_lr_ratio)
        if adam_learning_rate is None
        else adam_learning_rate,
        b1=adam_b1,
        b2=adam_b2,
        eps=adam_eps,
        weight_decay=scaled_rate(
            decay_scale, weight_decay if adam_weight_decay is None else adam_weight_decay
        ),
        mask=mask,
        matrix_axes=matrix_axes,
        on_uncovered=on_uncovered,
        vocabulary_size=vocabulary_size,
        labels=_labels(matrix_axes, precondition_1d, on_uncovered, vocabulary_size),
    )


def _decay_scale(
    kind: str, learning_rate: optax.ScalarOrSchedule, maximum: Scalar | None
) -> optax.ScalarOrSchedule:
    """What multiplies the decay before the learning rate does."""
    if kind in ("decoupled", "l2"):
        return 1.0
    if kind not in ("corrected", "independent"):
        raise ValueError(
            f"weight_decay_type is {kind!r}; choose one of decoupled, l2, corrected, independent"
        )
    if maximum is None:
        if callable(learning_rate):
            raise ValueError(
                f"max_learning_rate is None; weight_decay_type={kind!r} needs it where the "
                "learning rate is a schedule"
            )
        maximum = learning_rate
    if isinstance(maximum, int | float) and not 0 < maximum < math.inf:
        raise ValueError(f"max_learning_rate is {maximum}; it must be a positive number")
    return 1 / maximum if kind == "independent" else scaled_rate(learning_rate, 1 / maximum)


def _labels(
    matrix_axes: MatrixAxesSpec,
    precondition_1d: bool,
    on_uncovered: str,
    vocabulary_size: int | None,
) -> Callable[[optax.Params], Any]:
    """Label function of the partition: matrices, and what else shall be preconditioned."""
    if on_uncovered not in ("adamw", "modes", "error"):
        raise ValueError(f"on_uncovered is {on_uncovered!r}; choose 'adamw', 'modes' or 'error'")
    roles = ("matrix",)  # a closure that reads it must hash
    if on_uncovered == "modes":
        roles += ("unspecified",)
    if precondition_1d:
        roles += ("vector",)

    def labels(params: optax.Params) -> Any:
        routes = route(
            params,
            matrix_axes,
            Routing(vocabulary_size or 10_000, on_uncovered),  # pyright: ignore
        )
        leaves, treedef = jax.tree.flatten(params)
        chosen = [r.role in roles and len(x.shape) > 0 for r, x in zip_strict(routes, leaves)]
        return treedef.unflatten(["shampoo" if c else FALLBACK_LABEL for c in chosen])

    return labels
