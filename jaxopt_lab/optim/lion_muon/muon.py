"""The heavy-ball classes of the LionMuon code base, as presets of one family.

They are baselines and reproductions. For new work take `lion_muon` or `sign_muon`, whose averaged
momentum superseded these during the paper's own experiments.
"""

from typing import Any

import optax
from jax.typing import DTypeLike

from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.optim.fallback import with_adamw_fallback
from jaxopt_lab.optim.lion_muon.transform import scale_by_lion_muon
from jaxopt_lab.optim.rates import check_rates, scaled_rate
from jaxopt_lab.optim.routing import MatrixAxesSpec


def legacy_sign_muon(
    learning_rate: optax.ScalarOrSchedule = 0.02,
    *,
    cheap_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_learning_rate: optax.ScalarOrSchedule = 3e-4,
    period: Scalar = 5,
    momentum: Scalar = 0.95,
    nesterov: bool = True,
    cheap_mode: str = "norm",
    sign_scaling: str = "muon",
    ns_steps: int = 6,
    weight_decay: Scalar = 0.0,
    adam_weight_decay: Scalar = 0.1,
    adam_b1: Scalar = 0.8,
    adam_b2: Scalar = 0.999,
    adam_eps: Scalar = 1e-8,
    matrix_axes: MatrixAxesSpec = None,
    mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    ns_dtype: str = "bfloat16",
    param_shardings: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """SignMuon of the first experiments: heavy-ball momentum and a choice of cheap steps.

    In the released class the cheap and the AdamW rate stay constant while the spectral one follows
    the schedule (a defect, and the likely reason why it lost to its successor). Pass numbers to
    reproduce that, schedules to mend it.

    Args:
      learning_rate: Rate of the spectral steps.
      cheap_learning_rate: Rate of the others; None: a quarter of `learning_rate` for "sign" and
        "norm", else all of it.
      adam_learning_rate: Rate of the leaves that are not matrices.
      period: Every `period`-th step is spectral.
      momentum: Heavy-ball coefficient.
      nesterov: Descend along gradient plus momentum times buffer.
      cheap_mode: "sign", "norm", "cheap_ns" or "cached".
      sign_scaling: "none", "frob" or "muon".
      ns_steps: Newton-Schulz iterations.
      weight_decay: Decay of the matrices.
      adam_weight_decay: Decay of the other leaves.
      adam_b1: First-moment decay of AdamW.
      adam_b2: Second-moment decay of AdamW.
      adam_eps: Epsilon of AdamW.
      matrix_axes: As for `lion_muon`.
      mask: Which leaves decay.
      mu_dtype: Dtype of the momenta; None: that of the parameters.
      ns_dtype: Dtype of the Newton-Schulz iterates.
      param_shardings: As for `lion_muon`.

    Source: Bolatov et al., arXiv 2605.19811, released class `SignMuon`.
    """
    if cheap_learning_rate is None:
        quarter = 0.25 if cheap_mode in ("sign", "norm") else 1.0
        cheap_learning_rate = scaled_rate(learning_rate, quarter)
    check_rates(
        learning_rate=learning_rate,
        cheap_learning_rate=cheap_learning_rate,
        adam_learning_rate=adam_learning_rate,
    )
    direction = scale_by_lion_muon(
        period=period,
        b1=momentum,
        momentum="heavy_ball",
        heavy_ball_direction="nesterov" if nesterov else "buffer",
        ns_steps=ns_steps,
        cheap_mode=cheap_mode,
        sign_scaling=sign_scaling,
        spectral_rate=learning_rate,
        sign_rate=cheap_learning_rate,
        weight_decay=weight_decay,
        matrix_axes=matrix_axes,
        mask=mask,
        mu_dtype=mu_dtype,
        ns_dtype=ns_dtype,
        param_shardings=param_shardings,
    )
    return with_adamw_fallback(
        "sign_muon",
        optax.chain(direction, optax.scale(-1.0)),
        adam_learning_rate,
        b1=adam_b1,
        b2=adam_b2,
        eps=adam_eps,
        weight_decay=adam_weight_decay,
        matrix_axes=matrix_axes,
        mask=mask,
        mu_dtype=mu_dtype,
    )


def muon(
    learning_rate: optax.ScalarOrSchedule = 0.02,
    *,
    adam_lr_ratio: Scalar = 1.0,
    momentum: Scalar = 0.95,
    nesterov: bool = True,
    ns_steps: int = 6,
    weight_decay: Scalar = 0.0,
    adam_weight_decay: Scalar = 0.0,
    adam_b1: Scalar = 0.8,
    adam_b2: Scalar = 0.999,
    adam_eps: Scalar = 1e-8,
    matrix_axes: MatrixAxesSpec = None,
    mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    ns_dtype: str = "bfloat16",
    param_shardings: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon with heavy-ball momentum and the scale $\sqrt{\max(1, n_\text{out}/n_\text{in})}$.

    Args:
      learning_rate: A number or a schedule.
      adam_lr_ratio: AdamW rate over `learning_rate`.
      momentum: Heavy-ball coefficient.
      nesterov: Descend along gradient plus momentum times buffer. As in the released class, False
        orthogonalises the raw gradient and leaves the buffer unused.
      ns_steps: Newton-Schulz iterations.
      weight_decay: Decay of the matrices.
      adam_weight_decay: Decay of the other leaves.
      adam_b1: First-moment decay of AdamW.
      adam_b2: Second-moment decay of AdamW.
      adam_eps: Epsilon of AdamW.
      matrix_axes: As for `lion_muon`.
      mask: Which leaves decay.
      mu_dtype: Dtype of the momenta; None: that of the parameters.
      ns_dtype: Dtype of the Newton-Schulz iterates.
      param_shardings: As for `lion_muon`.

    Source: Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024; the class
    `Muon` of the LionMuon code.
    """
    check_rates(learning_rate=learning_rate, adam_lr_ratio=adam_lr_ratio)
    direction = scale_by_lion_muon(
        period=1,
        b1=momentum,
        momentum="heavy_ball",
        heavy_ball_direction="nesterov" if nesterov else "gradient",
        ns_steps=ns_steps,
        spectral_scale="fan",
        weight_decay=weight_decay,
        matrix_axes=matrix_axes,
        mask=mask,
        mu_dtype=mu_dtype,
        ns_dtype=ns_dtype,
        param_shardings=param_shardings,
    )
    return with_adamw_fallback(
        "muon",
        optax.chain(direction, optax.scale_by_learning_rate(learning_rate)),
        scaled_rate(learning_rate, adam_lr_ratio),
        b1=adam_b1,
        b2=adam_b2,
        eps=adam_eps,
        weight_decay=adam_weight_decay,
        matrix_axes=matrix_axes,
        mask=mask,
        mu_dtype=mu_dtype,
    )


def d_muon(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    *,
    momentum: Scalar = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    weight_decay: Scalar = 0.1,
    adam_b1: Scalar = 0.95,
    adam_b2: Scalar = 0.95,
    adam_eps: Scalar = 1e-8,
    matrix_axes: MatrixAxesSpec = None,
    mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    ns_dtype: str = "bfloat16",
    param_shardings: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon with updates of AdamW's size, so that one rate and one decay serve all leaves.

    Args:
      learning_rate: A number or a schedule, also for AdamW.
      momentum: Heavy-ball coefficient.
      nesterov: Descend along gradient plus momentum times buffer; False: along the buffer.
      ns_steps: Newton-Schulz iterations.
      weight_decay: Decay of all leaves.
      adam_b1: First-moment decay of AdamW.
      adam_b2: Second-moment decay of AdamW.
      adam_eps: Epsilon of AdamW.
      matrix_axes: As for `lion_muon`.
      mask: Which leaves decay.
      mu_dtype: Dtype of the momenta; None: that of the parameters.
      ns_dtype: Dtype of the Newton-Schulz iterates.
      param_shardings: As for `lion_muon`.

    Source: Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982.
    """
    check_rates(learning_rate=learning_rate)
    direction = scale_by_lion_muon(
        period=1,
        b1=momentum,
        momentum="heavy_ball",
        heavy_ball_direction="nesterov" if nesterov else "buffer",
        ns_steps=ns_steps,
        weight_decay=weight_decay,
        matrix_axes=matrix_axes,
        mask=mask,
        mu_dtype=mu_dtype,
        ns_dtype=ns_dtype,
        param_shardings=param_shardings,
    )
    return with_adamw_fallback(
        "d_muon",
        optax.chain(direction, optax.scale_by_learning_rate(learning_rate)),
        learning_rate,
        b1=adam_b1,
        b2=adam_b2,
        eps=adam_eps,
        weight_decay=weight_decay,
        matrix_axes=matrix_axes,
        mask=mask,
        mu_dtype=mu_dtype,
    )
