"""A learning rate that warms up with the loss: the transform."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import optax

from jaxopt_lab.core.dual_norms import DualNorms
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.routing import MatrixAxesSpec, float_leaves
from jaxopt_lab.schedules import warmup_checks
from jaxopt_lab.schedules.gap_rate import Curvature, warmup_kappa
from jaxopt_lab.schedules.warmup_phases import (
    AdaptiveWarmupState,
    DecayFactory,
    WarmupPhases,
)

_PARITY = "jaxopt_lab.parity.warmup.official_warmup({}=...)"


@explains_keywords(
    objective=_PARITY.format("objective"),
    target=_PARITY.format("target"),
    sigma=_PARITY.format("sigma") + ", or kappa=..., which it multiplies",
    official_first_step=_PARITY.format("official_first_step"),
    use_current_loss=_PARITY.format("use_current_loss"),
)
def adaptive_warmup(
    peak_lr: Scalar,
    total_steps: Scalar,
    target_loss: Scalar | Literal["auto"],
    div_factor: Scalar = 100.0,
    *,
    norm: DualNorms | Mapping[DualNorms, float] = "spectral",
    matrix_axes: MatrixAxesSpec = None,
    kappa: Scalar | None = None,
    delta_star_rule: Literal["exact"] | Scalar = "exact",
    curvature: Curvature | None = None,
    decay: Literal["cosine"] | DecayFactory = "cosine",
    final_div_factor: Scalar = 1e4,
    smoothing: Scalar = 0.0,
    fallback_after: Scalar | None = 0.5,
    relative: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Learning rate that rises as the loss falls, up to a peak, and then decays by a schedule.

    With the gap $\Delta_t = \max(l_t - f^*, 10^{-8})$ of the loss $l_t$ over its target $f^*$ and
    the first gap $\Delta_0$, the rate of step $t + 1$ is

    $$\eta_{t+1} = \eta_{\max} \left(1 + (r - 1) \frac{\Delta_0}{\Delta_t}
    \left(\frac{\Delta_t - \Delta^*}{\Delta_0 - \Delta^*}\right)^2\right)^{-1}$$

    until a loss with $\Delta_s \le \Delta^*$ starts the decay over the $N = T - s$ steps that
    remain, in which losses no longer matter:

    $$\eta_{t+1} = \eta_{\min} + (\eta_{\max} - \eta_{\min})\,
    \tfrac12 \left(1 + \cos \pi \tfrac{t - s + 2}{N}\right)$$

    The peak gap $\Delta^*$ is found from the first loss and $\kappa\sigma$ (`peak_gap`), with
    $\kappa$ of the norm in which the optimizer steps (`warmup_kappa`) and $\sigma = 10^{-3}$. The
    length of the warm-up is thus not an argument. Give every step's loss:
    `tx.update(grads, state, params, value=loss)`, averaged over microbatches and replicas, in the
    units of the target.

    Args:
      peak_lr: $\eta_{\max}$.
      total_steps: $T$, optimizer steps of the whole run.
      target_loss: $f^*$, a guess of the final training loss. Too low a guess prolongs the warm-up;
        guesses a little too high cost nothing. "auto" extrapolates it from the losses, all gaps
        following it in proportion (`target_estimate`): our own addition.
      div_factor: $r$, the peak rate over the rate at the start.
      norm: Of the optimizer: "spectral" (Muon), "sign" (Lion, Signum), "frobenius" (normalized
        SGD), or a weight for each, such as `{"spectral": 1 / P, "sign": 1 - 1 / P}` for LionMuon.
      matrix_axes: Layouts of the leaves that hold matrices, as for the optimizers.
      kappa: $\kappa$ itself, in place of `norm` and `matrix_axes`.
      delta_star_rule: "exact" searches $\Delta^*$; a number is its share of the first gap.
      curvature: $K_0, K_1, K_\rho, \rho$ by hand, in place of the search: the rate is
        $\min(\Delta / (K_0 + K_1 \Delta + K_\rho \Delta^\rho), \eta_{\max})$ and its maximum ends
        the warm-up. The first step is still $\eta_{\max} / r$.
      decay: "cosine", or a function from $N$ (a scalar array, not known before the switch) to a
        schedule from 1 to 0 that is called with the number of steps since the switch. For a
        schedule of Optax: `lambda n: lambda k: optax.linear_schedule(1.0, 0.0, 1)(k / n)`.
      final_div_factor: $\eta_{\max} / \eta_{\min}$.
      smoothing: Decay of an exponential average of the losses, in [0, 1).
      fallback_after: Share of $T$ after which the decay starts in any case, from the rate held
        then. None: the rate follows the loss to the end, as in the released code.
      relative: Multiply updates by $\eta / \eta_{\max}$ instead of $-\eta$: behind an optimizer
        that has its learning rates and its sign, all of which then warm up together.

    Returns:
      A transformation with state `AdaptiveWarmupState`, whose `rate` is that of the next step. A
      loss that is not finite leaves a warm-up as it is and counts in `ignored`. If the first loss
      is at the target or less than 0.02 above it there is nothing to follow: the decay starts at
      once (`switch_step` 0, `peak_gap` 0, and `initial_gap` says why).

    Raises:
      ValueError: An argument is out of range or unknown; at `init`, no leaf is a matrix; at
        `update`, the loss is missing or not a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = adaptive_warmup(0.1, 100, target_loss=1.0, norm="frobenius")
      >>> params = jnp.ones((2, 2))
      >>> state = tx.init(params)
      >>> for loss in (5.0, 4.0, 3.0, 2.5):
      ...     updates, state = tx.update(params, state, params, value=loss)
      ...     print(f"{-updates[0, 0]:.4f}")
      0.0010
      0.0010
      0.0018
      0.0054
      >>> round(float(state.peak_gap), 3), int(state.switch_step)
      (1.151, -1)

    Source: Riabinin, Veprikov, Bolatov, Takáč and Beznosikov, "Where Does Warm-Up Come From?
    Adaptive Scheduling for Norm-Constrained Optimizers", arXiv 2602.05813.

    Differs from the released code (`jaxopt_lab.parity.warmup`) in: the first step is not taken at
    the peak; the peak gap is integrated accurately, so that it does not depend on the peak rate;
    the loss is the mean of the whole step, not one replica's or the last microbatch's; coefficients
    by hand work, also with $\rho \ne 2$; a decay starts at the latest after half the run.
    """
    return warmup_by(
        norm=norm,
        matrix_axes=matrix_axes,
        kappa=kappa,
        relative=relative,
        peak_lr=peak_lr,
        total_steps=total_steps,
        target_loss=target_loss,
        div_factor=div_factor,
        delta_star_rule=delta_star_rule,
        curvature=curvature,
        decay=decay,
        final_div_factor=final_div_factor,
        smoothing=smoothing,
        fallback_after=fallback_after,
    )


