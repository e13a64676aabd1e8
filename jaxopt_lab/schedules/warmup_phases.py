"""The state of a warm-up that follows the loss, and how one loss changes it.

Scalars alone: what a transform does with the rate is its own matter (`adaptive_warmup`).
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.schedules.gap_rate import Curvature, gap_rate, peak_gap_of, relative_rate
from jaxopt_lab.schedules.peak_gap import (
    SMOOTH_OBJECTIVES,
    Objective,
    TargetShape,
    exact_peak_gap,
)
from jaxopt_lab.schedules.quadrature_peak_gap import quadrature_peak_gap
from jaxopt_lab.schedules.target_estimate import (
    TargetEstimate,
    estimated_target,
    expected_target,
    with_loss,
)

# "exact", "official", or the peak gap as a share of the initial one.
DeltaStarRule: TypeAlias = Literal["exact", "official"] | Scalar
# (steps of the decay) -> schedule from 1 to 0 in the steps since the switch.
DecayFactory: TypeAlias = Callable[[Array], optax.Schedule]

SMALLEST_GAP = 1e-8
# The candidates keep 0.01 from both ends, so a smaller initial gap leaves no room for them.
SMALLEST_INITIAL_GAP = 0.02


class AdaptiveWarmupState(NamedTuple):
    """State of `adaptive_warmup`: scalars, floats in JAX's default dtype."""

    count: Array  # shape=(), dtype=int32: steps taken
    rate: Array  # shape=(), float: learning rate of the next step (of this one: use_current_loss)
    gap: Array  # shape=(), float: smoothed loss above the target, at least 1e-8; inf: none seen yet
    initial_gap: Array  # shape=(), float: the first loss less the target; inf: none seen yet
    peak_gap: Array  # shape=(), float: gap at which the decay starts; 0: not known
    loss: Array  # shape=(), float: smoothed loss; 0 before the first
    switch_step: Array  # shape=(), dtype=int32: step whose loss started the decay; -1: none yet
    decay_from: Array  # shape=(), float: the rate the decay starts from
    ignored: Array  # shape=(), dtype=int32: losses that were not finite
    estimate: Any  # TargetEstimate of scalars for target_loss="auto", else MaskedNode


