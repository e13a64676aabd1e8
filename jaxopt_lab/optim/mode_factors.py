"""SOAP with one factor an axis, for leaves of any order: Adam in the eigenbases of mode Grams.

This is what SOAP and DyKAF do with parameters of more than two axes and, as an option, with
vectors. Leaves are updated one by one: they are few and small beside the matrices.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxopt_lab.core.modes import merged_shape, mode_gram, mode_product
from jaxopt_lab.core.ordering import after
from jaxopt_lab.core.orthogonalization import ORTHOGONALIZERS, Orthogonalizer
from jaxopt_lab.core.spectral import eigenbasis, refresh_eigenbasis
from jaxopt_lab.core.whole_matrices import known_sharding
from jaxopt_lab.optim.adamw_fallback import one_minus_power
from jaxopt_lab.optim.rates import check_rates
from jaxopt_lab.optim.routing import Scalar, broadcast_prefix

# The published limit: it keeps vocabularies out.
DEFAULT_MAX_PRECOND_DIM = 10_000

# One array for each axis that has a factor, `optax.MaskedNode()` for the others.
Modes = tuple[Any, ...]


class ModeSoapState(NamedTuple):
    """State of `scale_by_mode_soap`; float32 or wider."""

    count: Array  # shape=(), dtype=int32: gradients seen
    age: Any  # a leaf (), int32: 0 before its first gradient, then 1 + updates applied
    rejected: Any  # a leaf (), int32: gradients refused because they were not finite
    mu: Any  # shapes of the parameters: first moment in the current eigenbases
    nu: Any  # shapes of the parameters: second moment in the eigenbases
    factors: Any  # a leaf: a tuple, (d, d) for each (merged) axis, or MaskedNode()
    bases: Any  # the same: eigenvectors as columns, by decreasing eigenvalue


def scale_by_mode_soap(
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
    orthogonalizer: Orthogonalizer = "panels",
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

    A leaf without a factor gets Adam. A gradient that is not finite, or too large to be squared,
    leaves the state of its leaf as it was and moves nothing. A leaf whose first gradient was like
    that starts at a later one, in the identity: only the very first step decomposes anything.

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
      orthogonalizer: "panels" or "householder".
      weight_decay: $\lambda$; $\lambda W$ is added to the direction.
      mask: Which leaves decay: a tree of bools, a prefix of one, or a function of the parameters.
      decay_rate: The learning rate $\eta$, a number or a schedule. When given, the decay acts on
        weights that the step has already moved, as in the released code:
        $W \leftarrow (1 - \eta \lambda) (W - \eta U)$.

    Returns:
      A transformation with state `ModeSoapState`; follow it with `optax.scale_by_learning_rate`.

    Raises:
      ValueError: An option is unknown or out of range.

    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv 2409.11321, and
    its released code; the same rule is in the released code of DyKAF, arXiv 2511.06477.

    Differs from the released code in: factors, bases and moments are float32 or wider whatever the
    dtype of the parameters; $\beta = 1$ sums the Grams (released: the factors stay zero).
    """
    limit = DEFAULT_MAX_PRECOND_DIM if max_precond_dim is None else max_precond_dim
    rule = _ModeSoap(
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
        directions, leaves = rule.step(state.count, grads, leaves)
        out = [
            _laid_out_like(d.reshape(g.shape), g) for d, g in zip(directions, grads, strict=True)
        ]
        if decays:
            rate: Any = decay_rate(state.count) if callable(decay_rate) else decay_rate
            decaying = broadcast_prefix("mask", True if mask is None else mask, updates)
            rows = zip(out, jax.tree.leaves(params), leaves, decaying, strict=True)
            out = [
                _decayed(u, w, weight_decay, rate, leaf.moves) if d else u for u, w, leaf, d in rows
            ]
        out = [u.astype(g.dtype) for u, g in zip(out, grads, strict=True)]
        return treedef.unflatten(out), _pack(state, treedef, leaves)

    return optax.GradientTransformationExtraArgs(rule.init, update)


class _ModeSoap(NamedTuple):
    """The options, and what one step does with each leaf."""

    b1: Scalar
    b2: Scalar
    factor_decay: Scalar
    eps: Scalar
    precondition_frequency: Scalar
    max_precond_dim: int
    merge_dims: bool
    correct_bias: bool
    normalize_grads: bool
    skip_first_step: bool
    orthogonalizer: Orthogonalizer

    def check(self) -> None:
        """Raise `ValueError` for a number out of range; traced numbers pass."""
        wanted: dict[str, tuple[Callable[[Any], bool], str]] = {
            "b1": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
            "b2": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
            "factor_decay": (lambda x: 0 <= x <= 1, "between 0 and 1"),
            "eps": (lambda x: 0 <= x < math.inf, "a finite number of at least 0"),
            "precondition_frequency": (
                lambda x: 1 <= x < math.inf and x == int(x),
                "a whole number of at least 1",
            ),
            "max_precond_dim": (lambda x: x >= 0, "at least 0"),
        }
        for name, (allowed, text) in wanted.items():
            value = getattr(self, name)
            if isinstance(value, int | float) and not allowed(value):
                raise ValueError(f"{name} is {value}; it must be {text}")
        if self.orthogonalizer not in ORTHOGONALIZERS:
            raise ValueError(
                f"orthogonalizer is {self.orthogonalizer!r}; "
                f"choose one of {', '.join(ORTHOGONALIZERS)}"
            )

    def shape_of(self, x: Any) -> tuple[int, ...]:
        merges = self.merge_dims and self.max_precond_dim > 0
        return merged_shape(x.shape, self.max_precond_dim) if merges else x.shape

    def init(self, params: optax.Params) -> ModeSoapState:
        def modes(make: Callable[[int, Any], Array]) -> Any:
            def tuple_of(x: Any) -> Modes:
                return tuple(
                    make(d, _wide(x)) if 0 < d <= self.max_precond_dim else optax.MaskedNode()
                    for d in self.shape_of(x)
                )

            return jax.tree.map(tuple_of, params)

        return ModeSoapState(
            count=jnp.zeros([], jnp.int32),
            age=jax.tree.map(lambda _: jnp.zeros([], jnp.int32), params),
            rejected=jax.tree.map(lambda _: jnp.zeros([], jnp.int32), params),
            mu=jax.tree.map(lambda x: jnp.zeros_like(x, dtype=_wide(x)), params),
            nu=jax.tree.map(lambda x: jnp.zeros_like(x, dtype=_wide(x)), params),
            factors=modes(lambda d, dtype: jnp.zeros((d, d), dtype)),
            bases=modes(lambda d, dtype: jnp.eye(d, dtype=dtype)),
        )

    def step(
        self, count: Array, grads: list[Array], leaves: list["_Leaf"]
    ) -> tuple[list[Array], list["_Leaf"]]:
        """Directions in merged shapes, 0 where nothing is applied, and the new leaves."""
        # Conditions on the shared counter stay branches when members are vmapped.
        updates_due = count + (0 if self.skip_first_step else 1)
        refreshing = (count > 0) & (updates_due % self.precondition_frequency == 0)
        pairs = [self.take_up(g, x) for g, x in zip(grads, leaves, strict=True)]
        new = _if_due(count == 0, self.started, [leaf for _, leaf in pairs])
        pairs = [self.moved(g, x) for (g, _), x in zip(pairs, new, strict=True)]
        new = _if_due(refreshing, self.refreshed, [leaf for _, leaf in pairs])
        return [direction for direction, _ in pairs], new

    def take_up(self, grad: Array, leaf: "_Leaf") -> tuple[Array, "_Leaf"]:
        """The gradient, zero if refused, and the leaf with its factors advanced."""
        grad = _whole(grad, leaf.factors).astype(leaf.mu.dtype).reshape(leaf.mu.shape)
        finite = jnp.isfinite(jnp.sum(jnp.square(grad)))
        clean = jnp.where(finite, grad, 0)
        weight = _gradient_weight(self.factor_decay)
        factors = _map_modes(
            lambda k, x: self.factor_decay * x + weight * mode_gram(clean, k), leaf.factors
        )
        for x in jax.tree.leaves(factors):  # sums may overflow where the gradient does not
            finite &= jnp.isfinite(jnp.sum(x))
        starts, runs = finite & (leaf.age == 0), finite & (leaf.age > 0)
        return jnp.where(finite, clean, 0), leaf._replace(
            finite=finite,
            runs=runs,
            starts=starts,
            moves=runs if self.skip_first_step else runs | starts,
            factors=_where(runs | starts, factors, leaf.factors),
        )

    def started(self, leaf: "_Leaf", earlier: Array | None) -> tuple["_Leaf", Array]:
        """The leaf with its first bases, and the last decomposition."""
        bases = list(leaf.bases)
        for k, x in _present(leaf.factors):
            earlier = bases[k] = eigenbasis(after(x, earlier))
        assert earlier is not None
        return leaf._replace(bases=_where(leaf.starts, tuple(bases), leaf.bases)), earlier

    def moved(self, grad: Array, leaf: "_Leaf") -> tuple[Array, "_Leaf"]:
        """The direction, and the leaf with its moments advanced."""
        in_basis = _into(leaf.bases, grad)
        mu = self.b1 * leaf.mu + (1 - self.b1) * in_basis
        nu = self.b2 * leaf.nu + (1 - self.b2) * jnp.square(in_basis)
        size = jnp.sqrt(nu) + self.eps
        direction = _out_of(leaf.bases, mu / jnp.where(size > 0, size, 1))
        if self.normalize_grads:
            direction = direction / (1e-30 + jnp.sqrt(jnp.mean(jnp.square(direction))))
        if self.correct_bias:
            t = jnp.maximum(leaf.age, 1).astype(mu.dtype)
            correction = jnp.sqrt(one_minus_power(self.b2, t)) / one_minus_power(self.b1, t)
            direction = correction * direction
        return jnp.where(leaf.moves, direction, 0), leaf._replace(
            age=leaf.age + leaf.starts + leaf.moves,
            mu=jnp.where(leaf.moves, mu, leaf.mu),
            nu=jnp.where(leaf.moves, nu, leaf.nu),
        )

    def refreshed(self, leaf: "_Leaf", earlier: Array | None) -> tuple["_Leaf", Array]:
        """The leaf in new bases, and the last decomposition."""
        nu, bases = leaf.nu, list(leaf.bases)
        for k, x in _present(leaf.factors):
            earlier, order = refresh_eigenbasis(
                after(x, earlier),
                leaf.bases[k],
                orthogonalizer=self.orthogonalizer,
                precision="highest",
            )
            bases[k] = earlier
            nu = jnp.take(nu, order, axis=k)
        assert earlier is not None
        mu = _into(bases, _out_of(leaf.bases, leaf.mu))
        return _where(leaf.runs, leaf._replace(mu=mu, nu=nu, bases=tuple(bases)), leaf), earlier


class _Leaf(NamedTuple):
    """One leaf in its merged shape while it is updated."""

    age: Array
    mu: Array
    nu: Array
    factors: Modes
    bases: Modes
    finite: Array  # of the gradient
    runs: Array  # takes up a gradient that is not its first
    starts: Array  # takes up its first
    moves: Array  # applies an update


def _unpack(state: ModeSoapState, treedef, shapes: list[tuple[int, ...]]) -> list[_Leaf]:
    columns = (state.age, state.mu, state.nu, state.factors, state.bases)
    rows = zip(*map(treedef.flatten_up_to, columns), shapes, strict=True)
    no = jnp.array(False)
    return [
        _Leaf(
            age,
            _whole(mu, xs).reshape(shape),
            _whole(nu, xs).reshape(shape),
            xs,
            qs,
            no,
            no,
            no,
            no,
        )
        for age, mu, nu, xs, qs, shape in rows
    ]


def _pack(state: ModeSoapState, treedef, leaves: list[_Leaf]) -> ModeSoapState:
    def like(old: Any, new: list[Array]) -> Any:
        pairs = zip(treedef.flatten_up_to(old), new, strict=True)
        return treedef.unflatten([_laid_out_like(y.reshape(x.shape), x) for x, y in pairs])

    refused = [r + ~x.finite for r, x in zip(jax.tree.leaves(state.rejected), leaves, strict=True)]
    return ModeSoapState(
        count=jnp.asarray(optax.safe_increment(state.count)),
        age=treedef.unflatten([leaf.age for leaf in leaves]),
        rejected=treedef.unflatten(refused),
        mu=like(state.mu, [leaf.mu for leaf in leaves]),
        nu=like(state.nu, [leaf.nu for leaf in leaves]),
        factors=treedef.unflatten([leaf.factors for leaf in leaves]),
        bases=treedef.unflatten([leaf.bases for leaf in leaves]),
    )


def _if_due(
    due: Array,
    fn: Callable[[_Leaf, Array | None], tuple[_Leaf, Array]],
    leaves: list[_Leaf],
) -> list[_Leaf]:
    """`fn` of the leaves that have a factor, one after the other, if `due`.

    The others stay outside of the branch, which would copy them.
    """
    having = [i for i, leaf in enumerate(leaves) if _present(leaf.factors)]
    if not having:
        return leaves

    def in_turn(old: list[_Leaf]) -> list[_Leaf]:
        new, earlier = [], None
        for leaf in old:
            leaf, earlier = fn(leaf, earlier)
            new.append(leaf)
        return new

    taken = lax.cond(due, in_turn, lambda old: old, [leaves[i] for i in having])
    new = dict(zip(having, taken, strict=True))
    return [new.get(i, leaf) for i, leaf in enumerate(leaves)]


def _present(modes: Sequence[Any]) -> list[tuple[int, Array]]:
    return [(k, x) for k, x in enumerate(modes) if not isinstance(x, optax.MaskedNode)]


def _map_modes(fn: Callable[[int, Array], Array], modes: Modes) -> Modes:
    new = list(modes)
    for k, x in _present(modes):
        new[k] = fn(k, x)
    return tuple(new)


def _where(condition: Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _into(bases: Sequence[Any], x: Array) -> Array:
    for k, q in _present(bases):
        x = mode_product(x, q.T, k)
    return x


def _out_of(bases: Sequence[Any], x: Array) -> Array:
    for k, q in _present(bases):
        x = mode_product(x, q, k)
    return x


def _gradient_weight(decay: Scalar) -> Scalar:
    """1 - decay, and 1 for a plain sum; in double precision where it is a plain number."""
    if isinstance(decay, int | float):
        return 1 - decay if decay < 1 else 1
    return jnp.where(decay < 1, 1 - decay, 1)


def _decayed(u: Array, w: Array, decay: Scalar, rate: Scalar | None, moved: Array) -> Array:
    scale = 1 if rate is None else 1 - rate * decay
    return jnp.where(moved, scale * u + decay * w.astype(u.dtype), u)


def _whole(x: Array, modes: Modes) -> Array:
    """Replicated, where its type says that it is not and there are factors to multiply it by."""
    sharding = known_sharding(x, None) if _present(modes) else None
    return x if sharding is None else jax.sharding.reshard(x, _replicated(sharding))


def _laid_out_like(x: Array, model: Array) -> Array:
    sharding = known_sharding(model, None)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def _replicated(sharding: NamedSharding) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec())


def _wide(x: Any) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)