def warmup_by(
    *,
    norm: DualNorms | Mapping[DualNorms, float] = "spectral",
    matrix_axes: MatrixAxesSpec = None,
    kappa: Scalar | None = None,
    relative: bool = False,
    decay: Literal["cosine"] | DecayFactory = "cosine",
    **rule: Any,
) -> optax.GradientTransformationExtraArgs:
    """The transform of a rule, whose other parts are fields of `WarmupPhases`."""
    phases = WarmupPhases(decay=warmup_checks.decay_factory(decay), **rule)
    warmup_checks.check_phases(phases)
    warmup_checks.check_kappa(norm, kappa)

    def kappa_of(tree: Any) -> Scalar:
        if kappa is not None:
            return kappa
        if not phases.searches:
            return 0.0
        found = warmup_kappa(tree, norm, matrix_axes)
        if found <= 0:
            raise ValueError(
                "adaptive_warmup found no matrix among the parameters, so its norm has no kappa; "
                "say in matrix_axes which axes form matrices, or give kappa"
            )
        return found

    def init(params: optax.Params) -> AdaptiveWarmupState:
        kappa_of(float_leaves(params))
        return phases.start()

    def update(updates, state, params=None, *, value=None, **extra_args):
        del extra_args
        loss, updates = warmup_checks.scalar_loss(value), float_leaves(updates, params)
        new = phases.step(state, loss, kappa_of(updates))
        rate = new.rate if phases.use_current_loss else state.rate
        scale = rate / phases.peak_lr if relative else -rate
        # The product is rounded once, to the dtype of the update.
        return jax.tree.map(lambda u: (scale * u).astype(u.dtype), updates), new

    return optax.GradientTransformationExtraArgs(init, update)
