"""SOAP: Adam in the slowly updated eigenbases of Shampoo's factors."""

from typing import Any

import optax

from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.kronecker.factors import GramFactors
from jaxopt_lab.optim.kronecker.model import eigenbasis_optimizer
from jaxopt_lab.optim.kronecker.step import EigenbasisAdam
from jaxopt_lab.optim.kronecker.transform import eigenbasis_direction
from jaxopt_lab.optim.nonfinite import guarded
from jaxopt_lab.optim.options import AdamW, Eigenbasis, MeshWork, Routing
from jaxopt_lab.optim.routing import MatrixAxesSpec

# Keywords of earlier versions.
MOVED = {
    "stagger": "eigenbasis=Eigenbasis(stagger=...)",
    "max_precond_dim": "eigenbasis=Eigenbasis(max_precond_dim=...)",
    "decay_rate": "jaxopt_lab.parity.soap.decayed_after_step in the chain",
    "skip_first_step": "nothing: the first gradient only gives the bases",
} | dict.fromkeys(
    ("correct_bias", "normalize_grads", "decay_after_step", "merge_dims", "precondition_1d"),
    "the optimizer of that name in jaxopt_lab.parity, which has it",
)


@explains_keywords(**MOVED)
def scale_by_soap(
    *,
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    factor_decay: Scalar | None = None,
    eps: Scalar = 1e-8,
    precondition_frequency: int = 10,
    matrix_axes: MatrixAxesSpec = None,
    eigenbasis: Eigenbasis = Eigenbasis(),
    mesh: MeshWork = MeshWork(),
) -> optax.GradientTransformationExtraArgs:
    r"""Direction of SOAP.

    For a gradient $G$ of shape (m, n) and bases $Q_L, Q_R$ from earlier gradients,

    $$G' = Q_L^\top G Q_R, \qquad M \leftarrow \beta_1 M + (1 - \beta_1) G', \qquad
    V \leftarrow \beta_2 V + (1 - \beta_2) G' \circ G'$$

    $$N = Q_L \left[ \frac{\sqrt{1 - \beta_2^k}}{1 - \beta_1^k} \,
    \frac{M}{\sqrt V + \epsilon} \right] Q_R^\top$$

    $$L \leftarrow \beta L + (1 - \beta) G G^\top, \qquad
    R \leftarrow \beta R + (1 - \beta) G^\top G$$

    and every `precondition_frequency` steps the columns of each basis are sorted by decreasing
    $\operatorname{diag}(Q^\top X Q)$ and replaced by the orthogonal factor of $X Q$, one power
    iteration: $M$ is re-expressed in the new bases, $V$ follows the permutation. The first gradient
    only starts the factors and gives the bases, by a full eigendecomposition; no step is taken.
    Every leaf must be a matrix; `soap` routes the others.

    Args:
      b1: $\beta_1$.
      b2: $\beta_2$.
      factor_decay: $\beta$ of the factors; None: $\beta_2$. With 1 they are plain sums.
      eps: $\epsilon$, outside the bias correction.
      precondition_frequency: Updates from one refresh of the bases to the next.
      matrix_axes: Layouts as for `optax.contrib.muon`; see `jaxopt_lab.optim.routing.route`. None:
        every leaf has two axes.
      eigenbasis: How bases and moments are kept.
      mesh: Layouts of the parameters, and how replicas share the work.

    Returns:
      A transformation with state `EigenbasisAdamState`. A gradient that is not finite, or too large
      to be squared or added to sums of squares, leaves its matrix, factors and moments as they are
      and counts in `notfinite_count`; a refresh of the bases that is due is made all the same.
      Updates cannot be differentiated in reverse mode: steps that are not due are skipped by loops
      that end after no round, which `jax.grad` cannot transpose. Forward mode works.

    Raises:
      ValueError: A number is out of range, or a leaf is not a matrix.

    Source: Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson and Kakade, "SOAP: Improving
    and Stabilizing Shampoo using Adam", arXiv 2409.11321.

    Differs from the released code in: directions in which a factor is zero to working precision
    keep their basis vectors (released: arbitrary ones); leading axes are batch by layout; products
    of factors have about 16 bits of mantissa on accelerators by default.
    """
    method = soap_method(b1, b2, factor_decay, eps, precondition_frequency, eigenbasis, mesh)
    return guarded(eigenbasis_direction(method, matrix_axes, eigenbasis, mesh))


