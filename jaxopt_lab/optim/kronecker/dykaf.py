"""DyKAF: Adam in the eigenbases of a dynamical Kronecker approximation of the Fisher matrix."""

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from jaxopt_lab.core.kronecker import INTEGRATORS, StartScale
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.core.orthogonalization import Orthogonalizer
from jaxopt_lab.core.precision import ProductPrecision
from jaxopt_lab.core.stacks import ReplicatedWork
from jaxopt_lab.optim.kronecker.checks import check_choice, gradient_weight
from jaxopt_lab.optim.kronecker.factors import GramFactors, KroneckerFactors
from jaxopt_lab.optim.kronecker.groups import on_whole_model
from jaxopt_lab.optim.kronecker.step import EigenbasisAdam
from jaxopt_lab.optim.kronecker.transform import eigenbasis_transform
from jaxopt_lab.optim.rates import check_rates
from jaxopt_lab.optim.routing import MatrixAxesSpec

# Frobenius norm of the one-sided start of the released code.
_RELEASED_ONE_SIDED_START = 1e3


def scale_by_dykaf(
    *,
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    factor_decay: Scalar | None = None,
    eps: Scalar = 1e-8,
    precondition_frequency: int = 10,
    integrator: str = "ksl",
    init: str = "kron",
    kron_init_scale: StartScale = "sigma",
    max_precond_dim: int | None = None,
    one_sided: str = "ema",
    rank1_second_moment: bool = False,
    rank1_eps_in_denominator: bool = True,
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
    r"""Direction of DyKAF, with its weight decay.

    SOAP with better factors: $L \otimes R$ tracks the best Kronecker approximation of the averaged
    second moment $F$ by one step of a rank-one integrator a gradient, in the space in which
    Kronecker products are rank-one matrices (`jaxopt_lab.core.kronecker`). Its eigenvectors are the
    bases of Adam:

    .. math::
      F \leftarrow \beta F + (1 - \beta) \operatorname{vec} G \operatorname{vec} G^\top
        \approx L \otimes R, \qquad L = Q_L \Lambda_L Q_L^\top, \quad R = Q_R \Lambda_R Q_R^\top

      G' = Q_L^\top G Q_R, \qquad M \leftarrow \beta_1 M + (1 - \beta_1) G', \qquad
      V \leftarrow \beta_2 V + (1 - \beta_2) G' \circ G'

      N = \frac{\sqrt{1 - \beta_2^k}}{1 - \beta_1^k} \,
          Q_L \frac{M}{\sqrt V + \epsilon} Q_R^\top

    The current gradient enters the factors after the step, and the bases are refreshed every
    `precondition_frequency` steps by one power iteration, as in `scale_by_soap`. Every leaf must be
    a matrix; `dykaf` routes the others.

    Args:
      b1: $\beta_1$.
      b2: $\beta_2$.
      factor_decay: $\beta$ of the factors; None: $\beta_2$. With 1 they approximate the plain sum.
      eps: $\epsilon$, outside the bias correction.
      precondition_frequency: Updates from one refresh of the bases to the next.
      integrator: "ksl" (projector splitting, the method's own) or "parallel" (basis update and
        Galerkin, what the released code runs; half again as many products).
      init: Factors before the first gradient: "kron" (its best Kronecker approximation; a matrix
        whose gradient is zero waits for one that is not) or "eps" (multiples of the identity).
      kron_init_scale: "sigma" (exact) or "sqrt_sigma" (released code; in other units).
      max_precond_dim: A longer side has no factor and keeps its axes (static). None: 10 000.
      one_sided: The factor of a matrix whose other side has none: "ema" (as in SOAP) or "code" (a
        sum without decay from a start of norm 1000, as in the released code).
      rank1_second_moment: Keep $V \approx l r^\top$: less memory, clearly worse in pretraining.
      rank1_eps_in_denominator: Then add $\epsilon$ to the root all the same; without it rare
        coordinates take huge steps.
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

    Source: Yudin, Grishina, Veprikov, Beznosikov and Rakhuba, "DyKAF: Dynamical Kronecker
    Approximation of the Fisher Information Matrix for Gradient Preconditioning", arXiv 2511.06477.

    Differs from the released code in: the integrator, the scale of the start, the one-sided rule
    and the floor of the rank-one fit, each by default and each an option; factors are float32 or
    wider; a matrix that starts later than the others is refreshed with them.
    """
    check_choice("integrator", integrator, tuple(INTEGRATORS))
    check_choice("init", init, ("kron", "eps"))
    check_choice("kron_init_scale", kron_init_scale, ("sigma", "sqrt_sigma"))
    check_choice("one_sided", one_sided, ("ema", "code"))
    decay = b2 if factor_decay is None else factor_decay
    weight = gradient_weight(decay)
    single = GramFactors(decay, weight, factor_precision)
    if one_sided == "code":
        single = GramFactors(1.0, 1.0, factor_precision, _RELEASED_ONE_SIDED_START)
    method = EigenbasisAdam(
        rule=KroneckerFactors(
            decay, weight, single, factor_precision, integrator, init, kron_init_scale
        ),
        b1=b1,
        b2=b2,
        eps=eps,
        frequency=precondition_frequency,
        second_moment="rank_one" if rank1_second_moment else "full",
        eps_in_denominator=rank1_eps_in_denominator,
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
        weight_decay=weight_decay,
        mask=mask,
        decay_rate=decay_rate,
        matrix_axes=matrix_axes,
        param_shardings=param_shardings,
    )


def dykaf(
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
    integrator: str = "ksl",
    init: str = "kron",
    kron_init_scale: StartScale = "sigma",
    max_precond_dim: int | None = None,
    one_sided: str = "ema",
    rank1_second_moment: bool = False,
    rank1_eps_in_denominator: bool = True,
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
    """DyKAF for the matrices of a model, AdamW for everything else.

    See `scale_by_dykaf` for the equations, and `dykaf_official` for the released configuration.

    Args:
      learning_rate: A number or a schedule; 3e-3 is the released default.
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
      integrator: "ksl" or "parallel".
      init: "kron" or "eps".
      kron_init_scale: "sigma" or "sqrt_sigma".
      max_precond_dim: A longer side has no factor (static). A matrix with both sides longer belongs
        to AdamW. None: 10 000.
      one_sided: "ema" or "code".
      rank1_second_moment: As for `scale_by_dykaf`.
      rank1_eps_in_denominator: As for `scale_by_dykaf`.
      correct_bias: Multiply by Adam's bias correction.
      normalize_grads: Divide every direction by its root mean square.
      skip_first_step: Take no step at the first gradient, in any leaf.
      stagger: As for `scale_by_dykaf`.
      precondition_1d: Give vectors a factor as well; see `scale_by_tensor_soap`.
      merge_dims: Merge neighbouring axes while their product is within `max_precond_dim`, in leaves
        of more than two axes that no layout covers, and in matrices that become a vector.
      on_uncovered: A leaf of more than two axes without a layout: "adamw", "error", or "modes" for
        one averaged Gram factor an axis, as in the released code.
      vocabulary_size: Without `matrix_axes`, an axis this long marks an embedding. None: 10 000.
      orthogonalizer: As for `scale_by_dykaf`, for all leaves with factors.
      factor_precision: As for `scale_by_dykaf`.
      rotation_precision: As for `scale_by_dykaf`.
      param_shardings: Tree of `NamedSharding`, for meshes with Auto axes.
      replicated_work: "repeat" or "share" the work on factors over replicas.

    Returns:
      A transformation whose state holds an `optax.transforms.PartitionState` with the groups
      "dykaf", "modes" and "adamw".

    Raises:
      ValueError: A rate is NaN or negative, an option is unknown or out of range, or a layout does
        not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = optax.chain(optax.clip_by_global_norm(0.5), dykaf(1e-3, weight_decay=0.1))
      >>> params = {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> jax.tree.map(jnp.shape, updates)
      {'bias': (8,), 'kernel': (4, 8)}

    Source: Yudin et al., "DyKAF: Dynamical Kronecker Approximation of the Fisher Information Matrix
    for Gradient Preconditioning", arXiv 2511.06477.

    Differs from the released code in: see `scale_by_dykaf`; embeddings and heads are AdamW's unless
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
    direction = scale_by_dykaf(
        **shared,
        integrator=integrator,
        init=init,
        kron_init_scale=kron_init_scale,
        one_sided=one_sided,
        rank1_second_moment=rank1_second_moment,
        rank1_eps_in_denominator=rank1_eps_in_denominator,
        stagger=stagger,
        factor_precision=factor_precision,
        rotation_precision=rotation_precision,
        decay_rate=learning_rate if decay_after_step else None,
        param_shardings=param_shardings,
        replicated_work=replicated_work,
    )
    return on_whole_model(
        "dykaf",
        direction,
        learning_rate,
        **shared,
        merge_dims=merge_dims,
        precondition_1d=precondition_1d,
        decay_after_step=decay_after_step,
        on_uncovered=on_uncovered,
        vocabulary_size=vocabulary_size,
    )


def dykaf_official(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    factor_decay: Scalar | None = None,
    eps: Scalar = 1e-8,
    precondition_frequency: int = 10,
    weight_decay: Scalar = 0.01,
    mask: Any = None,
    matrix_axes: MatrixAxesSpec = None,
    init: str = "kron",
    max_precond_dim: int | None = None,
    rank1_second_moment: bool = True,
    correct_bias: bool = True,
    normalize_grads: bool = False,
    precondition_1d: bool = False,
    orthogonalizer: Orthogonalizer = "householder",
    factor_precision: ProductPrecision = "highest",
    rotation_precision: ProductPrecision = "highest",
    param_shardings: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """DyKAF as its released code runs it, with the defaults of the released class.

    The parallel integrator, the start with the root of the singular value, one-sided sums without
    decay, no floor under the rank-one second moment, decay after the step, a factor an axis for
    leaves of more than two axes, and every leaf of two axes a matrix, embeddings included.

    Args:
      learning_rate: As for `dykaf`.
      b1: As for `dykaf`.
      b2: As for `dykaf`.
      factor_decay: As for `dykaf`.
      eps: As for `dykaf`.
      precondition_frequency: As for `dykaf`.
      weight_decay: As for `dykaf`.
      mask: As for `dykaf`.
      matrix_axes: As for `dykaf`. None: every leaf of two axes.
      init: As for `dykaf`; the released training script takes "eps".
      max_precond_dim: As for `dykaf`.
      rank1_second_moment: As for `dykaf`; the released training script takes False.
      correct_bias: As for `dykaf`.
      normalize_grads: As for `dykaf`.
      precondition_1d: As for `dykaf`.
      orthogonalizer: As for `dykaf`.
      factor_precision: As for `dykaf`.
      rotation_precision: As for `dykaf`.
      param_shardings: As for `dykaf`.

    Source: Yudin et al., arXiv 2511.06477, code of the llm-baselines harness, branch dykaf.
    """
    return dykaf(
        learning_rate,
        b1=b1,
        b2=b2,
        factor_decay=factor_decay,
        eps=eps,
        precondition_frequency=precondition_frequency,
        weight_decay=weight_decay,
        mask=mask,
        decay_after_step=True,
        matrix_axes=_every_two_axes if matrix_axes is None else matrix_axes,
        integrator="parallel",
        init=init,
        kron_init_scale="sqrt_sigma",
        max_precond_dim=max_precond_dim,
        one_sided="code",
        rank1_second_moment=rank1_second_moment,
        rank1_eps_in_denominator=False,
        correct_bias=correct_bias,
        normalize_grads=normalize_grads,
        precondition_1d=precondition_1d,
        on_uncovered="modes",
        orthogonalizer=orthogonalizer,
        factor_precision=factor_precision,
        rotation_precision=rotation_precision,
        param_shardings=param_shardings,
    )


def _every_two_axes(params: optax.Params) -> Any:
    return jax.tree.map(lambda x: MuonDimensionNumbers() if len(x.shape) == 2 else None, params)
