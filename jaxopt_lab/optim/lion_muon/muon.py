"""Muon with a heavy-ball momentum, as its authors have it.

For new work take `lion_muon` or `sign_muon`: their averaged momentum superseded this one during the
paper's own experiments.
"""

from typing import Any

import optax
from jax.typing import DTypeLike

from jaxopt_lab.core.checks import check_decays, check_rates
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.lion_muon.lion_muon import for_a_model
from jaxopt_lab.optim.lion_muon.transform import (
    Average,
    alternating_direction,
    orthogonalized,
    signs,
)
from jaxopt_lab.optim.options import AdamW, MeshWork, NewtonSchulz, Routing
from jaxopt_lab.optim.routing import MatrixAxesSpec


def heavy_ball(momentum: Scalar, nesterov: bool) -> Average:
    r"""The buffer $B = \mu B + G$, and as direction $B$ or $G + \mu B$."""
    check_decays(momentum=momentum)

    def average(g, buffer):
        new = momentum * buffer + g
        return g + momentum * new if nesterov else new, new

    return average


@explains_keywords()
def muon(
    learning_rate: optax.ScalarOrSchedule = 0.02,
    *,
    momentum: Scalar = 0.95,
    nesterov: bool = True,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    matrix_axes: MatrixAxesSpec = None,
    mu_dtype: DTypeLike | None = None,
    newton_schulz: NewtonSchulz = NewtonSchulz(steps=6),
    routing: Routing = Routing(),
    fallback: AdamW = AdamW(),
    mesh: MeshWork = MeshWork(),
) -> optax.GradientTransformationExtraArgs:
    r"""Muon with heavy-ball momentum and the scale $\sqrt{\max(1, n_\text{out}/n_\text{in})}$.

    Args:
      learning_rate: A number or a schedule.
      momentum: Heavy-ball coefficient.
      nesterov: Descend along gradient plus momentum times buffer; False: along the buffer.
      weight_decay: Decoupled decay.
      mask: Which leaves decay.
      matrix_axes: Layouts of the matrices, as for `lion_muon`.
      mu_dtype: Dtype of the momenta; None: that of the parameters.
      newton_schulz: The iteration.
      routing: Which leaves are matrices where `matrix_axes` does not say.
      fallback: AdamW of the other leaves; where it says None, averages 0.8 and 0.999.
      mesh: Layout of the parameters, and who does the work on whole matrices.

    Source: Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024; the class
    `Muon` of the LionMuon code.

    Differs from the released code in: `nesterov=False` orthogonalises the buffer (released: the
    gradient, so that momentum has no effect).
    """
    return _heavy_ball_muon(
        "muon",
        "fan",
        0.8,
        0.999,
        learning_rate,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        mask=mask,
        matrix_axes=matrix_axes,
        mu_dtype=mu_dtype,
        newton_schulz=newton_schulz,
        routing=routing,
        fallback=fallback,
        mesh=mesh,
    )


@explains_keywords()
def d_muon(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    *,
    momentum: Scalar = 0.95,
    nesterov: bool = True,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    mask: Any = None,
    matrix_axes: MatrixAxesSpec = None,
    mu_dtype: DTypeLike | None = None,
    newton_schulz: NewtonSchulz = NewtonSchulz(),
    routing: Routing = Routing(),
    fallback: AdamW = AdamW(),
    mesh: MeshWork = MeshWork(),
) -> optax.GradientTransformationExtraArgs:
    r"""Muon with updates of AdamW's size, so that one rate and one decay serve all leaves.

    The scale is $0.2 \sqrt{\max(m, n)}$. The arguments are those of `muon`.

    Args:
      learning_rate: A number or a schedule, also for AdamW.
      momentum: Heavy-ball coefficient.
      nesterov: Descend along gradient plus momentum times buffer; False: along the buffer.
      weight_decay: Decoupled decay.
      mask: Which leaves decay.
      matrix_axes: Layouts of the matrices.
      mu_dtype: Dtype of the momenta.
      newton_schulz: The iteration.
      routing: Which leaves are matrices where `matrix_axes` does not say.
      fallback: AdamW of the other leaves; where it says None, averages 0.95 and 0.95.
      mesh: Layout of the parameters, and who does the work on whole matrices.

    Source: Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982.
    """
    return _heavy_ball_muon(
        "d_muon",
        "match_rms",
        0.95,
        0.95,
        learning_rate,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        mask=mask,
        matrix_axes=matrix_axes,
        mu_dtype=mu_dtype,
        newton_schulz=newton_schulz,
        routing=routing,
        fallback=fallback,
        mesh=mesh,
    )


def _heavy_ball_muon(
    label: str,
    spectral_scale: str,
    adam_b1: float,
    adam_b2: float,
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: Scalar,
    nesterov: bool,
    newton_schulz: NewtonSchulz,
    mesh: MeshWork,
    fallback: AdamW,
    **shared: Any,
) -> optax.GradientTransformationExtraArgs:
    check_rates(learning_rate=learning_rate)
    direction = alternating_direction(
        heavy_ball(momentum, nesterov),
        orthogonalized(newton_schulz, spectral_scale),
        signs(newton_schulz),
        1,
        shared["mu_dtype"],
        shared["matrix_axes"],
        mesh,
    )
    rates = learning_rate, learning_rate
    return for_a_model(label, direction, 1, rates, fallback, b1=adam_b1, b2=adam_b2, **shared)
