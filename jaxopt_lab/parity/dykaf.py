"""DyKAF as its released code runs it, and with single quirks of that."""

from dataclasses import replace
from typing import Any, Literal, get_args

import optax

from jaxopt_lab.core.checks import check_choice
from jaxopt_lab.core.kronecker import StartScale
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.kronecker.dykaf import Integrator, dykaf_method
from jaxopt_lab.optim.kronecker.factors import GramFactors, KroneckerFactors
from jaxopt_lab.optim.kronecker.step import EigenbasisAdam
from jaxopt_lab.optim.options import Eigenbasis, MeshWork
from jaxopt_lab.optim.routing import MatrixAxesSpec
from jaxopt_lab.parity.soap import released

# Frobenius norm of the one-sided start of the released code.
_ONE_SIDED_START = 1e3


@explains_keywords(
    init="eigenbasis=Eigenbasis(init=...)",
    rank1_second_moment='eigenbasis=Eigenbasis(second_moment="rank_one" or "full")',
)
def dykaf_official(
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
    eigenbasis: Eigenbasis = Eigenbasis(
        second_moment="rank_one",
        orthogonalizer="householder",
        factor_precision="highest",
        rotation_precision="highest",
    ),
    precondition_1d: bool = False,
    normalize_grads: bool = False,
    mesh: MeshWork = MeshWork(),
) -> optax.GradientTransformationExtraArgs:
    """DyKAF as its released code runs it, with the defaults of the released class.

    The parallel integrator, the start with the root of the singular value, one-sided sums without
    decay, no floor under the rank-one second moment, decay after the step, a factor an axis for
    leaves of more than two axes, and every leaf of two axes a matrix, embeddings included.

    Args:
      learning_rate: As for `dykaf`, and so are those that are not explained.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      factor_decay: Decay of the factors; None: `b2`.
      eps: Epsilon on the uncorrected root.
      precondition_frequency: Updates from one refresh of the bases to the next.
      weight_decay: Decay of all leaves, after the step.
      mask: Which leaves decay.
      matrix_axes: None: every leaf of two axes.
      eigenbasis: Products at full precision and the reference's orthogonaliser. The released
        training script takes `init="eps"` and `second_moment="full"`.
      precondition_1d: Give vectors a factor as well.
      normalize_grads: Divide every direction by its root mean square.
      mesh: Layouts of the parameters.

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
        matrix_axes=matrix_axes,
        eigenbasis=eigenbasis,
        mesh=mesh,
        integrator="parallel",
        kron_init_scale="sqrt_sigma",
        one_sided="code",
        rank1_eps_in_denominator=False,
        precondition_1d=precondition_1d,
        normalize_grads=normalize_grads,
    )


def dykaf(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    factor_decay: Scalar | None = None,
    eps: Scalar = 1e-8,
    precondition_frequency: int = 10,
    integrator: Integrator = "ksl",
    eigenbasis: Eigenbasis = Eigenbasis(),
    mesh: MeshWork = MeshWork(),
    kron_init_scale: StartScale = "sigma",
    one_sided: Literal["ema", "code"] = "ema",
    rank1_eps_in_denominator: bool = True,
    **others: Any,
) -> optax.GradientTransformationExtraArgs:
    """DyKAF in which every leaf has its factors, and decay comes after the step.

    Args:
      learning_rate: As for `jaxopt_lab.dykaf`, and so are those that are not explained.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      factor_decay: Decay of the factors.
      eps: Epsilon on the uncorrected root.
      precondition_frequency: Updates from one refresh to the next.
      integrator: "ksl" or "parallel".
      eigenbasis: How factors start, and how bases and moments are kept.
      mesh: Layouts of the parameters.
      kron_init_scale: "sigma" (exact) or "sqrt_sigma" (in other units).
      one_sided: As for `with_quirks`.
      rank1_eps_in_denominator: As for `with_quirks`.
      **others: As for `jaxopt_lab.parity.soap.released`.
    """
    method = dykaf_method(
        b1, b2, factor_decay, eps, precondition_frequency, integrator, eigenbasis, mesh
    )
    method = with_quirks(method, kron_init_scale, one_sided, rank1_eps_in_denominator)
    return released("dykaf", method, learning_rate, eigenbasis=eigenbasis, mesh=mesh, **others)


def with_quirks(
    method: EigenbasisAdam,
    kron_init_scale: StartScale = "sigma",
    one_sided: Literal["ema", "code"] = "ema",
    rank1_eps_in_denominator: bool = True,
) -> EigenbasisAdam:
    """A step of DyKAF with some of the released rules.

    Args:
      method: The step.
      kron_init_scale: "sigma" (exact) or "sqrt_sigma" (in other units).
      one_sided: The factor of a matrix whose other side has none: "ema" (as in SOAP) or "code" (a
        sum without decay from a start of norm 1000).
      rank1_eps_in_denominator: Whether epsilon is added to the root of a rank-one second moment;
        without it rare coordinates take huge steps.

    Raises:
      ValueError: A choice is unknown.
    """
    check_choice("kron_init_scale", kron_init_scale, get_args(StartScale))
    check_choice("one_sided", one_sided, ("ema", "code"))
    rule = method.rule
    assert isinstance(rule, KroneckerFactors)
    if one_sided == "code":
        rule = replace(rule, single=GramFactors(1.0, rule.precision, _ONE_SIDED_START))
    rule = replace(rule, kron_init_scale=kron_init_scale)
    return replace(method, rule=rule, eps_in_denominator=rank1_eps_in_denominator)
