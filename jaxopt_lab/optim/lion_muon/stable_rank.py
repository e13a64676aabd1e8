"""LionMuon in which the data decides: every matrix takes the branch that its stable rank says."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxopt_lab.core.checks import POSITIVE, check_dtype, check_number, check_rates
from jaxopt_lab.core.keys import leaf_keys
from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.core.spectral import stable_rank
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.lion_muon.transform import (
    Average,
    Branch,
    LionMuonState,
    advance,
    averaged,
    initial_state,
    orthogonalized,
    scaled,
    signs,
    zip_strict,
)
from jaxopt_lab.optim.matrix_leaves import LeafLayout, MatrixLeaves
from jaxopt_lab.optim.nonfinite import guarded
from jaxopt_lab.optim.options import MeshWork, NewtonSchulz, Routing
from jaxopt_lab.optim.rates import decayed_weights
from jaxopt_lab.optim.routing import MatrixAxesSpec


class StableRankState(NamedTuple):
    """State of the direction inside of `scale_by_stable_rank`."""

    steps: LionMuonState  # as of `scale_by_lion_muon`
    spectral: optax.Updates  # (*batch) a leaf, bool: whether the last step was spectral
    key_data: Array  # uint32: of the key from which start vectors are drawn


@explains_keywords(period="threshold=..., which decides", stable_rank_threshold="threshold=...")
def scale_by_stable_rank(
    threshold: Scalar,
    *,
    spectral_rate: optax.ScalarOrSchedule = 1.0,
    sign_rate: optax.ScalarOrSchedule = 0.05,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any = None,
    mu_dtype: DTypeLike | None = None,
    matrix_axes: MatrixAxesSpec = None,
    spectral_scale: str = "match_rms",
    newton_schulz: NewtonSchulz = NewtonSchulz(),
    mesh: MeshWork = MeshWork(),
    key: Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""`scale_by_lion_muon` with $r_t (U_t + \lambda W)$, a branch for each matrix.

    A step of a matrix is spectral when the stable rank $\lVert D_t \rVert_F^2 / \sigma_1(D_t)^2$ of
    its direction is at most $\alpha \min(m, n)$. Three rounds of power iteration estimate
    $\sigma_1$. Since the branch is known to the step alone, rates and decay belong to it; one
    scheduled rate after it is right for both branches. A gradient that is not finite leaves out its
    whole matrix.

    Args:
      threshold: $\alpha$.
      spectral_rate: $r$ of the spectral steps, a number or a schedule.
      sign_rate: $r$ of the other steps.
      b1: Averaging of the direction.
      b2: Averaging of the momentum.
      weight_decay: $\lambda$, decoupled.
      mask: Which leaves decay.
      mu_dtype: Dtype of the momentum; None: that of the parameters.
      matrix_axes: As for `scale_by_lion_muon`.
      spectral_scale: As for `scale_by_lion_muon`.
      newton_schulz: The iteration.
      mesh: Layout of the parameters, and who does the work.
      key: Key of the start vectors; None: `jax.random.key(0)`.

    Returns:
      A transformation. Its update takes an optional `draws=`: a tree like the parameters with start
      vectors (batch, m) or (m,), which replaces sampling.

    Raises:
      ValueError: An option is unknown or out of range, or a leaf is not a matrix.

    Source: Bolatov et al., "LionMuon", arXiv 2605.19811, released code.
    """
    check_rates(spectral_rate=spectral_rate, sign_rate=sign_rate)
    branches = averaged(b1, b2), orthogonalized(newton_schulz, spectral_scale), signs(newton_schulz)
    direction = deciding_direction(*branches, threshold, mu_dtype, matrix_axes, mesh, key)
    decay = decayed_weights(weight_decay, mask, Routing())
    return with_rates(direction, decay, spectral_rate, sign_rate, matrix_axes)