@dataclass(frozen=True)
class WarmupPhases:
    """The rule of a run; the arguments of `adaptive_warmup`, checked."""

    peak_lr: Scalar
    total_steps: Scalar
    target_loss: Scalar | Literal["auto"]
    div_factor: Scalar
    delta_star_rule: DeltaStarRule
    objective: Objective
    target: TargetShape
    sigma: Scalar
    curvature: Curvature | None
    decay: DecayFactory
    final_div_factor: Scalar
    smoothing: Scalar
    fallback_after: Scalar | None
    use_current_loss: bool
    official_first_step: bool

    def start(self) -> AdaptiveWarmupState:
        """The state before the first step."""
        dtype = jnp.result_type(float)
        first = self.peak_lr if self.official_first_step else self.peak_lr / self.div_factor
        known = 0.0 if self.curvature is None else peak_gap_of(self.curvature)
        return AdaptiveWarmupState(
            count=jnp.zeros([], jnp.int32),
            rate=jnp.asarray(first, dtype),
            gap=jnp.asarray(jnp.inf, dtype),
            initial_gap=jnp.asarray(jnp.inf, dtype),
            peak_gap=jnp.asarray(known, dtype),
            loss=jnp.zeros([], dtype),
            switch_step=jnp.full([], -1, jnp.int32),
            decay_from=jnp.asarray(self.peak_lr, dtype),
            ignored=jnp.zeros([], jnp.int32),
            estimate=self._start_estimate(dtype),
        )

    def absorb(self, state: AdaptiveWarmupState, loss: Array, kappa: Scalar) -> AdaptiveWarmupState:
        """The state after a step with this loss; a loss that is not finite only lets time pass."""
        loss = loss.astype(state.loss.dtype)
        finite = jnp.isfinite(loss)
        first = finite & ~jnp.isfinite(state.initial_gap)
        averaged = self.smoothing * state.loss + (1 - self.smoothing) * loss
        smoothed = jnp.where(first, loss, jnp.where(finite, averaged, state.loss))
        seen = state._replace(loss=smoothed, ignored=state.ignored + ~finite)
        if isinstance(self.target_loss, str):
            seen = self._estimated(first, finite, loss, seen)
            target = estimated_target(seen.estimate)
        else:
            target = self.target_loss
            seen = seen._replace(initial_gap=jnp.where(first, loss - target, state.initial_gap))
        gap = jnp.maximum(smoothed - target, SMALLEST_GAP)
        seen = seen._replace(gap=jnp.where(finite, gap, state.gap))
        seen = seen._replace(peak_gap=self._peak_gap(first, seen, kappa))
        seen = self._switched(finite, seen)
        follows = jnp.where(finite, self._warmup_rate(seen), state.rate)
        rate = jnp.where(seen.switch_step < 0, follows, self._decay_rate(seen))
        count = jnp.asarray(optax.safe_increment(state.count))
        return seen._replace(count=count, rate=rate.astype(state.rate.dtype))

    def _start_estimate(self, dtype: Any) -> Any:
        if not isinstance(self.target_loss, str):
            return optax.MaskedNode()
        return TargetEstimate(*(jnp.zeros([], dtype) for _ in TargetEstimate._fields))

    def _estimated(
        self, first: Array, finite: Array, loss: Array, state: AdaptiveWarmupState
    ) -> AdaptiveWarmupState:
        """The state with a target that knows one more loss; the gaps keep their proportion."""
        expected = expected_target(loss, self.total_steps)
        before = jax.tree.map(lambda a, b: jnp.where(first, a, b), expected, state.estimate)
        after = with_loss(before, loss, state.count, self.total_steps)
        estimate = jax.tree.map(lambda a, b: jnp.where(finite, a, b), after, state.estimate)
        initial = estimate.first_loss - estimated_target(estimate)
        initial = jnp.where(finite, initial, state.initial_gap)
        known = finite & ~first
        growth = jnp.where(known, initial / jnp.where(known, state.initial_gap, 1), 1)
        return state._replace(
            estimate=estimate, initial_gap=initial, peak_gap=growth * state.peak_gap
        )

    def _too_close(self, initial_gap: Array) -> Array:
        """Whether the first loss leaves nothing to warm up for."""
        if self.curvature is not None:
            return jnp.zeros([], bool)
        fraction = not isinstance(self.delta_star_rule, str)
        return initial_gap <= 0 if fraction else initial_gap < SMALLEST_INITIAL_GAP

    def _peak_gap(self, first: Array, state: AdaptiveWarmupState, kappa: Scalar) -> Array:
        if self.curvature is not None:
            return state.peak_gap
        wanted = first & ~self._too_close(state.initial_gap)
        if not isinstance(self.delta_star_rule, str):
            return jnp.where(wanted, self.delta_star_rule * state.initial_gap, state.peak_gap)
        return _searched_where(
            wanted,
            state.peak_gap,
            state.initial_gap,
            kappa * self.sigma,
            self.div_factor,
            self.peak_lr,
            rule=self.delta_star_rule,
            objective=self.objective,
            target=self.target,
        )

    def _switched(self, finite: Array, state: AdaptiveWarmupState) -> AdaptiveWarmupState:
        warming = finite & (state.switch_step < 0)
        reached = warming & ((state.gap <= state.peak_gap) | self._too_close(state.initial_gap))
        late = jnp.zeros([], bool)
        if self.fallback_after is not None:
            late = warming & ~reached & (state.count + 1 >= self.fallback_after * self.total_steps)
        decay_from = jnp.where(reached, self._peak_rate(), state.decay_from)
        return state._replace(
            switch_step=jnp.where(reached | late, state.count, state.switch_step),
            decay_from=jnp.where(late, state.rate, decay_from).astype(state.rate.dtype),
        )

    def _peak_rate(self) -> Array:
        if self.curvature is None:
            return jnp.asarray(self.peak_lr)
        peak = gap_rate(jnp.maximum(peak_gap_of(self.curvature), SMALLEST_GAP), self.curvature)
        return jnp.minimum(peak, self.peak_lr)

    def _warmup_rate(self, state: AdaptiveWarmupState) -> Array:
        if self.curvature is not None:
            return jnp.clip(gap_rate(state.gap, self.curvature), 0, self.peak_lr)
        share = relative_rate(state.gap, state.initial_gap, state.peak_gap, self.div_factor)
        return self.peak_lr * jnp.clip(share, 0, 1)

    def _decay_rate(self, state: AdaptiveWarmupState) -> Array:
        horizon = jnp.maximum(self.total_steps - state.switch_step, 1).astype(state.rate.dtype)
        step = state.count if self.use_current_loss else state.count + 1
        # Training beyond the last step keeps the last rate.
        share = self.decay(horizon)(jnp.minimum(step - state.switch_step, horizon))
        floor = jnp.minimum(self.peak_lr / self.final_div_factor, state.decay_from)
        return floor + (state.decay_from - floor) * share


