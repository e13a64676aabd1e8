"""JAGUAR SignSGD and JAGUAR Muon: a momentum of which each step refreshes a few coordinates."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxopt_lab.core.checks import check_decays, check_rates
from jaxopt_lab.core.numerics import Scalar, wide_dtype
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.nonfinite import finite_entries
from jaxopt_lab.optim.options import MeshWork, NewtonSchulz
from jaxopt_lab.optim.routing import float_leaves
from jaxopt_lab.zeroth_order.matrix_sign import FLOAT32, scale_by_matrix_sign
from jaxopt_lab.zeroth_order.probes import Probes, ProbeState, initial_state
from jaxopt_lab.zeroth_order.probing import Step, finite_or_zero, transformation
from jaxopt_lab.zeroth_order.samplers import blocks


class CoordinateMomentumState(NamedTuple):
    """State of `scale_by_coordinate_momentum`."""

    mu: optax.Updates  # like the parameters, float32 or wider


class JaguarState(NamedTuple):
    """State of `scale_by_jaguar`."""

    probes: ProbeState  # key, count and losses of the probes
    momentum: Any  # CoordinateMomentumState


def scale_by_coordinate_momentum(*, b1: Scalar = 0.9) -> optax.GradientTransformationExtraArgs:
    r"""An average that decays only where there is news.

    $$m_S \leftarrow \beta_1 m_S + (1 - \beta_1) g_S,$$

    and the other entries stay as they are. `update` takes the extra argument `support`: one entry a
    leaf, None for every entry or what says which ones, as `ldsd` passes it. Without it this is an
    average without bias correction.

    Args:
      b1: $\beta_1$, what is kept.
    """
    check_decays(b1=b1)

    def init(params: optax.Params) -> CoordinateMomentumState:
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, wide_dtype(p)), float_leaves(params))
        return CoordinateMomentumState(zeros)

    def update(updates, state, params=None, *, support=None, **extra_args):
        del extra_args
        leaves, treedef = jax.tree.flatten(float_leaves(updates, params))
        supports: Sequence[Array | None] = [None] * len(leaves) if support is None else support
        momenta = jax.tree.leaves(state.mu)

        def refreshed(g: Array, m: Array, drawn: Array | None) -> Array:
            usable = finite_entries(g) if drawn is None else finite_entries(g) & drawn
            return jnp.where(usable, b1 * m + (1 - b1) * g.astype(m.dtype), m).astype(m.dtype)

        new = [refreshed(*each) for each in zip(leaves, momenta, supports, strict=True)]
        out = [m.astype(g.dtype) for m, g in zip(new, leaves, strict=True)]
        return treedef.unflatten(out), CoordinateMomentumState(treedef.unflatten(new))

    return optax.GradientTransformationExtraArgs(init, update)


@explains_keywords()
def scale_by_jaguar(
    *, eps: Scalar = 1e-3, b1: Scalar = 0.9, key: Array, probes: Probes = Probes()
) -> optax.GradientTransformationExtraArgs:
    r"""The momentum of JAGUAR, from two losses a direction.

    A random block $S$ of every matrix and vector is moved by $\pm\epsilon$ at once, $D$ is the
    central difference of the losses, and

    $$m_S \leftarrow \beta_1 m_S + (1 - \beta_1) D$$

    is the output; other entries stay. $D$ is the sum of the partial derivatives over the blocks of
    all leaves, so as an estimate of each of them it is biased: `blocks(random_signs=True)` and
    `single_coordinate()` are not. Several directions are averaged, $D_j / q$ each, also on entries
    that only one of them touched.

    Args:
      eps: $\epsilon$.
      b1: $\beta_1$, what is kept of the old momentum.
      key: As for `estimate`.
      probes: Sampler (None: `blocks()`; `single_coordinate()` is the paper's, `sparse()` moves
        whole matrices), number of directions, engine, layouts of the matrices.

    Returns:
      A transformation with state `JaguarState`.

    Raises:
      ValueError: As for `estimate`; or `b1` is out of range.

    Source: Petrov, Evseev, Antonov, Veprikov, Bushkov, Moiseev and Beznosikov, "Leveraging
    Coordinate Momentum in SignSGD and Muon: Memory-Optimized Zero-Order LLM Fine-Tuning",
    arXiv 2506.04430.

    Differs from the paper in: the default is the released code's block, a tenth of the rows and
    columns of every leaf; the paper moves a single coordinate.
    """
    momentum = scale_by_coordinate_momentum(b1=b1)
    sampler, size = probes.sampler_or(blocks()), probes.losses()

    def init(params: optax.Params) -> JaguarState:
        state = initial_state(params, key, eps, size)
        return JaguarState(state, momentum.init(params))

    def update(step: Step, state: JaguarState, extra_args: Any) -> Any:
        del extra_args
        found = step.raw_differences(eps)
        weights, known = finite_or_zero(found) / probes.num_directions, jnp.isfinite(found)
        # Where only losses that are not finite were seen there is no news.
        found, support = step.combined(weights, known=known)
        out, new = momentum.update(step.tree(found), state.momentum, support=support)
        return out, JaguarState(step.next_state(), new)

    return transformation(probes, sampler, eps, init, update)


@explains_keywords()
def jaguar_signsgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    eps: Scalar = 1e-3,
    b1: Scalar = 0.9,
    key: Array,
    probes: Probes = Probes(),
) -> optax.GradientTransformationExtraArgs:
    r"""$x \leftarrow x - \gamma \operatorname{sign}(m)$ with the momentum of `scale_by_jaguar`.

    Entries that no step has drawn yet stay; others move by $\gamma$ at every step, with the sign of
    when they were last drawn, about $d / \lvert S \rvert$ steps ago. Keep $\gamma$ small against
    the distances within that time.

    Args:
      learning_rate: $\gamma$, a number or a schedule.
      eps: As for `scale_by_jaguar`.
      b1: As for `scale_by_jaguar`.
      key: As for `estimate`.
      probes: As for `scale_by_jaguar`.

    Raises:
      ValueError: As for `scale_by_jaguar`.

    Example:
      >>> tx = jaguar_signsgd(0.25, key=jax.random.key(0))
      >>> x = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(None, tx.init(x), x, value_fn=lambda x: jnp.sum(x**2))
      >>> sorted(jnp.abs(updates).tolist())
      [0.0, 0.25]

    Source: arXiv 2506.04430, see `scale_by_jaguar`.
    """
    check_rates(learning_rate=learning_rate)
    return optax.chain(
        scale_by_jaguar(eps=eps, b1=b1, key=key, probes=probes),
        optax.scale_by_sign(),
        optax.scale_by_learning_rate(learning_rate),
    )


@explains_keywords()
def jaguar_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    eps: Scalar = 1e-3,
    b1: Scalar = 0.9,
    matrix_scale: Scalar = 1.0,
    key: Array,
    newton_schulz: NewtonSchulz = FLOAT32,
    mesh: MeshWork = MeshWork(),
    probes: Probes = Probes(),
) -> optax.GradientTransformationExtraArgs:
    r"""Matrices move along $\mathrm{NS}(m)$, other leaves along $\operatorname{sign}(m)$.

    Args:
      learning_rate: A number or a schedule.
      eps: As for `scale_by_jaguar`.
      b1: As for `scale_by_jaguar`.
      matrix_scale: Rate of the matrices over that of the other leaves.
      key: As for `estimate`.
      newton_schulz: The iteration.
      mesh: Layout of the parameters, and who does the work on whole matrices.
      probes: As for `scale_by_jaguar`.

    Raises:
      ValueError: As for `scale_by_jaguar`.

    Source: arXiv 2506.04430, see `scale_by_jaguar`.

    Differs from the released code in: five iterations in float32 (released: ten in bfloat16, or
    five); nothing is added to the norm by which they divide (released: 1e-7).
    """
    check_rates(learning_rate=learning_rate)
    return optax.chain(
        scale_by_jaguar(eps=eps, b1=b1, key=key, probes=probes),
        scale_by_matrix_sign(
            matrix_scale=matrix_scale,
            matrix_axes=probes.matrix_axes,
            newton_schulz=newton_schulz,
            mesh=mesh,
        ),
        optax.scale_by_learning_rate(learning_rate),
    )
