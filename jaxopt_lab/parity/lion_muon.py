"""What the released classes of the LionMuon code do, and nobody should."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from jaxopt_lab.core.checks import check_choice, check_rates
from jaxopt_lab.core.newton_schulz import COEFFICIENTS
from jaxopt_lab.core.numerics import Scalar, frobenius_unit
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.lion_muon.lion_muon import for_a_model
from jaxopt_lab.optim.lion_muon.muon import heavy_ball
from jaxopt_lab.optim.lion_muon.stable_rank import StableRankState, deciding_direction
from jaxopt_lab.optim.lion_muon.transform import (
    SPECTRAL_SCALES,
    Average,
    Branch,
    alternating_direction,
    is_spectral_step,
    orthogonalized,
    signs,
    zip_strict,
)
from jaxopt_lab.optim.matrix_leaves import MatrixLeaves
from jaxopt_lab.optim.nonfinite import guarded
from jaxopt_lab.optim.options import AdamW, MeshWork, NewtonSchulz, Routing
from jaxopt_lab.optim.rates import decayed_weights, scaled_rate
from jaxopt_lab.optim.routing import MatrixAxesSpec
from jaxopt_lab.optim.sign import Norm, normalized_direction

_round = functools.partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=7)

SIGN_SCALES = {
    "none": lambda m, n: 1.0,
    "frob": lambda m, n: 1 / math.sqrt(max(m, n, 1)),
    "muon": lambda m, n: SPECTRAL_SCALES["fan"](m, n) / math.sqrt(max(m, n, 1)),
}
CHEAP_MODES = ("sign", "norm", "cheap_ns", "cached")


@explains_keywords(
    cheap_learning_rate="sign_learning_rate=...",
    cheap_ns_steps="released_muon(cheap_ns_steps=...)",
)
def legacy_sign_muon(
    learning_rate: optax.ScalarOrSchedule = 0.02,
    *,
    sign_learning_rate: optax.ScalarOrSchedule | None = None,
    period: Scalar = 5,
    momentum: Scalar = 0.95,
    nesterov: bool = True,
    cheap_mode: str = "norm",
    sign_scaling: str = "muon",
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    matrix_axes: MatrixAxesSpec = None,
    mu_dtype: DTypeLike | None = None,
    newton_schulz: NewtonSchulz = NewtonSchulz(steps=6),
    routing: Routing = Routing(),
    fallback: AdamW = AdamW(learning_rate=3e-4, weight_decay=0.1),
    mesh: MeshWork = MeshWork(),
) -> optax.GradientTransformationExtraArgs:
    """SignMuon of the first experiments: heavy-ball momentum and a choice of cheap steps.

    In the released class the cheap and the AdamW rate stay constant while the spectral one follows
    the schedule (a defect, and the likely reason why it lost to its successor). Pass numbers to
    reproduce that, schedules to mend it.

    Args:
      learning_rate: Rate of the spectral steps.
      sign_learning_rate: Rate of the others; None: a quarter of `learning_rate` for "sign" and
        "norm", else all of it.
      period: Every `period`-th step is spectral.
      momentum: Heavy-ball coefficient.
      nesterov: Descend along gradient plus momentum times buffer.
      cheap_mode: What a step that is not spectral does: "sign"; "norm" (Frobenius-normalised);
        "cheap_ns" (two iterations); "cached" (the last spectral direction again).
      sign_scaling: Factor on the sign: "none", "frob" or "muon".
      weight_decay: Decay of the matrices, at the rate of the branch taken.
      mask: Which leaves decay.
      matrix_axes: Layouts of the matrices, as for `lion_muon`.
      mu_dtype: Dtype of the momenta; None: that of the parameters.
      newton_schulz: The iteration.
      routing: Which leaves are matrices where `matrix_axes` does not say.
      fallback: AdamW of the other leaves.
      mesh: Layout of the parameters, and who does the work on whole matrices.

    Source: Bolatov et al., arXiv 2605.19811, released class `SignMuon`.
    """
    check_rates(learning_rate=learning_rate)
    if sign_learning_rate is None:
        quarter = 0.25 if cheap_mode in ("sign", "norm") else 1.0
        sign_learning_rate = scaled_rate(learning_rate, quarter)
    return released_muon(
        learning_rate,
        average=heavy_ball(momentum, nesterov),
        sign_learning_rate=sign_learning_rate,
        period=period,
        cheap_mode=cheap_mode,
        sign_scaling=sign_scaling,
        weight_decay=weight_decay,
        mask=mask,
        matrix_axes=matrix_axes,
        mu_dtype=mu_dtype,
        newton_schulz=newton_schulz,
        routing=routing,
        fallback=fallback,
        mesh=mesh,
        label="sign_muon",
    )


def raw_gradient(momentum: Scalar) -> Average:
    """Muon without Nesterov, as released: the buffer is kept, and the gradient orthogonalised."""
    return lambda g, buffer: (g, momentum * buffer + g)


def released_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    average: Average,
    sign_learning_rate: optax.ScalarOrSchedule = 0.0,
    period: Scalar = 1,
    stable_rank_threshold: Scalar | None = None,
    measures_momentum: bool = False,
    cheap_mode: str = "sign",
    cheap_ns_steps: int = 2,
    sign_scaling: str = "none",
    spectral_scale: str = "match_rms",
    round_newton_schulz: bool = False,
    round_update: bool = False,
    newton_schulz: NewtonSchulz = NewtonSchulz(eps=1e-7),
    fallback: AdamW = AdamW(),
    mesh: MeshWork = MeshWork(),
    label: str = "matrix",
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """Any member of the family, with every choice that a released class ever made.

    `average` goes from gradient and momentum to the direction and the next momentum.
    `measures_momentum`: the stable rank is that of the momentum. `round_newton_schulz`: the
    bfloat16 iteration bit for bit; `round_update`: scaled directions are rounded to bfloat16, as
    the released update buffer does. The rest is as for `legacy_sign_muon` and `lion_muon`.
    """
    defaults = {"weight_decay": 0.0, "mask": None, "matrix_axes": None}
    options = defaults | {"mu_dtype": None, "routing": Routing()} | options
    mu_dtype, matrix_axes = options["mu_dtype"], options["matrix_axes"]
    check_rates(learning_rate=learning_rate, sign_learning_rate=sign_learning_rate)
    spectral = orthogonalized(newton_schulz, spectral_scale)
    few = orthogonalized(dataclasses.replace(newton_schulz, steps=cheap_ns_steps), spectral_scale)
    if round_newton_schulz:
        polar = functools.partial(newton_schulz_rounded, eps=newton_schulz.eps)
        spectral = spectral._replace(apply=functools.partial(polar, steps=newton_schulz.steps))
        few = few._replace(apply=functools.partial(polar, steps=cheap_ns_steps))
    cheap = _cheap_branch(cheap_mode, sign_scaling, few, newton_schulz)
    shared = mu_dtype, matrix_axes, mesh
    if stable_rank_threshold is None:
        direction = alternating_direction(average, spectral, cheap, period, *shared)
    else:
        direction = deciding_direction(
            *(average, spectral, cheap, stable_rank_threshold, *shared),
            measures_momentum=measures_momentum,
        )
    if round_update:
        direction = _rounded(direction)
    if cheap_mode == "cached":
        direction = _repeating(direction, period, matrix_axes)
    period_or_none = period if stable_rank_threshold is None else None
    rates = learning_rate, sign_learning_rate
    return for_a_model(label, direction, period_or_none, rates, fallback, **options)


def _cheap_branch(
    mode: str, sign_scaling: str, few_steps: Branch, newton_schulz: NewtonSchulz
) -> Branch:
    check_choice("cheap_mode", mode, CHEAP_MODES)
    check_choice("sign_scaling", sign_scaling, SIGN_SCALES)
    if mode == "sign":
        return signs(newton_schulz)._replace(scale=SIGN_SCALES[sign_scaling])
    if mode == "cheap_ns":
        return few_steps
    # Nothing was ever cached: "cached" is "norm".
    return Branch(
        functools.partial(frobenius_unit, axes=(-2, -1), eps=newton_schulz.eps),
        lambda m, n: math.sqrt(min(m, n)) * SPECTRAL_SCALES["fan"](m, n),
    )


def newton_schulz_rounded(
    x: Float[Array, "*batch m n"], *, steps: int, eps: float = 1e-7
) -> Float[Array, "*batch m n"]:
    """The quintic iteration as PyTorch runs it in bfloat16: rounded after every operation.

    bfloat16 values are carried in float32: `reduce_precision` is the one rounding that XLA may not
    optimise away, and float32 products of bfloat16 values are exact before they are summed.

    Args:
      x: Matrices; leading axes are batch.
      steps: Iterations.
      eps: Added to the norm.
    """
    # The released weights are (out, in). Which Gram matrix a square one takes decides about its
    # rounding.
    wide = x.shape[-2] < x.shape[-1]
    y = _round((x if wide else x.mT).astype(jnp.float32))
    norm = _round(jnp.sqrt(jnp.sum(jnp.square(y), axis=(-2, -1), keepdims=True)))
    y = _round(y / _round(norm + eps))
    ((a, b, c),) = COEFFICIENTS["quintic"].steps
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    for _ in range(steps):
        gram = _round(product(y, y.mT))
        inner = _round(_round(b * gram) + _round(product(_round(c * gram), gram)))
        y = _round(_round(a * y) + _round(product(inner, y)))
    return y if wide else y.mT


def _rounded(
    direction: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params=None, **extra_args):
        steps, state = direction.update(updates, state, params, **extra_args)
        return jax.tree.map(_round, steps), state

    return optax.GradientTransformationExtraArgs(direction.init, update)


class CachedState(NamedTuple):
    """State of a direction whose cheap steps repeat the last spectral one."""

    direction: Any  # state of the direction
    cached: optax.Updates  # last scaled spectral direction: shapes of the parameters, wide

    @property
    def spectral(self) -> optax.Updates:
        """Which matrices took the spectral branch, where the data decides."""
        return self.direction.spectral

    @property
    def steps(self) -> Any:
        """State of the momentum, where the data decides."""
        return self.direction.steps


def _repeating(
    direction: optax.GradientTransformationExtraArgs, period: Scalar, matrix_axes: MatrixAxesSpec
) -> optax.GradientTransformationExtraArgs:
    def init(params: optax.Params) -> CachedState:
        wide = jax.tree.map(lambda p: jnp.promote_types(p.dtype, jnp.float32), params)
        zeros = jax.tree.map(lambda p, dtype: jnp.zeros_like(p, dtype=dtype), params, wide)
        return CachedState(direction.init(params), zeros)

    def update(updates, state, params=None, **extra_args):
        steps, inner = direction.update(updates, state.direction, params, **extra_args)
        leaves = MatrixLeaves.of(updates, matrix_axes)
        u, cached = jax.tree.leaves(steps), jax.tree.leaves(state.cached)
        if isinstance(inner, StableRankState):
            flags = jax.tree.leaves(inner.spectral)
            taken = [x.per_matrix(f) for x, f in zip_strict(leaves.layouts, flags)]
        else:
            taken = [is_spectral_step(state.direction.count, period)] * len(u)
        out, kept = [], []
        for layout, t, x, c in zip_strict(leaves.layouts, taken, u, cached):
            filled = jnp.any(c != 0, axis=layout.inner_axes, keepdims=True)
            out.append(jnp.where(jnp.logical_not(t) & filled, c, x))
            kept.append(jnp.where(t & ~jnp.isnan(x), x, c))
        unflatten = leaves.treedef.unflatten
        return unflatten(out), CachedState(inner, unflatten(kept))

    return optax.GradientTransformationExtraArgs(init, update)


class ReleasedTraceState(NamedTuple):
    """Heavy-ball momentum that starts from the parameters."""

    count: Array  # shape=(), dtype=int32: steps taken
    trace: optax.Updates  # the buffer: shapes and dtypes of the parameters


def released_heavy_ball(
    learning_rate: optax.ScalarOrSchedule,
    *,
    norm: Norm,
    momentum: Scalar,
    dampening: Scalar,
    nesterov: bool,
    weight_decay: Scalar,
) -> optax.GradientTransformationExtraArgs:
    """Signum and normalized SGD with dampening, and a buffer that starts from the parameters.

    From the parameters as the first step has decayed them. 1e-8 is added to the norm.
    """
    first_decay = scaled_rate(learning_rate, weight_decay)

    def init(params: optax.Params) -> ReleasedTraceState:
        return ReleasedTraceState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params))

    def update(updates, state, params=None):
        decay = first_decay(state.count) if callable(first_decay) else first_decay
        start = jnp.where(state.count == 0, 1 - decay, 0.0)
        new = jax.tree.map(
            lambda g, b, w: momentum * (b + start * w) + (1 - dampening) * g,
            *(updates, state.trace, params),
        )
        steps = jax.tree.map(lambda g, b: g + momentum * b, updates, new) if nesterov else new
        return steps, ReleasedTraceState(jnp.asarray(optax.safe_increment(state.count)), new)

    trace = optax.GradientTransformation(init, update)
    return guarded(
        normalized_direction(norm, trace, eps=1e-8 if norm == "frobenius" else 0.0),
        decayed_weights(weight_decay, None, Routing()),
        optax.scale_by_learning_rate(learning_rate),
    )
