"""Shampoo: inverse roots of Kronecker factors on every side, with the step size of Adam."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxopt_lab.core.checks import (
    COUNT,
    DECAY_OR_SUM,
    NOT_NEGATIVE,
    check_decays,
    check_number,
    check_rates,
)
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.optim.fallback import with_fallback
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.kronecker.grafting import graft_decay
from jaxopt_lab.optim.kronecker.shampoo_step import ShampooRule, ShampooState, shampoo_direction
from jaxopt_lab.optim.nonfinite import guarded
from jaxopt_lab.optim.options import AdamW, Graft, InverseRoot, MeshWork, Routing
from jaxopt_lab.optim.rates import decayed_weights
from jaxopt_lab.optim.routing import FALLBACK_LABEL, MatrixAxesSpec, route

__all__ = ["ShampooState", "scale_by_shampoo", "shampoo"]

_GONE = "no such option"
_MERGE = f"{_GONE}: axes merge in leaves of more than two axes only"
_explains_keywords = explains_keywords(
    relative_epsilon="inverse_root=InverseRoot(relative_eps=True)",
    exponent="inverse_root=InverseRoot(exponent=...)",
    root_method="inverse_root=InverseRoot(method=...)",
    root_precision="inverse_root=InverseRoot(precision=...)",
    stagger="inverse_root=InverseRoot(stagger=True)",
    max_preconditioner_dim="inverse_root=InverseRoot(max_precond_dim=...)",
    max_precond_dim="inverse_root=InverseRoot(max_precond_dim=...)",
    block_size="inverse_root=InverseRoot(max_precond_dim=...)",
    graft_b2="graft=Graft(b2=...)",
    graft_eps="graft=Graft(eps=...)",
    grafting="graft=Graft(kind=...)",
    momentum="b1=... for the average of the gradient; for momentum of the direction, optax.trace "
    "in a chain behind scale_by_shampoo",
    nesterov="optax.trace(..., nesterov=True) in a chain behind scale_by_shampoo",
    dampening="optax.scale(1 - dampening) before optax.trace, in a chain behind scale_by_shampoo",
    weight_decay_type='optax.add_decayed_weights in a chain: before shampoo for "l2", behind '
    "scale_by_shampoo with a schedule for the others",
    max_learning_rate="a schedule as weight_decay",
    start_preconditioning_step="precondition_frequency=...: the first roots come at that step",
    bias_correction=f"{_GONE}: moments and factors are always corrected",
    b3=f"{_GONE}: the averaged gradient of b1 is what is used",
    trace_scaling="inverse_root=InverseRoot(relative_eps=True), a ridge that follows the factors",
    kl_factors=f"{_GONE}: factors are averages of Gram matrices",
    merge=_MERGE,
    merge_dims=_MERGE,
    factor_precision=f'{_GONE}: Gram products are formed in "bf16_x3"',
    direction_precision=f"{_GONE}: it is that of jax.default_matmul_precision",
    precondition_1d="matrix_axes=...: a vector is a matrix if it has a layout, or lies in a stack",
)


@_explains_keywords
def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-12,
    precondition_frequency: Scalar = 10,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    matrix_axes: MatrixAxesSpec = None,
    inverse_root: InverseRoot = InverseRoot(),
    graft: Graft = Graft(),
    routing: Routing = Routing(),
    fallback: AdamW = AdamW(),
    mesh: MeshWork = MeshWork(),
) -> optax.GradientTransformationExtraArgs:
    r"""Shampoo for the matrices of a model, AdamW for everything else.

    See `scale_by_shampoo` for the equations. To start from a tuned AdamW keep its rate, betas and
    decay: with Adam grafting every block moves as far as Adam would, in a better direction.

    Args:
      learning_rate: A number or a schedule.
      b1: Decay of the first moment.
      b2: Decay of the factors; 1 accumulates sums.
      eps: Ridge of the factors.
      precondition_frequency: Steps from one refresh of the roots to the next, and to the first.
      weight_decay: Decoupled decay, a number or a schedule.
      mask: Which leaves decay: a tree of bools, a prefix of one, or a function of the parameters.
      matrix_axes: `MuonDimensionNumbers` for the leaves that are matrices, None for those that are
        not: a tree, a prefix, or a function of the parameters. None: as `routing` says.
      inverse_root: How factors become inverse roots, and how long a block may be.
      graft: The method whose step size every block takes.
      routing: Which leaves are matrices where `matrix_axes` does not say.
      fallback: What AdamW does differently, for the leaves that are not matrices.
      mesh: Where the parameters are laid out.

    Returns:
      A transformation whose state is an `optax.transforms.PartitionState` with the groups "shampoo"
      and "adamw".

    Raises:
      ValueError: An option is out of range, or a layout does not fit.
      TypeError: A keyword of an earlier version or of another library; the message says where the
        option is.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), shampoo(1e-3, weight_decay=0.1))
      >>> params = {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> jax.tree.map(jnp.shape, updates)
      {'bias': (8,), 'kernel': (4, 8)}

    Source: Gupta, Koren and Singer, arXiv 1802.09568 (2018); Shi et al., arXiv 2309.06497 (2023).

    Differs from the released code in: what `scale_by_shampoo` says; vectors, embeddings and heads
    go to AdamW.
    """
    check_rates(learning_rate=learning_rate)
    rule = _rule(b1, b2, eps, precondition_frequency, inverse_root, graft, mesh)
    of_matrices = guarded(
        shampoo_direction(rule, matrix_axes),
        decayed_weights(weight_decay, mask, routing),
        optax.scale_by_learning_rate(learning_rate),
    )
    return with_fallback(
        "shampoo",
        of_matrices,
        learning_rate,
        fallback,
        b1=b1,
        b2=graft_decay(graft, b2),
        weight_decay=weight_decay,
        mask=mask,
        matrix_axes=matrix_axes,
        routing=routing,
        labels=_labels(matrix_axes, routing),
    )


@_explains_keywords
def scale_by_shampoo(
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-12,
    precondition_frequency: Scalar = 10,
    matrix_axes: MatrixAxesSpec = None,
    inverse_root: InverseRoot = InverseRoot(),
    graft: Graft = Graft(),
    mesh: MeshWork = MeshWork(),
) -> optax.GradientTransformationExtraArgs:
    r"""Direction of Shampoo, bias correction included.

    A leaf is cut into blocks. For a block of order $o$ (2 for a matrix) with gradient $G$, first
    moment $M$ and the Gram matrices $G_{(k)} G_{(k)}^\top$ of its modes,

    $$X_k \leftarrow \beta_2 X_k + (1 - \beta_2) G_{(k)} G_{(k)}^\top, \qquad
    P_k = \Bigl( \frac{X_k}{1 - \beta_2^t} + \epsilon I \Bigr)^{-1 / (2 o)}$$

    $$D = \hat M \times_1 P_1 \cdots \times_o P_o, \qquad
    D \leftarrow D \, \lVert D_g \rVert / \lVert D \rVert$$

    where $\hat M$ is the bias-corrected first moment and $D_g$ the direction of the grafting
    method, which alone steers before the first roots. $\beta_2 = 1$ accumulates sums. The roots
    $P_k$ are refreshed every `precondition_frequency` steps, inside a conditional.

    Each matrix refuses a gradient that is not finite, whose sum of squares overflows, or whose
    squares make its factors overflow: the matrix stays as it was in all its blocks, its update is
    zero, and `notfinite_count` counts it. The others go on.

    A gradient times any number gives the same update as long as its entries are far above the
    epsilon of the graft ($10^{-8}$, as in Adam) and $\sqrt\epsilon$, which is $10^{-6}$, and its
    norm is below $10^{19}$. A ridge relative to the factors (`InverseRoot.relative_eps`) and a
    graft without an epsilon leave float32 as the only limit: entries above $10^{-15}$.

    Only forward-mode differentiation passes through an update. Roots come out of a loop whose
    length is known at run time only, and JAX has no reverse mode for those: it raises an error.

    Args:
      b1: $\beta_1$, decay of the first moment.
      b2: $\beta_2$, decay of the factors, in [0, 1]; 1: plain sums, which need no bias correction.
      eps: $\epsilon$, the ridge.
      precondition_frequency: Steps from one refresh of the roots to the next, and to the first.
      matrix_axes: `MuonDimensionNumbers` for leaves that hold batches of matrices; see
        `jaxopt_lab.optim.routing.route`. None, or None for a leaf: each of its axes is a mode.
      inverse_root: How factors become inverse roots, and how long a block may be.
      graft: The method whose step size every block takes.
      mesh: Where the parameters are laid out.

    Returns:
      A transformation with state `ShampooState`. It returns the direction, not negated.

    Raises:
      ValueError: An option is out of range, or a layout does not fit its leaf.

    Source: Gupta, Koren and Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", arXiv
    1802.09568 (2018); Shi, Lee, Iwasaki, Gallego-Posada, Li, Rangadurai, Mudigere and Rabbat, "A
    Distributed Data-Parallel PyTorch Implementation of the Distributed Shampoo Optimizer", arXiv
    2309.06497 (2023), with its code.

    Differs from the released code in: matrices are not merged into vectors; roots by Newton's
    iteration, with a ridge of at least round-off; Adam grafting, f = 10 and b2 = 0.999 by default;
    edge blocks are padded with zeros, which changes nothing; a block whose direction is zero stays
    zero, where the released code adds 1e-16 to its norm. `jaxopt_lab.parity.shampoo` runs the
    released rule.
    """
    rule = _rule(b1, b2, eps, precondition_frequency, inverse_root, graft, mesh)
    return guarded(shampoo_direction(rule, matrix_axes))


def _rule(
    b1: Scalar,
    b2: Scalar,
    eps: Scalar,
    precondition_frequency: Scalar,
    inverse_root: InverseRoot,
    graft: Graft,
    mesh: MeshWork,
) -> ShampooRule:
    """The step; checks its numbers."""
    check_decays(b1=b1)
    check_number("b2", b2, DECAY_OR_SUM)
    check_number("eps", eps, NOT_NEGATIVE)
    check_number("precondition_frequency", precondition_frequency, COUNT)
    if inverse_root.stagger and not isinstance(precondition_frequency, int):
        raise ValueError(
            f"precondition_frequency: got {precondition_frequency!r}, wanted a Python integer, "
            "because InverseRoot.stagger divides stacks into as many shares (under "
            "optax.inject_hyperparams name it in static_args)"
        )
    return ShampooRule(b1, b2, eps, precondition_frequency, inverse_root, graft, mesh)


def _labels(matrix_axes: MatrixAxesSpec, routing: Routing) -> Callable[[optax.Params], Any]:
    """Label function of the partition; with "modes" also for leaves without a layout."""

    def labels(params: optax.Params) -> Any:
        modes = routing.on_uncovered == "modes"
        names = [
            "shampoo" if r.axes or (modes and r.role == "unspecified") else FALLBACK_LABEL
            for r in route(params, matrix_axes, routing)
        ]
        return jax.tree.structure(params).unflatten(names)

    return labels
