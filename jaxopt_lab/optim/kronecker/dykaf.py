"""DyKAF: Adam in the eigenbases of a dynamical Kronecker approximation of the Fisher matrix."""

from dataclasses import replace
from typing import Any

import optax

from jaxopt_lab.core.checks import check_choice
from jaxopt_lab.core.kronecker import INTEGRATORS, Integrator
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.kronecker.factors import GramFactors, KroneckerFactors
from jaxopt_lab.optim.kronecker.model import eigenbasis_optimizer
from jaxopt_lab.optim.kronecker.soap import MOVED, soap_method
from jaxopt_lab.optim.kronecker.step import EigenbasisAdam
from jaxopt_lab.optim.kronecker.transform import eigenbasis_direction
from jaxopt_lab.optim.nonfinite import guarded
from jaxopt_lab.optim.options import AdamW, Eigenbasis, MeshWork, Routing
from jaxopt_lab.optim.routing import MatrixAxesSpec

_MOVED = MOVED | {
    "init": "eigenbasis=Eigenbasis(init=...)",
    "kron_init_scale": "it with jaxopt_lab.parity.dykaf",
    "rank1_eps_in_denominator": "it with jaxopt_lab.parity.dykaf",
}


@explains_keywords(**_MOVED)
def scale_by_dykaf(
    *,
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    factor_decay: Scalar | None = None,
    eps: Scalar = 1e-8,
    precondition_frequency: int = 10,
    integrator: Integrator = "ksl",
    matrix_axes: MatrixAxesSpec = None,
    eigenbasis: Eigenbasis = Eigenbasis(),
    mesh: MeshWork = MeshWork(),
) -> optax.GradientTransformationExtraArgs:
    r"""Direction of DyKAF.

    SOAP with better factors: $L \otimes R$ tracks the best Kronecker approximation of the averaged
    second moment $F$ by one step of a rank-one integrator a gradient, in the space in which
    Kronecker products are rank-one matrices (`jaxopt_lab.core.kronecker`). Its eigenvectors are the
    bases of Adam:

    $$F \leftarrow \beta F + (1 - \beta) \operatorname{vec} G \operatorname{vec} G^\top
    \approx L \otimes R, \qquad
    L = Q_L \Lambda_L Q_L^\top, \quad R = Q_R \Lambda_R Q_R^\top$$

    Moments, direction, refreshes and what is refused are as in `scale_by_soap`. The current
    gradient enters the factors after the step. Every leaf must be a matrix; `dykaf` routes the
    others.

    Args:
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      factor_decay: $\beta$ of the factors; None: `b2`. With 1 they approximate the plain sum.
      eps: Added to the root of the second moment, outside the bias correction.
      precondition_frequency: Updates from one refresh of the bases to the next.
      integrator: "ksl" (projector splitting, the method's own) or "parallel" (basis update and
        Galerkin, what the released code runs; half again as many products).
      matrix_axes: As for `scale_by_soap`.
      eigenbasis: How factors start, and how bases and moments are kept. The factor of a matrix
        whose other side has none is that of SOAP.
      mesh: Layouts of the parameters, and how replicas share the work.

    Returns:
      A transformation with state `EigenbasisAdamState`; see `scale_by_soap`.

    Raises:
      ValueError: An option is unknown or out of range, or a leaf is not a matrix.

    Source: Yudin, Grishina, Veprikov, Beznosikov and Rakhuba, "DyKAF: Dynamical Kronecker
    Approximation of the Fisher Information Matrix for Gradient Preconditioning", arXiv 2511.06477.

    Differs from the released code in: the integrator, the scale of the start, the one-sided rule
    and the floor of the rank-one fit (`dykaf_official` has the released ones); factors are float32
    or wider; a matrix that starts later than the others is refreshed with them.
    """
    method = dykaf_method(
        b1, b2, factor_decay, eps, precondition_frequency, integrator, eigenbasis, mesh
    )
    return guarded(eigenbasis_direction(method, matrix_axes, eigenbasis, mesh))


@explains_keywords(**_MOVED)
def dykaf(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    factor_decay: Scalar | None = None,
    eps: Scalar = 1e-8,
    precondition_frequency: int = 10,
    weight_decay: optax.ScalarOrSchedule = 0.01,
    mask: Any = None,
    integrator: Integrator = "ksl",
    matrix_axes: MatrixAxesSpec = None,
    eigenbasis: Eigenbasis = Eigenbasis(),
    routing: Routing = Routing(),
    fallback: AdamW = AdamW(),
    mesh: MeshWork = MeshWork(),
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
      weight_decay: Decay of all leaves, at the learning rate; a number or a schedule.
      mask: Which leaves decay: a tree of bools, a prefix of one, or a function of the parameters.
      integrator: "ksl" or "parallel"; see `scale_by_dykaf`.
      matrix_axes: As for `soap`.
      eigenbasis: How factors start, and how bases and moments are kept. A matrix with both sides
        above `max_precond_dim` belongs to AdamW.
      routing: As for `soap`; tensors have averaged Gram factors.
      fallback: What AdamW does differently; like DyKAF it takes no step at the first gradient.
      mesh: Layouts of the parameters, and how replicas share the work.

    Returns:
      A transformation whose state holds an `optax.transforms.PartitionState` with the groups
      "dykaf", "modes" and "adamw".

    Raises:
      ValueError: A rate is NaN or negative, an option is unknown or out of range, or a layout does
        not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> tx = optax.chain(optax.clip_by_global_norm(0.5), dykaf(1e-3, weight_decay=0.1))
      >>> params = {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> jax.tree.map(jnp.shape, updates)
      {'bias': (8,), 'kernel': (4, 8)}

    Source: Yudin et al., "DyKAF: Dynamical Kronecker Approximation of the Fisher Information Matrix
    for Gradient Preconditioning", arXiv 2511.06477.

    Differs from the released code in: see `scale_by_dykaf`; embeddings and heads are AdamW's unless
    `matrix_axes` names them; weights decay beside the step, not after it.
    """
    method = dykaf_method(
        b1, b2, factor_decay, eps, precondition_frequency, integrator, eigenbasis, mesh
    )
    return eigenbasis_optimizer(
        "dykaf",
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


def dykaf_method(
    b1: Scalar,
    b2: Scalar,
    factor_decay: Scalar | None,
    eps: Scalar,
    precondition_frequency: int,
    integrator: str,
    eigenbasis: Eigenbasis,
    mesh: MeshWork,
) -> EigenbasisAdam:
    """The step of DyKAF; arguments are those of `scale_by_dykaf`."""
    check_choice("integrator", integrator, INTEGRATORS)
    method = soap_method(b1, b2, factor_decay, eps, precondition_frequency, eigenbasis, mesh)
    single = method.rule
    assert isinstance(single, GramFactors)
    rule = KroneckerFactors(single.decay, single, single.precision, integrator, eigenbasis.init)
    return replace(method, rule=rule)