def deciding_direction(
    average: Average,
    spectral: Branch,
    cheap: Branch,
    threshold: Scalar,
    mu_dtype: DTypeLike | None,
    matrix_axes: MatrixAxesSpec,
    mesh: MeshWork,
    key: Array | None = None,
    measures_momentum: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """As `alternating_direction`; `measures_momentum`: decides by that instead of the direction."""
    check_number("stable_rank_threshold", threshold, POSITIVE)
    check_dtype("mu_dtype", mu_dtype)
    key = jax.random.key(0) if key is None else key
    implementation = jax.random.key_impl(key)

    def decide(stack: Array, measured: Array, start: Array) -> tuple[Array, Array]:
        # The released weights are (out, in): the iteration starts on the reduction side.
        rank = stable_rank(measured.mT, start.astype(measured.dtype))
        is_spectral = rank <= threshold * min(stack.shape[-2:])

        def one(args: tuple[Array, Array]) -> Array:
            matrix, taken = args
            branches = [lambda x, b=b: b.apply(x).astype(x.dtype) for b in (spectral, cheap)]
            return jax.lax.cond(taken, *branches, matrix)

        # A loop over matrices, not a batch: only then does `cond` skip what is not taken.
        u = jax.lax.map(one, (stack, is_spectral))
        return jnp.where(jnp.isnan(rank)[:, None, None], jnp.nan, u), is_spectral

    def init(params: optax.Params) -> StableRankState:
        return StableRankState(
            initial_state(params, mu_dtype, matrix_axes),
            spectral=MatrixLeaves.of(params, matrix_axes).zeros(jnp.bool),
            # A copy: the state may be donated, and the key be used again.
            key_data=jnp.array(jax.random.key_data(key), copy=True),
        )

    def update(updates, state, params=None, *, draws=None, **extra_args):
        del params, extra_args
        leaves = MatrixLeaves.of(updates, matrix_axes, mesh.param_shardings)
        g, m, counts = map(jax.tree.leaves, (updates, state.steps.mu, state.steps.notfinite_count))
        step_key = jax.random.wrap_key_data(state.key_data, impl=implementation)
        step_key = jax.random.fold_in(step_key, state.steps.count)
        starts = _start_vectors(leaves.layouts, step_key, draws)
        d, new = advance(average, g, m, [layout.whole_axes for layout in leaves.layouts])
        measured = d
        if measures_momentum:
            measured = [
                jnp.where(jnp.isnan(x), x, y.astype(x.dtype)) for x, y in zip_strict(d, new)
            ]
        u, decided = leaves.map_whole(
            decide,
            (d, measured),
            vectors=(starts,),
            numbers=1,
            replicated_work=mesh.replicated_work,
        )
        flags = [f.reshape(c.shape) for f, c in zip_strict(decided, counts)]
        refused = leaves.refused(u)
        mu = [jnp.where(jnp.isnan(x), *kept) for x, *kept in zip_strict(u, m, new)]
        per_matrix = [x.per_matrix(f) for x, f in zip_strict(leaves.layouts, flags)]
        steps = scaled(g, u, per_matrix, spectral, cheap, leaves.layouts)
        unflatten = leaves.treedef.unflatten
        counts = [c + r for c, r in zip_strict(counts, refused)]
        count = jnp.asarray(optax.safe_increment(state.steps.count))
        taken = LionMuonState(count, unflatten(mu), unflatten(counts))
        return unflatten(steps), StableRankState(taken, unflatten(flags), state.key_data)

    return optax.GradientTransformationExtraArgs(init, update)


def _start_vectors(
    layouts: list[LeafLayout], key: Array, draws: optax.Updates | None
) -> list[Array]:
    """Start vectors (batch, m) of a power iteration, one array a leaf, which draws by its path.

    Raises:
      ValueError: `draws` has another number of leaves, or one of another size.
    """
    shapes = [(x.batch, x.sides[0]) for x in layouts]
    if draws is None:
        keys = leaf_keys(key, [x.path for x in layouts])
        return [jax.random.normal(own, shape, jnp.promote_types(x.dtype, jnp.float32))
                for own, shape, x in zip_strict(keys, shapes, layouts)]  # fmt: skip
    supplied = jax.tree.leaves(draws)
    if len(supplied) != len(shapes):
        raise ValueError(
            f"draws has {len(supplied)} leaves; the tree has {len(shapes)} matrix leaves"
        )
    for x, v, (b, m) in zip_strict(layouts, supplied, shapes):
        if v.size != b * m:
            raise ValueError(
                f"draws of leaf {keystr(x.path)} has shape {v.shape}; it must be ({b}, {m}), one "
                "start vector for each matrix"
            )
    return [v.reshape(shape) for v, shape in zip_strict(supplied, shapes)]


def with_rates(
    direction: optax.GradientTransformationExtraArgs,
    decay: optax.GradientTransformation,
    spectral_rate: optax.ScalarOrSchedule,
    sign_rate: optax.ScalarOrSchedule,
    matrix_axes: MatrixAxesSpec,
) -> optax.GradientTransformationExtraArgs:
    """A direction that decides, its decay, and for each matrix the rate of the branch it took."""
    steps = guarded(direction, decay)

    def update(updates, state, params=None, **extra_args):
        rates = [r(state[0].steps.count) if callable(r) else r for r in (spectral_rate, sign_rate)]
        out, new = steps.update(updates, state, params, **extra_args)
        leaves = MatrixLeaves.of(updates, matrix_axes)
        u, flags = jax.tree.leaves(out), jax.tree.leaves(cast(Any, new)[0].spectral)
        per_matrix = [x.per_matrix(f) for x, f in zip_strict(leaves.layouts, flags)]
        # In the dtype of the updates, whatever those of the rates.
        moved = [(jnp.where(f, *rates) * x).astype(x.dtype) for f, x in zip_strict(per_matrix, u)]
        return leaves.treedef.unflatten(moved), new

    return optax.GradientTransformationExtraArgs(steps.init, update)
