"""LDSD: directions from a Gaussian policy whose mean is learned from the losses it leads to."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxopt_lab.core.checks import FINITE, POSITIVE, check_number, check_rates
from jaxopt_lab.core.keys import purpose_key, threefry_key
from jaxopt_lab.core.numerics import Scalar, frobenius_unit, wide_dtype, widened
from jaxopt_lab.optim.keywords import explains_keywords
from jaxopt_lab.optim.routing import float_leaves
from jaxopt_lab.zeroth_order.directions import Direction, leaves_of
from jaxopt_lab.zeroth_order.engines import sequential
from jaxopt_lab.zeroth_order.probes import (
    Probes,
    ProbeState,
    check_integer,
    default_sampler,
    initial_state,
)
from jaxopt_lab.zeroth_order.probing import Step, finite_or_zero, summed, transformation
from jaxopt_lab.zeroth_order.samplers import gaussian

Selection = Literal["best", "random", "mean"]
Start = Literal["zero", "random", "gradient", "estimate"]

# Two-sided estimates whose sum is the mean to start from, as in the released code.
_START_DIRECTIONS = 20


class PolicyStep(NamedTuple):
    """A step of the policy's mean: a sum of noise, drawn when it is taken."""

    weights: Array  # (candidates,) of their noise
    count: Array  # shape=(), dtype=int32: of the step that drew it


class LDSDState(NamedTuple):
    """State of `ldsd`; `policy_mean` is the mean after the step."""

    probes: ProbeState  # key, count and losses of the probes
    mean: optax.Updates  # of the policy in the last step: like the parameters, float32 or wider
    pending: PolicyStep  # what its losses move the mean by, at the start of the next step
    base: optax.OptState  # of the optimizer below

    # Where no loss of a step is finite, the mean has moved by the losses of the step before, and
    # nothing is pending: no guard has to hold a second mean to go back to.
    not_guarded = ("mean", "pending")


