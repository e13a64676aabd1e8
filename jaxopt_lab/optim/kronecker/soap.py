"""SOAP: Adam in the slowly updated eigenbases of Shampoo's factors."""

from typing import Any

import optax

from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.core.orthogonalization import Orthogonalizer
from jaxopt_lab.core.precision import ProductPrecision
from jaxopt_lab.core.stacks import ReplicatedWork
from jaxopt_lab.optim.kronecker.checks import gradient_weight
from jaxopt_lab.optim.kronecker.factors import GramFactors
from jaxopt_lab.optim.kronecker.groups import on_whole_model
from jaxopt_lab.optim.kronecker.step import EigenbasisAdam
from jaxopt_lab.optim.kronecker.transform import eigenbasis_transform
from jaxopt_lab.optim.rates import check_rates
from jaxopt_lab.optim.routing import MatrixAxesSpec


def scale_by_soap(
    *,
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    factor_decay: Scalar | None = None,
    eps: Scalar = 1e-8,
    precondition_frequency: int = 10,
    max_precond_dim: int | None = None,
    one_sided: bool = False,
    factored_second_moment: bool = False,
    correct_bias: bool = True,
    normalize_grads: bool = False,
    skip_first_step: bool = True,
    stagger: bool = False,
    orthogonalizer: Orthogonalizer = "cholesky_qr",
    factor_precision: ProductPrecision = "bf16_x3",
    rotation_precision: ProductPrecision = "bfloat16",
    weight_decay: Scalar = 0.0,
    mask: Any = None,
    decay_rate: optax.ScalarOrSchedule | None = None,
    matrix_axes: MatrixAxesSpec = None,
    param_shardings: Any = None,
    replicated_work: ReplicatedWork = "repeat",
) -> optax.GradientTransformationExtraArgs:
    r"""Direction of SOAP, with its weight decay.

    For a gradient $G$ of shape (m, n) and bases $Q_L, Q_R$ from earlier gradients,

    .. math::
      G' = Q_L^\top G Q_R, \qquad M \leftarrow \beta_1 M + (1 - \beta_1) G', \qquad
      V \leftarrow \beta_2 V + (1 - \beta_2) G' \circ G'

      N = \frac{\sqrt{1 - \beta_2^k}}{1 - \beta_1^k} \,
          Q_L \frac{M}{\sqrt V + \epsilon} Q_R^\top

      L \leftarrow \beta L + (1 - \beta) G G^\top, \qquad
      R \leftarrow \beta R + (1 - \beta) G^\top G

    and every `precondition_frequency` steps the columns of each basis are sorted by decreasing
    $\operatorname{diag}(Q^\top X Q)$ and replaced by the orthogonal factor of $X Q$, one power
    iteration: $M$ is re-expressed in the new bases, $V$ follows the permutation. The first gradient
    only starts the factors and gives the bases, by a full eigendecomposition. Every leaf must be a
    matrix; `soap` routes the others.

    Args:
      b1: $\beta_1$.
      b2: $\beta_2$.
      factor_decay: $\beta$ of the factors; None: $\beta_2$. With 1 they are plain sums.
      eps: $\epsilon$, outside the bias correction.
      precondition_frequency: Updates from one refresh of the bases to the next.
      max_precond_dim: A longer side has no factor and keeps its axes (static). None: 10 000.
      one_sided: Give a factor to the smaller side only.
      factored_second_moment: Keep row and column sums of $V$ (Adafactor) instead of $V$.
      correct_bias: Multiply by Adam's bias correction.
      normalize_grads: Divide $N$ by its root mean square.
      skip_first_step: Take no step at the first gradient.
      stagger: Refresh a share of the matrices at every step instead of all at once. No step then
        pays for all of them, and which matrix has its turn when depends on how they are distributed
        over devices; `precondition_frequency` must be a plain integer.
      orthogonalizer: "cholesky_qr" (matrix products) or "householder".
      factor_precision: Of the products that form factors and bases.
      rotation_precision: Of the products that rotate into the bases and back. With "bfloat16" the
        bases of float32 matrices are kept in bfloat16 as well: nothing else reads them.
      weight_decay: Decoupled decay $\lambda$: the direction is $N + \lambda W$.
      mask: Which leaves decay: a tree of bools, a prefix of one, or a function of the parameters.
      decay_rate: The learning rate. When given, weights decay after the step, as in the released
        code: $W \leftarrow (1 - \eta \lambda)(W - \eta N)$.
      matrix_axes: Layouts as for `optax.contrib.muon`; see `jaxopt_lab.optim.routing.route`. None:
        every leaf has two axes.
      param_shardings: Tree of `NamedSharding` of the parameters. Needed on meshes with Auto axes,
        where types do not show the layout.
      replicated_work: On mesh axes that replicate the parameters, "repeat" the work on factors or
        "share" it for an all-gather of the results.

    Returns:
      A transformation with state `EigenbasisAdamState`. A gradient that is not finite, or too large
      to be squared or added to sums of squares, leaves its matrix, factors and moments as they are
      and counts in `notfinite_count`; a refresh of the bases that is due is made all the same.

    Raises:
      ValueError: An option is unknown or out of range, or a leaf is not a matrix.

    Source: Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson and Kakade, "SOAP: Improving
    and Stabilizing Shampoo using Adam", arXiv 2409.11321.

    Differs from the released code in: directions in which a factor is zero to working precision
    keep their basis vectors (released: arbitrary ones); leading axes are batch by layout; products
    of factors have about 16 bits of mantissa on accelerators by default.
    """
    decay = b2 if factor_decay is None else factor_decay
    method = EigenbasisAdam(
        rule=GramFactors(decay, gradient_weight(decay), factor_precision),
        b1=b1,
        b2=b2,
        eps=eps,
        frequency=precondition_frequency,
        second_moment="factored" if factored_second_moment else "full",
        eps_in_denominator=True,
        correct_bias=correct_bias,
        normalize_grads=normalize_grads,
        skip_first_step=skip_first_step,
        stagger=stagger,
        orthogonalizer=orthogonalizer,
        factor_precision=factor_precision,
        rotation_precision=rotation_precision,
        replicated_work=replicated_work,
    )
    return eigenbasis_transform(
        method,
        max_precond_dim=max_precond_dim,
        smaller_side_only=one_sided,
        weight_decay=weight_decay,
        mask=mask,
        decay_rate=decay_rate,
        matrix_axes=matrix_axes,
        param_shardings=param_shardings,
    )


