"""The state of a warm-up that follows the loss, and how one loss changes it.

Scalars alone: what a transform does with the rate is its own matter (`adaptive_warmup`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxopt_lab.core.numerics import Scalar
from jaxopt_lab.schedules.gap_rate import Curvature, gap_rate, peak_gap_of, relative_rate
from jaxopt_lab.schedules.peak_gap import exact_where
from jaxopt_lab.schedules.target_estimate import (
    TargetEstimate,
    estimated_target,
    expected_target,
    with_loss,
)

# (whether to search, known peak gap, initial gap, kappa sigma, div_factor) -> peak gap
PeakGapSearch: TypeAlias = Callable[..., Array]
# (steps of the decay) -> schedule from 1 to 0 in the steps since the switch.
DecayFactory: TypeAlias = Callable[[Array], optax.Schedule]

SIGMA = 1e-3  # width parameter of the weight, the released default
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
    """The rule of a run: the arguments of `adaptive_warmup`, then what only parity sets."""

    peak_lr: Scalar
    total_steps: Scalar
    target_loss: Scalar | Literal["auto"]
    div_factor: Scalar
    decay: DecayFactory
    delta_star_rule: Literal["exact"] | Scalar = "exact"
    curvature: Curvature | None = None
    final_div_factor: Scalar = 1e4
    smoothing: Scalar = 0.0
    fallback_after: Scalar | None = None

    sigma: Scalar = SIGMA
    search: PeakGapSearch = exact_where
    first_step_at_peak: bool = False
    use_current_loss: bool = False  # a loss sets the rate of its own step

    @property
    def searches(self) -> bool:
        """Whether the peak gap is searched for, which takes a kappa."""
        return self.curvature is None and isinstance(self.delta_star_rule, str)

    def start(self) -> AdaptiveWarmupState:
        """The state before the first step."""
        dtype = jnp.result_type(float)
        first = self.peak_lr if self.first_step_at_peak else self.peak_lr / self.div_factor
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

    def step(self, state: AdaptiveWarmupState, loss: Array, kappa: Scalar) -> AdaptiveWarmupState:
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
        return initial_gap < SMALLEST_INITIAL_GAP if self.searches else initial_gap <= 0

    def _peak_gap(self, first: Array, state: AdaptiveWarmupState, kappa: Scalar) -> Array:
        if self.curvature is not None:
            return state.peak_gap
        wanted = first & ~self._too_close(state.initial_gap)
        if not isinstance(self.delta_star_rule, str):
            return jnp.where(wanted, self.delta_star_rule * state.initial_gap, state.peak_gap)
        return self.search(
            wanted, state.peak_gap, state.initial_gap, kappa * self.sigma, self.div_factor
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