@explains_keywords()
def ldsd(
    base: optax.GradientTransformation,
    *,
    candidates: int = 5,
    eps: Scalar = 1e-3,
    policy_rate: Scalar = 1e-2,
    policy_std: Scalar = 1.0,
    selection: Selection = "best",
    selected: int = 3,
    start: Start = "zero",
    start_sign: Scalar = 1.0,
    key: Array,
    probes: Probes = Probes(),
) -> optax.GradientTransformationExtraArgs:
    r"""Learnable direction sampling over any optimizer.

    Candidates $v_i = \mu + \sigma \xi_i$ with Gaussian $\xi_i$, $i = 1 \dots K$, are scored by
    $l_i = f(x + \epsilon v_i)$. The best one, $v$, becomes an estimate for the base optimizer,

    $$g = D v, \qquad D = \frac{\min_i l_i - f(x - \epsilon v)}{2 \epsilon},$$

    and the mean of the policy descends along the candidates by their losses,

    $$\mu \leftarrow \mu - \eta \frac{1}{(K - 1) \sigma} \sum_i (l_i - \bar l)\, \xi_i,$$

    a REINFORCE step with a leave-one-out baseline. It turns $\mu$ to the negative gradient: for a
    linear loss the mean of the step is $-\eta \epsilon \nabla f$. $K + 1$ losses a step ($K + c$
    with `selection="mean"`) and one array of the size of the parameters beside the base: the step
    of $\mu$ is taken at the start of the next one, when nothing else reads the old mean, so in
    place. `policy_mean` gives $\mu$ after a step.

    A loss that is not finite is not selected, and its candidate does not move the policy.

    Args:
      base: Takes the estimate, such as `optax.sgd(1e-3)`. With a sampler that leaves entries out it
        is passed `support`, which `scale_by_coordinate_momentum` takes: LDSD over JAGUAR is
        `ldsd(optax.chain(scale_by_coordinate_momentum(), optax.scale_by_sign(),
        optax.scale_by_learning_rate(1e-3)), start="random", probes=Probes(sparse()), ...)`.
      candidates: $K$. With one the policy stays where it is.
      eps: $\epsilon$.
      policy_rate: $\eta$; 0 leaves the policy alone: best-of-K descent.
      policy_std: $\sigma$.
      selection: "best"; "random", any of the candidates, uniformly; "mean", the average of the
        estimates from the best `selected`, each with a loss on its other side.
      selected: $c$ of "mean".
      start: Of $\mu$: "zero"; "random", a Gaussian of norm 1 in each leaf; from the first batch
        "gradient", by one backward pass, or "estimate", the sum of 20 two-sided estimates, of norm
        1 in each leaf.
      start_sign: Factor on the last two. The released code starts along plus the gradient, while
        the policy learns minus the gradient: -1 saves that way.
      key: As for `estimate`.
      probes: Sampler (None: Gaussian), engine, layouts; one two-sided direction.

    Returns:
      A transformation with state `LDSDState`.

    Raises:
      ValueError: As for `estimate`; an option is unknown or out of range.

    Example:
      >>> tx = ldsd(optax.sgd(0.05), candidates=3, policy_rate=1.0, key=jax.random.key(0))
      >>> x = jnp.array([1.0, -2.0])
      >>> updates, state = tx.update(None, tx.init(x), x, value_fn=lambda x: jnp.sum(x**2))
      >>> state.mean.shape
      (2,)

    Source: Parfenov, Evseev, Veprikov, Bushkov, Moiseev and Beznosikov, "Zero-Order Optimization
    for LLM Fine-Tuning via Learnable Direction Sampling", arXiv 2602.13659.

    Differs from the released code in: the policy is updated with the candidates that were evaluated
    (released: with other draws, so that it learns nothing); the loss of the chosen candidate is
    not evaluated again; leaves draw independently; one subset a step for all candidates under
    `sparse` (released: one a candidate, which is `sparse(per_probe=True)`, but its policy moves on
    the subset of the chosen one alone, along noise that other candidates were not evaluated with).
    """
    check_rates(policy_rate=policy_rate)
    check_number("policy_std", policy_std, POSITIVE)
    check_number("start_sign", start_sign, FINITE)
    check_integer("candidates", candidates)
    check_integer("selected", selected)
    for name, value, known in (("selection", selection, Selection), ("start", start, Start)):
        if value not in get_args(known):
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(get_args(known))}")
    count = selected if selection == "mean" else 1
    if count > candidates:
        raise ValueError(f"selected is {selected}; there are {candidates} candidates")
    probes.only_one_direction("ldsd")
    # Chunks are of candidates here.
    probes.engine.check(candidates)
    inner = optax.with_extra_args_support(base)

    def init(params: optax.Params) -> LDSDState:
        state = initial_state(params, key, eps, candidates + count)
        mean = _start(float_leaves(params), threefry_key(key), probes, start == "random")
        pending = PolicyStep(jnp.zeros(candidates), jnp.zeros((), jnp.int32))
        return LDSDState(state, mean, pending, inner.init(params))

    def update(step: Step, state: LDSDState, extra_args: dict[str, Any]) -> Any:
        step.num_directions = candidates
        mean = jax.tree.leaves(policy_mean(state, probes))
        if start in ("gradient", "estimate"):
            first = _from_first_batch(start, step, start_sign, eps)
            kept = mean
            mean = jax.lax.cond(state.probes.count == 0, first, lambda: kept)

        def drawn(probe: Array, purpose: str = "evaluation", key: Array | None = None) -> Direction:
            return step.direction(probe, purpose, mean=mean, std=policy_std, key=key)

        def choose(losses: Array) -> Array:
            return _chosen(losses, selection, count, purpose_key(step.key, "selection"))

        found, behind = _both_sides(step, candidates, count, eps, choose, drawn)
        chosen = choose(found)
        differences = (found[chosen] - behind) / (2 * eps)
        weights, known = finite_or_zero(differences) / count, jnp.isfinite(differences)
        of_update = functools.partial(drawn, purpose="update")
        g, support = step.combined(weights, chosen, of_update, known)
        extra_args["support"] = support
        point = step.tree(step.params)
        out, base_state = inner.update(step.tree(g), state.base, point, **extra_args)
        pending = _policy_step(found, policy_rate / policy_std, state)
        if step.draws is not None:
            mean = _moved_along_draws(mean, pending.weights, policy_std, drawn)
            pending = pending._replace(weights=jnp.zeros_like(pending.weights))
        tree = jax.tree.structure(state.mean).unflatten(mean)
        return out, LDSDState(step.next_state(), tree, pending, base_state)

    return transformation(probes, default_sampler(probes), eps, init, update)


def policy_mean(state: LDSDState, probes: Probes = Probes()) -> optax.Updates:
    """The mean of the policy of `ldsd` after its last step.

    Args:
      state: Of `ldsd` itself, not of a chain around it.
      probes: As `ldsd` was given them.

    Returns:
      A tree like the parameters.
    """
    mean, treedef = jax.tree.flatten(state.mean)
    leaves = leaves_of(state.mean, probes.matrix_axes, probes.trainable)
    key = jax.random.wrap_key_data(state.probes.key, impl="threefry2x32")
    key = jax.random.fold_in(key, state.pending.count)

    def add(mean: list[Array], row: tuple[Array, Array]) -> tuple[list[Array], None]:
        weight, probe = row
        # The noise is 0 where nothing was drawn: there the mean stays.
        noise = Direction(default_sampler(probes), key, probe, leaves)
        return [m + weight.astype(m.dtype) * noise.of(i) for i, m in enumerate(mean)], None

    # A loop, because the draws of all candidates in one expression take long to compile.
    rows = (state.pending.weights, jnp.arange(state.pending.weights.size))
    return treedef.unflatten(jax.lax.scan(add, mean, rows)[0])


