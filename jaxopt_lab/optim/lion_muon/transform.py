"""LionMuon: alternating spectral and sign descent on one momentum buffer."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array

from jaxopt_lab.core import newton_schulz as iteration
from jaxopt_lab.core.checks import (
    COUNT,
    Wanted,
    check_choice,
    check_decays,
    check_dtype,
    check_number,
    check_rates,
)
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.matrix_leaves import LeafLayout, MatrixLeaves
from jaxopt_lab.optim.nonfinite import guarded
from jaxopt_lab.optim.options import MeshWork, NewtonSchulz
from jaxopt_lab.optim.routing import MatrixAxesSpec

# The typical root mean square of an AdamW update. Singular values of 1 alone give an m x n matrix
# one of 1 / sqrt(max(m, n)).
ADAMW_RMS = 0.2

SPECTRAL_SCALES: dict[str, Callable[[int, int], float]] = {
    "match_rms": lambda m, n: ADAMW_RMS * math.sqrt(max(m, n)),
    "fan": lambda m, n: math.sqrt(max(1.0, n / max(m, 1))),
    "none": lambda m, n: 1.0,
}

Average = Callable[[Array, Array], tuple[Array, Array]]  # (gradient, M) -> (direction, next M)
zip_strict = functools.partial(zip, strict=True)


class LionMuonState(NamedTuple):
    """State of `scale_by_lion_muon`."""

    count: Array  # shape=(), dtype=int32: steps taken
    mu: optax.Updates  # momentum: shapes of the parameters, dtype mu_dtype
    notfinite_count: optax.Updates  # (*batch) a leaf, int32: spectral steps refused to a matrix


class Branch(NamedTuple):
    """What a step makes of the directions. Where it is given NaN it returns NaN."""

    apply: Callable[[Array], Array]  # (..., m, n) -> (..., m, n)
    scale: Callable[[int, int], float]  # factor on the result for an m x n matrix
    dtype: DTypeLike | None = None  # of the results; None: float32 or wider
    whole: bool = True  # works on whole matrices, or entry by entry


_PERIOD = Wanted(
    "an integer >= 1, or math.inf for no spectral step at all",
    lambda x: x == math.inf or COUNT.holds(x),
)
_RATES = (
    "no such argument: rates follow the direction, optax.scale_by_learning_rate(branch_rate(...))"
)
_DECAY = "no such argument: decay follows the direction, optax.add_decayed_weights(...)"
_QUIRKS = ("momentum", "heavy_ball_direction", "cheap_mode", "cheap_ns_steps", "sign_scaling")


@explains_keywords(
    spectral_rate=_RATES,
    sign_rate=_RATES,
    weight_decay=_DECAY,
    mask=_DECAY,
    stable_rank_threshold="scale_by_stable_rank(threshold)",
    key="scale_by_stable_rank(key=...)",
    first_step_spectral="a period that no run reaches, such as period=2**30: step 0 is spectral",
    **dict.fromkeys(_QUIRKS, "jaxopt_lab.parity.lion_muon.released_muon"),
)
def scale_by_lion_muon(
    *,
    period: Scalar = 2,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: DTypeLike | None = None,
    matrix_axes: MatrixAxesSpec = None,
    spectral_scale: str = "match_rms",
    newton_schulz: NewtonSchulz = NewtonSchulz(),
    mesh: MeshWork = MeshWork(),
) -> optax.GradientTransformationExtraArgs:
    r"""Direction of LionMuon.

    With momentum $M$ and gradient $G$, step $t$ computes

    $$D_t = \beta_1 M_{t-1} + (1 - \beta_1) G_t, \qquad
    M_t = \beta_2 M_{t-1} + (1 - \beta_2) G_t$$

    $$U_t = \begin{cases}
      0.2 \sqrt{\max(m, n)} \, \mathrm{NS}(D_t) & t \bmod P = 0 \\
      \operatorname{sign}(D_t) & \text{otherwise} \end{cases}$$

    and returns $U_t$. The two branches have rates of their own: `branch_rate` is the schedule that
    alternates with them. Every leaf must be a matrix; `lion_muon` routes the others to AdamW.

    A spectral step leaves out a matrix with a gradient that is not finite, or whose square is not,
    and counts it; a sign step leaves out such entries.

    Args:
      period: $P$, an integer of at least 1. `math.inf`: no step is spectral.
      b1: $\beta_1$.
      b2: $\beta_2$.
      mu_dtype: Dtype of the momentum; None: that of the parameters.
      matrix_axes: Layouts as for `optax.contrib.muon`; see `jaxopt_lab.optim.routing.route`. None:
        every leaf has two axes.
      spectral_scale: "match_rms" is $0.2\sqrt{\max(m, n)}$ (the released code, under which the
        published rates hold), "fan" $\sqrt{\max(1, n/m)}$, "none" 1 (the paper's algorithm box).
      newton_schulz: The iteration NS.
      mesh: Layout of the parameters, and who does the work.

    Returns:
      A transformation with state `LionMuonState`.

    Raises:
      ValueError: An option is unknown or out of range, or a leaf is not a matrix.

    Source: Bolatov, Riabinin, Kornilov, Veprikov, Horváth, Takáč and Beznosikov, "LionMuon:
    Alternating Spectral and Sign Descent for Efficient Training", arXiv 2605.19811.

    Differs from the released code in: an infinite period is never spectral (released: step 0 is);
    leading axes are batch (released: flattened into the columns); bfloat16 rounds once a product;
    nothing is added to the norm by which the iteration divides (released: 1e-7).
    """
    spectral = orthogonalized(newton_schulz, spectral_scale)
    direction = alternating_direction(
        averaged(b1, b2), spectral, signs(newton_schulz), period, mu_dtype, matrix_axes, mesh
    )
    return guarded(direction)


def averaged(b1: Scalar, b2: Scalar) -> Average:
    """Two averages: of the direction and of the buffer, which does not depend on the branch."""
    check_decays(b1=b1, b2=b2)
    return lambda g, m: (b1 * m + (1 - b1) * g, b2 * m + (1 - b2) * g)


def orthogonalized(newton_schulz: NewtonSchulz, spectral_scale: str) -> Branch:
    """The spectral branch."""
    check_choice("spectral_scale", spectral_scale, SPECTRAL_SCALES)
    polar = functools.partial(
        iteration.newton_schulz,
        steps=newton_schulz.steps,
        coefficients=newton_schulz.coefficients,
        compute_dtype=newton_schulz.dtype,
        eps=newton_schulz.eps,
    )
    # A matrix that float16 does not hold reaches the iteration in float32.
    wide = newton_schulz.dtype is None or jnp.dtype(newton_schulz.dtype) == jnp.float16
    dtype = None if wide else newton_schulz.dtype
    return Branch(polar, SPECTRAL_SCALES[spectral_scale], dtype)


def signs(newton_schulz: NewtonSchulz) -> Branch:
    """The sign branch; its results have the dtype of the other one."""
    return Branch(jnp.sign, lambda m, n: 1.0, newton_schulz.dtype, whole=False)


def alternating_direction(
    average: Average,
    spectral: Branch,
    cheap: Branch,
    period: Scalar,
    mu_dtype: DTypeLike | None,
    matrix_axes: MatrixAxesSpec,
    mesh: MeshWork,
) -> optax.GradientTransformationExtraArgs:
    """One branch at every `period`-th step, the other at all others; NaN where it is refused."""
    check_number("period", period, _PERIOD)
    check_dtype("mu_dtype", mu_dtype)

    def init(params: optax.Params) -> LionMuonState:
        return initial_state(params, mu_dtype, matrix_axes)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        leaves = MatrixLeaves.of(updates, matrix_axes, mesh.param_shardings)
        whole = [layout.whole_axes for layout in leaves.layouts]
        is_spectral = is_spectral_step(state.count, period)

        # The momentum belongs into the branches: computed outside, the direction would have to be
        # written to memory and read again across the conditional.
        def take(branch: Branch) -> Callable:
            def step(gradients: list[Array], momenta: list[Array], counts: list[Array]):
                axes_of = whole if branch.whole else [()] * len(whole)
                d, new = advance(average, gradients, momenta, axes_of)
                if branch.whole:
                    # Cast first: what crosses the mesh is then the small dtype, both ways.
                    small = [x.astype(branch.dtype or x.dtype) for x in d]
                    options = {"replicated_work": mesh.replicated_work, "transposable": True}
                    (u,) = leaves.map_whole(branch.apply, (small,), **options)
                    counts = [c + r for c, r in zip_strict(counts, leaves.refused(u))]
                    # No device sees all of a matrix that is sharded until it comes back.
                    new = [
                        n if axes else jnp.where(jnp.isnan(x), m, n)
                        for x, m, n, axes in zip_strict(u, momenta, new, whole)
                    ]
                else:
                    u = [branch.apply(x) for x in d]
                u = [x.astype(cheap.dtype or g.dtype) for x, g in zip_strict(u, d)]
                return u, new, counts

            return step

        operands = [jax.tree.leaves(x) for x in (updates, state.mu, state.notfinite_count)]
        if isinstance(is_spectral, bool):
            u, mu, counts = take(spectral if is_spectral else cheap)(*operands)
        else:
            u, mu, counts = jax.lax.cond(is_spectral, take(spectral), take(cheap), *operands)
        taken = [is_spectral] * len(u)
        steps = scaled(operands[0], u, taken, spectral, cheap, leaves.layouts)
        unflatten = leaves.treedef.unflatten
        count = jnp.asarray(optax.safe_increment(state.count))
        return unflatten(steps), LionMuonState(count, unflatten(mu), unflatten(counts))

    return optax.GradientTransformationExtraArgs(init, update)


def initial_state(
    params: optax.Params, mu_dtype: DTypeLike | None, matrix_axes: MatrixAxesSpec
) -> LionMuonState:
    """No momentum, and nothing refused."""
    return LionMuonState(
        count=jnp.zeros([], jnp.int32),
        mu=optax.tree.zeros_like(params, dtype=mu_dtype),
        notfinite_count=MatrixLeaves.of(params, matrix_axes).zeros(jnp.int32),
    )


def advance(
    average: Average,
    gradients: list[Array],
    momenta: list[Array],
    whole: Sequence[tuple[int, ...]],
) -> tuple[list[Array], list[Array]]:
    """Directions in float32 or wider, and the next momenta.

    Where a gradient is refused the direction is NaN and the momentum stays: entry by entry, and
    along the axes that `whole` names all together.
    """
    directions, new = [], []
    for gradient, momentum, axes in zip_strict(gradients, momenta, whole):
        wide = jnp.promote_types(gradient.dtype, jnp.float32)
        g = gradient.astype(wide)
        usable = jnp.isfinite(jnp.square(g))
        # A narrow momentum may overflow where the gradient does not. Others are not looked at: the
        # pass over whole matrices then reads the gradient alone.
        if jnp.finfo(momentum.dtype).maxexp < jnp.finfo(wide).maxexp:
            usable &= jnp.isfinite(average(g, momentum.astype(wide))[1].astype(momentum.dtype))
        if axes:
            usable = jnp.all(usable, axis=axes, keepdims=True)
        # Of a gradient without its refused entries, XLA keeps the mask inside of the two fusions.
        d, m = average(jnp.where(usable, g, 0), momentum.astype(wide))
        m = m.astype(momentum.dtype)
        directions.append(jnp.where(usable, d, jnp.nan))
        new.append(jnp.where(usable, m, momentum))
    return directions, new


def scaled(
    gradients: list[Array],
    u: list[Array],
    is_spectral: list,
    spectral: Branch,
    cheap: Branch,
    layouts: list[LeafLayout],
) -> list[Array]:
    """Steps in float32 or wider, each with the scale of its branch."""
    out = []
    for layout, g, x, s in zip_strict(layouts, gradients, u, is_spectral):
        factor = jnp.where(s, spectral.scale(*layout.sides), cheap.scale(*layout.sides))
        out.append(factor * x.astype(jnp.promote_types(g.dtype, jnp.float32)))
    return out


def is_spectral_step(count: Array, period: Scalar) -> Array | bool:
    """Whether step `count` is spectral; a Python bool where that is the same at every step."""
    if isinstance(period, int | float):
        if period == 1 or math.isinf(period):
            return period == 1
        return count % min(int(period), 2**31 - 1) == 0
    # count % inf is count: step 0 must not look due.
    return (count % period == 0) & jnp.isfinite(period)


def branch_rate(
    period: Scalar, spectral_rate: optax.ScalarOrSchedule, sign_rate: optax.ScalarOrSchedule
) -> optax.Schedule:
    """The schedule that alternates with the branches of `scale_by_lion_muon`.

    Example:
      >>> rate = branch_rate(2, 1e-2, lambda count: 1e-4 * count)
      >>> [round(float(rate(jnp.array(count))), 4) for count in range(4)]
      [0.01, 0.0001, 0.01, 0.0003]

    Args:
      period: As for `scale_by_lion_muon`.
      spectral_rate: Of the spectral steps, a number or a schedule.
      sign_rate: Of the other steps.

    Raises:
      ValueError: The period is no integer of at least 1, or a rate is NaN or negative.
    """
    check_number("period", period, _PERIOD)
    check_rates(spectral_rate=spectral_rate, sign_rate=sign_rate)

    def rate(count: ArrayLike) -> Array:
        rates = [r(count) if callable(r) else r for r in (spectral_rate, sign_rate)]
        return jnp.where(is_spectral_step(jnp.asarray(count), period), *rates)

    return rate
