"""LionMuon and SignMuon, ready for a whole model."""

from typing import Any

import optax
from jax.typing import DTypeLike

from jaxopt_lab.core.checks import check_rates
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.optim.fallback import with_fallback
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.lion_muon.stable_rank import deciding_direction, with_rates
from jaxopt_lab.optim.lion_muon.transform import (
    alternating_direction,
    averaged,
    branch_rate,
    orthogonalized,
    signs,
)
from jaxopt_lab.optim.nonfinite import guarded
from jaxopt_lab.optim.options import AdamW, MeshWork, NewtonSchulz, Routing
from jaxopt_lab.optim.rates import decayed_weights, scaled_rate
from jaxopt_lab.optim.routing import MatrixAxesSpec

# Of the paper's experiments: sign rate over spectral rate, and AdamW's averages.
SIGN_RATIO = 0.05
ADAM_B1, ADAM_B2 = 0.8, 0.999

_SIGN_RATIO = "sign_learning_rate=..., a number or a schedule"
_FIRST_STEP = "a period that no run reaches, such as period=2**30: step 0 is spectral"


@explains_keywords(
    sign_lr_ratio=_SIGN_RATIO,
    first_step_spectral=_FIRST_STEP,
    nesterov="b1=beta**2, b2=beta: an averaged momentum with Nesterov's step",
    key="draws=... of the update, or scale_by_stable_rank(key=...)",
    cheap_mode="jaxopt_lab.parity.lion_muon.legacy_sign_muon(cheap_mode=...)",
    sign_scaling="jaxopt_lab.parity.lion_muon.legacy_sign_muon(sign_scaling=...)",
)
def lion_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    sign_learning_rate: optax.ScalarOrSchedule | None = None,
    period: Scalar = 2,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    matrix_axes: MatrixAxesSpec = None,
    mu_dtype: DTypeLike | None = None,
    spectral_scale: str = "match_rms",
    stable_rank_threshold: Scalar | None = None,
    newton_schulz: NewtonSchulz = NewtonSchulz(),
    routing: Routing = Routing(),
    fallback: AdamW = AdamW(),
    mesh: MeshWork = MeshWork(),
) -> optax.GradientTransformationExtraArgs:
    r"""LionMuon for the matrices of a model, AdamW for everything else.

    Every `period`-th step a matrix moves along its orthogonalised momentum (Muon), at the other
    steps along the sign (Lion). Both branches read and write one buffer, so the state of a matrix
    is half of AdamW's. See `scale_by_lion_muon` for the equations. With defaults this is the
    configuration of the paper's experiments, except for their weight decay of 0.1.

    Three rates are involved: spectral, sign and AdamW. By default `learning_rate` drives all three,
    so one schedule warms up and decays them together. A rate given by itself stands alone: a number
    stays constant, a schedule is followed.

    Args:
      learning_rate: Rate of the spectral steps, a number or a schedule.
      sign_learning_rate: Rate of the sign steps; None: 0.05 times `learning_rate`, the ratio of the
        experiments.
      period: Steps from one spectral step to the next; `math.inf` is Lion, 1 is Muon.
      b1: Averaging of the direction.
      b2: Averaging of the momentum.
      weight_decay: Decoupled decay, at the rate of the branch taken.
      mask: Which leaves decay: a tree of bools, a prefix of one, or a function of the parameters.
      matrix_axes: `MuonDimensionNumbers` for the leaves that are matrices, None for those that are
        not: a tree, a prefix, or a function of the parameters. None: leaves of two axes, except
        embeddings and heads.
      mu_dtype: Dtype of the momenta; None: that of the parameters.
      spectral_scale: "match_rms", "fan" or "none"; see `scale_by_lion_muon`.
      stable_rank_threshold: $\alpha$. When given, `period` is ignored and each matrix is spectral
        when its stable rank is at most $\alpha \min(m, n)$; see `scale_by_stable_rank`.
      newton_schulz: The iteration.
      routing: Which leaves are matrices where `matrix_axes` does not say.
      fallback: AdamW of the other leaves; where it says None, averages 0.8 and 0.999.
      mesh: Layout of the parameters, and who does the work on whole matrices.

    Returns:
      A transformation whose state is an `optax.transforms.PartitionState` with the groups
      "lion_muon" and "adamw".

    Raises:
      ValueError: A rate is NaN or negative, an option is unknown, or a layout does not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> tx = optax.chain(optax.clip_by_global_norm(0.5), lion_muon(1e-3, weight_decay=0.1))
      >>> params = {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> jax.tree.map(jnp.shape, updates)
      {'bias': (8,), 'kernel': (4, 8)}

    Source: Bolatov et al., "LionMuon: Alternating Spectral and Sign Descent for Efficient
    Training", arXiv 2605.19811.

    Differs from the released code in: see `scale_by_lion_muon`; the sign rate defaults to the ratio
    of the experiments (released class: 0.01); the AdamW rate follows the schedule.
    """
    check_rates(learning_rate=learning_rate)
    if sign_learning_rate is None:
        sign_learning_rate = scaled_rate(learning_rate, SIGN_RATIO)
    check_rates(sign_learning_rate=sign_learning_rate)
    branches = averaged(b1, b2), orthogonalized(newton_schulz, spectral_scale), signs(newton_schulz)
    shared = mu_dtype, matrix_axes, mesh
    if stable_rank_threshold is None:
        direction = alternating_direction(*branches, period, *shared)
    else:
        direction = deciding_direction(*branches, stable_rank_threshold, *shared)
    return for_a_model(
        "lion_muon",
        direction,
        period if stable_rank_threshold is None else None,
        (learning_rate, sign_learning_rate),
        fallback,
        weight_decay=weight_decay,
        mask=mask,
        matrix_axes=matrix_axes,
        routing=routing,
        mu_dtype=mu_dtype,
    )


