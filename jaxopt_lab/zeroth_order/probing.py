"""One step of a zero-order method: losses at perturbed parameters, and sums of directions."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr
from jaxtyping import Array

from jaxopt_lab.core.numerics import perturbed, widened
from jaxopt_lab.optim.routing import float_leaves
from jaxopt_lab.zeroth_order.directions import Direction, Sampler, leaves_of, spread_like
from jaxopt_lab.zeroth_order.layerwise import ProbeFn, check_probe_fn
from jaxopt_lab.zeroth_order.losses import ValueFn, check_value_fn
from jaxopt_lab.zeroth_order.probes import Draws, Probes, ProbeState


def transformation(
    probes: Probes,
    sampler: Sampler,
    eps: Any,
    init: Callable[[optax.Params], Any],
    update: Callable[..., tuple[optax.Updates, Any]],
    *,
    whole_trees: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A transformation from what it does with a step.

    Args:
      probes: The options.
      sampler: Of the directions.
      eps: Size of the perturbations; None: there are none.
      init: From parameters to the state, which is a `ProbeState` or has one as field `probes`.
      update: (step, state, other extra arguments) -> (updates, state).
      whole_trees: Name of a method that evaluates losses of whole trees only; None: it may perturb
        layer by layer.
    """

    def run(
        updates, state, params=None, *, value_fn=None, probe_fn=None, draws=None, losses=None,
        **extra_args,
    ):  # fmt: skip
        del updates
        if whole_trees and probe_fn is not None:
            raise ValueError(f"{whole_trees}: got probe_fn, wanted value_fn: it needs whole trees")
        known = state if isinstance(state, ProbeState) else state.probes
        step = Step(
            *(probes, sampler, known, params),
            eps=eps,
            value_fn=value_fn,
            probe_fn=probe_fn,
            draws=draws,
            losses=losses,
        )
        return update(step, state, extra_args)

    start: Any = init  # its argument may have any name
    return optax.GradientTransformationExtraArgs(start, run)


