"""SOAP with one factor an axis, for leaves of any order: Adam in the eigenbases of mode Grams.

This is what SOAP and DyKAF do with parameters of more than two axes and, as an option, with
vectors. Leaves are updated one by one: they are few and small beside the matrices.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.core.orthogonalization import Orthogonalizer
from jaxopt_lab.core.whole_matrices import known_sharding
from jaxopt_lab.optim.kronecker.tensor_rule import Modes, TensorLeaf, TensorRule
from jaxopt_lab.optim.kronecker.transform import MAX_PRECOND_DIM, decayed
from jaxopt_lab.optim.rates import check_rates
from jaxopt_lab.optim.routing import broadcast_prefix


class TensorSoapState(NamedTuple):
    """State of `scale_by_tensor_soap`; float32 or wider."""

    count: Array  # shape=(), dtype=int32: gradients seen
    age: Any  # a leaf (), int32: 0 before its first gradient, then 1 + updates applied
    notfinite_count: Any  # a leaf (), int32: gradients refused: not finite, or too large
    mu: Any  # shapes of the parameters: first moment in the current eigenbases
    nu: Any  # shapes of the parameters: second moment in the eigenbases
    factors: Any  # a leaf: a tuple, (d, d) for each (merged) axis, or MaskedNode()
    bases: Any  # the same: eigenvectors as columns, by decreasing eigenvalue


def scale_by_tensor_soap(
    *,
    b1: Scalar = 0.95,
    b2: Scalar = 0.95,
    factor_decay: Scalar | None = None,
    eps: Scalar = 1e-8,
    precondition_frequency: Scalar = 10,
    max_precond_dim: int | None = None,
    merge_dims: bool = False,
    correct_bias: bool = True,
    normalize_grads: bool = False,
    skip_first_step: bool = True,
    orthogonalizer: Orthogonalizer = "cholesky_qr",
    weight_decay: Scalar = 0.0,
    mask: Any = None,
    decay_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam in slowly updated eigenbases of one Gram factor an axis.

    With the unfolding $G_{(k)}$ of a gradient along its axis $k$ and the bases $Q_k$ in force,

    .. math::
      \tilde G = G \times_1 Q_1^\top \dotsm \times_d Q_d^\top, \qquad
      \tilde M \leftarrow \beta_1 \tilde M + (1 - \beta_1) \tilde G, \qquad
      V \leftarrow \beta_2 V + (1 - \beta_2) \tilde G^2

      U = \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
          \frac{\tilde M}{\sqrt V + \epsilon} \times_1 Q_1 \dotsm \times_d Q_d, \qquad
      X_k \leftarrow \beta X_k + (1 - \beta) G_{(k)} G_{(k)}^\top

    The bases are the eigenvectors of the factors after the first gradient and are refreshed by one
    power iteration every `precondition_frequency` steps; a gradient never enters its own basis. The
    first moment follows a refresh exactly, the second one by the order of the columns.

    A leaf without a factor gets Adam. A gradient that is not finite, or too large to be squared or
    added to sums of squares, leaves the state of its leaf as it was and moves nothing. A leaf whose
    first gradient was like that starts at a later one, in the identity: only the very first step
    decomposes anything.

    Args:
      b1: $\beta_1$.
      b2: $\beta_2$.
      factor_decay: $\beta$ of the factors; None: $\beta_2$. At 1 the factors are plain sums.
      eps: $\epsilon$, added to the uncorrected root.
      precondition_frequency: Steps from one refresh to the next.
      max_precond_dim: Axes longer than this have no factor and stay as they are. None: 10 000.
      merge_dims: Multiply axes together from the left while the product is at most
        `max_precond_dim`, and take factors of the reshaped leaf.
      correct_bias: Adam's bias correction.
      normalize_grads: Divide the direction by its root mean square, before the bias correction.
      skip_first_step: Only take up the first gradient into the factors: no update, no decay.
      orthogonalizer: "cholesky_qr" or "householder".
      weight_decay: $\lambda$; $\lambda W$ is added to the direction.
      mask: Which leaves decay: a tree of bools, a prefix of one, or a function of the parameters.
      decay_rate: The learning rate $\eta$, a number or a schedule. When given, the decay acts on
        weights that the step has already moved, as in the released code:
        $W \leftarrow (1 - \eta \lambda) (W - \eta U)$.

    Returns:
      A transformation with state `TensorSoapState`; follow it with `optax.scale_by_learning_rate`.

    Raises:
      ValueError: An option is unknown or out of range.

    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv 2409.11321, and
    its released code; the same rule is in the released code of DyKAF, arXiv 2511.06477.

    Differs from the released code in: factors, bases and moments are float32 or wider whatever the
    dtype of the parameters; $\beta = 1$ sums the Grams (released: the factors stay zero).
    """
    limit = MAX_PRECOND_DIM if max_precond_dim is None else max_precond_dim
    rule = TensorRule(
        b1=b1,
        b2=b2,
        factor_decay=b2 if factor_decay is None else factor_decay,
        eps=eps,
        precondition_frequency=precondition_frequency,
        max_precond_dim=limit,
        merge_dims=merge_dims,
        correct_bias=correct_bias,
        normalize_grads=normalize_grads,
        skip_first_step=skip_first_step,
        orthogonalizer=orthogonalizer,
    )
    rule.check()
    check_rates(weight_decay=weight_decay, decay_rate=decay_rate)
    # A traced number (from inject_hyperparams) may be anything; only a plain zero skips the decay.
    decays = not (isinstance(weight_decay, int | float) and weight_decay == 0)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if decays and params is None:
            raise ValueError("weight_decay needs the parameters: call update(grads, state, params)")
        grads, treedef = jax.tree.flatten(updates)
        leaves = _unpack(state, treedef, [rule.shape_of(g) for g in grads])
        whole = [
            _whole(g, leaf.factors).astype(leaf.mu.dtype).reshape(leaf.mu.shape)
            for g, leaf in zip(grads, leaves, strict=True)
        ]
        directions, leaves = rule.step(state.count, whole, leaves)
        out = [
            _laid_out_like(d.reshape(g.shape), g) for d, g in zip(directions, grads, strict=True)
        ]
        if decays:
            rate: Any = decay_rate(state.count) if callable(decay_rate) else decay_rate
            decaying = broadcast_prefix("mask", True if mask is None else mask, updates)
            rows = zip(out, jax.tree.leaves(params), leaves, decaying, strict=True)
            out = [
                decayed(u, w, leaf.moves, weight_decay, rate) if d else u for u, w, leaf, d in rows
            ]
        out = [u.astype(g.dtype) for u, g in zip(out, grads, strict=True)]
        return treedef.unflatten(out), _pack(state, treedef, leaves)

    return optax.GradientTransformationExtraArgs(functools.partial(_initial, rule), update)