def for_a_model(
    label: str,
    direction: optax.GradientTransformationExtraArgs,
    period: Scalar | None,
    rates: tuple[optax.ScalarOrSchedule, optax.ScalarOrSchedule],
    fallback: AdamW,
    *,
    b1: Scalar = ADAM_B1,
    b2: Scalar = ADAM_B2,
    **shared: Any,
) -> optax.GradientTransformationExtraArgs:
    """Decay and rates behind a direction of the family (period None: it decides), AdamW beside."""
    if shared["routing"].on_uncovered == "modes":
        raise ValueError(
            "Routing.on_uncovered: got 'modes', wanted 'adamw' or 'error': this family has no rule "
            "for leaves of more than two axes without a layout"
        )
    decay = decayed_weights(shared["weight_decay"], shared["mask"], shared["routing"])
    if period is None:
        steps = with_rates(direction, decay, *rates, shared["matrix_axes"])
        matrices = optax.chain(steps, optax.scale(-1.0))
    else:
        rate = optax.scale_by_learning_rate(branch_rate(period, *rates))
        matrices = guarded(direction, decay, rate)
    return with_fallback(label, matrices, rates[0], fallback, b1=b1, b2=b2, **shared)


@explains_keywords(
    sign_lr_ratio=_SIGN_RATIO,
    b2="b1=...; for two averages lion_muon",
    spectral_scale="lion_muon(spectral_scale=...) with b1 = b2",
    stable_rank_threshold="lion_muon(stable_rank_threshold=...) with b1 = b2",
)
def sign_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    sign_learning_rate: optax.ScalarOrSchedule | None = None,
    period: Scalar = 2,
    b1: Scalar = 0.9,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    matrix_axes: MatrixAxesSpec = None,
    mu_dtype: DTypeLike | None = None,
    newton_schulz: NewtonSchulz = NewtonSchulz(),
    routing: Routing = Routing(),
    fallback: AdamW = AdamW(),
    mesh: MeshWork = MeshWork(),
) -> optax.GradientTransformationExtraArgs:
    """SignMuon: `lion_muon` with one averaging constant, so the direction is the momentum itself.

    With period=1 this is Muon with averaged momentum, with period=math.inf it is Signum. All other
    arguments are those of `lion_muon`.

    Args:
      learning_rate: Rate of the spectral steps, a number or a schedule.
      sign_learning_rate: Rate of the sign steps.
      period: Steps from one spectral step to the next.
      b1: The averaging constant of direction and momentum.
      weight_decay: Decoupled decay.
      mask: Which leaves decay.
      matrix_axes: Layouts of the matrices.
      mu_dtype: Dtype of the momenta.
      newton_schulz: The iteration.
      routing: Which leaves are matrices where `matrix_axes` does not say.
      fallback: AdamW of the other leaves.
      mesh: Layout of the parameters, and who does the work.

    Source: Bolatov et al., arXiv 2605.19811 (the `_fixed` runs of the released code).
    """
    return lion_muon(
        learning_rate,
        sign_learning_rate=sign_learning_rate,
        period=period,
        b1=b1,
        b2=b1,
        weight_decay=weight_decay,
        mask=mask,
        matrix_axes=matrix_axes,
        mu_dtype=mu_dtype,
        newton_schulz=newton_schulz,
        routing=routing,
        fallback=fallback,
        mesh=mesh,
    )
