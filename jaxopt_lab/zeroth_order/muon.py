"""ZO-Muon: matrix signs of estimates, and directions that are orthogonal to begin with."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxopt_lab.core.checks import check_rates
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.options import MeshWork, NewtonSchulz
from jaxopt_lab.zeroth_order.estimators import estimated
from jaxopt_lab.zeroth_order.matrix_sign import FLOAT32, scale_by_matrix_sign
from jaxopt_lab.zeroth_order.probes import Probes
from jaxopt_lab.zeroth_order.samplers import orthogonal


@explains_keywords()
def zo_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    eps: Scalar = 1e-3,
    key: Array,
    newton_schulz: NewtonSchulz = FLOAT32,
    mesh: MeshWork = MeshWork(),
    probes: Probes = Probes(),
) -> optax.GradientTransformationExtraArgs:
    r"""Matrices move along $\mathrm{NS}(g)$, other leaves along $\operatorname{sign}(g)$.

    With one direction $\mathrm{NS}(D z) = \operatorname{sign}(D) \mathrm{NS}(z)$: the losses decide
    a sign.

    Args:
      learning_rate: A number or a schedule.
      eps: $\epsilon$ of the estimate.
      key: As for `estimate`.
      newton_schulz: The iteration.
      mesh: Layout of the parameters, and who does the work on whole matrices.
      probes: Sampler (None: Gaussian), number of directions, engine, layouts of the matrices.

    Raises:
      ValueError: As for `estimate`.

    Source: `ZO_Muon` of the code of Parfenov et al., "Zero-Order Optimization for LLM Fine-Tuning
    via Learnable Direction Sampling", arXiv 2602.13659.

    Differs from the released code in: the update takes the directions that were evaluated
    (released: from the second leaf on it draws others); nothing is added to the norm by which the
    iteration divides (released: 1e-7); float32 iterates (released: bfloat16).
    """
    check_rates(learning_rate=learning_rate)
    return optax.chain(
        estimated(probes, eps=eps, key=key),
        scale_by_matrix_sign(
            matrix_axes=probes.matrix_axes, newton_schulz=newton_schulz, mesh=mesh
        ),
        optax.scale_by_learning_rate(learning_rate),
    )


@explains_keywords()
def sampling_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    eps: Scalar = 1e-3,
    key: Array,
    probes: Probes = Probes(),
) -> optax.GradientTransformationExtraArgs:
    r"""$x \leftarrow x - \gamma \operatorname{sign}(D) z$ with orthogonal matrices $z$.

    Args:
      learning_rate: $\gamma$, a number or a schedule.
      eps: $\epsilon$ of the estimate.
      key: As for `estimate`.
      probes: Sampler (None: `orthogonal()`), number of directions (their average), engine.

    Raises:
      ValueError: As for `estimate`.

    Source: `ZO_SamplingMuon` of the code of arXiv 2602.13659.

    Differs from the released code in: the released step is longer by $1 / \epsilon$; divide the
    rate by $\epsilon$ for the same.
    """
    check_rates(learning_rate=learning_rate)
    drawn: dict[str, Any] = vars(probes) | {"sampler": probes.sampler_or(orthogonal())}
    return optax.chain(
        estimated(Probes(**drawn), eps=eps, key=key, coefficient=jnp.sign),
        optax.scale_by_learning_rate(learning_rate),
    )