def _chosen(losses: Array, selection: Selection, count: int, key: Array) -> Array:
    """(count,) numbers of the candidates that become the estimate."""
    if selection == "random":
        return jax.random.randint(key, (1,), 0, losses.size)
    # Of equal ones the first.
    return jax.lax.top_k(jnp.where(jnp.isfinite(losses), -losses, -jnp.inf), count)[1]


def _both_sides(
    step: Step,
    candidates: int,
    count: int,
    eps: Scalar,
    choose: Callable[[Array], Array],
    drawn: Callable[..., Direction],
) -> tuple[Array, Array]:
    """Losses (candidates,) in front of the point, and (count,) behind it of the chosen ones."""
    if not step.probes.engine.one_by_one:
        front = step.losses(jnp.arange(candidates), jnp.full(candidates, eps), direction=drawn)
        return front, step.losses(choose(front), jnp.full(count, -eps), direction=drawn)

    def row(losses: Array, number: Array) -> tuple[Array, Array]:
        in_front = number < candidates
        behind = choose(losses[:candidates])[jnp.maximum(number - candidates, 0)]
        return jnp.where(in_front, number, behind), jnp.where(in_front, eps, -eps)

    losses = step.losses_in_turn(candidates + count, row, direction=drawn)
    return losses[:candidates], losses[candidates:]


def _policy_step(losses: Array, rate: Scalar, state: LDSDState) -> PolicyStep:
    """Minus `rate` times the gradient of the expected loss by the mean, for noise of variance 1."""
    finite = jnp.isfinite(losses)
    known = jnp.where(finite, losses, 0)
    baseline = jnp.sum(known) / jnp.maximum(jnp.sum(finite), 1)
    advantages = jnp.where(finite, losses - baseline, 0) / max(losses.size - 1, 1)
    weights = finite_or_zero(-rate * advantages).astype(state.pending.weights.dtype)
    # A guard that goes back to the old mean and the old weights where no loss was finite lets
    # counts pass: this one has to be theirs.
    count = jnp.where(jnp.any(finite), state.probes.count, state.pending.count)
    return PolicyStep(weights, count)


def _moved_along_draws(
    mean: Sequence[Array], weights: Array, std: Scalar, drawn: Callable[..., Direction]
) -> list[Array]:
    """The mean after a step along given candidates, which no key draws again."""

    def term(weight: Array, probe: Array) -> list[Array]:
        direction = drawn(probe, "policy")
        return [weight * (direction.of(i) - m) / std for i, m in enumerate(mean)]

    changes = summed(term, weights, jnp.arange(weights.size))
    return [(m + c).astype(m.dtype) for m, c in zip(mean, changes, strict=True)]


def _start(params: optax.Params, key: Array, probes: Probes, random: bool) -> optax.Updates:
    """Zeros, or Gaussians of norm 1, laid out as the parameters are."""
    if not random:
        return jax.tree.map(lambda p: jnp.zeros_like(p, wide_dtype(p)), params)
    leaves, treedef = jax.tree.flatten(params)
    parts = leaves_of(params, probes.matrix_axes, probes.trainable)
    noise = Direction(gaussian(), purpose_key(key, "policy start"), 0, parts)

    return treedef.unflatten([_unit(noise.of(i)) for i in range(len(leaves))])


def _from_first_batch(
    start: Start, step: Step, sign: Scalar, eps: Scalar
) -> Callable[[], list[Array]]:
    """What finds the mean from the first batch; a branch of a conditional."""
    value_fn, point = step.value_fn, step.tree(step.params)
    if step.recorded is not None:
        raise ValueError(f"a run with start={start!r} cannot be repeated from its losses alone")
    if start == "gradient" and value_fn is None:
        raise ValueError("start='gradient': got probe_fn, wanted value_fn: it needs whole trees")

    def gradient() -> list[Array]:
        assert value_fn is not None
        return [
            sign * finite_or_zero(widened(g)) for g in jax.tree.leaves(jax.grad(value_fn)(point))
        ]

    def estimate() -> list[Array]:
        # A step of its own: what is seen in a branch must not leave it.
        many = {"sampler": None, "num_directions": _START_DIRECTIONS, "engine": sequential()}
        probes = replace(step.probes, **many)
        loss = {"value_fn": value_fn, "probe_fn": step.probe_fn}
        own = Step(probes, gaussian(), step.state, point, eps=eps, **loss)
        own.key = purpose_key(step.key, "policy start")
        found, _ = own.combined(own.differences(eps))
        return [sign * _unit(g) for g in found]

    return gradient if start == "gradient" else estimate


def _unit(x: Array) -> Array:
    return frobenius_unit(x, range(x.ndim))