def _initial(rule: TensorRule, params: optax.Params) -> TensorSoapState:
    def modes(make: Callable[[int, Any], Array]) -> Any:
        def tuple_of(x: Any) -> Modes:
            return tuple(
                make(d, _wide(x)) if 0 < d <= rule.max_precond_dim else optax.MaskedNode()
                for d in rule.shape_of(x)
            )

        return jax.tree.map(tuple_of, params)

    return TensorSoapState(
        count=jnp.zeros([], jnp.int32),
        age=jax.tree.map(lambda _: jnp.zeros([], jnp.int32), params),
        notfinite_count=jax.tree.map(lambda _: jnp.zeros([], jnp.int32), params),
        mu=jax.tree.map(lambda x: jnp.zeros_like(x, dtype=_wide(x)), params),
        nu=jax.tree.map(lambda x: jnp.zeros_like(x, dtype=_wide(x)), params),
        factors=modes(lambda d, dtype: jnp.zeros((d, d), dtype)),
        bases=modes(lambda d, dtype: jnp.eye(d, dtype=dtype)),
    )


def _unpack(state: TensorSoapState, treedef, shapes: list[tuple[int, ...]]) -> list[TensorLeaf]:
    columns = (state.age, state.mu, state.nu, state.factors, state.bases)
    rows = zip(*map(treedef.flatten_up_to, columns), shapes, strict=True)
    no = jnp.array(False)
    return [
        TensorLeaf(
            age, _whole(mu, xs).reshape(shape), _whole(nu, xs).reshape(shape), xs, qs, *[no] * 4
        )
        for age, mu, nu, xs, qs, shape in rows
    ]


def _pack(state: TensorSoapState, treedef, leaves: list[TensorLeaf]) -> TensorSoapState:
    def like(old: Any, new: list[Array]) -> Any:
        pairs = zip(treedef.flatten_up_to(old), new, strict=True)
        return treedef.unflatten([_laid_out_like(y.reshape(x.shape), x) for x, y in pairs])

    refused = [
        r + ~x.finite for r, x in zip(jax.tree.leaves(state.notfinite_count), leaves, strict=True)
    ]
    return TensorSoapState(
        count=jnp.asarray(optax.safe_increment(state.count)),
        age=treedef.unflatten([leaf.age for leaf in leaves]),
        notfinite_count=treedef.unflatten(refused),
        mu=like(state.mu, [leaf.mu for leaf in leaves]),
        nu=like(state.nu, [leaf.nu for leaf in leaves]),
        factors=treedef.unflatten([leaf.factors for leaf in leaves]),
        bases=treedef.unflatten([leaf.bases for leaf in leaves]),
    )


def _whole(x: Array, modes: Modes) -> Array:
    """Replicated, where its type says that it is not and there are factors to multiply it by."""
    sharding = known_sharding(x, None) if jax.tree.leaves(modes) else None
    if sharding is None:
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def _laid_out_like(x: Array, model: Array) -> Array:
    sharding = known_sharding(model, None)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def _wide(x: Any) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