class Step:
    """The probes of one step, at one point. Losses that are seen are kept for the next state."""

    def __init__(
        self,
        probes: Probes,
        sampler: Sampler,
        state: ProbeState,
        params: optax.Params | None,
        *,
        eps: Any,
        value_fn: ValueFn | None,
        probe_fn: ProbeFn | None = None,
        draws: Any = None,
        losses: Array | None = None,
    ) -> None:
        """Checks what was passed to `update`.

        Args:
          probes: The options.
          sampler: Of the directions.
          state: The state before the step.
          params: The point.
          eps: Size of the perturbations.
          value_fn: The loss.
          probe_fn: The loss as a function that perturbs its layers itself, in place of `value_fn`.
          draws: `Draws`, or a tree: the directions.
          losses: Recorded ones, to take instead of evaluating.
        """
        if value_fn is not None and probe_fn is not None:
            raise ValueError("got both value_fn and probe_fn, wanted one of them")
        losses = None if losses is None else jnp.asarray(losses)
        if params is None or (losses is None and probe_fn is None):
            check_value_fn(value_fn, params, eps)
        elif losses is not None and losses.shape != state.losses.shape:
            raise ValueError(f"losses: got shape {losses.shape}, wanted {state.losses.shape}")
        assert params is not None
        params = float_leaves(params)
        self.params, self._treedef = jax.tree.flatten(params)
        self.leaves = leaves_of(params, probes.matrix_axes, probes.trainable)
        if probe_fn is not None:
            check_probe_fn(probe_fn, params, self.leaves, sampler, eps)
        self.draws = draws if isinstance(draws, Draws) or draws is None else Draws(draws)
        key = jax.random.wrap_key_data(state.key, impl="threefry2x32")
        self.key = jax.random.fold_in(key, state.count)
        self.probes, self.state, self._sampler = probes, state, sampler
        self.num_directions = probes.num_directions
        self.value_fn, self.probe_fn, self.recorded = value_fn, probe_fn, losses
        self._seen: list[Array] = []

    def tree(self, arrays: Sequence[Array]) -> optax.Params:
        """A tree like the parameters, in their dtypes."""
        cast = [x.astype(p.dtype) for x, p in zip(arrays, self.params, strict=True)]
        return self._treedef.unflatten(cast)

    def flat(self, tree: Any) -> list[Any]:
        """One entry a leaf of a tree like the parameters, whose entries may be trees."""
        return self._treedef.flatten_up_to(tree)

    def given(self, purpose: str) -> list[Array] | None:
        """The draws for a purpose, (probes, *shape) a leaf; None: sample."""
        if self.draws is None:
            return None
        tree = getattr(self.draws, purpose)
        tree = self.draws.evaluation if tree is None else tree
        leaves = self.flat(tree)
        for leaf, z in zip(self.leaves, leaves, strict=True):
            if tuple(z.shape) != (wanted := (self.num_directions, *leaf.shape)):
                raise ValueError(
                    f"draws.{purpose} of leaf {keystr(leaf.path)}: got {z.shape}, wanted {wanted}"
                )
        return leaves

    def direction(
        self,
        probe: Array | int,
        purpose: str = "evaluation",
        *,
        mean: Sequence[Array] | None = None,
        std: Any = 1.0,
        key: Array | None = None,
    ) -> Direction:
        """The direction of a probe.

        Args:
          probe: Its number.
          purpose: A field of `Draws`.
          mean: Of the policy, one array a leaf.
          std: Of the policy.
          key: The key of the step, where it has passed a barrier.
        """
        return Direction(
            self._sampler,
            self.key if key is None else key,
            probe,
            self.leaves,
            mean=mean,
            std=std,
            given=self.given(purpose),
        )

    def apart(self, *numbers: Array) -> tuple[Array, ...]:
        """The key of the step, and numbers, as XLA knows nothing of elsewhere.

        It would draw before a loop where the draw is the same in all of its rounds, or once for
        evaluation and update together, and keep the direction whole.
        """
        data = jax.random.key_data(self.key)
        data, *apart = jax.lax.optimization_barrier((data, *numbers))
        return jax.random.wrap_key_data(data, impl="threefry2x32"), *apart

    def losses(
        self,
        probe: Array,
        scale: Array,
        *,
        sides: int = 1,
        direction: Callable[..., Direction] | None = None,
    ) -> Array:
        """Losses at `params + scale * direction(probe)`, for (n,) probes and scales.

        Args:
          probe: Numbers of probes.
          scale: Of their directions.
          sides: Losses a direction, for the size of chunks.
          direction: From a probe, and a `key` of the step, to its direction; None: `direction`.
        """
        loss, engine = self._loss(direction), self.probes.engine

        def evaluate() -> Array:
            if self.probe_fn is None or not engine.both_sides:
                return engine.map(loss, probe, scale, sides=sides)
            # The scales of a direction in one loop over layers, which draws once.
            return engine.map(loss, probe[::sides], scale.reshape(-1, sides)).reshape(-1)

        return self.seen(probe.size, evaluate)

    def losses_in_turn(
        self,
        size: int,
        row: Callable[[Array, Array], tuple[Array, Array]],
        *,
        direction: Callable[..., Direction],
    ) -> Array:
        """(size,) losses, one after the other, each of a probe that those before it may choose.

        One loop: the loss is compiled once.

        Args:
          size: How many.
          row: From the losses so far, (size,) with 0 for what is to come, and the number of the
            next one to its probe and scale.
          direction: As for `losses`.
        """
        loss, dtype = self._loss(direction), self.state.losses.dtype

        def add(losses: Array, number: Array) -> tuple[Array, None]:
            return losses.at[number].set(loss(*row(losses, number)).astype(dtype)), None

        def evaluate() -> Array:
            return jax.lax.scan(add, jnp.zeros(size, dtype), jnp.arange(size))[0]

        return self.seen(size, evaluate)

    def _loss(self, direction: Callable[..., Direction] | None) -> Callable[[Array, Array], Array]:
        """From a probe and a scale, or the scales of both sides, to the loss."""
        drawn = self.direction if direction is None else direction
        point = self.tree(self.params)

        def loss(probe: Array, scale: Array) -> Array:
            key, probe, scale = self.apart(probe, scale)
            along = drawn(probe, key=key)
            if self.probe_fn is not None:
                layerwise: Any = functools.partial(self.probe_fn, point, along)
                return widened(jax.vmap(layerwise)(scale) if scale.ndim else layerwise(scale))
            assert self.value_fn is not None
            return widened(self.value_fn(self.perturbed(along, scale)))

        return loss

    def seen(self, size: int, evaluate: Any) -> Array:
        """`size` numbers from `evaluate`, or the next recorded ones; kept for the state."""
        if self.recorded is None:
            found = evaluate()
        else:
            start = sum(x.size for x in self._seen)
            found = self.recorded[start : start + size]
        self._seen.append(found.astype(self.state.losses.dtype))
        return found

    def perturbed(self, direction: Direction, scale: Array) -> optax.Params:
        """`params + scale * direction`, computed in float32 or wider."""
        moved = [
            perturbed(x, scale, direction.of(i)) if leaf.moves else x
            for i, (x, leaf) in enumerate(zip(self.params, self.leaves, strict=True))
        ]
        return self.tree(moved)

    def differences(self, eps: Any, direction: Callable[..., Direction] | None = None) -> Array:
        """(directions,) finite differences along them, 0 where one is not a finite number."""
        return finite_or_zero(self.raw_differences(eps, direction))

    def raw_differences(self, eps: Any, direction: Callable[..., Direction] | None = None) -> Array:
        """(directions,) finite differences along them, whatever they are."""
        q, probes = self.probes.num_directions, jnp.arange(self.probes.num_directions)
        if self.probes.two_sided:
            scale = jnp.tile(eps * jnp.array([1.0, -1.0]), q)
            plus, minus = (
                self.losses(jnp.repeat(probes, 2), scale, sides=2, direction=direction)
                .reshape(q, 2)
                .T
            )
            return (plus - minus) / (2 * eps)
        # The loss in the middle is one more row, at a distance of 0.
        scale = eps * jnp.minimum(jnp.arange(q + 1), 1.0)
        middle, *_ = found = self.losses(
            jnp.concatenate([probes[:1], probes]), scale, direction=direction
        )
        return (found[1:] - middle) / eps

    def combined(
        self,
        weights: Array,
        probes: Array | None = None,
        direction: Callable[..., Direction] | None = None,
        known: Array | None = None,
    ) -> tuple[list[Array], list[Array | None]]:
        """The sum of weighted directions, and the union of their supports, one a leaf.

        Args:
          weights: (n,) of the directions.
          probes: (n,) their numbers; None: 0, 1, ...
          direction: From a probe to its direction; None: `direction`, for the update.
          known: (n,) which of them the supports are of; None: all.
        """
        numbers = jnp.arange(weights.size) if probes is None else probes
        drawn = direction or (lambda probe: self.direction(probe, "update"))
        indices = range(len(self.leaves))
        factored = range(0)
        if direction is None and self.draws is None and self._sampler.factors is not None:
            factored = [i for i in indices if self.leaves[i].has_matrices]

        def term(weight: Array, probe: Array, *known: Array) -> tuple[list[Any], list[Any]]:
            one = drawn(probe)
            sums = [
                None if i in factored else weight.astype(x.dtype) * one.of(i)
                for i, x in enumerate(one.leaves)
            ]
            supports = [one.support_of(i) for i in indices]
            for good in known:
                supports = [good if drawn is None else good & drawn for drawn in supports]
            return sums, supports

        columns = (weights, numbers) if known is None else (weights, numbers, known)
        sums, supports = summed(term, *columns)
        for i in factored:
            sums[i] = self._factored_sum(i, weights, numbers)
        return sums, supports

    def _factored_sum(self, number: int, weights: Array, probes: Array) -> Array:
        """The sum of weighted directions that have factors: one product of depth probes x rank."""
        leaf = self.leaves[number]

        def total(data: Array, weights: Array, probes: Array) -> Array:
            key = jax.random.wrap_key_data(data, impl="threefry2x32")

            def factors(probe: Array) -> Any:
                return self.direction(probe, key=key).factors_of(number)

            a, b = jax.vmap(factors)(probes)
            a = a * weights.astype(a.dtype).reshape(-1, *(1,) * (a.ndim - 1))
            highest = jax.lax.Precision.HIGHEST
            return leaf.arranged(jnp.einsum("q...nr,q...mr->...nm", a, b, precision=highest))

        return spread_like(leaf, total, jax.random.key_data(self.key), weights, probes)

    def next_state(self) -> ProbeState:
        """The state after the step."""
        losses = jnp.concatenate(self._seen)
        bad = jnp.sum(~jnp.isfinite(losses), dtype=jnp.int32)
        count: Any = optax.safe_increment(self.state.count)
        return ProbeState(count, self.state.key, losses, self.state.notfinite_count + bad)


# A sum of so many draws is one expression, which XLA computes entry by entry where it is used; a
# loop over more keeps the sum, an array of the size of the parameters.
_FUSED = 8


def summed(term: Callable[..., Any], *columns: Array) -> Any:
    """The sum of `term` over rows, one after the other, of numbers; of bools, the union.

    Args:
      term: From one row to a tree.
      *columns: (rows,) each.
    """
    rows = columns[0].size

    def add(total: Any, row: Any) -> tuple[Any, None]:
        return jax.tree.map(
            lambda a, b: a | b if a.dtype == bool else a + b, total, term(*row)
        ), None

    if rows <= _FUSED:
        total = term(*(x[0] for x in columns))
        for i in range(1, rows):
            total, _ = add(total, tuple(x[i] for x in columns))
        return total
    abstract = jax.eval_shape(term, *(x[0] for x in columns))
    zeros = jax.tree.map(jnp.zeros_like, abstract)
    return jax.lax.scan(add, zeros, columns)[0]


def finite_or_zero(x: Array) -> Array:
    """`x`, with 0 for what is not finite: such a probe does not count in an average."""
    return jnp.where(jnp.isfinite(x), x, 0)