def soap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    factor_decay: Scalar | None = None,
    eps: Scalar = 1e-8,
    precondition_frequency: int = 10,
    weight_decay: Scalar = 0.01,
    mask: Any = None,
    decay_after_step: bool = False,
    matrix_axes: MatrixAxesSpec = None,
    max_precond_dim: int | None = None,
    one_sided: bool = False,
    factored_second_moment: bool = False,
    correct_bias: bool = True,
    normalize_grads: bool = False,
    skip_first_step: bool = True,
    stagger: bool = False,
    precondition_1d: bool = False,
    merge_dims: bool = False,
    on_uncovered: str = "adamw",
    vocabulary_size: int | None = None,
    orthogonalizer: Orthogonalizer = "cholesky_qr",
    factor_precision: ProductPrecision = "bf16_x3",
    rotation_precision: ProductPrecision = "bfloat16",
    param_shardings: Any = None,
    replicated_work: ReplicatedWork = "repeat",
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
      weight_decay: Decay of all leaves, at the learning rate.
      mask: Which leaves decay: a tree of bools, a prefix of one, or a function of the parameters.
      decay_after_step: Let the updated weights decay, as the released code does, instead of adding
        decay to the step.
      matrix_axes: `MuonDimensionNumbers` for the leaves that are matrices, None for those that are
        not: a tree, a prefix, or a function of the parameters. None: leaves of two axes, except
        embeddings and heads.
      max_precond_dim: A longer side has no factor (static). A matrix with both sides longer belongs
        to AdamW. None: 10 000.
      one_sided: As for `scale_by_soap`.
      factored_second_moment: As for `scale_by_soap`.
      correct_bias: Multiply by Adam's bias correction.
      normalize_grads: Divide every direction by its root mean square.
      skip_first_step: Take no step at the first gradient, in any leaf.
      stagger: As for `scale_by_soap`.
      precondition_1d: Give vectors a factor as well; see `scale_by_tensor_soap`.
      merge_dims: Merge neighbouring axes while their product is within `max_precond_dim`, in leaves
        of more than two axes that no layout covers, and in matrices that become a vector.
      on_uncovered: A leaf of more than two axes without a layout: "adamw", "error", or "modes" for
        one factor an axis, as in the released code.
      vocabulary_size: Without `matrix_axes`, an axis this long marks an embedding. None: 10 000.
      orthogonalizer: As for `scale_by_soap`, for all leaves with factors.
      factor_precision: As for `scale_by_soap`.
      rotation_precision: As for `scale_by_soap`.
      param_shardings: Tree of `NamedSharding`, for meshes with Auto axes.
      replicated_work: "repeat" or "share" the work on factors over replicas.

    Returns:
      A transformation whose state holds an `optax.transforms.PartitionState` with the groups
      "soap", "modes" and "adamw".

    Raises:
      ValueError: A rate is NaN or negative, an option is unknown or out of range, or a layout does
        not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> tx = soap(3e-3)
      >>> params = {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> jax.tree.map(jnp.shape, updates)
      {'bias': (8,), 'kernel': (4, 8)}

    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv 2409.11321.

    Differs from the released code in: see `scale_by_soap`; embeddings and heads are AdamW's unless
    `matrix_axes` names them; decay is decoupled unless `decay_after_step`.
    """
    check_rates(learning_rate=learning_rate, weight_decay=weight_decay)
    shared: dict[str, Any] = {
        "b1": b1,
        "b2": b2,
        "factor_decay": factor_decay,
        "eps": eps,
        "precondition_frequency": precondition_frequency,
        "max_precond_dim": max_precond_dim,
        "correct_bias": correct_bias,
        "normalize_grads": normalize_grads,
        "skip_first_step": skip_first_step,
        "orthogonalizer": orthogonalizer,
        "weight_decay": weight_decay,
        "mask": mask,
        "matrix_axes": matrix_axes,
    }
    direction = scale_by_soap(
        **shared,
        one_sided=one_sided,
        factored_second_moment=factored_second_moment,
        stagger=stagger,
        factor_precision=factor_precision,
        rotation_precision=rotation_precision,
        decay_rate=learning_rate if decay_after_step else None,
        param_shardings=param_shardings,
        replicated_work=replicated_work,
    )
    return on_whole_model(
        "soap",
        direction,
        learning_rate,
        **shared,
        merge_dims=merge_dims,
        precondition_1d=precondition_1d,
        decay_after_step=decay_after_step,
        on_uncovered=on_uncovered,
        vocabulary_size=vocabulary_size,
    )