def official_cosine(horizon: Array) -> optax.Schedule:
    """Half a cosine that is one step ahead, as in the released code.

    The first step of the decay stands at 2/N of it and the last at 1, because a one-cycle schedule
    without warm-up is advanced twice at the switch.
    """
    # A squared sine keeps the precision that 1 + cos loses near the end.
    return lambda step: jnp.square(jnp.sin(jnp.pi / 2 * ((horizon - step - 1) / horizon)))


# Compiled once for all: outside `jit` every loop would be compiled anew.
@functools.partial(jax.jit, static_argnames=("rule", "objective", "target"))
def _searched_where(
    wanted: Array,
    known: Array,
    initial_gap: Array,
    kappa_sigma: Array,
    div_factor: Array,
    peak_lr: Array,
    *,
    rule: str,
    objective: Objective,
    target: TargetShape,
) -> Array:
    """The peak gap of a search where one is wanted, else the one that is known."""
    # Piecewise constant in everything, so there is no derivative to take.
    given = jax.lax.stop_gradient((initial_gap, kappa_sigma, div_factor, peak_lr))

    def at_once(wanted: Array, known: Array, numbers: tuple[Array, ...]) -> Array:
        gap, sharpness, div, _ = numbers
        found = exact_peak_gap(gap, sharpness, div, objective, target, chunk=None)
        return jnp.where(wanted, found.astype(known.dtype), known)

    def if_wanted(wanted: Array, known: Array, numbers: tuple[Array, ...]) -> Array:
        def search(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            # Tied to the carry, or the compiler moves the search out of the loop and always runs
            # it.
            tied, _ = jax.lax.optimization_barrier((numbers, carry))
            if rule == "exact":
                gap, sharpness, div, _ = tied
                found = exact_peak_gap(gap, sharpness, div, objective, target)
            else:
                found = _on_host(tied, objective, target)
            return jnp.zeros_like(carry[0]), found.astype(known.dtype)

        # A loop of one pass rather than a cond: when runs are vmapped a cond becomes a select and
        # would search at every step, a loop runs while there is a run that wants it.
        return jax.lax.while_loop(lambda carry: carry[0], search, (wanted, known))[1]

    if rule != "exact" or objective not in SMOOTH_OBJECTIVES:
        return if_wanted(wanted, known, given)
    # On a GPU the host reads the predicate of a loop, at every step, and so waits for all that was
    # dispatched before. There the search itself is a few small kernels; on a CPU it takes longer
    # than many a step.
    return jax.lax.platform_dependent(
        wanted, known, given, cuda=at_once, rocm=at_once, default=if_wanted
    )


def _on_host(numbers: tuple[Array, ...], objective: Objective, target: TargetShape) -> Array:
    dtype, thread = numbers[0].dtype, _ieee_thread()

    def search(*numbers: Array) -> np.ndarray:
        gap, sharpness, div, peak = map(float, numbers)
        task = thread.submit(quadrature_peak_gap, gap, sharpness, div, peak, objective, target)
        return np.asarray(task.result(), dtype)

    result = jax.ShapeDtypeStruct((), dtype)
    return jax.pure_callback(search, result, *numbers, vmap_method="sequential")


@functools.cache
def _ieee_thread() -> ThreadPoolExecutor:
    """A thread with denormal numbers.

    XLA flushes them to zero wherever it computes, callbacks included, but the released integrals of
    narrow weights hang on them. A thread inherits this from the one that starts it: start it here,
    while a program is being traced.
    """
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="peak-gap")
    thread.submit(lambda: None).result()
    return thread
