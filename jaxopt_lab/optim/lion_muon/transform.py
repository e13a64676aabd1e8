"""LionMuon: alternating spectral and sign descent on one momentum buffer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.core.stacks import ReplicatedWork
from jaxopt_lab.optim.fallback import with_adamw_fallback
from jaxopt_lab.optim.lion_muon.branches import Family, zip_strict
from jaxopt_lab.optim.matrix_leaves import MatrixLeaves
from jaxopt_lab.optim.options import OnUncovered
from jaxopt_lab.optim.rates import check_rates, scaled_rate
from jaxopt_lab.optim.routing import MatrixAxesSpec, broadcast_prefix, require_matrices


class LionMuonState(NamedTuple):
    """State of `scale_by_lion_muon`."""

    count: Array  # shape=(), dtype=int32: steps taken
    mu: optax.Updates  # momentum: shapes of the parameters, dtype mu_dtype
    cached: Any  # last scaled spectral direction, with cheap_mode="cached" only
    key: Any  # typed PRNG key, with the stable-rank trigger only


def scale_by_lion_muon(
    *,
    period: Scalar = 2,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    ns_steps: int = 5,
    spectral_rate: optax.ScalarOrSchedule = 1.0,
    sign_rate: optax.ScalarOrSchedule = 0.05,
    weight_decay: Scalar = 0.0,
    mask: Any = None,
    matrix_axes: MatrixAxesSpec = None,
    mu_dtype: DTypeLike | None = None,
    ns_dtype: str = "bfloat16",
    ns_coefficients: str = "quintic",
    spectral_scale: str = "match_rms",
    first_step_spectral: bool = False,
    stable_rank_threshold: Scalar | None = None,
    key: Array | None = None,
    momentum: str = "ema",
    heavy_ball_direction: str = "nesterov",
    cheap_mode: str = "sign",
    cheap_ns_steps: int = 2,
    sign_scaling: str = "none",
    round_newton_schulz: bool = False,
    round_update: bool = False,
    param_shardings: Any = None,
    replicated_work: ReplicatedWork = "repeat",
) -> optax.GradientTransformationExtraArgs:
    r"""Direction of LionMuon, with the rate ratio and the weight decay of the branch taken.

    With momentum $M$ and gradient $G$, step $t$ computes

    .. math::
      D_t = \beta_1 M_{t-1} + (1 - \beta_1) G_t, \qquad
      M_t = \beta_2 M_{t-1} + (1 - \beta_2) G_t

      U_t = \begin{cases}
        0.2 \sqrt{\max(m, n)} \, \mathrm{NS}(D_t) & t \bmod P = 0 \\
        \operatorname{sign}(D_t) & \text{otherwise} \end{cases}

    and returns $r_t (U_t + \lambda W)$, where $r_t$ is `spectral_rate` or `sign_rate`: one
    scheduled rate after it is right for both branches. Every leaf must be a matrix; `lion_muon`
    routes the others to AdamW.

    Args:
      period: $P$, an integer of at least 1. `math.inf`: no step is spectral.
      b1: $\beta_1$; with heavy-ball momentum the only coefficient.
      b2: $\beta_2$.
      ns_steps: Newton-Schulz iterations (static).
      spectral_rate: Multiplies spectral steps; a number or a schedule of the step.
      sign_rate: Multiplies the other steps.
      weight_decay: $\lambda$, decoupled; it decays at the rate of the branch taken.
      mask: Which leaves decay: a tree of bools, a prefix of one, or a function of the parameters.
      matrix_axes: Layouts as for `optax.contrib.muon`; see `jaxopt_lab.optim.routing.route`. None:
        every leaf has two axes.
      mu_dtype: Dtype of the momentum; None: that of the parameters.
      ns_dtype: Dtype of the iterates; products accumulate in float32 or wider.
      ns_coefficients: "quintic" (the paper's), "polar_express" or "dion".
      spectral_scale: "match_rms" is $0.2\sqrt{\max(m, n)}$ (the released code, under which the
        published rates hold), "fan" $\sqrt{\max(1, n/m)}$, "none" 1 (the paper's algorithm box).
      first_step_spectral: Take step 0 spectrally also when the period is infinite.
      stable_rank_threshold: $\alpha$. When given, `period` is ignored and each matrix is spectral
        when its stable rank is at most $\alpha \min(m, n)$.
      key: Key of the power iteration's start vectors; None: `jax.random.key(0)`.
      momentum: "ema", or "heavy_ball" for the legacy $B \leftarrow \beta_1 B + G$.
      heavy_ball_direction: "nesterov" ($G + \beta_1 B$), "buffer" ($B$) or "gradient" ($G$).
      cheap_mode: What a step that is not spectral does: "sign"; "norm" (Frobenius-normalised);
        "cheap_ns" (few iterations); "cached" (the last spectral direction again).
      cheap_ns_steps: Iterations of "cheap_ns" (static).
      sign_scaling: Factor on the sign: "none", "frob" or "muon".
      round_newton_schulz: Reproduce the released bfloat16 iteration bit for bit.
      round_update: Round scaled directions to bfloat16, as the released update buffer does.
      param_shardings: Tree of `NamedSharding` of the parameters. Needed on meshes with Auto axes,
        where types do not show the layout; without it GSPMD gathers inside Newton-Schulz.
      replicated_work: On mesh axes that replicate the parameters, "repeat" the orthogonalisation
        or "share" it for one all-gather of its results.

    Returns:
      A transformation with state `LionMuonState`. Its update takes an optional `draws=`: a tree
      like the parameters with start vectors (batch, m) or (m,), which replaces sampling.

    Raises:
      ValueError: An option is unknown or out of range, or a leaf is not a matrix.

    Source: Bolatov, Riabinin, Kornilov, Veprikov, Horváth, Takáč and Beznosikov, "LionMuon:
    Alternating Spectral and Sign Descent for Efficient Training", arXiv 2605.19811.

    Differs from the released code in: an infinite period is never spectral (released: step 0 is);
    leading axes are batch (released: flattened into the columns); bfloat16 rounds once a product.
    """
    family = Family(
        b1=b1,
        b2=b2,
        momentum=momentum,
        heavy_ball_direction=heavy_ball_direction,
        ns_steps=ns_steps,
        ns_dtype=ns_dtype,
        ns_coefficients=ns_coefficients,
        spectral_scale=spectral_scale,
        cheap_mode=cheap_mode,
        cheap_ns_steps=cheap_ns_steps,
        sign_scaling=sign_scaling,
        round_newton_schulz=round_newton_schulz,
        round_update=round_update,
        replicated_work=replicated_work,
        period=period,
        first_step_spectral=first_step_spectral,
        stable_rank_threshold=stable_rank_threshold,
    )
    family.check()
    check_rates(spectral_rate=spectral_rate, sign_rate=sign_rate)
    triggered = stable_rank_threshold is not None
    # A traced number (from inject_hyperparams) may be anything; only a plain zero skips the decay.
    decays = not (isinstance(weight_decay, int | float) and weight_decay == 0)

    def init(params: optax.Params) -> LionMuonState:
        require_matrices(params, matrix_axes)
        absent = optax.MaskedNode()
        return LionMuonState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            cached=jax.tree.map(_zeros_wide, params) if cheap_mode == "cached" else absent,
            key=(jax.random.key(0) if key is None else key) if triggered else absent,
        )

    def update(updates, state, params=None, *, draws=None, **extra_args):
        del extra_args
        if decays and params is None:
            raise ValueError("weight_decay needs the parameters: call update(grads, state, params)")
        leaves = MatrixLeaves.of(updates, matrix_axes, param_shardings)
        g, m, cached = map(jax.tree.leaves, (updates, state.mu, state.cached))
        if triggered:
            starts = leaves.start_vectors(g, jax.random.fold_in(state.key, state.count), draws)
            u, new_mu, spectral = family.triggered_step(starts, leaves, g, m, cached)
        else:
            u, new_mu, spectral = family.periodic_step(state.count, leaves, g, m, cached)
        scaled = [
            family.apply_scale(x, jnp.where(s, *family.scales(i, y, leaves)), _wide(y))
            for i, (x, s, y) in enumerate(zip_strict(u, spectral, g))
        ]
        decayed = scaled
        if decays:
            decaying = broadcast_prefix("mask", True if mask is None else mask, updates)
            decayed = [
                x + weight_decay * w.astype(x.dtype) if d else x
                for x, w, d in zip_strict(scaled, jax.tree.leaves(params), decaying)
            ]
        rates = [r(state.count) if callable(r) else r for r in (spectral_rate, sign_rate)]
        out = [
            (jnp.where(s, *rates) * x).astype(y.dtype)
            for s, x, y in zip_strict(spectral, decayed, g)
        ]
        new_cached = [jnp.where(s, *pair) for s, *pair in zip_strict(spectral, scaled, cached or u)]
        unflatten = leaves.treedef.unflatten
        return unflatten(out), LionMuonState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            mu=unflatten(new_mu),
            cached=unflatten(new_cached) if cheap_mode == "cached" else state.cached,
            key=state.key,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _wide(x: Any) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _zeros_wide(x: Any) -> Array:
    return jnp.zeros_like(x, dtype=_wide(x))


def lion_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    sign_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    sign_lr_ratio: Scalar = 0.05,
    adam_lr_ratio: Scalar = 1.0,
    period: Scalar = 2,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    ns_steps: int = 5,
    weight_decay: Scalar = 0.0,
    adam_weight_decay: Scalar | None = None,
    mask: Any = None,
    matrix_axes: MatrixAxesSpec = None,
    mu_dtype: DTypeLike | None = None,
    ns_dtype: str = "bfloat16",
    ns_coefficients: str = "quintic",
    spectral_scale: str = "match_rms",
    first_step_spectral: bool = False,
    stable_rank_threshold: Scalar | None = None,
    key: Array | None = None,
    adam_b1: Scalar = 0.8,
    adam_b2: Scalar = 0.999,
    adam_eps: Scalar = 1e-8,
    on_uncovered: OnUncovered = "adamw",
    vocabulary_size: int | None = None,
    param_shardings: Any = None,
    replicated_work: ReplicatedWork = "repeat",
) -> optax.GradientTransformationExtraArgs:
    r"""LionMuon for the matrices of a model, AdamW for everything else.

    Every `period`-th step a matrix moves along its orthogonalised momentum (Muon), at the other
    steps along the sign (Lion). Both branches read and write one buffer, so the state of a matrix
    is half of AdamW's. See `scale_by_lion_muon` for the equations. With defaults this is the
    configuration of the paper's experiments, except for their weight decay of 0.1.

    Three rates are involved: spectral, sign and AdamW. By default `learning_rate` drives all three
    through `sign_lr_ratio` and `adam_lr_ratio`, so one schedule warms up and decays them together.
    A rate given by itself stands alone: a number stays constant, a schedule is followed.

    Args:
      learning_rate: Rate of the spectral steps, a number or a schedule.
      sign_learning_rate: Rate of the sign steps; None: `sign_lr_ratio * learning_rate`.
      adam_learning_rate: Rate of the other leaves; None: `adam_lr_ratio * learning_rate`.
      sign_lr_ratio: Sign rate over spectral rate.
      adam_lr_ratio: AdamW rate over spectral rate.
      period: Steps from one spectral step to the next; `math.inf` is Lion, 1 is Muon.
      b1: Averaging of the direction.
      b2: Averaging of the momentum.
      ns_steps: Newton-Schulz iterations (static).
      weight_decay: Decoupled decay of the matrices, at the rate of the branch taken.
      adam_weight_decay: Decay of the other leaves; None: the same.
      mask: Which leaves decay: a tree of bools, a prefix of one, or a function of the parameters.
      matrix_axes: `MuonDimensionNumbers` for the leaves that are matrices, None for those that are
        not: a tree, a prefix, or a function of the parameters. None: leaves of two axes, except
        embeddings and heads.
      mu_dtype: Dtype of the momenta; None: that of the parameters.
      ns_dtype: Dtype of the Newton-Schulz iterates.
      ns_coefficients: "quintic", "polar_express" or "dion".
      spectral_scale: "match_rms", "fan" or "none".
      first_step_spectral: Take step 0 spectrally also when the period is infinite.
      stable_rank_threshold: When given, each matrix decides alone by its stable rank.
      key: Key of that decision's power iteration.
      adam_b1: First-moment decay of AdamW.
      adam_b2: Second-moment decay of AdamW.
      adam_eps: Epsilon of AdamW, on the uncorrected root.
      on_uncovered: "adamw" or "error" for a leaf of more than two axes without a layout.
      vocabulary_size: Without `matrix_axes`, an axis this long marks an embedding. None: 10 000.
      param_shardings: Tree of `NamedSharding`, for meshes with Auto axes.
      replicated_work: "repeat" or "share" the orthogonalisation over replicas.

    Returns:
      A transformation whose state is an `optax.transforms.PartitionState` with the groups
      "lion_muon" and "adamw".

    Raises:
      ValueError: A rate is NaN or negative, an option is unknown, or a layout does not fit.

    Example:
      >>> import jax.numpy as jnp
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
    check_rates(
        learning_rate=learning_rate,
        sign_learning_rate=sign_learning_rate,
        adam_learning_rate=adam_learning_rate,
        sign_lr_ratio=sign_lr_ratio,
        adam_lr_ratio=adam_lr_ratio,
    )
    coupled = sign_learning_rate is None
    direction = scale_by_lion_muon(
        period=period,
        b1=b1,
        b2=b2,
        ns_steps=ns_steps,
        spectral_rate=1.0 if coupled else learning_rate,
        sign_rate=sign_lr_ratio if sign_learning_rate is None else sign_learning_rate,
        weight_decay=weight_decay,
        mask=mask,
        matrix_axes=matrix_axes,
        mu_dtype=mu_dtype,
        ns_dtype=ns_dtype,
        ns_coefficients=ns_coefficients,
        spectral_scale=spectral_scale,
        first_step_spectral=first_step_spectral,
        stable_rank_threshold=stable_rank_threshold,
        key=key,
        param_shardings=param_shardings,
        replicated_work=replicated_work,
    )
    return with_adamw_fallback(
        "lion_muon",
        optax.chain(direction, optax.scale_by_learning_rate(learning_rate if coupled else 1.0)),
        scaled_rate(learning_rate, adam_lr_ratio)
        if adam_learning_rate is None
        else adam_learning_rate,
        b1=adam_b1,
        b2=adam_b2,
        eps=adam_eps,
        weight_decay=weight_decay if adam_weight_decay is None else adam_weight_decay,
        mask=mask,
        mu_dtype=mu_dtype,
        matrix_axes=matrix_axes,
        on_uncovered=on_uncovered,
        vocabulary_size=vocabulary_size,
    )


def sign_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    sign_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    sign_lr_ratio: Scalar = 0.05,
    adam_lr_ratio: Scalar = 1.0,
    period: Scalar = 2,
    b1: Scalar = 0.9,
    ns_steps: int = 5,
    weight_decay: Scalar = 0.0,
    mask: Any = None,
    matrix_axes: MatrixAxesSpec = None,
    mu_dtype: DTypeLike | None = None,
    ns_dtype: str = "bfloat16",
    on_uncovered: OnUncovered = "adamw",
    param_shardings: Any = None,
    replicated_work: ReplicatedWork = "repeat",
) -> optax.GradientTransformationExtraArgs:
    """SignMuon: `lion_muon` with one averaging constant, so the direction is the momentum itself.

    With period=1 this is Muon with averaged momentum, with period=math.inf it is Signum. For the
    remaining options call `lion_muon` with b1 = b2.

    Args:
      learning_rate: Rate of the spectral steps, a number or a schedule.
      sign_learning_rate: As for `lion_muon`.
      adam_learning_rate: As for `lion_muon`.
      sign_lr_ratio: As for `lion_muon`.
      adam_lr_ratio: As for `lion_muon`.
      period: As for `lion_muon`.
      b1: The averaging constant of direction and momentum.
      ns_steps: As for `lion_muon`.
      weight_decay: Decay of all leaves.
      mask: As for `lion_muon`.
      matrix_axes: As for `lion_muon`.
      mu_dtype: As for `lion_muon`.
      ns_dtype: As for `lion_muon`.
      on_uncovered: As for `lion_muon`.
      param_shardings: As for `lion_muon`.
      replicated_work: As for `lion_muon`.

    Source: Bolatov et al., arXiv 2605.19811 (the `_fixed` runs of the released code).
    """
    return lion_muon(
        learning_rate,
        sign_learning_rate=sign_learning_rate,
        adam_learning_rate=adam_learning_rate,
        sign_lr_ratio=sign_lr_ratio,
        adam_lr_ratio=adam_lr_ratio,
        period=period,
        b1=b1,
        b2=b1,
        ns_steps=ns_steps,
        weight_decay=weight_decay,
        mask=mask,
        matrix_axes=matrix_axes,
        mu_dtype=mu_dtype,
        ns_dtype=ns_dtype,
        on_uncovered=on_uncovered,
        param_shardings=param_shardings,
        replicated_work=replicated_work,
    )