@explains_keywords(**MOVED)
def soap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    factor_decay: Scalar | None = None,
    eps: Scalar = 1e-8,
    precondition_frequency: int = 10,
    weight_decay: optax.ScalarOrSchedule = 0.01,
    mask: Any = None,
    matrix_axes: MatrixAxesSpec = None,
    eigenbasis: Eigenbasis = Eigenbasis(),
    routing: Routing = Routing(),
    fallback: AdamW = AdamW(),
    mesh: MeshWork = MeshWork(),
) -> optax.GradientTransformationExtraArgs:
    """SOAP for the matrices of a model, AdamW for everything else.

    See `scale_by_soap` for the equations. One hyperparameter more than AdamW: how often the bases
    are refreshed.

    Args:
      learning_rate: A number or a schedule; 3e-3 is the published default.
      b1: Decay of the first moment, for all leaves.
      b2: Decay of the second moment, for all leaves.
      factor_decay: Decay of the factors; None: `b2`.
      eps: Epsilon on the uncorrected root, for all leaves.
      precondition_frequency: Updates from one refresh of the bases to the next.
      weight_decay: Decay of all leaves, at the learning rate; a number or a schedule.
      mask: Which leaves decay: a tree of bools, a prefix of one, or a function of the parameters.
      matrix_axes: `MuonDimensionNumbers` for the leaves that are matrices, None for those that are
        not: a tree, a prefix, or a function of the parameters. None: leaves of two axes, except
        embeddings and heads.
      eigenbasis: How bases and moments are kept. A matrix with both sides above `max_precond_dim`
        belongs to AdamW.
      routing: Which leaves are matrices without `matrix_axes`. `on_uncovered="modes"` gives leaves
        of more than two axes one factor an axis, as the released code does.
      fallback: What AdamW does differently; like SOAP it takes no step at the first gradient.
      mesh: Layouts of the parameters, and how replicas share the work.

    Returns:
      A transformation whose state holds an `optax.transforms.PartitionState` with the groups
      "soap", "modes" and "adamw".

    Raises:
      ValueError: A rate is NaN or negative, a number is out of range, or a layout does not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> tx = soap(3e-3)
      >>> params = {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> jax.tree.map(jnp.shape, updates)
      {'bias': (8,), 'kernel': (4, 8)}

    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv 2409.11321.

    Differs from the released code in: see `scale_by_soap`; embeddings and heads are AdamW's unless
    `matrix_axes` names them; weights decay beside the step, not after it.
    """
    method = soap_method(b1, b2, factor_decay, eps, precondition_frequency, eigenbasis, mesh)
    return eigenbasis_optimizer(
        "soap",
        method,
        learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        matrix_axes=matrix_axes,
        eigenbasis=eigenbasis,
        routing=routing,
        fallback=fallback,
        mesh=mesh,
    )


def soap_method(
    b1: Scalar,
    b2: Scalar,
    factor_decay: Scalar | None,
    eps: Scalar,
    precondition_frequency: int,
    eigenbasis: Eigenbasis,
    mesh: MeshWork,
) -> EigenbasisAdam:
    """The step of SOAP; arguments are those of `scale_by_soap`."""
    return EigenbasisAdam(
        GramFactors(b2 if factor_decay is None else factor_decay, eigenbasis.factor_precision),
        b1,
        b2,
        eps,
        precondition_frequency,
        eigenbasis,
        mesh.replicated_work,
    )
