"""The mathematics of Shampoo as a transformation: inverse roots of one factor a mode."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.core.precision import PrecisionName, ProductPrecision
from jaxopt_lab.core.stacks import ReplicatedWork
from jaxopt_lab.optim.kronecker.blocks import DEFAULT_MAX_DIM
from jaxopt_lab.optim.kronecker.grafting import keeps_squares
from jaxopt_lab.optim.kronecker.shampoo_guard import Guard, Leaves, zip_strict
from jaxopt_lab.optim.kronecker.shampoo_problems import MAX_ORDER, Problem, problems_of
from jaxopt_lab.optim.kronecker.shampoo_rule import ShampooRule
from jaxopt_lab.optim.rates import check_rates
from jaxopt_lab.optim.routing import MatrixAxesSpec, broadcast_prefix


class ShampooState(NamedTuple):
    """State of `scale_by_shampoo`.

    `batch` are the batch axes of a leaf, () without a layout; `blocks` is the number of blocks of
    one problem and d their edge along a mode. All arrays but the counters are float32 or wider.
    """

    count: Array  # shape=(), dtype=int32: gradients seen
    notfinite_count: optax.Updates  # (*batch,) int32: gradients refused: not finite, or too large
    mu: optax.Updates  # shapes of the parameters: first moment
    squares: Any  # shapes of the parameters: second moment of the graft; MaskedNode() without one
    velocity: Any  # shapes of the parameters: momentum of the direction; MaskedNode() without it
    # One tree a mode, (*batch, blocks, d, d); MaskedNode() where a leaf has fewer modes.
    factors: tuple[Any, ...]
    roots: tuple[Any, ...]  # like the factors: their inverse roots, the identity at first


def scale_by_shampoo(
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    epsilon: Scalar = 1e-12,
    relative_epsilon: bool = False,
    precondition_frequency: Scalar = 10,
    start_preconditioning_step: Scalar | None = None,
    exponent: float | Mapping[int, float] | None = None,
    bias_correction: bool = True,
    graft: str | None = "adam",
    graft_b2: Scalar | None = None,
    graft_eps: Scalar = 1e-8,
    b3: Scalar | None = None,
    momentum: Scalar | None = None,
    dampening: Scalar = 0.0,
    nesterov: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_type: str = "decoupled",
    mask: Any = None,
    trace_scaling: bool = False,
    kl_factors: bool = False,
    max_preconditioner_dim: int | None = None,
    merge: str = "tensors",
    matrix_axes: MatrixAxesSpec = None,
    root_method: str = "newton",
    root_precision: PrecisionName = "bf16_x3",
    factor_precision: ProductPrecision = "bf16_x3",
    direction_precision: ProductPrecision = "default",
    stagger: bool = False,
    param_shardings: Any = None,
    replicated_work: ReplicatedWork = "repeat",
) -> optax.GradientTransformationExtraArgs:
    r"""Direction of Shampoo, bias correction and weight decay included.

    A leaf is cut into blocks, each a problem of its own. For a block of order $o$ (2 for a matrix)
    with gradient $G$, first moment $M$ and the Gram matrices $G_{(k)} G_{(k)}^\top$ of its modes,

    .. math::
      X_k \leftarrow \beta_2 X_k + (1 - \beta_2) G_{(k)} G_{(k)}^\top, \qquad
      P_k = \Bigl( \frac{X_k}{1 - \beta_2^t} + \epsilon I \Bigr)^{-1 / (2 o)}

      D = \hat M \times_1 P_1 \cdots \times_o P_o, \qquad
      D \leftarrow D \, \lVert D_g \rVert / \lVert D \rVert

    where $\hat M$ is the bias-corrected first moment and $D_g$ the direction of the grafting
    method, which alone steers before the first roots. $\beta_2 = 1$ accumulates sums. The roots
    $P_k$ are refreshed every `precondition_frequency` steps, inside a conditional.

    A gradient that is not finite (or whose square overflows, or makes the factors overflow) leaves
    the problem it belongs to as it was: its update is zero, `notfinite_count` counts it, the other
    problems go on.

    Args:
      b1: $\beta_1$, decay of the first moment.
      b2: $\beta_2$, decay of the factors, in [0, 1]; 1: plain sums, which need no bias correction.
      epsilon: $\epsilon$, the ridge.
      relative_epsilon: Take $\epsilon \lambda_{\max}(X_k)$ as the ridge.
      precondition_frequency: Steps from one refresh of the roots to the next, f.
      start_preconditioning_step: Step of the first roots, at least f; None: f.
      exponent: Of the inverse roots, a number or {order: number}; None: $1 / (2 o)$. Static.
      bias_correction: Divide moment and factors by what their decay has not yet filled.
      graft: Method whose step size every block takes: "adam", "rmsprop", "adagrad", "sgd" (the norm
        of the averaged gradient), or None.
      graft_b2: Decay of its second moment; None: `b2`, or 0.999 where `b2` is 1.
      graft_eps: Added to the root of its second moment.
      b3: Look-ahead: average with this decay instead of `b1` what is used, not what is stored.
      momentum: Heavy-ball momentum of the direction; None: none, and no state for it.
      dampening: 1 minus the weight of the direction in the momentum.
      nesterov: Add the momentum to the direction instead of replacing it.
      weight_decay: A number or a schedule of the step.
      weight_decay_type: "decoupled" adds decay times parameter to the direction, "l2" to the
        gradient.
      mask: Which leaves decay: a tree of bools, a prefix of one, or a function of the parameters.
      trace_scaling: Divide each factor by the root of its trace before the inverse root.
      kl_factors: Form each Gram matrix from the gradient multiplied by the last roots along all
        other modes (KL-Shampoo).
      max_preconditioner_dim: Longest block edge; None: 1024. Static.
      merge: "tensors" merges small adjacent axes in leaves of more than two axes only, "always" as
        the released code does (8 x 12 becomes a vector of 96), "never". Axes of size 1 are dropped
        in any case.
      matrix_axes: `MuonDimensionNumbers` for leaves that hold batches of matrices; see
        `jaxopt_lab.optim.routing.route`. None, or None for a leaf: each of its axes is a mode.
      root_method: "newton" (matrix products) or "eigh"; see `jaxopt_lab.core.inverse_roots`.
      root_precision: Of the products of "newton".
      factor_precision: Of the Gram products.
      direction_precision: Of the products with the roots.
      stagger: Instead of refreshing all roots every f steps, refresh 1/f of the blocks of one size
        at every step after the first refresh. Then f is static.
      param_shardings: Tree of `NamedSharding` of the parameters. Needed on meshes with Auto axes.
      replicated_work: On mesh axes that replicate the parameters, "repeat" the roots or "share"
        them for one all-gather.

    Returns:
      A transformation with state `ShampooState`. It returns the direction, not negated.

    Raises:
      ValueError: An option is unknown or out of range, or a layout does not fit its leaf.

    Source: Gupta, Koren and Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", arXiv
    1802.09568 (2018); Shi, Lee, Iwasaki, Gallego-Posada, Li, Rangadurai, Mudigere and Rabbat, "A
    Distributed Data-Parallel PyTorch Implementation of the Distributed Shampoo Optimizer", arXiv
    2309.06497 (2023), with its code; arXiv 2509.03378 (2025) for `kl_factors`.

    Differs from the released code in: small matrices are not merged into vectors (`merge`); roots
    by Newton's iteration, with a ridge of at least round-off (`root_method`); Adam grafting, f = 10
    and b2 = 0.999 by default; edge blocks are padded with zeros, which changes nothing.
    """
    if graft_b2 is None:
        plain = isinstance(b2, int | float)
        graft_b2 = (0.999 if b2 == 1 else b2) if plain else jnp.where(b2 == 1, 0.999, b2)
    rule = ShampooRule(
        b1=b1,
        b2=b2,
        b3=b3,
        epsilon=epsilon,
        relative_epsilon=relative_epsilon,
        precondition_frequency=precondition_frequency,
        start_preconditioning_step=precondition_frequency
        if start_preconditioning_step is None
        else start_preconditioning_step,
        exponent=exponent,
        bias_correction=bias_correction,
        graft=graft,
        graft_b2=graft_b2,
        graft_eps=graft_eps,
        momentum=momentum,
        dampening=dampening,
        nesterov=nesterov,
        weight_decay_type=weight_decay_type,
        trace_scaling=trace_scaling,
        kl_factors=kl_factors,
        max_preconditioner_dim=DEFAULT_MAX_DIM
        if max_preconditioner_dim is None
        else max_preconditioner_dim,
        merge=merge,
        root_method=root_method,
        root_precision=root_precision,
        factor_precision=factor_precision,
        direction_precision=direction_precision,
        stagger=stagger,
        replicated_work=replicated_work,
    )
    rule.check()
    check_rates(weight_decay=weight_decay)
    geometry = rule.max_preconditioner_dim, merge
    # A traced number (from inject_hyperparams) may be anything; only a plain zero skips the decay.
    decays = not (isinstance(weight_decay, int | float) and weight_decay == 0)

    def init(params: optax.Params) -> ShampooState:
        problems = problems_of(params, matrix_axes, *geometry)
        leaves, treedef = jax.tree.flatten(params)
        dtypes = [_wide(x) for x in leaves]
        absent = optax.MaskedNode()
        return ShampooState(
            count=jnp.zeros([], jnp.int32),
            notfinite_count=treedef.unflatten([p.zero_counter() for p in problems]),
            mu=_zeros(params),
            squares=_zeros(params) if keeps_squares(graft) else absent,
            velocity=absent if momentum is None else _zeros(params),
            factors=_by_mode(treedef, [p.factors(d) for p, d in zip_strict(problems, dtypes)]),
            roots=_by_mode(
                treedef, [p.factors(d, identity=True) for p, d in zip_strict(problems, dtypes)]
            ),
        )

    def decay_terms(count: Array, params: Any, like: Any) -> Leaves | None:
        if not decays:
            return None
        if params is None:
            raise ValueError("weight_decay needs the parameters: call update(grads, state, params)")
        rate = weight_decay(count) if callable(weight_decay) else weight_decay
        decaying = broadcast_prefix("mask", True if mask is None else mask, like)
        terms = zip_strict(jax.tree.leaves(params), decaying)
        return [(rate if d else 0) * w.astype(_wide(w)) for w, d in terms]

    def update(updates, state, params=None, **extra_args):
        del extra_args
        problems = problems_of(updates, matrix_axes, *geometry, param_shardings=param_shardings)
        raw, treedef = jax.tree.flatten(updates)
        decay = decay_terms(state.count, params, updates)
        g = [x.astype(_wide(x)) for x in raw]
        if decay and weight_decay_type == "l2":
            g = [x + z for x, z in zip_strict(g, decay)]
        t = jnp.asarray(optax.safe_increment(state.count))
        guard = Guard.of(problems, g, t, treedef.flatten_up_to(state.notfinite_count))
        g = guard.or_zero(g)
        factors, roots = (_by_leaf(treedef, problems, x) for x in (state.factors, state.roots))
        guard, factors = rule.accumulate(problems, guard, g, factors, roots)
        roots = rule.refresh(t, problems, guard, factors, roots)
        mu, squares, velocity = map(jax.tree.leaves, (state.mu, state.squares, state.velocity))
        direction, mu, squares = rule.directions(t, problems, guard, g, mu, squares, roots)
        if decay and weight_decay_type == "decoupled":
            direction = [x + z for x, z in zip_strict(direction, decay)]
        direction, velocity = rule.with_momentum(guard, direction, velocity)
        out = [x.astype(y.dtype) for x, y in zip_strict(guard.or_zero(direction), raw)]
        unflatten = treedef.unflatten
        return unflatten(out), ShampooState(
            count=t,
            notfinite_count=unflatten(guard.notfinite_count),
            mu=unflatten(mu),
            squares=unflatten(squares) if keeps_squares(graft) else state.squares,
            velocity=state.velocity if momentum is None else unflatten(velocity),
            factors=_by_mode(treedef, factors),
            roots=_by_mode(treedef, roots),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _wide(x: Any) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _zeros(params: optax.Params) -> Any:
    return jax.tree.map(lambda p: jnp.zeros_like(p, dtype=_wide(p)), params)


def _by_mode(treedef: Any, factors: Any) -> tuple[Any, ...]:
    """From a list a leaf to a tree a mode, absent modes masked."""
    absent = optax.MaskedNode()
    return tuple(
        treedef.unflatten([modes[k] if k < len(modes) else absent for modes in factors])
        for k in range(MAX_ORDER)
    )


def _by_leaf(treedef: Any, problems: list[Problem], trees: tuple[Any, ...]) -> list[Leaves]:
    """Inverse of `_by_mode`."""
    modes = [treedef.flatten_up_to(tree) for tree in trees]
    return [[modes[k][i] for k in range(p.blocks.order)] for i, p in enumerate(problems)]
